"""What a team does when it fails: try again, wait for others, or give up in words."""

from __future__ import annotations

import time

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util import placement_group, placement_group_table

from trainables import distributed
from trainables.distributed import _given_up, _train_to_the_end, others_train
from trainables.ray_internals import release_orphans

NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))
BUSY = {0: RuntimeError("NCCL error\nmore of it"), 1: ActorDiedError()}


@pytest.fixture
def tried(small, tmp_path, monkeypatch):
    """Return how often a team is tried that ends in errors, and what is raised in the end."""
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    trial = {"recipe": small().model_dump(mode="json"), "digest": small().digest()}
    trial |= {"storage": str(tmp_path), "workers": 2}

    def run(*errors, others=False):
        left = list(errors)

        def train(trial):
            if left:
                raise left.pop(0)

        monkeypatch.setattr(distributed, "_train", train)
        monkeypatch.setattr(distributed, "release_orphans", lambda: None)
        monkeypatch.setattr(distributed, "others_train", lambda: others)
        try:
            _train_to_the_end(trial)
        except Exception as error:
            return len(errors) - len(left), error
        return len(errors) - len(left), None

    return run


def test_a_team_without_room_waits_for_as_long_as_others_train(tried):
    assert tried(*[NO_ROOM] * 9, others=True) == (9, None)
    assert tried(NO_ROOM, others=False) == (1, NO_ROOM)
    ill = ControllerError(OSError("no such bucket"))
    assert tried(ill, others=True) == (1, ill)


def test_deaths_are_tried_again_and_a_programs_own_fault_is_not(tried):
    own = WorkerGroupError("two failed", {0: BUSY[0], 1: ValueError("a bad axis")})
    assert tried(own) == (1, own)
    of_controller = RayTaskError("run", "a trace", KeyError("x"))
    assert tried(of_controller) == (1, of_controller)
    assert tried(ActorDiedError()) == (1, None)
    assert tried(*[ActorDiedError()] * 9)[0] == 1 + distributed.MAX_FAILURES
    assert tried(*[WorkerGroupError("both failed", BUSY)] * 9)[0] == 1 + distributed.MAX_FAILURES


def test_a_trial_that_is_given_up_says_in_a_line_what_its_workers_raised():
    own = WorkerGroupError("two failed", {0: BUSY[0], 1: ValueError("a bad axis")})
    assert _given_up("abc", own)["reason"] == "ValueError: a bad axis"
    told = _given_up("abc", WorkerGroupError("both failed", BUSY))
    assert told["reason"] == "RuntimeError: NCCL error"
    assert "both failed" in told["trace"]
    assert (told["outcome"], told["done"]) == ("failed", True)


@pytest.fixture
def two_cpus():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Controller:
    def hold(self):
        self.group = placement_group([{"CPU": 1}] * 2)
        return ray.get(self.group.ready()) and None


def test_what_a_dead_controller_held_is_given_back(two_cpus):
    controller = ray.remote(num_cpus=0)(Controller).remote()
    ray.get(controller.hold.remote())
    waiting = placement_group([{"CPU": 1}])
    release_orphans()
    assert others_train()
    ray.kill(controller)
    deadline = time.monotonic() + 60
    while not waiting.wait(1):
        assert time.monotonic() < deadline
        release_orphans()
    assert [group["state"] for group in placement_group_table().values()].count("CREATED") == 1
