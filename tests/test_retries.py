"""What Tune tries again: processes that really die, with and without getting any further."""

from __future__ import annotations

import json

import pytest
import ray
import torch
from ray import tune

from grid.cluster import Placement, Room
from grid.launch import _PlanOrder
from tests.dying import Dying
from trainables.store.retries import OWN_FAULTS, wait_after

MAX_FAILURES, EPOCHS = 1, 4


@pytest.fixture
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_deaths_are_forgiven_as_long_as_a_trial_gets_further(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    trials = [
        {"digest": name, "further": further, "teacher": None, "folder": str(tmp_path)}
        | {"epochs": EPOCHS}
        for name, further in (("further", True), ("stuck", False))
    ]
    placements = {trial["digest"]: Placement() for trial in trials}
    found = tune.Tuner(
        Dying,
        param_space={"trial": tune.grid_search([json.dumps(t) for t in trials]), "source": None},
        tune_config=tune.TuneConfig(
            scheduler=_PlanOrder(Room(), placements, teams=False), reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    ).fit()
    assert found.num_errors == 1
    marks = {path.name: len(path.read_text()) for path in tmp_path.glob("*-*")}
    assert marks == {
        "further-attempts": EPOCHS,
        "further-done": EPOCHS,
        "stuck-attempts": 1 + MAX_FAILURES,
    }


def test_waits_grow_and_a_programs_own_fault_is_none_of_the_machines():
    assert [wait_after(failures) for failures in (1, 2, 3)] == [2.0, 8.0, 32.0]
    assert not issubclass(torch.OutOfMemoryError, OWN_FAULTS)
    assert not issubclass(OSError, OWN_FAULTS)
    assert issubclass(KeyError, OWN_FAULTS)
