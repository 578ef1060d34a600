"""A user's own folder through the real commands: check, train, evaluate, and run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from evaluators.__main__ import main as evaluate
from evaluators.ledger import scores_of
from grid.run import main
from tests.pictures import write_folder
from trainables.data.listing import DataSource, scale_of
from trainables.scale import scale_named
from trainables.store.tracking import Tracker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STUDY = """
name = "pictures"
base = "resnet50"
evaluators = ["clean", "pgd"]
[set]
model = "timm:test_resnet"
augmentation = "randaug"
epochs = 2
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "pictures.toml"
    path.write_text(STUDY)
    return path


def arguments(root, study, results):
    data = ["--scale", "folder", "--data", str(root), "--image-size", "32", "--data-workers", "1"]
    return [*data, "--study", str(study), "--results", str(results)]


def run(*options):
    return subprocess.run(
        [sys.executable, "grid/run.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root, study):
    results = tmp_path_factory.mktemp("own") / "results"
    ended = run(*arguments(root, study, results))
    assert ended.returncode == 0, ended.stderr
    return results, ended


def test_a_damaged_image_stops_the_run_before_any_compute(capsys, study, tmp_path):
    root = write_folder(tmp_path / "pictures", per_class=2, held_out=1)
    path = root / "train" / "class-05" / "picture 0.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit) as stopped:
        main(arguments(root, study, tmp_path / "results"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "picture 0.JPEG (class class-05): replace or remove" in said
    assert "Traceback" not in said
    assert not (tmp_path / "results" / "mlflow.db").exists()


def test_a_folder_is_trained_and_judged(finished, root):
    results, ended = finished
    assert "Trained 1 and judged 2 cells" in ended.stdout
    scale = scale_of("folder", DataSource(root=root), image_size=32)
    tracker = Tracker(
        f"sqlite:///{results}/mlflow.db",
        experiment=f"robustness-{scale.name}",
        artifacts=results / "artifacts",
    )
    (trial,) = tracker.trials().values()
    for name in ("clean", "pgd"):
        assert {score.n for score in scores_of(tracker.ledger(trial, name))} == {24}
    assert scale_named(scale.name) == scale
    run = MlflowClient(tracker.uri).get_run(trial.run_id)
    (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert dataset.name == scale.name
    assert len(dataset.digest) == 12
    assert "12 classes, 32 px" in (results / "report" / "tables.md").read_text()


def test_its_weights_can_be_judged_by_the_folder_again(finished, root, tmp_path, capsys):
    results, _ = finished
    (weights,) = results.glob("trials/*/weights.safetensors")
    options = ["--weights", str(weights), "--data", str(root)]
    assert evaluate([*options, "--ledger", str(tmp_path)]) == 0
    assert "at scale folder-32px-12classes-72train-" in capsys.readouterr().out


def test_any_checkpoint_can_be_judged_by_a_folder(finished, root, tmp_path, capsys):
    results, _ = finished
    (weights,) = results.glob("trials/*/weights.safetensors")
    options = ["--model", "timm:test_resnet", "--weights", str(weights), "--data", str(root)]
    options += ["--scale", "folder", "--image-size", "32", "--ledger", str(tmp_path)]
    assert evaluate(options) == 0
    assert "clean" in capsys.readouterr().out
