"""Two commands that run one study at the same time, on one MLflow, each with its own storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from mlflow import MlflowClient

from grid.plan import Plan
from grid.record import Lease, Recorder
from grid.status import ProgressLine
from tests.driver import wait_until
from tests.made_up import MadeUpPool
from tests.test_mend import PLAN, STUDY, TEACHER, flip
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.scale import DIGITS
from trainables.store.checkpoint import save_weights
from trainables.store.storage import weights_path
from trainables.store.tracking import SCHEMA, SCHEMA_TAG, Tracker


@pytest.fixture
def command(tmp_path):
    """Return a function that starts the recorder of a command, by its owner's name."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    place = (tmp_path / "artifacts").as_uri()
    MlflowClient(uri).create_experiment("x", place, {SCHEMA_TAG: str(SCHEMA)})

    def start(owner, plan=PLAN):
        tracker = Tracker(uri, experiment="x", artifacts=None, owner=owner)
        told = {"study": STUDY.name, "scale": DIGITS, "data": load_data(DIGITS)}
        return Recorder(tracker, plan, line=ProgressLine(), **told)

    return start


def take(recorder, digest):
    recorder._take(digest)
    return recorder.lease(digest)


def test_commands_that_each_have_a_failed_trial_do_not_wait_for_each_other(command):
    one, other = command("one"), command("other")
    first, second = [trial.digest for trial in PLAN][:2]
    for recorder, digest in ((one, first), (other, second)):
        assert take(recorder, digest) is Lease.OURS
        recorder._on_failed(digest, {"reason": "no memory", "trace": ""})
    assert take(one, second) is take(other, first) is Lease.OVER
    assert [len(one.failures), len(other.failures)] == [2, 2]
    assert other.failures[1].endswith(": failed in command one")
    one.tracker.renew(over=True)
    assert take(command("one"), first) is Lease.OURS  # the next run tries it again
    assert take(command("other"), first) is Lease.THEIRS


def finish(recorder, path, recipe=TEACHER):
    """Report that a trial has finished, with initial weights."""
    sha256 = save_weights(path, build_classifier(recipe), recipe.model_dump_json())
    recorder.started(recipe.digest())
    ended = {"outcome": "finished", "reason": "", "weights": str(path), "sha256": sha256}
    recorder.reported({"digest": recipe.digest(), "epoch": 1, "epochs": []} | ended)


class BusyPool(MadeUpPool):
    """Judges when it is let."""

    is_let = False

    def poll(self, timeout):
        return super().poll(timeout) if self.is_let else []


@pytest.mark.parametrize("dies", [False, True])
def test_the_command_that_has_a_trial_judges_it_alone_unless_it_dies(
    command, tmp_path, monkeypatch, dies
):
    monkeypatch.setattr("grid.record.RENEW_SECONDS", 0.1)
    one, pool = command("one"), BusyPool()
    take(one, TEACHER.digest())
    with ThreadPoolExecutor(1) as thread, one.recording(pool):
        finish(one, tmp_path / "weights.safetensors")
        wait_until(None, lambda: len(pool))
        if dies:
            monkeypatch.setattr(one.tracker, "renew", lambda **_: set())
            monkeypatch.setattr("trainables.store.tracking.SILENT_RENEWALS", 5)
        other = command("other")
        ended = thread.submit(record_until_all_is_judged, other)
        if dies:
            ended.result()
        else:
            wait_until(None, lambda: other._awaited)
        pool.is_let = True
    ended.result()
    assert (one.progress.cells_done, other.progress.cells_done) == (1, int(dies))
    cells = one.tracker.trials()[TEACHER.digest()].cells
    assert [*cells] == ["clean"]


def record_until_all_is_judged(recorder):
    with recorder.recording(MadeUpPool()):
        pass


def test_commands_with_other_evaluators_do_not_wait_for_each_other(command, tmp_path, monkeypatch):
    monkeypatch.setattr("grid.record.RENEW_SECONDS", 0.1)
    trials = [trial for trial in PLAN if not trial.recipe.prerequisites][:2]
    plans = [
        Plan(tuple(replace(trial, evaluators=("clean", name)) for trial in trials))
        for name in ("pgd", "health")
    ]
    recorders = [command(name, plan) for name, plan in zip(("one", "other"), plans, strict=True)]
    both_are_over = Barrier(2)

    def work(recorder, trial):
        take(recorder, trial.digest)
        with recorder.recording(MadeUpPool()):
            finish(recorder, tmp_path / trial.digest, trial.recipe)
            wait_until(None, lambda: recorder._outcome(trial.digest) == "finished")
            both_are_over.wait()
            for other in trials:
                recorder.lease(other.digest)

    with ThreadPoolExecutor(2) as threads:
        [*threads.map(work, recorders, trials)]
    for run in recorders[0].tracker.trials().values():
        assert sorted(run.cells) == ["clean", "health", "pgd"]


class TransferPool(MadeUpPool):
    """Judges models' own adversarial images at once, and all models' when it is let."""

    is_let = False

    def poll(self, timeout):
        return [judged for judged in super().poll(timeout) if self.is_let or not judged[0].sources]


def test_one_command_judges_all_adversarial_images_and_the_others_wait_for_it(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr("grid.record.RENEW_SECONDS", 0.1)
    trials = [trial for trial in PLAN if not trial.recipe.prerequisites][:2]
    plan = Plan(tuple(replace(trial, evaluators=("transfer",)) for trial in trials))
    one, other, pool = command("one", plan), command("other", plan), TransferPool()
    lease, leases = other.tracker.lease, []
    monkeypatch.setattr(other.tracker, "lease", lambda key: leases.append(key) or lease(key))

    def train_and_judge():
        for trial in trials:
            take(one, trial.digest)
        with one.recording(pool):
            for trial in trials:
                finish(one, tmp_path / trial.digest, trial.recipe)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(train_and_judge)
        wait_until(None, lambda: [cell for cell in pool._asked if cell.sources])
        for trial in trials:
            take(other, trial.digest)
        second = threads.submit(record_until_all_is_judged, other)
        wait_until(None, lambda: second.done() or leases.count("transfer") > 2)
        pool.is_let = True
        first.result(), second.result()
    assert (one.progress.cells_done, other.progress.cells_done) == (4, 0)
    assert not other._transfers()


def test_a_command_that_starts_later_takes_the_weights_of_another(command, tmp_path):
    one, digest = command("one"), TEACHER.digest()
    path = tmp_path / "weights.safetensors"
    take(one, digest)
    with one.recording(MadeUpPool()):
        finish(one, path)
    content = path.read_bytes()
    stored = Path(weights_path(str(tmp_path / "other"), digest))

    def is_trained_again():
        stored.unlink(missing_ok=True)
        other = command("other")
        other.mend(str(tmp_path / "other"))
        return TEACHER.digest() in [trial.digest for trial in other.trials_to_train()]

    assert not is_trained_again()
    assert stored.read_bytes() == content
    flip(next(tmp_path.glob("artifacts/*/artifacts/weights.safetensors")))
    one.tracker.renew()  # it lives, and has the lease
    assert not is_trained_again()
    one.tracker.renew(over=True)
    assert is_trained_again()
