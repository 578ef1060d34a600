"""What Tune tries again: processes that really die, with and without getting any further."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray
import torch
from ray import tune

from grid.launch import _PlanOrder
from trainables.retries import MAX_FAILURES, OWN_FAULTS, wait_after


class Dying(tune.Trainable):
    """Ends at its last epoch; its process dies at every step before, `further` with an epoch done.

    config["trial"]: digest, teacher, folder, further, epochs.
    """

    def setup(self, config):
        self.trial = config["trial"]
        self.marks = Path(self.trial["folder"])

    def step(self):
        attempts = self.marks / f"{self.trial['digest']}-attempts"
        done = self.marks / f"{self.trial['digest']}-done"
        if self.iteration == 0:
            with attempts.open("a") as file:
                file.write("x")
        epoch = len(done.read_text()) + 1 if done.exists() else 1
        if not self.trial["further"] or self.iteration == 1:
            os._exit(1)
        with done.open("a") as file:
            file.write("x")
        return {"epoch": epoch, "done": epoch == self.trial["epochs"]}

    def reset_config(self, new_config):
        self.setup(new_config)
        return True


@pytest.fixture
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_deaths_are_forgiven_as_long_as_a_trial_gets_further(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setattr("trainables.retries.FIRST_WAIT_SECONDS", 0.01)
    epochs = MAX_FAILURES + 3
    trials = [
        {"digest": name, "further": further, "teacher": None, "folder": str(tmp_path)}
        | {"epochs": epochs}
        for name, further in (("further", True), ("stuck", False))
    ]
    found = tune.Tuner(
        Dying,
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(scheduler=_PlanOrder(2, strict=False), reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    ).fit()
    failed = {result.config["trial"]["digest"]: bool(result.error) for result in found}
    assert failed == {"further": False, "stuck": True}
    attempts = {path.name: len(path.read_text()) for path in tmp_path.glob("*-attempts")}
    assert attempts == {"further-attempts": epochs, "stuck-attempts": 1 + MAX_FAILURES}


def test_waits_grow_and_a_programs_own_fault_is_none_of_the_machines():
    assert [wait_after(failures) for failures in (1, 2, 3)] == [2.0, 8.0, 32.0]
    assert not issubclass(torch.OutOfMemoryError, OWN_FAULTS)
    assert not issubclass(OSError, OWN_FAULTS)
    assert issubclass(KeyError, OWN_FAULTS)
