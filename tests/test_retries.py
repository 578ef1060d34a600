"""Which trial Tune is to start next: the plan's order, teachers first, and the dead again."""

from __future__ import annotations

import json

import pytest
import torch

from grid.launch import PlanOrder
from grid.record import Lease
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, wait_after


def configs_of(teachers):
    told = {d: {"digest": d, "needs": [t] if t else []} for d, t in teachers.items()}
    return {digest: {"trial": json.dumps(trial), "source": None} for digest, trial in told.items()}


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.0)


def test_deaths_are_forgiven_as_long_as_a_trial_gets_further(at_once):
    order = PlanOrder(configs_of({"a": None}))
    epochs = [(1, 0), (2, 0), (2, 7), (2, 9), (3, 0), *[(3, 0)] * MAX_FAILURES]
    for number, (epoch, forward) in enumerate(epochs):
        assert order.suggest(str(number))
        order.on_trial_result(str(number), {"epoch": epoch, "forward": forward})
        order.on_trial_complete(str(number), error=True)
        assert order.will_retry("a") == (number < len(epochs) - 1)
    assert order.suggest("none") == PlanOrder.FINISHED


def test_deaths_by_a_node_that_went_do_not_count(at_once):
    gone = set()
    order = PlanOrder(configs_of({"a": None}), None, lambda leaving: set(gone))
    for number in range(3 * MAX_FAILURES):
        assert order.suggest(str(number))
        gone.add(number)
        order.on_trial_complete(str(number), error=True)
    for number in range(MAX_FAILURES + 1):
        assert order.suggest(str(number))
        order.on_trial_complete(str(number), error=True)
    assert not order.will_retry("a")


def test_trials_come_in_the_plans_order_a_student_after_its_teacher(monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 60.0)
    configs = configs_of({"a": None, "student": "a", "b": None, "c": None})
    order = PlanOrder(configs)
    assert [order.suggest("1"), order.suggest("2")] == [configs["a"], configs["b"]]
    order.on_trial_complete("2")
    assert order.suggest("3") == configs["c"]
    order.on_trial_complete("1", error=True)
    order.on_trial_complete("3")
    assert order.suggest("4") is None  # the teacher waits, and its student for it
    order._not_before["a"] = 0.0
    assert order.suggest("4") == configs["a"]
    order.on_trial_complete("4")
    assert order.suggest("5") == configs["student"]
    assert order.suggest("6") is None
    order.on_trial_complete("5")
    assert order.suggest("6") == PlanOrder.FINISHED


def test_a_trial_that_another_command_has_is_passed_over_until_it_is_over():
    configs = configs_of({"a": None, "student": "a", "b": None})
    leases = {"a": Lease.ASKED, "student": Lease.OURS, "b": Lease.OURS}
    order = PlanOrder(configs, lease=leases.get)
    assert order.suggest("1") is None
    leases["a"] = Lease.THEIRS
    assert order.suggest("1") == configs["b"]
    assert order.suggest("2") is None
    leases["a"] = Lease.OVER
    assert order.suggest("2") == configs["student"]
    order.on_trial_complete("1")
    order.on_trial_complete("2")
    assert order.suggest("3") == PlanOrder.FINISHED


def test_one_team_at_a_time_waits_for_its_workers():
    placed = 0
    configs = configs_of({"a": None, "b": None})
    order = PlanOrder(configs, lambda: placed)
    assert order.suggest("1") == configs["a"]
    assert order.suggest("2") is None
    placed = 1
    assert order.suggest("2") == configs["b"]


def test_waits_grow_and_a_programs_own_fault_is_none_of_the_machines():
    assert [wait_after(failures) for failures in (1, 2, 3)] == [2.0, 8.0, 32.0]
    assert not issubclass(torch.OutOfMemoryError, OWN_FAULTS)
    assert not issubclass(OSError, OWN_FAULTS)
    assert issubclass(KeyError, OWN_FAULTS)
