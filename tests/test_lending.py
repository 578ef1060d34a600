"""Which GPUs evaluators may hold: two nodes of four GPUs each, counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import filling
from grid.lending import lendable
from trainables.scale import scale_named

NODES = {"a": {"CPU": 16.0, "GPU": 4.0}, "b": {"CPU": 16.0, "GPU": 4.0}}
ONE = {"CPU": 1.0, "GPU": 1.0}
MOST = {("a", "0"): 4, ("a", "1"): 4, ("a", "2"): 4, ("a", "3"): 4}
MOST |= {("b", gpu): count for (_, gpu), count in MOST.items()}


def lent(placed=(), waiting=(), there=None, *, wanted=100, kept=1.0, nodes=NODES):
    evaluators = Counter(there or {})
    return lendable(nodes, placed, waiting, evaluators, wanted=wanted, kept=kept)


def on_node(lent):
    counts = Counter()
    for (node, _), count in lent.items():
        counts[node] += count
    return counts


def test_evaluators_borrow_every_gpu_that_no_trial_has_use_for():
    assert on_node(lent()) == {"a": 16, "b": 16}
    assert on_node(lent([("a", ONE)] * 3)) == {"a": 4, "b": 16}
    assert lent(wanted=3).total() == 3
    assert lent(wanted=0).total() == 0


def test_they_give_back_what_a_waiting_trial_needs_and_keep_an_eighth():
    running = [("a", ONE)] * 4 + [("b", ONE)] * 2
    there = {("b", "2"): 4, ("b", "3"): 4}
    assert lent(running, there=there) == there
    kept = lent(running, [[ONE]] * 3, there)
    assert kept.total() == 4  # on one of the two GPUs
    assert kept in (Counter({("b", "2"): 4}), Counter({("b", "3"): 4}))
    assert lent(running, [[ONE]] * 3, there, kept=0).total() == 0
    assert lent(running, [[ONE]] * 3, there, wanted=0).total() == 0  # nothing is to be judged
    assert lent(running, [[ONE]], there | {("b", "3"): 1}) == {("b", "2"): 4}


def test_a_trial_as_large_as_the_cluster_gets_all_of_it_once_that_would_do():
    assert lent(waiting=[[ONE] * 8], there=MOST).total() == 0
    # As long as another trial runs, it could not start: they go on.
    assert lent([("a", ONE)], [[ONE] * 8], there={("b", "0"): 4}).total() == 28
    assert lent(waiting=[[ONE] * 4], there=MOST) == {h: 4 for h in MOST if h[0] == "b"}


def test_where_trials_hold_all_evaluators_wait_for_their_share_of_what_comes_free():
    all_held = [(node, ONE) for node in "aabb" * 2]
    assert lent(all_held, [[ONE]]) == {("a", ""): 4}
    assert lent(all_held, [[ONE]], kept=2.0) == {("a", ""): 4, ("b", ""): 4}
    assert lent(all_held, [[ONE]], wanted=0).total() == 0
    assert lent(all_held, [[ONE] * 2]).total() == 0  # which the larger trial gets


@pytest.mark.parametrize("there", [{}, {("a", "0"): 4}, {("a", str(gpu)): 1 for gpu in range(4)}])
def test_a_share_of_a_gpu_is_placed_on_one_gpu(there):
    node, share = {"a": NODES["a"]}, {"CPU": 1.0, "GPU": 0.75}
    # Four trials of three quarters leave a quarter of each, which no fifth can use.
    full = lent([("a", share)] * 4, [[share]], {("a", "0"): 1}, nodes=node)
    assert full == {("a", gpu): 1 for gpu in ("0", "other 0", "other 1", "other 2")}
    # Beside three, a fourth needs a GPU of which at most a quarter is lent.
    left = lent([("a", share)] * 3, [[share]], there, nodes=node, kept=0)
    assert sorted(left.values()) == [1, 1, 1, 1]


def test_what_waits_for_other_things_than_gpus_reserves_none():
    assert lent(waiting=[[ONE | {"CPU": 17.0}]], there=MOST) == MOST
    assert lent(waiting=[[ONE | {"accelerator_type:H200": 0.001}]], there=MOST) == MOST
    large = NODES | {"b": NODES["b"] | {"accelerator_type:H200": 1.0}}
    waiting = [[ONE | {"accelerator_type:H200": 0.001}]] * 5
    assert on_node(lent(waiting=waiting, there=MOST, nodes=large)) == {"a": 16}


def test_evaluators_without_work_stay_only_on_nodes_where_a_trial_is():
    there = {("a", "1"): 4, ("b", "0"): 4}
    assert lent([("a", ONE)], there=there, wanted=0) == {("a", "1"): 4}
    assert lent([("a", ONE)], there=there, wanted=4).total() == 4  # not counted twice
    assert lent(there=there, wanted=0).total() == 0


def test_a_share_that_may_be_beside_an_evaluator_is_taken_to_be_on_another_gpu():
    node, share = {"a": {"CPU": 16.0, "GPU": 2.0}}, {"CPU": 1.0, "GPU": 0.5}
    # Else the second GPU would pass for whole, and the trial wait for an evaluator without end.
    left = lent([("a", share)], [[ONE]], {("a", "0"): 1}, nodes=node, kept=0)
    assert left == {("a", "other 0"): 2}
    assert lent([("a", share)], [], {("a", "0"): 1}, nodes=node).total() == 6


def test_without_a_gpu_node_one_evaluator_has_the_autoscaler_start_one():
    assert lent(nodes={"head": {"CPU": 2.0}}) == {("", ""): 1}
    assert lent(nodes={"head": {"CPU": 2.0}}, wanted=0).total() == 0


@pytest.mark.parametrize(("scale", "workers"), [("digits", 1), ("imagenet", 4)])
def test_over_the_papers_study_at_least_seven_of_eight_gpus_are_busy(scale, workers, monkeypatch):
    monkeypatch.setattr(filling, "STEPS", 400)
    plan, work = filling.study_at(scale_named(scale))
    (mean,) = filling.busy(filling.simulated(plan, work, workers))
    assert 7 <= mean <= 8
