"""The schedule simulation, against schedules worked out by hand."""

from __future__ import annotations

import pytest

from grid.plan import Trial, build_plan
from grid.schedule import lanes_of, simulate
from grid.studies import load_study
from trainables.recipe import Distillation
from trainables.scale import IMAGENET


def trial(recipe, cost):
    return Trial(recipe, recipe.digest(), (), (), cost)


@pytest.fixture
def trials(small):
    """Costs 4, 3, 3, 2: no two lanes share them better than 6 and 6."""
    return [trial(small(seed=seed), cost) for seed, cost in enumerate((4, 3, 3, 2))]


def test_trials_take_the_first_free_lane_in_their_order(trials):
    found = simulate(trials, lanes=2, workers=1, seconds_per_unit=10)
    # Lane 1: 4 until 40, then 2 until 60. Lane 2: 3 until 30, then 3 until 60.
    assert list(found.starts.values()) == [0, 0, 30, 40]
    assert (found.makespan, found.lower_bound, found.utilisation) == (60, 60, 1)


def test_one_long_trial_bounds_the_time_however_many_lanes(trials):
    found = simulate(trials, lanes=8, workers=1, seconds_per_unit=10)
    assert (found.makespan, found.lower_bound) == (40, 40)
    assert found.utilisation == pytest.approx(120 / 320)


def test_more_workers_a_trial_shorten_it(trials):
    found = simulate(trials, lanes=1, workers=2, seconds_per_unit=10)
    assert (found.makespan, found.utilisation) == (60, 1)


def test_a_student_waits_for_its_teacher_and_others_go_first(small):
    teacher = small(seed=1)
    student = small(distillation=Distillation(teacher=teacher))
    trials = [trial(teacher, 3), trial(student, 2), trial(small(seed=2), 1)]
    found = simulate(trials, lanes=2, workers=1, seconds_per_unit=1)
    assert found.starts == {trials[0].digest: 0, trials[2].digest: 0, trials[1].digest: 3}
    assert (found.makespan, found.lower_bound) == (5, 5)


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_the_papers_study_ends_close_to_the_bound(nodes):
    plan = build_plan(load_study("paper"), IMAGENET)
    lanes = lanes_of(nodes, 8, workers=8, gpus_per_worker=1)
    found = simulate(plan.trials, lanes=lanes, workers=8, seconds_per_unit=1)
    assert found.makespan <= 1.05 * found.lower_bound


def test_a_worker_never_spans_nodes():
    assert lanes_of(3, 8, workers=2, gpus_per_worker=3) == 3
    with pytest.raises(ValueError, match="1 nodes of 1 GPUs do not hold 2 workers of 1 GPUs"):
        lanes_of(1, 1, workers=2, gpus_per_worker=1)
