"""What a team does when it fails: die to be tried again, wait for others, or fail in words."""

from __future__ import annotations

import json
import time

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util import placement_group

from trainables import trial
from trainables.ray_internals import node_leaves, nodes_gone, release_orphans
from trainables.store.retries import NodeLeavesError
from trainables.trial import teams_placed, train_together

NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))
BUSY = WorkerGroupError("both failed", {0: RuntimeError("NCCL error"), 1: ActorDiedError()})
LEFT = WorkerGroupError("node away", {0: RuntimeError("NCCL error"), 1: NodeLeavesError()})
OWN = WorkerGroupError("two failed", {0: RuntimeError("NCCL error"), 1: ValueError("a bad axis")})


@pytest.fixture
def tried(monkeypatch):
    """Return a function: what a team that ends in errors reports, in how many tries."""
    reported = []
    monkeypatch.setattr(trial, "release_orphans", lambda: None)
    monkeypatch.setattr(trial.tune, "report", reported.append)

    def run(*errors):
        left = list(errors)

        def train(settings, starts):
            if left:
                raise left.pop(0)

        monkeypatch.setattr("trainables.distributed.train_team", train)
        train_together({"trial": json.dumps({"digest": "abc"}), "source": None})
        return len(errors) - len(left), reported

    return run


def test_a_team_without_room_or_that_left_a_node_begins_anew_without_limit(tried):
    assert tried(*[NO_ROOM, LEFT] * 9) == (18, [])
    with pytest.raises(ControllerError):
        tried(ControllerError(OSError("no such bucket")))


def test_deaths_are_raised_for_tune_and_a_programs_own_fault_is_reported(tried):
    for death in (ActorDiedError(), BUSY):
        with pytest.raises(type(death)):
            tried(death)
    _, (result,) = tried(OWN)
    assert (result["outcome"], result["reason"]) == ("failed", "ValueError: a bad axis")
    assert "two failed" in result["trace"]
    assert result["done"]


@pytest.fixture
def two_cpus():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_node_that_is_drained_leaves(two_cpus):
    assert not node_leaves()
    busy = ray.remote(num_cpus=1)(Controller).remote()  # an idle node would end at once
    node = ray.get(busy.node.remote())
    client = ray._private.worker.global_worker.gcs_client
    preempted, in_two_minutes = 2, (time.time_ns() // 10**6) + 120_000
    assert client.drain_node(node, preempted, "spot", in_two_minutes)[0]
    assert node_leaves()
    assert (nodes_gone(True), nodes_gone(False)) == ({node}, set())


class Controller:
    def hold(self):
        self.group = placement_group([{"CPU": 1}] * 2)
        return ray.get(self.group.ready()) and None

    def node(self):
        return ray.get_runtime_context().get_node_id()


def test_what_a_dead_controller_held_is_given_back(two_cpus):
    controller = ray.remote(num_cpus=0)(Controller).remote()
    ray.get(controller.hold.remote())
    waiting = placement_group([{"CPU": 1}])
    release_orphans()
    assert teams_placed() == 1
    ray.kill(controller)
    deadline = time.monotonic() + 60
    while not waiting.wait(1):
        assert time.monotonic() < deadline
        release_orphans()
    assert teams_placed() == 1
