"""What Tune tries again: processes that really die, with and without getting any further."""

from __future__ import annotations

import json

import pytest
import ray
import torch
from ray import tune

from grid.launch import PlanOrder
from tests.dying import Dying
from trainables.store.retries import OWN_FAULTS, wait_after

EPOCHS = 4


@pytest.fixture
def ray_session():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_deaths_are_forgiven_as_long_as_a_trial_gets_further(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("grid.launch.MAX_FAILURES", 1)
    trials = [
        {"digest": name, "further": further, "teacher": None, "folder": str(tmp_path)}
        | {"epochs": EPOCHS}
        for name, further in (("further", True), ("stuck", False))
    ]
    configs = {t["digest"]: {"trial": json.dumps(t), "source": None} for t in trials}
    found = tune.Tuner(
        Dying,
        tune_config=tune.TuneConfig(
            search_alg=PlanOrder(configs), num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    # Each epoch of one that gets further costs a process but for the last; one is stuck, twice.
    assert len(found) == EPOCHS + 2
    marks = {path.name: len(path.read_text()) for path in tmp_path.glob("*-*")}
    assert marks == {
        "further-attempts": EPOCHS,
        "further-done": EPOCHS,
        "stuck-attempts": 2,
    }


def test_trials_come_in_the_plans_order_a_student_after_its_teacher(monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 60.0)
    teachers = {"a": None, "student": "a", "b": None, "c": None}
    told = {digest: {"digest": digest, "teacher": t} for digest, t in teachers.items()}
    configs = {d: {"trial": json.dumps(trial), "source": None} for d, trial in told.items()}
    placed = 0
    order = PlanOrder(configs, lambda: placed)
    assert order.suggest("1") == configs["a"]
    assert order.suggest("2") is None  # the first team waits for its workers
    placed = 2
    assert order.suggest("2") == configs["b"]
    order.on_trial_complete("2")
    assert order.suggest("3") == configs["c"]
    order.on_trial_complete("1", error=True)
    assert order.will_retry("a")
    order.on_trial_complete("3")
    assert order.suggest("4") is None  # the teacher waits, and its student for it
    order._not_before["a"] = 0.0
    assert order.suggest("4") == configs["a"]
    order.on_trial_complete("4")
    assert order.suggest("5") == configs["student"]
    assert order.suggest("6") is None
    order.on_trial_complete("5")
    assert order.suggest("6") == PlanOrder.FINISHED


def test_waits_grow_and_a_programs_own_fault_is_none_of_the_machines():
    assert [wait_after(failures) for failures in (1, 2, 3)] == [2.0, 8.0, 32.0]
    assert not issubclass(torch.OutOfMemoryError, OWN_FAULTS)
    assert not issubclass(OSError, OWN_FAULTS)
    assert issubclass(KeyError, OWN_FAULTS)
