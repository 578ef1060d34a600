"""What a run shares out before it trains, and how it ends, on a real Ray and a real database."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import ray

from grid.cluster import Placement, check_room
from grid.launch import Launch, _config, _kinds_of_gpus, _start_pool
from grid.options import RunOptions
from grid.plan import build_plan
from grid.status import ProgressLine
from grid.study import load_study
from tests.driver import study_of_one
from tests.made_up import record
from trainables.scale import DIGITS
from trainables.trial import trial_config

CLUSTER = """
head_node_type: head
max_workers: 9
available_node_types:
  head: {resources: {CPU: 0}}
  big: {resources: {CPU: 64}, max_workers: 3}
"""


@pytest.fixture
def launch(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(study_of_one(epochs=10))
    study = load_study(str(path))
    return Launch(
        study=study,
        plan=build_plan(study, DIGITS),
        scale=DIGITS,
        options=RunOptions(results=tmp_path / "results", workers=2),
    )


@pytest.mark.parametrize(
    ("gpus", "stated", "numerics"),
    [(0.0, None, "exact"), (1.0, None, "fast"), (1.0, "exact", "exact")],
)
def test_trainings_are_fast_on_gpus_unless_they_are_to_be_exact(launch, gpus, stated, numerics):
    options = launch.options.model_copy(update={"gpus_per_worker": gpus, "numerics": stated})
    (trial,) = launch.plan.trials
    assert trial_config(_config(replace(launch, options=options), trial))["numerics"] == numerics


@pytest.fixture(scope="module")
def two_cpus():
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_team_that_fills_the_machine_has_an_evaluator_beside_it(two_cpus, launch):
    assert len(_start_pool(launch, "sqlite:///none")._homes) == 1


def test_a_step_is_tried_on_a_gpu_before_anything_is_trained(two_cpus, launch, monkeypatch):
    recipes = [launch.plan.trials[0].recipe.with_seed(seed) for seed in (1, 2)]
    assert _kinds_of_gpus(launch, recipes) == {}  # on CPUs nothing is tried
    options = launch.options.model_copy(update={"gpus_per_worker": 0.5})
    launch = replace(launch, options=options)
    assert _kinds_of_gpus(launch, recipes) == {}  # made-up GPUs have any memory

    def too_large(recipes, workers, share, is_fast):
        return [f"{len(recipes)} recipes, {workers} workers, {share} GPUs, {is_fast}"]

    monkeypatch.setattr("trainables.train.memory.misfits", too_large)
    with pytest.raises(ValueError, match=r"^1 recipes, 2 workers, 0\.5 GPUs, True$"):
        _kinds_of_gpus(launch, recipes)


def test_a_training_too_large_for_one_kind_of_gpu_is_placed_on_another(
    two_cpus, launch, monkeypatch
):
    small, large = "accelerator_type:T4", "accelerator_type:H200"
    options = launch.options.model_copy(update={"gpus_per_worker": 1.0})
    launch, recipe = replace(launch, options=options), launch.plan.trials[0].recipe
    node = {"CPU": 8.0, "GPU": 2.0}
    nodes = {"a": node | {small: 1.0}, "b": node | {large: 1.0}}
    monkeypatch.setattr("grid.launch.nodes_there", lambda: nodes)
    monkeypatch.setattr("grid.cluster.nodes_there", lambda: nodes)
    answers = {small: ["on T4, it takes 20 GiB"], large: [""]}
    monkeypatch.setattr("grid.launch._dry_steps", lambda *_: answers)
    assert _kinds_of_gpus(launch, [recipe]) == {recipe.digest(): large}
    trial = trial_config(_config(launch, launch.plan.trials[0], large))
    assert trial["kind"] == {large: 0.001}
    nodes["b"]["GPU"] = 1.0  # of two workers
    with pytest.raises(ValueError, match="2 workers of 1 CPUs and 1 GPUs of H200 each, but Ray"):
        _kinds_of_gpus(launch, [recipe])


def test_a_trial_that_fits_no_node_is_refused_unless_the_autoscaler_may_start_such(
    two_cpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(CLUSTER)
    check_room([Placement(workers=2), Placement(gpus=2.0)], joined=False)
    with pytest.raises(ValueError, match="a trial needs 4 workers of 1 CPUs and 0 GPUs each, but"):
        check_room([Placement(workers=4)], joined=False)
    with pytest.raises(ValueError, match=r"a trial needs 1 CPUs and 2\.5 GPUs, but .* 2 GPUs;"):
        check_room([Placement(gpus=2.5)], joined=False)
    check_room([Placement(workers=192)], joined=True)
    with pytest.raises(ValueError, match="a trial needs 193 workers"):
        check_room([Placement(workers=193)], joined=True)


@pytest.mark.parametrize(
    ("share", "free", "lanes"),
    [(1.0, 4.0, 4), (2.0, 5.0, 2), (0.75, 4.0, 4), (0.3, 4.0, 12), (0.5, 3.5, 7), (0.75, 3.5, 3)],
)
def test_a_share_of_a_gpu_lies_on_one_gpu(share, free, lanes):
    assert Placement(gpus=share).lanes([{"CPU": 64.0, "GPU": free}]) == lanes


def test_cells_are_recorded_and_progress_shown_between_a_rush_of_reports(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("grid.record.EVENTS_AT_ONCE", 1)
    monkeypatch.setattr(ProgressLine, "show", lambda _, text: shown.append(text))
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=["T6"], evaluators=["clean"])
    record(tmp_path, study, plan)
    stands = [re.findall(r"trials (\d)/3.* cells (\d)/3", text)[0] for text in shown]
    assert stands[-1] == ("3", "3")
    assert ("1", "1") in stands
    assert stands == sorted(stands)
