"""What the axes of a grid span: hand-counted combinations, and those that are left out."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from grid.plan import build_plan
from grid.study import load_study
from tests.paper import resnet50
from trainables.scale import DIGITS, IMAGENET


def study_of(tmp_path, text, base='base = "resnet50"'):
    path = tmp_path / "s.toml"
    path.write_text(f'name = "s"\n{base}\n{text}\n')
    return load_study(str(path))


def combinations(study):
    return [" ".join(labels.values()) for labels in study.combinations()]


def test_axes_in_step_are_as_many_trials_as_values(tmp_path):
    text = 'mode = "zip"\n[axes]\nepochs = [10, 20]\nlearning_rate = [0.1, 0.2]'
    assert combinations(study_of(tmp_path, text)) == ["resnet50 10 0.1", "resnet50 20 0.2"]
    with pytest.raises(ValueError, match=r"as many values \(epochs 2, learning_rate 3\)"):
        study_of(tmp_path, text.replace("0.2]", "0.2, 0.3]"))


def test_what_is_excluded_is_not_spanned(tmp_path):
    axes = '[axes]\noptimizer = ["sgd", "adamw", "lamb"]\nepochs = [10, 20]'
    text = f'exclude = [{{ optimizer = ["adamw", "lamb"], epochs = 20 }}]\n{axes}'
    assert combinations(study_of(tmp_path, text)) == [
        "resnet50 sgd 10",
        "resnet50 sgd 20",
        "resnet50 adamw 10",
        "resnet50 lamb 10",
    ]
    alone = combinations(study_of(tmp_path, f'mode = "one-at-a-time"\n{text}'))
    # Beside the base's own optimizer, sgd, nothing is excluded.
    assert alone == ["resnet50", *(f"resnet50 {v}" for v in ("sgd", "adamw", "lamb", 10, 20))]
    study = study_of(tmp_path, f"exclude = [{{ epochs = [10, 20] }}]\n{axes}")
    with pytest.raises(ValueError, match="study 's' has no trial left, `exclude` leaves none"):
        build_plan(study, IMAGENET)


def test_an_axis_under_a_condition_varies_only_where_it_holds(tmp_path):
    text = """[axes]
    optimizer = ["sgd", "adamw"]
    layer_decay = [0.65, 0.75]
    [only_with]
    layer_decay = { optimizer = "adamw" }
    """
    study = study_of(tmp_path, text, 'base = "deit_small"')
    assert combinations(study) == [
        "deit_small sgd",
        "deit_small adamw 0.65",
        "deit_small adamw 0.75",
    ]
    plan = build_plan(study, DIGITS)
    # The effects see what the base has where the axis does not vary.
    assert [tuple(labels.values()) for labels in plan.grid.values()] == [
        ("sgd", "None"),
        ("adamw", "0.65"),
        ("adamw", "0.75"),
    ]


def test_several_bases_and_rows_of_tables_have_the_axes_each(tmp_path):
    text = """[axes]
    epochs = [100, 50]
    [[tables]]
    name = "A1"
    question = "?"
    columns = ["clean"]
    rows = [
        { label = "SiLU", base = "resnet50", activation = "silu" },
        { label = "ReLU", base = "resnet50" },
    ]
    """
    study = study_of(tmp_path, text, 'base = ["deit_small", "A1/SiLU"]')
    assert study.size == 4
    plan = build_plan(study, IMAGENET)
    spanned = {(t.recipe.model, t.recipe.activation, t.recipe.epochs) for t in plan}
    assert spanned == {
        *(("deit_small", "gelu", epochs) for epochs in (100, 50)),
        *(("resnet50", "silu", epochs) for epochs in (100, 50)),
        ("resnet50", "relu", 100),
    }
    assert Counter(labels["base"] for labels in plan.grid.values()) == {
        "deit_small": 2,
        "A1/SiLU": 2,
    }
    assert list(study_of(tmp_path, text, 'base = "A1/*"').base) == ["A1/SiLU", "A1/ReLU"]
    with pytest.raises(ValueError, match=r"unknown base 'A1/SeLU'; .* Did you mean 'A1/SiLU'"):
        study_of(tmp_path, text, 'base = "A1/SeLU"')


def test_labels_name_values_in_trials_refusals_and_effects(tmp_path):
    text = """[axes.adversary]
    weak = { epsilon = "4/255", step_size = "5/255" }
    strong = { epsilon = "4/255", step_size = "2/255", steps = 3 }
    [axes.norm]
    usual = "batch"
    ghosts = "ghost"
    """
    plan = build_plan(study_of(tmp_path, text, 'base = "deit_small"'), IMAGENET)
    assert {tuple(labels.items()) for labels in plan.grid.values()} == {
        (("adversary", "weak"), ("norm", "usual")),
        (("adversary", "strong"), ("norm", "usual")),
    }
    assert [words for words, _ in plan.refused] == [
        "adversary=weak norm=ghosts",
        "adversary=strong norm=ghosts",
    ]
    assert all(
        re.search("adversary=(weak|strong) norm=usual \\w{6}$", trial.name) for trial in plan
    )


def test_only_takes_bases_and_the_labels_of_a_grid(tmp_path):
    text = """[axes]
    epochs = [10, 100]
    [axes.norm]
    usual = "batch"
    ghosts = "ghost"
    [[tables]]
    name = "A1"
    question = "?"
    columns = ["clean"]
    rows = [{ label = "1 epoch", base = "resnet50", epochs = 10, activation = "silu" }]
    """
    study = study_of(tmp_path, text, 'base = ["resnet50", "deit_small"]')

    def kept(**only):
        return sorted(
            (t.recipe.model, t.recipe.norm, t.recipe.epochs)
            for t in build_plan(study, DIGITS, only={a: tuple(v) for a, v in only.items()})
        )

    ghosts = [("resnet50", "ghost", epochs) for epochs in (1, 10)]
    assert kept(norm=["ghosts"]) == kept(norm=["ghost"]) == ghosts
    assert kept(base=["deit_small"]) == [("deit_small", "batch", epochs) for epochs in (1, 10)]
    # 10 epochs at full size are one here, and 100 are 10: the word is the grid's.
    assert kept(epochs=["10"], base=["resnet50"], norm=["ghosts"]) == ghosts[:1]
    assert kept(epochs=["1"], norm=["batch"]) == [
        ("deit_small", "batch", 1),
        ("resnet50", "batch", 1),
        ("resnet50", "batch", 1),
    ]
    assert kept(base=["none"]) == [("resnet50", "batch", 1)]
    with pytest.raises(ValueError, match="has base=deit; values there: deit_small, none, resnet50"):
        kept(base=["deit"])


LARGE = """[axes]
activation = ["relu", "gelu", "silu", "mish"]
scheduler = ["step", "cosine"]
augmentation = ["none", "randaug", "mixup", "cutmix"]
epochs = [100, 200, 300, 400]
norm = ["batch", "ghost"]
"""


@pytest.mark.parametrize("method", ["sobol", "random"])
def test_a_sample_is_so_many_trials_the_same_each_time(tmp_path, method):
    def sampled(seed):
        sample = f'sample = {{ size = 64, method = "{method}", seed = {seed} }}'
        return build_plan(study_of(tmp_path, f"{sample}\n{LARGE}"), IMAGENET)

    plan = sampled(0)
    assert len(plan.trials) == 64 < 4 * 2 * 4 * 4 * 2
    assert [trial.digest for trial in sampled(0)] == [trial.digest for trial in plan]
    assert {trial.digest for trial in sampled(1)} != {trial.digest for trial in plan}
    if method == "sobol":  # balanced but for the few points that fall on one combination
        counts = Counter(labels["activation"] for labels in plan.grid.values())
        assert all(14 <= count <= 18 for count in counts.values()), counts


def test_a_sample_passes_over_what_is_excluded_or_cannot_be(tmp_path):
    text = LARGE.replace("[axes]", 'sample = 64\nexclude = [{ norm = "ghost" }]\n[axes]')
    plan = build_plan(study_of(tmp_path, text), IMAGENET)
    assert (len(plan.trials), {trial.recipe.norm for trial in plan}) == (64, {"batch"})
    plan = build_plan(study_of(tmp_path, text, 'base = "deit_small"'), IMAGENET)
    assert (len(plan.trials), plan.refused) == (64, ())
    assert plan.notes == ("the grid is a sample of 64 of 256 combinations",)
    large = LARGE.replace("[axes]", "sample = 64\n[axes]")
    plan = build_plan(study_of(tmp_path, large, 'base = "deit_small"'), IMAGENET)
    # Ghost batches need batch normalisation.
    assert len(plan.trials) == 64
    assert plan.refused
    whole = build_plan(study_of(tmp_path, "sample = 64\n[axes]\nepochs = [3, 4]"), IMAGENET)
    assert len(whole.trials) == 2


def test_a_sample_may_be_of_a_billion_combinations(tmp_path):
    rates = ", ".join(str(number / 1000) for number in range(1, 1001))
    axes = "\n".join(f"{a} = [{rates}]" for a in ("learning_rate", "weight_decay", "mixup_alpha"))
    plan = build_plan(study_of(tmp_path, f"sample = 16\n[axes]\n{axes}"), IMAGENET)
    assert len(plan.grid) == len(plan.trials) == 16


def test_a_study_says_how_many_seeds_it_wants_and_the_command_may_say_otherwise(tmp_path):
    study = study_of(tmp_path, "replicates = 3")
    assert {trial.recipe.seed for trial in build_plan(study, IMAGENET)} == {0, 1, 2}
    assert [trial.recipe for trial in build_plan(study, IMAGENET, seeds=1)] == [resnet50()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exclude = [{ epoch = 10 }]", "exclude.0: unknown axis of this grid 'epoch'; one of base"),
        ("exclude = [{ epochs = 11 }]", "exclude.0: unknown value of epochs '11'; one of 10, 20"),
        ("only_with = { norm = { epochs = 10 } }", "only_with.norm: unknown axis of this grid"),
        ("only_with = { epochs = { base = 1 } }", "only_with.epochs: unknown value of base '1'"),
        ("sample = 0", "sample.size: Input should be greater than 0, not 0"),
        ("sample = { size = 4, methd = 1 }", "Did you mean 'method'?"),
        ('mode = "zip"\nsample = 4', "a sample is of mode 'product', not of 'zip'"),
        ('mode = "zap"', "Did you mean 'zip'?"),
        ("replicates = 0", "replicates: Input should be greater than or equal to 1, not 0"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        study_of(tmp_path, f"{text}\n[axes]\nepochs = [10, 20]")


@pytest.mark.parametrize(
    ("values", "message"),
    [("[]", "axes.epochs: an axis has at least one value"), ("3", "a list of values, or a table")],
)
def test_an_axis_without_values_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        study_of(tmp_path, f"[axes]\nepochs = {values}")
