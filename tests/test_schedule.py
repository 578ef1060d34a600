"""The schedule simulation, against schedules worked out by hand."""

from __future__ import annotations

import pytest

from grid.forecast import Throughput, forecast
from grid.plan import build_plan
from grid.schedule import (
    Interruptions,
    Job,
    Machines,
    Schedule,
    gpu_machines,
    simulate,
    speed_of,
)
from grid.studies import load_study
from trainables.scale import IMAGENET

DAY = 86_400.0


def jobs(*seconds):
    return [Job(str(place), each) for place, each in enumerate(seconds)]


def on(lanes, **changes):
    return Machines(lanes=lanes, evaluators=lanes, **{"own": float(lanes)} | changes)


def test_trials_take_the_first_free_lane_in_their_order():
    found = simulate(jobs(40, 30, 30, 20), on(2))
    # Lane 1: 40, then 20 until 60. Lane 2: 30, then 30 until 60.
    assert found.starts == {"0": 0, "1": 0, "2": 30, "3": 40}
    assert found == Schedule(
        lower_bound=60, trained=60, makespan=60, utilisation=1, starts=found.starts
    )


def test_one_long_trial_bounds_the_time_however_many_lanes():
    found = simulate(jobs(40, 30, 30, 20), on(8))
    assert (found.makespan, found.lower_bound) == (40, 40)
    assert found.utilisation == pytest.approx(120 / 320)


def test_a_student_waits_for_its_teacher_and_others_go_first():
    found = simulate([Job("t", 3), Job("s", 2, teacher="t"), Job("o", 1)], on(2))
    assert found.starts == {"t": 0, "o": 0, "s": 3}
    assert (found.makespan, found.lower_bound) == (5, 5)


def test_a_teacher_that_is_not_to_be_trained_is_not_waited_for():
    assert simulate([Job("s", 2, teacher="done")], on(1)).makespan == 2


def test_evaluators_on_cores_of_training_share_them_evenly():
    judged = Job("a", 10, shards=((0, 6.0),))
    found = simulate([judged, Job("b", 20)], Machines(lanes=1, evaluators=1))
    # a trains until 10; then its shard and b each go at half speed: the shard takes until 22, when
    # b has 14 left, which it then has for itself.
    assert (found.trained, found.makespan, found.lower_bound) == (36, 36, 36)


def test_evaluators_with_machines_of_their_own_slow_no_training():
    judged = Job("a", 10, shards=((1, 6.0), (0, 2.0)))
    found = simulate([judged, Job("b", 5)], Machines(lanes=1, evaluators=2, own=0.5))
    # From 10 on two shards share half a worker: at a quarter each, rank 0 ends at 18 and rank 1
    # has 4 left, which take 8 at half speed.
    assert (found.trained, found.makespan, found.lower_bound) == (15, 26, 16)


def test_a_trial_goes_on_from_its_last_whole_epoch_when_its_node_is_taken():
    ten_epochs = Job("a", 100.0, epochs=10)
    draw = Interruptions(per_node_day=DAY / 64, seconds_away=30.0, seed=1)
    found = simulate([ten_epochs], on(1), draw)
    assert found.interruptions > 0
    assert 0 < found.repeated < 10 * found.interruptions
    away = found.interruptions * 30
    assert found.makespan == pytest.approx(100 + away + found.repeated)
    assert simulate([ten_epochs], on(1), draw) == found


def test_another_node_takes_over_what_was_interrupted():
    machines = on(2, nodes=2)
    # Of this draw the first node goes after 28.9 s, the other one after 376 s.
    draw = Interruptions(per_node_day=DAY / 200, seconds_away=1e6, seed=1)
    found = simulate(jobs(100.0, 100.0), machines, draw)
    assert (found.interruptions, found.makespan) == (1, 200)
    assert found.repeated == pytest.approx(28.9, abs=0.1)


def test_lanes_and_nodes_divide_each_other():
    assert [list(on(4, nodes=2).nodes_of(lane)) for lane in range(4)] == [[0], [0], [1], [1]]
    assert [list(on(2, nodes=4).nodes_of(lane)) for lane in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("nodes", "workers"), [(1, 1), (8, 8), (64, 8)])
def test_the_papers_study_trains_close_to_the_bound(nodes, workers):
    plan = build_plan(load_study("paper"), IMAGENET, evaluators=[])
    found = forecast(plan, IMAGENET, Throughput(seconds_per_unit=60), held_out=50_000)
    machines = gpu_machines(nodes, 8, workers=workers, gpus_per_worker=1)
    schedule = simulate(found.jobs(workers), machines)
    assert schedule.makespan <= 1.05 * schedule.lower_bound


def test_no_worker_spans_nodes_and_evaluators_have_their_share():
    # 12 evaluators hold 3 GPUs of the first node; 5, 8 and 8 are left: 1, 2 and 2 workers of 3.
    machines = gpu_machines(3, 8, workers=2, gpus_per_worker=3)
    assert machines == Machines(lanes=2, evaluators=12, nodes=3, own=3.0)
    with pytest.raises(ValueError, match="1 nodes of 8 GPUs do not hold 8 workers of 1 GPUs"):
        gpu_machines(1, 8, workers=8, gpus_per_worker=1)


@pytest.mark.parametrize(
    ("gpus", "workers", "advice"),
    [
        (1, 1, "--gpus-per-worker 0.75"),
        (2, 2, "--gpus-per-worker 0.75"),
        (4, 4, "fewer --workers"),
    ],
)
def test_gpus_that_evaluators_share_are_refused_with_what_fits(gpus, workers, advice):
    with pytest.raises(ValueError, match=f"GPUs: give {advice}$"):
        gpu_machines(1, gpus, workers=workers, gpus_per_worker=1)
    if "0.75" in advice:
        machines = gpu_machines(1, gpus, workers=workers, gpus_per_worker=0.75)
        assert (machines.lanes, machines.own) == (1, 0.25)


def test_a_worker_has_its_share_on_one_gpu():
    # Of 8 GPUs evaluators hold one, and 7 are free: 0.25 of each is left over, which is no 0.75.
    assert gpu_machines(1, 8, workers=1, gpus_per_worker=0.75).lanes == 7
    assert gpu_machines(1, 8, workers=1, gpus_per_worker=0.1).lanes == 70
    assert [speed_of(share) for share in (0, 2, 1, 0.75, 0.5, 0.2)] == [1, 1, 1, 1, 1 / 2, 1 / 5]
