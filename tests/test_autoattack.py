"""AutoAttack against pyautoattack called plainly."""

import dataclasses
import logging
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyautoattack import AutoAttack as PlainAutoAttack
from torch import nn

from evaluators import autoattack, evaluator_named
from evaluators.autoattack import STAGES, AutoAttack, _Victims
from evaluators.base import Batch, judge_images
from evaluators.ledger import in_order
from tests.tiny import trained_classifier
from trainables.data.base import WHOLE, Shard, to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS

CPU = torch.device("cpu")
EPSILON = 20 / 255
QUERIES = 60
IMAGES = 100
FEW = 20
THRIFTY = dataclasses.replace(DIGITS, square_queries=QUERIES)
SMALLER, LARGER = "autoattack@16/255", "autoattack@20/255"


def of_classes(count):
    return dataclasses.replace(
        DIGITS, data_set=dataclasses.replace(DIGITS.data_set, num_classes=count)
    )


@pytest.fixture(scope="module")
def classifier():
    return trained_classifier()


@pytest.fixture(scope="module")
def batch():
    split = load_data(DIGITS).held_out.subset(IMAGES, seed=0)
    return Batch(to_unit(split.images), split.labels, split.ids)


def judged(classifier, batch, *, radii=(EPSILON,)):
    evaluator = AutoAttack(THRIFTY, radii=radii)
    return evaluator, evaluator.judge(classifier, batch)


@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "images"),
    [
        ("autoattack", "Linf", EPSILON, IMAGES),
        ("autoattack-l2", "L2", 0.6, FEW),
        ("autoattack-l1", "L1", 4.0, FEW),
    ],
)
def test_same_survivors_as_pyautoattack_called_plainly(
    classifier, batch, name, norm, epsilon, images
):
    few = Batch(batch.images[:images], batch.labels[:images], batch.ids[:images])
    plain = PlainAutoAttack(classifier, eps=epsilon, norm=norm, seed=0, version="standard")
    plain.square.n_queries = QUERIES
    _, answers = plain.run_standard_evaluation(few.images.contiguous(), few.labels)
    theirs = (answers == few.labels).tolist()
    ledger = evaluator_named(name, THRIFTY, radii=[epsilon]).judge(classifier, few)
    ours = [row["survived"] for row in ledger.to_pylist()]
    assert 0 < sum(theirs) < images
    assert abs(sum(ours) - sum(theirs)) <= 1
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= images // 100


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_verdicts_in_other_norms_are_the_same_in_any_batch_and_inside_the_ball(
    classifier, batch, norm, monkeypatch
):
    monkeypatch.setattr(autoattack, "ITERATIONS", 10)
    few = Batch(batch.images[:6], batch.labels[:6], batch.ids[:6])
    evaluator = evaluator_named(f"autoattack-{norm}", THRIFTY)
    evaluator.stages = ("fab-t", "square") if norm == "l2" else ("apgd-ce", "square")
    accepted = []
    monkeypatch.setattr(
        _Victims,
        "_break",
        lambda self, *row, inner=_Victims._break: (accepted.append(row[0]), inner(self, *row)),
    )
    whole = evaluator.judge(classifier, few)
    parts = pa.concat_tables(evaluator.judge(classifier, part) for part in few.parts(2))
    assert accepted
    assert parts.equals(whole)


def test_verdicts_and_scores_at_two_radii_agree(classifier, batch):
    few = Batch(batch.images[:FEW], batch.labels[:FEW], batch.ids[:FEW])
    evaluator, ledger = judged(classifier, few, radii=[EPSILON, 0.8 * EPSILON])
    rows = {name: [] for name in (SMALLER, LARGER)}
    for row in ledger.to_pylist():
        rows[row["question"]].append(row)
        assert (row["stage"] is None) == row["survived"] == (row["predicted"] == row["label"])
        assert row["stage"] in (None, "clean", *STAGES)
        reached_square = row["stage"] in (None, "square")
        assert (row["queries"] is not None) == reached_square
        assert not reached_square or 1 <= row["queries"] <= QUERIES + 1
    pairs = list(zip(*rows.values(), strict=True))
    assert not all(small["survived"] for small, _ in pairs)
    assert not any(large["survived"] for small, large in pairs if not small["survived"])
    scores = {score.name: score for score in evaluator.summarize(ledger)}
    after = [scores[f"{LARGER}/after-{stage}"].value for stage in STAGES]
    assert after == sorted(after, reverse=True)
    assert after[-1] == scores[LARGER].value == sum(r["survived"] for r in rows[LARGER]) / FEW
    right = sum(row["stage"] != "clean" for row in rows[LARGER])
    assert scores["autoattack/clean"].value == right / FEW
    assert scores[SMALLER].value >= scores[LARGER].value
    assert all(score.n == FEW for score in scores.values())


@pytest.mark.parametrize("stage", STAGES)
def test_an_images_verdict_is_the_same_in_any_shard_batch_and_order(
    classifier, digits, stage, monkeypatch
):
    monkeypatch.setattr(autoattack, "ITERATIONS", 10)
    few = dataclasses.replace(digits, held_out=digits.held_out.subset(30, seed=0))
    backwards = few.held_out.at(np.arange(30)[::-1].copy())
    radii = [0.5 * EPSILON, 0.8 * EPSILON]

    def ledger(*shards, data=few, batch_size=200, rows=200):
        monkeypatch.setattr(autoattack, "ROWS_AT_ONCE", rows)
        evaluator = AutoAttack(THRIFTY, radii=radii)
        evaluator.stages = (stage,)
        judge = partial(
            judge_images, evaluator, classifier, data, device=CPU, batch_size=batch_size
        )
        return in_order(pa.concat_tables([judge(shard=shard) for shard in shards]))

    before = torch.random.get_rng_state()
    whole = ledger(WHOLE)
    assert {None, stage} <= set(whole["stage"].to_pylist())
    assert ledger(Shard(0, 3), Shard(3, 20), Shard(20, 30)).equals(whole)
    assert ledger(WHOLE, batch_size=2).equals(whole)
    assert ledger(WHOLE, rows=7).equals(whole)
    assert ledger(WHOLE, data=dataclasses.replace(few, held_out=backwards)).equals(whole)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.requires_grad for p in classifier.parameters())


def test_runs_are_packed_with_the_likeliest_targets_first(classifier, batch, monkeypatch):
    monkeypatch.setattr(autoattack, "ROWS_AT_ONCE", 4)
    few = Batch(batch.images[:6], batch.labels[:6], batch.ids[:6])
    victims = _Victims(classifier, few, EPSILON)
    victims.broken_B[:] = False
    sizes, owners, targets = [], [], []
    for run in victims.runs(2):
        sizes.append(len(run.owners))
        owners += run.owners.tolist()
        targets += run.targets.tolist()
        if len(sizes) == 1:
            victims.broken_B[5] = True
    assert sizes == [4, 4, 2]
    assert owners == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    second, third = classifier(few.images).topk(3).indices[:5, 1:].T.tolist()
    assert targets == [*second, *third]
    # The third likeliest class alone, rank 3; none where only the likeliest is attacked.
    assert {rank for run in victims.runs(2, 1) for rank in run.ranks.tolist()} == {3}
    assert list(victims.runs(1, 2)) == []


def test_targeted_stages_run_against_nine_classes_and_the_others_once(
    classifier, batch, monkeypatch
):
    ranks = {stage: set() for stage in STAGES}
    for stage in STAGES:
        noted = partial(lambda ranks, _, run, __: ranks.update(run.ranks.tolist()), ranks[stage])
        monkeypatch.setitem(autoattack._ATTACKS, stage, noted)
    judged(classifier, Batch(batch.images[:3], batch.labels[:3], batch.ids[:3]))
    nine = set(range(2, 11))
    assert ranks == {"apgd-ce": {2}, "apgd-t": nine, "fab-t": nine, "square": {2}}


def test_l1_restarts_five_times_and_has_five_targets_but_for_fab():
    assert evaluator_named("autoattack-l1", DIGITS).rounds == {
        **{"apgd-ce": 5, "apgd-t": 5},
        **{"fab-t": 9, "square": 1},
    }


def test_a_stage_breaks_what_it_broke_in_a_smaller_ball(classifier, batch):
    few = Batch(batch.images[:3], batch.labels[:3], batch.ids[:3])
    smaller, larger = (_Victims(classifier, few, radius) for radius in (0.01, 0.02))
    for victims in (smaller, larger):
        victims.broken_B[:] = False
        victims.stages = [None] * 3
    smaller.begin("apgd-t")
    smaller._break(1, 2, 7)
    larger.begin("apgd-ce", smaller)
    assert not larger.broken_B.any()
    larger.begin("apgd-t", smaller)
    assert larger.broken_B.tolist() == [False, True, False]
    assert (larger.stages[1], int(larger.predicted_B[1])) == ("apgd-t", 7)


def test_a_model_whose_margins_are_no_numbers_is_judged():
    class NoNumber(Classifier):
        def forward(self, images_BCHW):
            zero_B = 0 * images_BCHW.sum(dim=(1, 2, 3))
            return torch.stack([*[zero_B] * 9, zero_B * float("nan")], dim=1)

    split = load_data(DIGITS).held_out.subset(8, seed=0)
    classifier = NoNumber(nn.Identity(), mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    batch = Batch(to_unit(split.images), torch.full((8,), 9), split.ids)
    assert len(judged(classifier, batch)[1]) == 8


class Threshold(nn.Module):
    """Class 1 where the mean pixel exceeds one half, else class 0; two more classes never win."""

    def forward(self, images):
        margin = 10 * (images.mean(dim=(1, 2, 3)) - 0.5)
        never = torch.full_like(margin, -9.0)
        return torch.stack([-margin, margin, never, never - margin], dim=1)


@pytest.fixture
def threshold():
    return Classifier(Threshold(), (0.0,) * 3, (1.0,) * 3).eval()


def test_a_fake_adversarial_outside_the_ball_breaks_nothing(threshold):
    batch = Batch(torch.full((3, 3, 4, 4), 0.4), torch.zeros(3, dtype=torch.long), ("a", "b", "c"))
    victims = _Victims(threshold, batch, 0.2)
    victims.begin("fab-t")
    outside = torch.full((3, 3, 4, 4), 0.6 + 1e-3)
    outside[1] = float("nan")
    outside[2] = 0.6
    victims.try_break(torch.arange(3), torch.full((3,), 2), outside)
    assert victims.broken_B.tolist() == [False, False, True]
    assert victims.stages == [None, None, "fab-t"]


def test_a_linear_model_breaks_exactly_where_the_ball_reaches_the_boundary(threshold):
    scale = dataclasses.replace(of_classes(4), square_queries=20)
    levels = (0.30, 0.38, 0.42, 0.55)
    images = torch.stack([torch.full((3, 8, 8), level) for level in levels])
    batch = Batch(images, torch.zeros(4, dtype=torch.long), tuple("abcd"))
    evaluator = AutoAttack(scale, radii=[0.1])
    ledger = evaluator.judge(threshold, batch)
    assert evaluator.targets == 3
    assert ledger["survived"].to_pylist() == [True, True, False, False]
    assert ledger["stage"].to_pylist() == [None, None, "apgd-ce", "clean"]


def test_fewer_classes_have_fewer_targets_and_say_so():
    data = load_data(DIGITS)
    assert AutoAttack(DIGITS).identity(data)["targets"] == 9
    few = AutoAttack(of_classes(3)).identity(data)
    assert few["targets"] == 2
    assert "apgd-t" not in few["stages"]


def test_a_model_without_gradients_is_not_broken_by_nan(batch, classifier, caplog):
    class Quantised(nn.Module):
        def forward(self, images):
            return classifier((images * 4).round() / 4)

    caplog.set_level(logging.ERROR)
    quantised = Classifier(Quantised(), (0.0,) * 3, (1.0,) * 3).eval()
    few = Batch(batch.images[:3], batch.labels[:3], batch.ids[:3])
    rows = judged(quantised, few)[1].to_pylist()
    with torch.no_grad():
        right = (quantised(few.images).argmax(1) == few.labels).tolist()
    assert any(row["survived"] for row in rows)
    assert [row["stage"] != "clean" for row in rows] == right
