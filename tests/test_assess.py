"""The pool on the real Ray: shards, their order, a run cut short, an actor that dies."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace

import pytest
import ray
import torch

from evaluators import evaluator_named
from evaluators.base import cell_digest, judge_images
from evaluators.ledger import from_parquet, to_parquet
from evaluators.shards import ShardStore
from grid.assess import Cell, EvaluatorPool
from trainables.data.base import Shard
from trainables.data.listing import EMBEDDED
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.scale import DIGITS
from trainables.store.checkpoint import save_weights

SCALE = replace(DIGITS, attack_subset=12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ray_session():
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="pool"
    )
    yield
    ray.shutdown()


@pytest.fixture
def trial(small, tmp_path):
    recipe = small()
    classifier = build_classifier(recipe)
    save_weights(tmp_path / "run" / "weights.safetensors", classifier, recipe.model_dump_json())
    return recipe.digest(), classifier.eval(), (tmp_path / "run").as_uri()


def new_pool(folder):
    (node,) = (node["NodeID"] for node in ray.nodes())
    return EvaluatorPool(
        lambda there, wanted: Counter({(node, ""): 1}),
        f"sqlite:///{folder}/mlflow.db",
        SCALE,
        EMBEDDED,
        folder / "shards",
        threads=1,
        on_gpus=False,
        hung_after=8.0,
    )


@pytest.fixture(scope="module")
def shared(ray_session, tmp_path_factory):
    """One pool for all: an actor's imports take longer than what is asked of it."""
    return new_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def pool(shared, monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("evaluators.shards.FIRST_PIXELS", 5 * DIGITS.image_size**2)
    yield shared
    for cell in list(shared._stores):
        shared.settle(cell)


def cell_of(trial, evaluator):
    digest, _, uri = trial
    question = cell_digest(evaluator_named(evaluator, SCALE), load_data(SCALE))
    return Cell(digest, uri, evaluator, question)


def judged(pool, count=1):
    found, deadline = [], time.monotonic() + 120
    while len(found) < count:
        found += pool.poll(1)
        assert time.monotonic() < deadline
    return found


def test_a_cell_is_judged_by_shards_and_comes_out_as_if_judged_whole(pool, trial):
    _, classifier, _ = trial
    pgd = evaluator_named("pgd", SCALE)
    cell = cell_of(trial, "pgd")
    assert pgd.total(load_data(SCALE)) == 12
    pool.submit(cell, 12)
    # 12 images of cost 2 at a pace of 3 seconds, the time of a shard under way among them.
    assert sum(pool.seconds(Counter(), {"pgd": 2.0}, 3.0)) == pytest.approx(72)
    for ago, rest in ((9, 63), (90, 72)):  # of 30 s, 21 are left; a late one takes a third more
        pool._under_way[None] = (time.monotonic() - ago, cell, Shard(0, 5), None)
        spent, left = pool.seconds(Counter(), {"pgd": 2.0}, 3.0)
        assert spent >= ago
        assert left == pytest.approx(rest, abs=3)
    del pool._under_way[None]
    ((_, content, _),) = judged(pool)
    ledger, seconds = from_parquet(content)
    assert seconds > 0
    assert ledger.equals(judge_images(pgd, classifier, load_data(SCALE), device=CPU))
    assert {s.name: s.n for s in pgd.summarize(ledger)}["pgd-100"] == 12
    names = sorted(path.name.rpartition("-")[0] for path in pool._folder.rglob("*.parquet"))
    assert names == ["0-5", "5-12"]
    pool.settle(cell)
    assert len(pool) == 0
    assert not pool._folder.exists()
    spent, left = pool.seconds(Counter(pgd=24), {}, 0.0)
    assert spent == pytest.approx(seconds, abs=0.1)
    assert left == pytest.approx(2 * spent)
    # Of clean, the cost at the pace of pgd: 12 images of cost 2 took what 24 of cost 1 take.
    assert pool.seconds(Counter(clean=24), {"pgd": 2.0, "clean": 1.0}, 0.0)[1] == spent


def test_a_cell_with_a_number_of_images_of_its_own_has_the_verdicts_of_the_larger_one(pool, trial):
    data = load_data(SCALE)
    fewer, usual = (evaluator_named("pgd", SCALE, images=count) for count in (5, 0))
    assert set(fewer.images(data).ids) < set(usual.images(data).ids)
    pool.submit(replace(cell_of(trial, "pgd"), question=cell_digest(fewer, data), images=5), 5)
    ((_, content, _),) = judged(pool)
    rows = from_parquet(content)[0].drop_columns("image").to_pylist()
    assert {row["image_id"] for row in rows} == set(fewer.images(data).ids)
    larger = judge_images(usual, trial[1], data, device=CPU).drop_columns("image").to_pylist()
    assert all(row in larger for row in rows)


def test_shards_that_a_stopped_run_left_are_not_judged_again(pool, trial):
    _, classifier, _ = trial
    cell = cell_of(trial, "pgd")
    store = ShardStore(pool._folder / f"{cell.trial}-{cell.question}", 12)
    pgd = evaluator_named("pgd", SCALE)
    for shard in (Shard(2, 4), Shard(8, 12)):
        ledger = judge_images(pgd, classifier, load_data(SCALE), device=CPU, shard=shard)
        store.add(shard, to_parquet(ledger, seconds=1000.0))
    pool.submit(cell, 12)
    ledger, seconds = from_parquet(judged(pool)[0][1])
    assert 2000 < seconds < 2900
    assert ledger.equals(judge_images(pgd, classifier, load_data(SCALE), device=CPU))


def test_the_cheapest_evaluators_are_asked_first(pool, trial):
    for name in ("pgd", "health", "clean"):
        total = evaluator_named(name, SCALE).total(load_data(SCALE))
        pool.submit(cell_of(trial, name), total, least=5)
    # Five images of the first were handed out before the others came.
    order = [cell.evaluator for cell, _, _ in judged(pool, 3)]
    assert order == ["clean", "health", "pgd"]


def test_a_cell_that_cannot_be_judged_says_why_and_frees_its_place(pool, trial):
    digest, _, uri = trial
    pool.submit(Cell(digest, uri + "-gone", "pgd", "q"), 12)
    ((_, _, error),) = judged(pool)
    assert "No such" in error or "not exist" in error or "OSError" in error
    assert len(pool) == 0


@pytest.mark.parametrize("damage", ["flipped", "emptied", "another trial's"])
def test_weights_that_are_not_the_trials_own_are_named_and_not_judged(
    pool, trial, small, tmp_path, damage
):
    path, other = tmp_path / "run" / "weights.safetensors", small(seed=1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    save_weights(path, build_classifier(other), other.model_dump_json())
    contents = {"flipped": content, "emptied": b"", "another trial's": path.read_bytes()}
    path.write_bytes(contents[damage])
    pool.submit(cell_of(trial, "clean"), 1)
    ((_, content, error),) = judged(pool)
    assert str(path) in error
    assert content == b""


def idle_actor(pool):
    """Return the pool's actor once it is there and free: a busy machine may have killed it."""
    deadline = time.monotonic() + 300
    while not pool._idle:
        assert time.monotonic() < deadline, "the actor does not come back"
        pool.poll(0.2)
    return pool._idle[0]


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def killed(actor, trial):
    actor.__ray_call__.remote(lambda _: os.kill(os.getpid(), 9))


def hung(actor, trial):
    def hang(actor):
        classifier = actor._load(trial[2], trial[0])
        classifier.register_forward_pre_hook(lambda *_: time.sleep(1000))

    ray.get(actor.__ray_call__.remote(hang))


def without_device(actor, trial):
    def lose_device(actor):
        def load(*_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        actor._load = load

    ray.get(actor.__ray_call__.remote(lose_device))


@pytest.mark.parametrize(
    "become", [killed, without_device, pytest.param(hung, marks=pytest.mark.slow)]
)
def test_an_actor_that_is_lost_is_replaced_and_its_shard_asked_again(pool, trial, become):
    actor = idle_actor(pool)
    pid = pid_of(actor)
    become(actor, trial)
    pool.submit(cell_of(trial, "pgd"), 12)
    ((_, content, error),) = judged(pool)
    assert not error
    assert from_parquet(content)[0].num_rows == 4 * 12
    assert pid_of(idle_actor(pool)) != pid


def test_a_shard_that_failed_is_not_judged_again_before_its_wait_is_over(pool, trial, monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 3600.0)
    without_device(idle_actor(pool), trial)
    cell = cell_of(trial, "clean")
    pool.submit(cell, 5)
    idle_actor(pool)  # it is restarted, and free
    assert pool.poll(0.2) == []
    assert not pool._under_way

    ((until, *shard),) = pool._resting
    pool._resting = [(until - 3600, *shard)]
    ((_, content, error),) = judged(pool)
    assert not error
    assert from_parquet(content)[0].num_rows == 5
