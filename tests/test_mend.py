"""Weights are checked before they are judged or teach; where they are damaged the trial goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from grid.plan import build_plan
from grid.record import Recorder
from grid.status import ProgressLine, open_tracker
from grid.study import load_study
from tests.made_up import MadeUpPool
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.scale import DIGITS
from trainables.store.checkpoint import save_weights
from trainables.store.storage import weights_path
from trainables.store.tracking import OTHER_WEIGHTS

STUDY = load_study("bai2021")
PLAN = build_plan(STUDY, DIGITS, tables=("T9",), evaluators=["clean"])
TEACHER = next(trial.recipe.teacher for trial in PLAN if trial.recipe.teacher)


class Results:
    """A results folder in which the teacher of T9 is trained and judged, and nothing else."""

    def __init__(self, folder):
        self.storage, self.said = str(folder), []
        self.tracker = open_tracker(folder, None, DIGITS)
        self.stored = Path(weights_path(self.storage, TEACHER.digest()))
        self.finish(TEACHER)
        uri = self.tracker.trials()[TEACHER.digest()].artifact_uri
        self.logged = Path(url2pathname(urlsplit(uri).path), "weights.safetensors")

    def recorder(self):
        line = ProgressLine()
        line.say = self.said.append
        return Recorder(
            self.tracker, PLAN, study=STUDY.name, scale=DIGITS, data=load_data(DIGITS), line=line
        )

    def finish(self, recipe, initial=0):
        """Record that a trial has finished, with a network's initial weights as the trained."""
        path = weights_path(self.storage, recipe.digest())
        network = build_classifier(recipe.replace(seed=initial))
        sha256 = save_weights(path, network, recipe.model_dump_json())
        recorder = self.recorder()
        recorder.open_study()
        with recorder.recording(MadeUpPool()):
            recorder.started(recipe.digest())
            ended = {"outcome": "finished", "reason": "", "weights": path, "sha256": sha256}
            recorder.reported({"digest": recipe.digest(), "epoch": 1, "epochs": []} | ended)
        return recorder

    def trained_again(self):
        """Mend, and return whether the teacher is trained again."""
        recorder = self.recorder()
        recorder.mend(self.storage)
        return TEACHER.digest() in [trial.digest for trial in recorder.trials_to_train()]

    def forget_verdicts(self):
        run = self.tracker.trials()[TEACHER.digest()]
        self.tracker.forget_cell(run, "clean", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "results"
    folder.mkdir()
    return Results(folder)


@pytest.fixture
def results(made):
    """The results, put back after the test."""
    content = made.stored.read_bytes()
    yield made
    made.said.clear()
    for path in (made.stored, made.logged):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    made.finish(TEACHER)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap(path):
    other = TEACHER.replace(seed=5)
    save_weights(path, build_classifier(other), other.model_dump_json())


def train_elsewhere(path):
    save_weights(path, build_classifier(TEACHER.replace(seed=5)), TEACHER.model_dump_json())


DAMAGES = {
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "its folder missing": lambda path: shutil.rmtree(path.parent),
    "another trial's": swap,
    "the same trial's from elsewhere": train_elsewhere,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("copy", ["for a student", "to be judged"])
def test_a_trial_whose_weights_are_damaged_goes_on_before_they_are_needed(results, copy, damage):
    if copy == "to be judged":
        results.forget_verdicts()
    DAMAGES[damage](results.logged if copy == "to be judged" else results.stored)
    if copy == "for a student":
        assert not results.trained_again()  # MLflow has its weights
        assert results.stored.read_bytes() == results.logged.read_bytes()
        DAMAGES[damage](results.stored)
        DAMAGES[damage](results.logged)
    assert results.trained_again()
    (said,) = results.said
    assert said.startswith(f"the weights of trial {TEACHER.digest()} are damaged or missing")
    assert results.tracker.trials()[TEACHER.digest()].outcome == "training"


def test_a_trial_trained_again_to_the_same_weights_keeps_its_verdicts_and_to_others_does_not(
    results,
):
    assert results.finish(TEACHER).progress.cells_done == 0
    judged = results.finish(TEACHER, initial=7)
    assert judged.progress.cells_done == 1
    run = results.tracker.trials()[TEACHER.digest()]
    assert "clean" in run.cells
    assert OTHER_WEIGHTS not in run.failed_cells.values()


def test_sound_weights_are_left_alone(results):
    times = [path.stat().st_mtime_ns for path in (results.stored, results.logged)]
    results.forget_verdicts()
    assert not results.trained_again()
    assert times == [path.stat().st_mtime_ns for path in (results.stored, results.logged)]
    assert results.said == []
