"""Rows of weights that need no training, and trainings that start from weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch

from evaluators.intervals import compare
from grid.estimate import disk_bytes
from grid.plan import build_plan
from grid.run import main
from grid.study import load_study
from tests.driver import ended, start, trials, wait_until
from trainables.data.load import load_data
from trainables.data.registry import IMAGENET_MEAN
from trainables.networks import build_classifier, first_classifier
from trainables.running import next_result, open_trial
from trainables.scale import DIGITS, IMAGENET
from trainables.store.checkpoint import classifier_of, save_weights
from trainables.train.loop import accuracy

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
VIT = "timm:vit_small_patch16_224.augreg_in1k"
HALF = (0.5, 0.5, 0.5)
STUDY = """
name = "pretrained"
title = "Which of these models is robust?"
[[tables]]
name = "P1"
question = "Models as they are"
columns = ["clean", "pgd-10"]
rows = [
{rows}]
[[claims]]
says = "The smaller one is level"
test = "level"
row = "P1/ResNet"
of = "P1/{of}"
column = "clean"
headline = "on clean images"
"""


def saved(path, name="test_resnet", classes=10, prefix="module."):
    """Save a small model of timm with weights drawn by a seed, as training scripts do."""
    with torch.random.fork_rng():
        torch.manual_seed(len(path.name))
        network = timm.create_model(name, num_classes=classes)
    torch.save({"state_dict": {prefix + k: v for k, v in network.state_dict().items()}}, path)
    return network.eval()


def study_of(folder, *rows, of="ResNet"):
    path = folder / "pretrained.toml"
    path.write_text(STUDY.format(rows="".join(f"    {row},\n" for row in (SMALL, *rows)), of=of))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    saved(folder / "resnet.pth")
    saved(folder / "wide.pth", classes=20)
    saved(folder / "efficient.pth", "test_efficientnet")
    return folder


SMALL = (
    '{ label = "ResNet", weights = "resnet.pth", model = "timm:test_resnet", '
    "preprocessing = { size = 32 } }"
)
WIDE = '{ label = "Wide", weights = "wide.pth", model = "timm:test_resnet" }'
EFFICIENT = (
    '{ label = "Efficient", weights = "efficient.pth", model = "timm:test_efficientnet", '
    "preprocessing = { size = 24, mean = [0.4, 0.4, 0.4], std = [0.2, 0.2, 0.2] } }"
)


def recipe_of(folder, row):
    study = load_study(str(study_of(folder, row)))
    return study.tables[0].rows[-1].recipe


def test_a_row_of_weights_has_timms_preprocessing_and_what_it_states_itself(folder):
    recipe = recipe_of(folder, WIDE)
    assert (recipe.preprocessing.size, recipe.preprocessing.crop) == (160, 0.95)
    assert (recipe.preprocessing.mean, recipe.preprocessing.std) == (HALF, HALF)
    stated = recipe_of(folder, EFFICIENT).preprocessing
    assert (stated.size, stated.mean, stated.interpolation) == (24, (0.4, 0.4, 0.4), "bicubic")
    published = recipe_of(
        folder, '{ label = "V", weights = "timm:vit_small_patch16_224.augreg_in1k" }'
    )
    assert (published.model, published.preprocessing.mean) == (published.init, HALF)
    published = recipe_of(
        folder, '{ label = "D", weights = "timm:deit_small_patch16_224.fb_in1k" }'
    )
    assert published.preprocessing.mean == IMAGENET_MEAN


def test_the_pages_study_of_pretrained_models_is_planned(tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if 'name = "pretrained"' in block)
    (tmp_path / "page.toml").write_text(text)
    (tmp_path / "ours.pth").write_bytes(b"weights")
    plan = build_plan(load_study(str(tmp_path / "page.toml")), IMAGENET)
    sizes = {trial.serves[0]: trial.recipe.preprocessing.size for trial in plan}
    assert sizes == {"P1 DeiT-S": 224, "P1 ResNet-50": 224, "P1 Ours": 176}
    assert {trial.evaluators for trial in plan} == {("clean", "pgd", "corruptions")}


def test_a_row_is_known_by_its_files_content_wherever_it_lies(folder, tmp_path):
    recipe = recipe_of(folder, WIDE)
    content = (folder / "wide.pth").read_bytes()
    assert recipe.init_sha256 == hashlib.sha256(content).hexdigest()
    (tmp_path / "wide.pth").write_bytes(content)
    (tmp_path / "resnet.pth").write_bytes(content)
    moved = recipe_of(tmp_path, WIDE)
    assert moved.init != recipe.init
    assert moved.digest() == recipe.digest() == recipe.with_seed(3).digest()
    assert recipe.replace(init_sha256="0" * 64).digest() != recipe.digest()
    assert recipe.replace(learning_rate=0.5).digest() == recipe.digest()
    assert recipe.replace(activation="gelu").digest() != recipe.digest()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('weights = "resnte.pth", model = "resnet18"', "resnte.pth are not there"),
        ('weights = "resnte.pth", model = "resnet18"', "Did you mean 'resnet.pth'?"),
        ('weights = "wide.pth"', "wide.pth does not say whose weights it is: add model"),
        ('weights = "wide.pth", model = "timm:test_resnte"', "Did you mean 'test_resnet'?"),
        (
            'weights = "timm:deit_small_patch16_224.fb_in21k"',
            "Did you mean 'deit_small_patch16_224.fb_in1k'?",
        ),
        ('weights = "https://a.b/c.pth", model = "resnet18"', "needs the sha256 of its file"),
        (
            'weights = "wide.pth", sha256 = "12"',
            "the sha256 of its file, 64 hex digits, not '12'",
        ),
        ('weights = "wide.pth", modle = "resnet18"', "Did you mean 'model'?"),
        ('weights = "wide.pth", base = "resnet50"', "unknown key 'base'"),
        ('weights = "wide.pth", model = "wide.py:net"', "studies and weights files run none"),
        ('weights = "wide.pth", model = "resnet18", preprocessing = { sise = 4 }', "'size'?"),
        ('model = "resnet18"', "a row has weights, or a base: one of resnet50, "),
    ],
)
def test_a_mistyped_row_is_refused_as_the_study_is_read(folder, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_of(folder, f'{{ label = "A", {row} }}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 7}, "the model answers among 7 classes, and the data have 10"),
        ({"name": "test_efficientnet"}, "resnet.pth does not fit the model: "),
    ],
)
def test_weights_that_cannot_be_judged_are_refused_before_any_compute(
    tmp_path, capsys, change, message
):
    saved(tmp_path / "resnet.pth", **change)
    path = study_of(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["--study", str(path), "--results", str(tmp_path / "results")])
    said = capsys.readouterr().err
    assert "timm:test_resnet of resnet.pth (sha256 " in said
    assert message in said
    assert not (tmp_path / "results" / "mlflow.db").exists()


def test_a_teacher_that_is_taken_as_it_is_is_not_trained_by_what_is_set(folder):
    base = '[bases.ready]\nextends = "resnet50"\ninit = "resnet.pth"\nepochs = 0\n'
    row = '{ label = "S", base = "deit_small", teacher = "ready" }'
    path = study_of(folder, row)
    path.write_text(path.read_text().replace("[[tables]]", f"{base}[[tables]]"))
    study = load_study(str(path)).model_copy(update={"settings": {"epochs": 20}})
    teachers = [t.recipe.teacher for t in build_plan(study, DIGITS) if t.recipe.teacher]
    assert [teacher.epochs for teacher in teachers] == [0]


def test_a_quick_look_at_models_as_they_are_says_what_their_judging_takes(folder, tmp_path, capsys):
    path = study_of(folder)
    words = ["--plan", "--study", str(path), "--results", str(tmp_path), "--minutes", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert re.search(r"held-out images takes about .+: give --minutes", capsys.readouterr().err)


def test_weights_of_this_project_say_what_they_are(tmp_path, small):
    recipe = small(activation="gelu", pixel_range="half")
    classifier = build_classifier(recipe)
    save_weights(tmp_path / "resnet.pth", classifier, "{}")
    save_weights(tmp_path / "own.safetensors", classifier, recipe.model_dump_json())
    row = recipe_of(tmp_path, '{ label = "Own", weights = "own.safetensors" }')
    assert (row.model, row.activation, row.pixel_range) == ("resnet18", "gelu", "half")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        taken = first_classifier(DIGITS.shrink(row))[0].eval()(images)
        torch.testing.assert_close(taken, classifier.eval()(images), rtol=0, atol=0)


def trial(recipe, storage):
    config = {"recipe": recipe.model_dump(mode="json"), "storage": str(storage), "source": None}
    return open_trial(config | {"threads": 1, "device": "cpu", "compile": False})


@pytest.mark.parametrize("name", ["resnet", "wide"])
def test_a_trial_of_weights_stores_them_as_they_are_with_their_own_head(folder, tmp_path, name):
    row = WIDE.replace("wide.pth", f"{name}.pth")
    recipe = DIGITS.shrink(recipe_of(folder, row)).replace(preprocessing={"size": 32, "mean": HALF})
    result = next_result(trial(recipe, tmp_path))
    assert (result["outcome"], result["epochs"], result["done"]) == ("finished", [], True)
    head = ["the head has the weights' 20 classes, not 10"] if name == "wide" else []
    assert result["notes"] == ["the names' prefix 'module.' is left out", *head]
    stored = classifier_of(Path(result["weights"]), recipe.digest()).eval()
    network = saved(tmp_path / f"{name}.pth", classes={"resnet": 10, "wide": 20}[name])
    images = torch.rand(2, 3, 32, 32)
    std = torch.tensor(DIGITS.data_set.std).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(stored(images), network((images - 0.5) / std))


def test_fine_tuning_starts_at_the_weights_with_a_new_head_of_the_datas_classes(
    folder, tmp_path, small
):
    recipe = small(model="timm:test_resnet", activation="own", epochs=1)
    fine = recipe.replace(init=str(folder / "wide.pth"), preprocessing={"size": 32})
    classifier, notes = first_classifier(fine)
    assert "a new one of 10 stays" in notes[-1]
    network = saved(tmp_path / "wide.pth", classes=20).state_dict()
    ours = classifier.backbone.state_dict()
    assert {n for n in ours if not torch.equal(ours[n], network[n])} == {"fc.weight", "fc.bias"}
    assert fine.digest() != recipe.digest()
    assert fine.with_seed(1).digest() != fine.digest()


def test_init_brings_the_networks_own_activation_and_timms_preprocessing_unless_stated(folder):
    row = '{ label = "F", base = "resnet50", model = "timm:test_resnet", init = "wide.pth" }'
    assert recipe_of(folder, row).activation == "own"
    assert not recipe_of(folder, row).preprocessing.chosen()
    row = row.replace('"wide.pth"', f'"{VIT}", activation = "silu"')
    recipe = recipe_of(folder, row)
    assert (recipe.activation, recipe.preprocessing.size) == ("silu", 224)
    smaller = recipe_of(folder, row.replace(" }", ", preprocessing = { size = 32 } }"))
    assert smaller.preprocessing == recipe.preprocessing.model_copy(update={"size": 32})
    assert (recipe.epochs, recipe.optimizer) == (100, "sgd")
    assert recipe.describe() == f"timm:test_resnet of {VIT} silu sgd step none 100ep seed0"


def test_models_as_they_are_come_first_cost_no_training_and_have_one_seed(folder):
    path = study_of(folder, WIDE, '{ label = "Trained", base = "resnet50" }')
    plan = build_plan(load_study(str(path)), DIGITS, seeds=3)
    assert [bool(trial.recipe.epochs) for trial in plan] == [False, False, True, True, True]
    assert plan.makeup == "3 trainings and 2 models as they are"
    assert [trial.cost for trial in plan][:2] == [0, 0]
    (wide,) = (t for t in plan if "Wide" in t.serves[0])
    size = (folder / "wide.pth").stat().st_size
    assert disk_bytes([wide]) == 2 * size


def test_what_is_set_for_all_trains_no_model_that_is_taken_as_it_is(folder):
    path = study_of(folder, '{ label = "Trained", base = "resnet50" }')
    study = load_study(str(path))
    settings = {"epochs": 20, "preprocessing": {"size": 64, "crop": 0.5}}
    plan = build_plan(study.model_copy(update={"settings": settings}), IMAGENET)
    (taken, trained) = plan
    assert (taken.recipe.epochs, trained.recipe.epochs) == (0, 20)
    # It states its own size; timm states its crop.
    assert (taken.recipe.preprocessing.size, trained.recipe.preprocessing.size) == (32, 64)
    assert any("not the 1 models that need none" in note for note in plan.notes)


def test_a_single_model_is_compared_with_several_trainings_by_their_spread():
    one, two = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 0.5)
    alike = compare([one], [two, two])
    apart = compare([one], [{**two, "a": 0.9}, {**two, "a": 0.1}])
    # Shares 0.6 and 0.4: the standard error is 0.1, Student's t of one degree 12.706.
    assert apart.high - apart.difference > 1.2706 > alike.high - alike.difference


@pytest.mark.slow
def test_the_command_judges_them_is_killed_and_goes_on(folder, tmp_path):
    """The real command: rows of weights beside a training, killed amid the cells."""
    trained = '{ label = "Trained", base = "resnet50", model = "resnet18", epochs = 20 }'
    wide = WIDE.replace(" }", ", preprocessing = { size = 32 } }")
    path, results = study_of(folder, wide, trained, of="Trained"), tmp_path / "results"
    driver = start(path, results, "--seeds", "1")
    database = results / "mlflow.db"
    wait_until(driver, lambda: database.exists() and any(r.cells for r in trials(results).values()))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    before = {digest: run.start_time for digest, run in trials(results).items()}
    assert "Trained" in ended(start(path, results, "--seeds", "1"))
    runs = trials(results)
    assert before.items() <= {digest: run.start_time for digest, run in runs.items()}.items()
    assert len(runs) == 3
    assert {(run.outcome, *sorted(run.cells)) for run in runs.values()} == {
        ("finished", "clean", "pgd")
    }
    row = load_study(str(path)).tables[0].rows[0]
    recipe = DIGITS.shrink(row.recipe)
    data = load_data(DIGITS.preprocessed(recipe.preprocessing))
    classifier = first_classifier(recipe)[0]
    expected = accuracy(classifier, data.held_out, device=torch.device("cpu"))
    assert runs[recipe.digest()].metrics["clean"] == pytest.approx(expected)
    page = (results / "report" / "index.html").read_text()
    assert "1 trainings and 2 models as they are" in page
    assert f"sha256 {recipe.init_sha256}; not trained here" in page
    assert 'The smaller one is level: <span class="decision' in page
    said = ended(start(path, results, "--seeds", "1"))
    assert "3 trials: 3 done, 0 to train; 0 cells to judge" in said
