"""Two commands that run one study at the same time, on one MLflow, each with its own storage."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from grid.record import Lease, Recorder
from grid.status import ProgressLine
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

    def start(owner):
        tracker = Tracker(uri, experiment="x", artifacts=None, owner=owner)
        told = {"study": STUDY.name, "scale": DIGITS, "data": load_data(DIGITS)}
        return Recorder(tracker, PLAN, line=ProgressLine(), **told)

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


def test_a_command_that_starts_later_takes_the_weights_of_another(command, tmp_path):
    one, digest = command("one"), TEACHER.digest()
    path = tmp_path / "weights.safetensors"
    sha256 = save_weights(path, build_classifier(TEACHER), TEACHER.model_dump_json())
    content = path.read_bytes()
    take(one, digest)
    with one.recording(MadeUpPool()):
        one.started(digest)
        ended = {"outcome": "finished", "reason": "", "weights": str(path), "sha256": sha256}
        one.reported({"digest": digest, "epoch": 1, "epochs": []} | ended)
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
