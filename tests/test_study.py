"""A study is a file: what it may hold, down to the report, and what a wrong one is told."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from evaluators import EVALUATORS, columns_of, evaluator_named, evaluator_of
from evaluators.base import judge_images
from grid.plan import build_plan
from grid.report.build import write_report
from grid.report.claims import judge_claims
from grid.report.tables import tables_of
from grid.report.verdicts import Verdicts
from grid.study import load_study
from tests.made_up import record
from tests.paper import BASES, resnet50
from tests.test_run import refusal
from trainables.networks import build_classifier
from trainables.scale import DIGITS, IMAGENET

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "study.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
OWN, GRID_OF_PAGE, CHANGED, *_ = BLOCKS

SECOND = """[[tables]]
name = "A1"
question = "?"
columns = ["clean"]
rows = [{ label = "ReLU", base = "resnet50" }]
"""
GELU = '{ label = "GELU", base = "resnet50", activation = "gelu" }'
CLAIM = """[[claims]]
says = "It is well calibrated"
test = "ahead"
row = "A1/ReLU"
of = "A1/GELU"
column = "calibration/ece"
"""


def write(folder, text, name="study.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def refused(capsys, folder, text):
    """Return what the command says of a study's file as it ends with 2, before any compute."""
    message = refusal(capsys, "--study", write(folder, text), "--results", str(folder / "results"))
    assert not (folder / "results").exists()
    return message


def test_a_users_tables_figures_and_claims_are_in_the_report(tmp_path):
    """The page's example, from the file to the rendered report, with verdicts drawn at random."""
    study = load_study(write(tmp_path, OWN))
    plan = build_plan(study, DIGITS)
    # Three trainings of the row that the headline is about, one of "GELU, cosine".
    assert [trial.recipe.activation for trial in plan].count("gelu") == DIGITS.headline_seeds + 1
    tracker = record(tmp_path / "results", study, plan)
    page = write_report(tracker, study, plan, DIGITS, tmp_path / "report").read_text()
    assert "<title>Does GELU help a CNN on clean images?" in page
    assert "A1: ReLU or GELU" in page
    # Ours minus the published figure is said of the paper's own data alone.
    assert 'data-tip="the notebook of a colleague">77.1 published</span>' in page
    assert re.search(
        r"GELU and ReLU are level on clean images: <span class=\"decision [a-z-]+\"", page
    )
    # The published difference: 77.1 - 76.9.
    assert '<span class="published">+0.2 published</span>' in page
    assert re.search(r"Here, each comparison by itself, GELU is .* on clean images \([+-]", page)
    assert "Of 1 claims of the study, decided together: 1 " in page
    assert "Transformer" not in page
    values = (tmp_path / "report" / "tables.md").read_text()
    assert f"| ReLU {plan.tables[0].rows[0].recipe.digest()[:6]} | " in values
    assert " | 76.9 |" in values


def test_the_pages_grid_is_a_sample_of_what_can_be(tmp_path):
    plan = build_plan(load_study(write(tmp_path, GRID_OF_PAGE)), DIGITS)
    assert len(plan.trials) == 24
    pairs = {(labels["base"], labels["optimizer"]) for labels in plan.grid.values()}
    assert pairs >= {("deit_small", "adamw"), ("resnet50", "lamb")}
    assert ("resnet50", "adamw") not in pairs
    decayed = {t.recipe.optimizer for t in plan if t.recipe.layer_decay}
    assert decayed == {"adamw", "lamb"}


def test_the_pages_change_of_the_papers_study_has_the_rows_that_it_says(tmp_path):
    study = load_study(write(tmp_path, CHANGED))
    (table,) = study.tables
    epochs = {row.label: row.recipe.epochs for row in table.rows}
    assert epochs == {
        "ResNet-50*, teacher DeiT-S": 100,
        "DeiT-S, teacher ResNet-50*": 300,
        "DeiT-S, no teacher": 100,
    }
    assert "DeiT-S, teacher ResNet-50*" not in {label for label, _ in table.published}


def test_a_claim_about_a_score_that_the_data_lack_cannot_be_judged(tmp_path):
    text = OWN.replace('"pgd-10"]', '"natural-1000"]')
    text = text.replace('column = "clean"', 'column = "natural-1000"')
    study = load_study(write(tmp_path, text))
    plan = build_plan(study, DIGITS)
    tables = tables_of(study, plan, {})
    (judgement,) = judge_claims(study.claims, tables, Verdicts(None, {}))
    assert (judgement.decision, judgement.outcome[:10]) == ("cannot be judged", "these data")


GRID = """
name = "activation"
base = "resnet50"
[set]
micro_batch = 64
label_smoothing = 0.3
[axes]
family = ["resnet", "deit"]
augmentation = ["none", "randaug+mixup+cutmix"]
"""


def test_a_files_settings_win_over_what_its_axes_bring(tmp_path):
    plan = build_plan(load_study(write(tmp_path, GRID)), IMAGENET)
    assert len(plan.trials) == 4
    assert {(t.recipe.micro_batch, t.recipe.label_smoothing) for t in plan} == {(64, 0.3)}
    assert {trial.evaluators for trial in plan} == {("clean", "pgd")}
    # Other fields still come with the family.
    batches = {(trial.recipe.family, trial.recipe.batch_size) for trial in plan}
    assert batches == {("resnet", 256), ("deit", 2048)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[set]\nfamily = "deit"', "family=deit is set for every trial, and the study varies fam"),
        ('[set]\nmodel = "resnet18"', "and the study varies family (resnet, deit): both choose"),
        ('[set]\nprecision = "bf17"', "precision: Input should be 'float32', 'bf16' or 'fp16'"),
        ('[set]\nsize = "tiny"', "family 'resnet' has no size 'tiny'"),
        ("[set]\ncurriculum = [{}]", "curriculum.0.epoch: Field required"),
    ],
)
def test_settings_that_no_trial_can_have_are_refused(tmp_path, line, message):
    text = GRID.replace("[set]", line)
    with pytest.raises(ValueError, match=re.escape(message)):
        build_plan(load_study(write(tmp_path, text)), DIGITS)


def test_a_study_may_have_bases_and_a_curriculum_of_its_own(tmp_path):
    fields = 'optimizer="sgd"\nlearning_rate=0.1\nweight_decay=0.0\nbatch_size=64\nepochs=3'
    base = f'[bases.mine]\nmodel="resnet18"\nscheduler="step"\naugmentation="cutmix"\n{fields}\n'
    path = write(tmp_path, f'name="s"\nextends=""\nbase="mine"\n{base}')
    (trial,) = build_plan(load_study(path), IMAGENET)
    assert (trial.recipe.augmentations, trial.recipe.label_smoothing) == (("cutmix",), 0.1)
    above = write(tmp_path, 'name="t"\nextends="study.toml"\nbase="mine"\n', "other.toml")
    assert load_study(above).base == load_study(path).base
    with pytest.raises(ValueError, match=r"unknown base 'resnet50'; one of mine$"):
        load_study(write(tmp_path, f'name="s"\nextends=""\nbase="resnet50"\n{base}'))
    row = "randaug_magnitude=4, mix_probability=0.5, cutmix_alpha=1.0, switch_probability=0.5"
    text = f'name="c"\nbase="deit_small"\n[set]\ncurriculum=[{{epoch=0, {row}}}]\n'
    (trial,) = build_plan(load_study(write(tmp_path, text)), IMAGENET)
    assert [row.randaug_magnitude for row in trial.recipe.curriculum] == [4]


def test_a_base_may_change_one_of_its_name_and_be_a_teacher(tmp_path):
    text = """name = "s"
    base = "student"
    [bases.resnet50]
    extends = "resnet50"
    epochs = 30
    [bases.student]
    extends = "deit_small"
    teacher = "resnet50"
    """
    study = load_study(write(tmp_path, text))
    assert study.base["student"].teacher == resnet50().replace(epochs=30)
    assert study.bases.keys() == {*BASES, "student"}


def test_a_claim_of_a_score_that_is_no_mean_over_images_is_refused(capsys, tmp_path):
    text = (
        'name = "mine"\n'
        + SECOND.replace("clean", "calibration/ece").replace(" }]", f" }}, {GELU}]")
        + CLAIM
    )
    said = refused(capsys, tmp_path, text)
    assert (
        "calibration/ece is no mean over images, and claims compare models image by image" in said
    )


def test_a_grid_may_stand_beside_tables(tmp_path):
    text = OWN.replace('name = "gelu"', 'name = "gelu"\nbase = "resnet50"\nevaluators = ["clean"]')
    plan = build_plan(load_study(write(tmp_path, text + "[axes]\nepochs = [100, 50]\n")), DIGITS)
    assert {trial.recipe.epochs for trial in plan} == {10, 5}
    # The base is the table's first row as well. Two rows have more seeds, for the headline.
    assert len(plan.trials) == 4 + 2 * (DIGITS.headline_seeds - 1)


EXTENSION = """name = "longer"
extends = "study.toml"
drop = ["A1/GELU, cosine"]
[bases.resnet50]
extends = "resnet50"
epochs = 7
[[tables]]
name = "A1"
rows = [
    { label = "GELU", epochs = 300 },
    { label = "SiLU", base = "smooth", activation = "silu" },
    { label = "Short", base = "resnet50" },
]
[[tables.published]]
source = "another colleague"
columns = ["clean"]
figures = { "SiLU" = [77.5] }
[[tables]]
name = "A2"
question = "Again"
columns = ["clean"]
rows = [{ label = "ReLU", base = "resnet50" }]
[[claims]]
says = "SiLU is ahead of ReLU"
test = "ahead"
row = "A1/SiLU"
of = "A1/ReLU"
column = "clean"
"""


def extended(folder, text=EXTENSION):
    write(folder, OWN)
    return load_study(write(folder, text, "longer.toml"))


def test_a_study_that_extends_another_changes_adds_and_drops_rows_and_tables(tmp_path):
    study = extended(tmp_path)
    assert (study.name, study.title) == ("longer", "Does GELU help a CNN on clean images?")
    assert [table.name for table in study.tables] == ["A1", "A2"]
    table, _ = study.tables
    assert (table.question, table.columns) == ("ReLU or GELU", ("clean", "pgd-10"))
    by_label = {row.label: row.recipe for row in table.rows}
    assert list(by_label) == ["ReLU", "GELU", "SiLU", "Short"]
    # A base that the file changes is that of its own rows; inherited rows stay as they were.
    assert [recipe.epochs for recipe in by_label.values()] == [100, 300, 100, 7]
    assert [r.activation for r in by_label.values()] == ["relu", "gelu", "silu", "relu"]
    # GELU is another training than the one that was published.
    assert {cell: value for cell, (value, _) in table.published.items()} == {
        ("ReLU", "clean"): 76.9,
        ("SiLU", "clean"): 77.5,
    }
    assert [claim.says for claim in study.claims] == [
        "GELU and ReLU are level on clean images",
        "SiLU is ahead of ReLU",
    ]


def test_a_claim_of_a_dropped_row_goes_with_it_and_one_that_is_stated_again_replaces(tmp_path):
    text = 'name = "s"\nextends = "study.toml"\ndrop = ["A1/GELU"]\n'
    assert extended(tmp_path, text).claims == ()
    ahead = OWN[OWN.index("[[claims]]") :].replace('"level"', '"ahead"')
    text = f'name = "s"\nextends = "study.toml"\n{ahead}'
    assert [claim.test for claim in extended(tmp_path, text).claims] == ["ahead"]


def test_a_published_difference_of_a_changed_row_is_not_inherited(tmp_path):
    claim = 'says = "SiLU is ahead of ReLU"\npublished = 1.5'
    extended(tmp_path, EXTENSION.replace('says = "SiLU is ahead of ReLU"', claim))
    text = 'name = "s"\nextends = "longer.toml"\n'
    changed = '[[tables]]\nname = "A1"\nrows = [{ label = "SiLU", epochs = 3 }]\n'
    for more, published in (("", 1.5), (changed, None)):
        *_, claim = load_study(write(tmp_path, text + more, "s.toml")).claims
        assert (claim.says, claim.published) == ("SiLU is ahead of ReLU", published)


def test_a_study_may_take_all_but_the_tables_of_another(tmp_path):
    grid = 'base = "smooth"\n[axes]\nepochs = [3, 4]\n'
    study = extended(tmp_path, f'name = "s"\nextends = "study.toml"\ndrop = ["*"]\n{grid}')
    assert (study.tables, study.claims, len(build_plan(study, IMAGENET).trials)) == ((), (), 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["A1/GELU, cosine"]', '["A1/GELUU"]', "drop: unknown table or row 'A1/GELUU'; one of A1"),
        ('label = "SiLU", base', 'label = "GELU", base', "tables.0: row 'GELU' is there twice"),
        ('name = "A2"', 'name = "A1"', "table 'A1' is there twice"),
        ('"GELU", epochs = 300', '"GELU", epocs = 300', "row 'GELU': unknown axis 'epocs'"),
        ('name = "longer"', "", "name: Field required"),
        ('extends = "study.toml"', "", "state which one this `extends`"),
        ('extends = "study.toml"', 'extends = "longer.toml"', "longer.toml extends itself"),
        ('row = "A1/SiLU"', 'row = "A1/GELU, cosine"', "unknown row 'GELU, cosine'; one of ReLU"),
    ],
)
def test_a_wrong_extension_is_refused(tmp_path, old, new, message):
    assert EXTENSION.count(old) == 1
    text = EXTENSION.replace(old, new)
    if "state" in message:
        text = text.replace('    { label = "GELU", epochs = 300 },\n', "")
        text = text.replace("smooth", "resnet50").replace('"A1/ReLU"', '"A1/Short"')
        text = text.replace('name = "A1"', 'name = "A1"\nquestion = "?"\ncolumns = ["clean"]')
    with pytest.raises(ValueError, match=re.escape(message)):
        extended(tmp_path, text)


RELATIVES = """name = "s"
[bases.tiny]
extends = "deit_small"
model = "timm:convnext_tiny"
model_args = { depths = [3, 3, 9, 3], kernel_sizes = 7 }
warm_start = "deit_small"
[relatives."timm:convnext_tiny"]
model = "timm:convnext_atto"
model_args = { depths = [1, 1, 1, 1] }
[relatives."timm:vit_base_patch16_224.augreg_in1k"]
model = "timm:vit_tiny_patch16_224"
base = "deit_small"
[[tables]]
name = "A1"
question = "Whom"
columns = ["clean"]
rows = [
    { label = "ConvNeXt", base = "tiny", epochs = 50 },
    { label = "ViT", weights = "timm:vit_base_patch16_224.augreg_in1k" },
]
"""


def test_a_relative_stands_for_a_model_only_where_models_are_cut_down(tmp_path):
    study = load_study(write(tmp_path, RELATIVES))
    (table,) = build_plan(study, IMAGENET).tables
    assert [row.recipe.model for row in table.rows] == [
        "timm:convnext_tiny",
        "timm:vit_base_patch16_224.augreg_in1k",
    ]
    assert table.question == "Whom"
    plan = build_plan(study.model_copy(update={"settings": {"precision": "bf16"}}), DIGITS)
    convnext, vit = (row.recipe for row in plan.tables[0].rows)
    assert (convnext.model, convnext.epochs) == ("timm:convnext_atto", 5)
    assert convnext.model_args == {"depths": (1, 1, 1, 1), "kernel_sizes": 7}
    # Weights of a whole model: the relative is trained by its base, and as every trial.
    assert (vit.model, vit.epochs, vit.init) == ("timm:vit_tiny_patch16_224", 10, "")
    assert (vit.precision, vit.learning_rate) == ("bf16", 2e-3)
    assert "timm:convnext_atto for timm:convnext_tiny, " in plan.tables[0].question


def test_a_relative_stands_for_a_teacher_and_in_a_grid(tmp_path):
    grid = """base = "student"
    [bases.student]
    extends = "deit_small"
    teacher = "resnet50"
    [axes]
    model = ["timm:convnext_tiny", "deit_small"]
    [relatives.resnet50]
    model = "resnet18"
    [relatives."timm:convnext_tiny"]
    model = "timm:convnext_atto"
    """
    plan = build_plan(load_study(write(tmp_path, f'name = "s"\n{grid}')), DIGITS)
    models = {"timm:convnext_atto", "deit_small", "resnet18"}
    assert {trial.recipe.model for trial in plan} == models


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('base = "deit_small"\n[[', "[[", "give the relative of timm:vit_base_patch16_224.augreg"),
        ('"timm:convnext_atto"', '"resnet18"', "resnet18 is not of the kind of timm:convnext_tiny"),
        ('augreg_in1k"]', 'augreg"]', "relatives: unknown model of the study 'timm:vit_base_pat"),
    ],
)
def test_a_relative_that_stands_for_nothing_or_has_no_training_is_refused(
    tmp_path, old, new, message
):
    assert old in RELATIVES
    with pytest.raises(ValueError, match=re.escape(message)):
        build_plan(load_study(write(tmp_path, RELATIVES.replace(old, new))), DIGITS)


def test_one_relative_for_two_rows_that_are_else_alike_is_refused(tmp_path):
    text = RELATIVES.replace(
        '{ label = "ViT", weights = "timm:vit_base_patch16_224.augreg_in1k" }',
        '{ label = "ConvNeXt-S", base = "tiny", model = "timm:convnext_small", epochs = 50 }',
    ).replace('"timm:vit_base_patch16_224.augreg_in1k"', '"timm:convnext_small"')
    text = text.replace('"timm:vit_tiny_patch16_224"\nbase = "deit_small"', '"timm:convnext_atto"')
    text += '[relatives."timm:convnext_small".model_args]\ndepths = [1, 1, 1, 1]\n'
    study = load_study(write(tmp_path, text))
    assert len(build_plan(study, IMAGENET).tables[0].rows) == 2
    with pytest.raises(ValueError, match="a relative at scale digits makes one trial of A1 ConvNe"):
        build_plan(study, DIGITS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("columns = [", "colums = [", "tables.0: unknown key 'colums'; one of name, question, "),
        ('"pgd-10"]', '"pgd-11"]', "table A1: columns: unknown score 'pgd-11'; one of pgd-5, "),
        ('"pgd-10"]', '"pdg-10"]', "tables.0.columns.1: unknown score 'pdg-10'; one of clean, "),
        ('base = "resnet50"', 'base = "resnet5"', "row 'ReLU': unknown base 'resnet5'; one of "),
        ('extends = "resnet50"', 'extends = "resnet5"', "bases: smooth: unknown base 'resnet5'"),
        ('activation = "gelu"', 'activation = "gulu"', "Did you mean 'gelu'?"),
        ("scheduler =", "schedule =", "row 'GELU, cosine': unknown axis 'schedule'"),
        ('row = "A1/GELU"', 'row = "A1/GELUU"', "unknown row 'GELUU'; one of ReLU, GELU, GELU, c"),
        ('row = "A1/GELU"', 'row = "A2/GELU"', "unknown table 'A2'; one of A1. Did you mean 'A1'?"),
        ('row = "A1/GELU"', 'row = "GELU"', "claims.0.row: 'GELU' is not a row: write 'TABLE/lab"),
        ('of = "A1/ReLU"', "", "claims.0: test 'level' needs a second row: `of`"),
        ('column = "clean"', 'column = "tpa"', "unknown column 'tpa'; one of clean, pgd-10"),
        ('test = "level"', 'test = "equal"', "claims.0.test: Input should be 'ahead', 'behind'"),
        ('"GELU" = [77.1]', '"GELU" = [77.1, 3]', "published: 'GELU' has 2 for 1 columns, cl"),
        ('"GELU" = [77.1]', '"SiLU" = [77.1]', "published: unknown row 'SiLU'; one of ReLU"),
        ('label = "GELU"', 'label = "ReLU"', "tables.0.rows: row 'ReLU' is there twice"),
        ("[[claims]]", f"{SECOND}[[claims]]", "table 'A1' is there twice"),
        (
            '["clean", "pgd-10"]',
            "[]",
            "tables.0.columns: a table has at least one column, the name",
        ),
        ('"clean", "pgd-10"]', '"clean", "clean"]', "tables.0.columns: column 'clean' is there tw"),
        (
            'activation = "gelu"',
            'teacher = "smooth"',
            "smooth: teacher 'smooth' is this base or one",
        ),
        (
            'activation = "gelu"',
            "drop_path = 1.5",
            "smooth: drop_path: Input should be less than 1",
        ),
        ('activation = "gelu"', "drop_pth = 0.1", "Did you mean 'drop_path'?"),
        (
            'base = "resnet50" }',
            'weights = "https://a.org/b.pth" }',
            "row 'ReLU': https://a.org/b.pth needs the sha256 of its file, 64 hex digits",
        ),
        ('column = "clean"', 'column = "pgd-5"', "unknown column 'pgd-5'; one of clean, pgd-10"),
        ('label = "ReLU", ', "", "tables.0.rows.0: row '': its label is missing"),
        (
            ', base = "resnet50" }',
            " }",
            "row 'ReLU': a row has weights, or a base: one of resnet50, ",
        ),
        ("[[claims]]", "[axes]\nepochs = [3]\n[[claims]]", "axes need a base"),
        ("[[claims]]", "[[claims]", "is not TOML"),
        ("source =", "sorce =", "published: figures: unknown key 'sorce'; one of source, columns"),
        ('name = "gelu"', "name = 3", "name: Input should be a valid string, not 3"),
        ('name = "gelu"', 'name = "../up"', "name: String should match"),
        ("[[claims]]", "[axes]\nactivations = [3]\n[[claims]]", "Did you mean 'activation'?"),
        ('name = "gelu"', 'name = "gelu"\nextends = "study.toml"', "study.toml extends itself"),
        ('name = "gelu"', 'name = "gelu"\nextends = "bai"', "extends: unknown study 'bai'; one of"),
        ('name = "gelu"', 'name = "gelu"\nevaluators = ["claen"]', "Did you mean 'clean'?"),
    ],
)
def test_a_wrong_file_ends_the_command_with_2_and_names_file_key_and_nearest_word(
    tmp_path, capsys, old, new, message
):
    assert OWN.count(old) >= 1
    said = refused(capsys, tmp_path, OWN.replace(old, new, 1))
    assert re.search(r"study file .*study\.toml", said)
    assert message in said


def test_bases_and_files_that_need_each_other_are_refused(tmp_path, capsys):
    text = 'name="s"\nbase="a"\n[bases.a]\nextends="resnet50"\nteacher="b"\n'
    text += '[bases.b]\nextends="resnet50"\nteacher="a"\n'
    said = refused(capsys, tmp_path, text)
    assert "bases: a: teacher 'b' is this base or one below it" in said
    write(tmp_path, 'name="o"\nextends="study.toml"\nbase="resnet50"\n', "other.toml")
    said = refused(capsys, tmp_path, 'name="s"\nextends="other.toml"\nbase="resnet50"\n')
    assert re.search(
        r"extends: study file .*other\.toml: extends: .*study\.toml extends itself", said
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axes]\nlearning_rat = [0.1]", "unknown axis 'learning_rat'"),
        ("[axes]\nlearning_rate = [-1.0]", "no trial left, all 1 are refused; the first, learning"),
        ('[set]\nactivation = "swish"', "unknown activation 'swish'"),
    ],
)
def test_a_wrong_grid_ends_the_command_with_2(tmp_path, text, message, capsys):
    assert message in refused(capsys, tmp_path, f'name = "s"\nbase = "resnet50"\n{text}\n')


def test_files_that_cannot_be_read_or_hold_nothing_to_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither base nor tables"):
        load_study(write(tmp_path, 'name = "s"\n'))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_study(str(tmp_path / "none.toml"))


@pytest.fixture
def noise(monkeypatch):
    """The evaluator of docs/evaluator.md, in a file of its own and one row of the registry."""
    page = (ROOT / "docs" / "evaluator.md").read_text(encoding="utf-8")
    module = types.ModuleType("noise_of_the_docs")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(code, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(EVALUATORS, "noise", f"{module.__name__}:Noise")


def test_a_new_evaluator_brings_its_column(noise, tmp_path, few_digits):
    study = load_study(write(tmp_path, OWN.replace('"pgd-10"]', '"noise"]')))
    plan = build_plan(study, DIGITS)
    assert {trial.evaluators for trial in plan} == {("clean", "noise")}
    (table,) = tables_of(study, plan, {})
    assert [column.title for column in table.shown] == ["Clean", "Under noise"]
    evaluator, classifier = (
        evaluator_named("noise", DIGITS),
        build_classifier(plan.trials[0].recipe),
    )
    ledger = judge_images(evaluator, classifier, few_digits, device=torch.device("cpu"))
    (score,) = evaluator.summarize(ledger)
    assert (score.name, score.n) == ("noise", len(few_digits.held_out))


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_an_evaluators_columns_are_found_by_their_names(evaluator):
    for name, column in columns_of(evaluator).items():
        assert (evaluator_of(name), column.evaluator) == (evaluator, evaluator)


@pytest.mark.parametrize(
    ("stated", "epochs"),
    [
        ('"every 20 epochs"', (2, 4, 6, 8)),
        ("[5, 50, 90, 95, 100]", (1, 5, 9)),
        ('"every 300 epochs"', ()),
    ],
)
def test_checkpoints_are_stated_in_the_studys_epochs_and_come_before_the_last(
    tmp_path, stated, epochs
):
    file = tmp_path / "along.toml"
    rows = 'rows = [{ label = "A", base = "resnet50" }]'
    table = f'[[tables]]\nname = "T"\nquestion = "?"\ncolumns = ["pgd-100"]\n{rows}'
    head = f'name = "along"\nevaluators = ["clean"]\ncheckpoints = {stated}\n'
    file.write_text(head + table)
    (trial,) = build_plan(load_study(str(file)), DIGITS)  # a tenth of 100 epochs
    assert (trial.checkpoints, trial.along) == (epochs, ("clean",))
    assert trial.evaluators == ("clean", "pgd")
    assert trial.recipe == DIGITS.shrink(resnet50())


def test_checkpoints_that_no_one_can_read_are_refused(tmp_path):
    file = tmp_path / "along.toml"
    file.write_text('name = "along"\ncheckpoints = "every ten"\nbase = "resnet50"\n')
    with pytest.raises(ValueError, match="checkpoints: 'every ten' is not like 'every 10 epochs'"):
        load_study(str(file))


def test_a_grid_that_is_trained_and_not_judged_has_a_table_without_columns(tmp_path):
    file = tmp_path / "unjudged.toml"
    file.write_text('name = "unjudged"\nbase = "resnet50"\nevaluators = []\n')
    study = load_study(str(file))
    (table,) = tables_of(study, build_plan(study, DIGITS), {})
    assert (table.columns, len(table.rows)) == ([], 1)
