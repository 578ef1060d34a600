"""The trial as Tune drives it, without a cluster: step by step, reused, cut short, blocked."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.disks import fill, small_disk
from trainables.data import augment
from trainables.data.listing import EMBEDDED
from trainables.networks import build_classifier
from trainables.recipe import Distillation
from trainables.store.checkpoint import save_checkpoint, stored_weights
from trainables.store.results import SECONDS, WAITING
from trainables.store.retries import NodeLeavesError
from trainables.store.storage import weights_path
from trainables.trial import RecipeTrial


@pytest.fixture
def start(tmp_path, monkeypatch, few_digits):
    """Return a function that makes a trial actor for a recipe on few digits."""
    monkeypatch.setattr("trainables.data.load.load_data", lambda scale, source: few_digits)
    monkeypatch.setattr("trainables.running.CHECKPOINT_SECONDS", 0.0)

    def config(recipe, **settings):
        trial = {
            "digest": recipe.digest(),
            "recipe": recipe.model_dump(mode="json"),
            "storage": str(tmp_path),
            "threads": 1,
            "device": "cpu",
            "compile": False,
            "hung_after": 60.0,
            **settings,
        }
        return {"trial": json.dumps(trial), "source": EMBEDDED}

    def make(recipe, actor=None, **settings):
        if actor is None:
            return RecipeTrial(config(recipe, **settings))
        assert actor.reset_config(config(recipe))
        return actor

    return make


def run(actor):
    results = [actor.step()]
    while not results[-1]["done"]:
        results.append(actor.step())
    return results


def test_a_trial_reports_every_epoch_once_and_is_not_trained_again(start, small, tmp_path):
    recipe = small(epochs=3)
    results = run(start(recipe))
    assert [e["epoch"] for result in results for e in result["epochs"]] == [1, 2, 3]
    assert results[-1]["outcome"] == "finished"
    assert results[-1]["weights"] == weights_path(str(tmp_path), recipe.digest())
    (again,) = run(start(recipe))
    assert (again["sha256"], again["outcome"]) == (results[-1]["sha256"], "finished")


def test_a_trial_that_waits_for_data_says_so_once_with_figures(start, small, monkeypatch):
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    monkeypatch.setattr(augment, "perf_counter", partial(next, count()))  # half of it waiting
    recipe = small(epochs=2, batch_size=32)
    results = run(start(recipe))
    assert [e[WAITING] for result in results for e in result["epochs"]] == [0.5, 0.5]
    said = "waits for data 50% of the time: 16 images/s; more --data-workers or packed shards"
    assert [note for result in results for note in result["notes"]] == [said]


def test_weights_along_the_way_are_those_of_a_shorter_training_and_leave_the_last_alone(
    start, small, tmp_path
):
    long, short = (small(epochs=n, scheduler="constant", warmup_epochs=0.0) for n in (3, 2))
    last = run(start(long))[-1]["sha256"]
    shutil.rmtree(tmp_path / "trials" / long.digest())
    cut = start(long, checkpoints=[1, 2])
    assert cut.step()["checkpoints"].keys() == {1}
    results = run(start(long, checkpoints=[1, 2]))  # in another process
    assert results[0]["checkpoints"].keys() == {1, 2}
    assert results[-1]["sha256"] == last
    run(start(short))
    along = stored_weights(results[-1]["checkpoints"][2], long.digest())
    theirs = stored_weights(weights_path(str(tmp_path), short.digest()), short.digest())
    assert all(torch.equal(value, theirs[name]) for name, value in along.items())


def test_a_reused_actor_trains_the_same_weights_as_a_fresh_one(start, small, tmp_path):
    first, second = small(epochs=2, seed=1), small("deit", epochs=2)
    fresh = run(start(second))[-1]["sha256"]
    for path in (tmp_path / "trials" / second.digest()).iterdir():
        path.unlink()
    actor = start(first)
    run(actor)
    assert run(start(second, actor))[-1]["sha256"] == fresh


def test_a_trial_cut_short_goes_on_in_another_actor_and_ends_the_same(start, small, tmp_path):
    recipe = small("deit", epochs=3)
    whole = run(start(recipe))[-1]["sha256"]
    for path in (tmp_path / "trials" / recipe.digest()).iterdir():
        path.unlink()
    cut = start(recipe)
    sent = [cut.step()["epochs"][0] for _ in range(2)]
    results = run(start(recipe))
    first, second, third = results[0]["epochs"]
    assert [first, second] == sent  # the seconds that they took, too
    assert all(epoch[SECONDS] > 0 for epoch in (first, second, third))
    assert results[-1]["sha256"] == whole


def test_a_trial_killed_within_an_epoch_goes_on_there_and_ends_the_same(
    start, small, tmp_path, monkeypatch
):
    recipe = small("deit", epochs=2, batch_size=16)  # of 12 steps
    whole = run(start(recipe))
    folder = tmp_path / "trials" / recipe.digest()
    shutil.rmtree(folder)
    monkeypatch.setattr("trainables.running.MIDWAY_SECONDS", 0.0)

    def save_and_die(*arguments, forward):
        name = save_checkpoint(*arguments, forward=forward)
        if name.startswith("epoch-00001.0000007-"):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("trainables.store.checkpoint.save_checkpoint", save_and_die)
        killed = multiprocessing.get_context("fork").Process(target=run, args=[start(recipe)])
        killed.start()
        killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    monkeypatch.setattr("trainables.running.MIDWAY_SECONDS", 1e9)
    (last,) = run(start(recipe))
    assert last["sha256"] == whole[-1]["sha256"]
    before = [result["epochs"][0] for result in whole]
    assert [e["train/loss"] for e in last["epochs"]] == [e["train/loss"] for e in before]


def test_a_trial_saves_what_it_did_and_leaves_a_node_that_is_taken_away(
    start, small, tmp_path, monkeypatch
):
    recipe = small(epochs=1)
    whole = run(start(recipe))[-1]["sha256"]
    shutil.rmtree(tmp_path / "trials" / recipe.digest())
    with monkeypatch.context() as patch:
        patch.setattr("trainables.running.LOOK_SECONDS", 0.0)
        patch.setattr("trainables.trial.node_leaves", lambda: True)
        actors = [start(recipe) for _ in range(2)]
        for step, actor in enumerate(actors, start=1):
            with pytest.raises(NodeLeavesError):
                actor.step()
            newest = max((tmp_path / "trials" / recipe.digest()).iterdir())
            assert newest.name.startswith(f"epoch-00000.000000{step}-")
    assert run(start(recipe))[-1]["sha256"] == whole


def test_a_trial_is_saved_after_every_epoch_from_which_it_may_be_stopped(
    start, small, tmp_path, monkeypatch
):
    monkeypatch.setattr("trainables.running.CHECKPOINT_SECONDS", 1e9)
    recipe = small(epochs=4)
    actor, folder = start(recipe, stops_from=2), tmp_path / "trials" / recipe.digest()
    saved = []
    for _ in range(3):
        actor.step()
        saved.append(sorted(path.name[:11] for path in folder.glob("epoch-*")))
    assert saved == [[], ["epoch-00002"], ["epoch-00002", "epoch-00003"]]


def test_a_collapse_ends_the_trial_with_its_reason_and_stays_an_outcome(start, small, tmp_path):
    recipe = small(epochs=4, learning_rate=1e30)
    results = run(start(recipe))
    assert results[-1]["outcome"] == "collapsed"
    assert "the training loss became" in results[-1]["reason"]
    assert "weights" not in results[-1]
    assert not Path(weights_path(str(tmp_path), recipe.digest())).exists()
    again = run(start(recipe))
    assert len(again) == 1
    assert again[0]["reason"] == results[-1]["reason"]


def test_a_student_whose_teacher_did_not_finish_is_blocked(start, small):
    teacher = small(epochs=4, learning_rate=1e30)
    student = small(epochs=1, distillation=Distillation(teacher=teacher))
    run(start(teacher))
    (result,) = run(start(student))
    assert result["outcome"] == "blocked"
    assert result["reason"] == f"blocked by {teacher.describe()}"
    assert result["epoch"] == 0


def test_a_warm_start_begins_with_the_last_weights_of_the_trial_that_it_needs(
    start, small, tmp_path
):
    clean = small("deit", epochs=2)
    still = {"learning_rate": 1e-30, "floor_rate": 0.0, "weight_decay": 0.0, "warmup_epochs": 0.0}
    robust = small("deit", epochs=1, seed=7, warm_start=clean, **still)
    (result,) = run(start(robust))
    assert (result["outcome"], result["reason"]) == ("blocked", f"blocked by {clean.describe()}")
    run(start(clean))
    assert run(start(robust))[-1]["outcome"] == "finished"
    ours, theirs = (
        stored_weights(weights_path(str(tmp_path), recipe.digest()), recipe.digest())
        for recipe in (robust, clean)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert robust.digest() != small("deit", epochs=1, seed=7).digest()
    assert robust.with_seed(3).warm_start.seed == 3


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_stored_weights_are_their_mean_where_it_is_judged(start, small, tmp_path, evaluated):
    recipe = small(epochs=2, ema_decay=0.999999, ema_evaluated=evaluated)
    sha256 = run(start(recipe))[-1]["sha256"]
    path = weights_path(str(tmp_path), recipe.digest())
    stored = stored_weights(path, recipe.digest())["backbone.fc.weight"]
    first = build_classifier(recipe).backbone.fc.weight
    # So slow a mean is where the training began.
    assert bool((stored - first).abs().max() < 1e-4) == evaluated
    Path(path).unlink()
    assert run(start(recipe))[-1]["sha256"] == sha256


def test_a_warm_start_that_was_cut_short_goes_on_from_its_own_weights(start, small, tmp_path):
    clean = small(epochs=1)
    recipe = small(epochs=3, seed=7, warm_start=clean)
    run(start(clean))
    whole = run(start(recipe))[-1]["sha256"]
    shutil.rmtree(tmp_path / "trials" / recipe.digest())
    start(recipe).step()
    assert run(start(recipe))[-1]["sha256"] == whole


@pytest.fixture
def trials(tmp_path):
    """The folder of the trials, a small disk of its own."""
    try:
        with small_disk(tmp_path / "trials", 64) as disk:
            yield disk
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error.stderr!r}")


def test_a_full_disk_pauses_the_trial_and_nothing_that_is_there_is_lost(
    start, small, trials, monkeypatch
):
    monkeypatch.setattr("trainables.running.FULL_SECONDS", 0.0)
    recipe = small("deit", epochs=3)
    whole = run(start(recipe))[-1]["sha256"]
    own = trials / recipe.digest()
    shutil.rmtree(own)
    actor = start(recipe)
    actor.step()
    kept = contents(own)
    filler = fill(trials)
    paused, still = actor.step(), actor.step()
    assert (paused["outcome"], paused["done"], paused["epoch"]) == ("training", False, 2)
    (note,) = paused["notes"]
    said = rf"paused: no room for {own}/\S+\.pt, which takes \d\.\d MB: No space left on device"
    assert re.fullmatch(said, note)
    assert (still["notes"], still["epochs"], still["epoch"]) == ([], [], 2)
    assert contents(own) == kept
    filler.unlink()
    assert actor.step()["notes"] == ["there is room again, it goes on"]
    filler = fill(trials)
    last = actor.step()
    assert (last["outcome"], last["done"], last["epoch"]) == ("training", False, 3)
    filler.unlink()
    last = actor.step()
    assert (last["outcome"], last["sha256"]) == ("finished", whole)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_the_program_is_at_fault_for_fails_the_trial_with_its_traceback(start, small):
    actor = start(small())
    actor._trial_config["recipe"]["epochs"] = -1
    result = actor.step()
    assert (result["outcome"], result["done"], result["epochs"]) == ("failed", True, [])
    assert result["reason"]
    assert "in open_trial" in result["trace"]


def test_a_trial_says_that_its_checkpoint_was_damaged(start, small, tmp_path):
    recipe = small(epochs=3)
    cut = start(recipe)
    cut.step()
    cut.step()
    newest = max((tmp_path / "trials" / recipe.digest()).glob("epoch-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    result = start(recipe).step()
    (note,) = result["notes"]
    assert f"{newest.name} is damaged" in note
    assert result["epoch"] == 2


def test_trials_whose_checkpoints_were_swapped_end_with_their_own_weights(start, small, tmp_path):
    recipes = small(epochs=2), small(epochs=2, seed=1)
    whole = [run(start(recipe))[-1]["sha256"] for recipe in recipes]
    first, second = (tmp_path / "trials" / recipe.digest() for recipe in recipes)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    for recipe, other, sha256 in zip(recipes, recipes[::-1], whole, strict=True):
        results = run(start(recipe))
        said = f"belongs to trial {other.digest()}, not to {recipe.digest()}"
        assert [said in note for note in results[0]["notes"]] == [True, True]
        assert (results[-1]["outcome"], results[-1]["sha256"]) == ("finished", sha256)


def test_a_student_learns_from_its_teachers_weights_and_no_others(start, small, tmp_path):
    teacher = small(epochs=1)
    student = small(epochs=1, seed=1, distillation=Distillation(teacher=teacher))
    other = small(epochs=1, seed=2)
    for recipe in (teacher, other):
        run(start(recipe))
    path = Path(weights_path(str(tmp_path), teacher.digest()))
    another = Path(weights_path(str(tmp_path), other.digest()))
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), b"", another.read_bytes()):
        path.write_bytes(damaged)
        (result,) = run(start(student))
        assert result["outcome"] == "failed"
        assert str(path) in result["reason"]
    path.write_bytes(content)
    assert run(start(student))[-1]["outcome"] == "finished"
