"""The contract that every evaluator keeps, and the scores."""

from __future__ import annotations

import ast
import re
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint
from torch import nn

import evaluators
from evaluators import (
    EVALUATORS,
    PGD_STEPS,
    base,
    column_named,
    evaluator_named,
    evaluator_of,
)
from evaluators.base import (
    Batch,
    Clean,
    cell_digest,
    judge_images,
    one_ahead,
    split_batches,
    verdicts,
)
from evaluators.ledger import LEDGER, share, survival_scores
from evaluators.pgd import PGD, PublishedPGD
from tests.tiny import Watched
from trainables.data.base import Data, Split, to_unit
from trainables.data.listing import EMBEDDED
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
# The contract does not depend on how many images and queries are spent.
THRIFTY = replace(
    DIGITS,
    attack_subset=12,
    autoattack_subset=6,
    square_queries=20,
    smoothing_samples=20,
    patch=replace(DIGITS.patch, images=6, samples=5, steps=4),
)


@pytest.fixture(scope="module")
def classifier(few_digits):
    from tests.paper import resnet50
    from trainables.train.loop import train

    recipe = DIGITS.shrink(resnet50()).replace(model="resnet18", epochs=6, scheduler="cosine")
    model = build_classifier(recipe)
    list(train(recipe, model, few_digits, device=CPU))
    return model.eval()


def keeps_the_contract(name, classifier, few_digits):
    evaluator = evaluator_named(name, THRIFTY)
    assert evaluator.name == name
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    ledger = judge_images(evaluator, classifier, few_digits, device=CPU)
    assert ledger.schema == LEDGER
    assert ledger.num_rows > 0
    assert {*ledger["image_id"].to_pylist()} <= {*few_digits.held_out.ids}
    scores = evaluator.summarize(ledger)
    assert len({score.name for score in scores}) == len(scores) > 0
    assert all(score.low <= score.value <= score.high and score.n > 0 for score in scores)
    assert all(torch.equal(value, before[k]) for k, value in classifier.state_dict().items())
    assert all(p.requires_grad for p in classifier.parameters())
    assert judge_images(evaluator, classifier, few_digits, device=CPU).equals(ledger)
    return scores


@pytest.mark.parametrize("name", sorted(EVALUATORS.keys() - EMBEDDED.missing(DIGITS.data_set)))
def test_every_evaluator_keeps_the_contract(name, classifier, few_digits):
    scores = keeps_the_contract(name, classifier, few_digits)
    # A score's name begins with its evaluator's, but for health, which has no column.
    assert name == "health" or all(evaluator_of(score.name) == name for score in scores)


def test_the_documented_evaluator_is_added_by_its_file_and_its_entry(
    classifier, few_digits, tmp_path, monkeypatch
):
    page = (Path(__file__).parents[1] / "docs" / "evaluator.md").read_text()
    code, entry = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "noise.py").write_text(code)
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "evaluators.noise", None)
    monkeypatch.delitem(sys.modules, "evaluators.noise")
    for name, place in ast.literal_eval(f"{{{entry}}}").items():
        monkeypatch.setitem(EVALUATORS, name, place)
    (score,) = keeps_the_contract("noise", classifier, few_digits)
    assert (score.name, score.n) == ("noise", 60)
    assert column_named("noise").title == "Under noise"
    assert evaluator_named("noise", DIGITS).cost(597, withstanding=1.0) == 597
    clean = judge_images(Clean(DIGITS), classifier, few_digits, device=CPU)
    noisy = judge_images(evaluator_named("noise", DIGITS), classifier, few_digits, device=CPU)
    assert noisy["predicted"] != clean["predicted"]


@pytest.mark.parametrize("name", sorted(EVALUATORS.keys() - EMBEDDED.missing(DIGITS.data_set)))
def test_a_question_is_named_by_what_its_verdicts_depend_on(name, digits, few_digits):
    evaluator = evaluator_named(name, DIGITS)
    assert cell_digest(evaluator, digits) == cell_digest(evaluator_named(name, DIGITS), digits)
    assert cell_digest(evaluator, digits) != cell_digest(evaluator, few_digits)


def test_two_evaluators_of_the_same_images_ask_two_questions(digits):
    class Other(Clean):
        name = "other"

    assert Other(DIGITS).identity(digits) == Clean(DIGITS).identity(digits)
    assert cell_digest(Other(DIGITS), digits) != cell_digest(Clean(DIGITS), digits)


def test_an_unknown_evaluator_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"unknown evaluator 'pgf'; one of clean, .*'pgd'"):
        evaluator_named("pgf", DIGITS)


def test_clean_is_the_share_of_right_answers(classifier, few_digits):
    (score,) = Clean(DIGITS).summarize(
        judge_images(Clean(DIGITS), classifier, few_digits, device=CPU)
    )
    with torch.inference_mode():
        images = few_digits.held_out.images.float() / 255
        right = int((classifier(images).argmax(1) == few_digits.held_out.labels).sum())
    assert (score.value, score.n) == (right / 60, 60)


def test_a_device_is_made_exact_before_the_first_pass(classifier, few_digits, monkeypatch):
    calls = []
    judge = Clean.judge
    monkeypatch.setattr(base, "exact", calls.append)
    monkeypatch.setattr(Clean, "judge", lambda *a: calls.append("a pass") or judge(*a))
    judge_images(Clean(DIGITS), classifier, few_digits, device=CPU)
    assert calls == [CPU, "a pass"]


def test_pgd_is_four_lengths_of_one_trajectory_on_one_subset(classifier, digits):
    evaluator = PGD(DIGITS)
    ledger = judge_images(evaluator, classifier, digits, device=CPU)
    scores = {score.name: score.value for score in evaluator.summarize(ledger)}
    assert list(scores) == [f"pgd-{n}" for n in PGD_STEPS]
    assert scores["pgd-100"] <= scores["pgd-5"] + 0.02
    ids = ledger["image_id"].to_pylist()
    assert ids[:64] == ids[64:128] == list(digits.held_out.subset(64, seed=0).ids)


def test_pgd_at_the_studys_scale_starts_anywhere_in_the_ball_and_steps_by_one_of_255():
    """Greys far from black and white, and a model whose gradient has one sign everywhere."""
    images = torch.randint(60, 200, (8, 3, 16, 16), dtype=torch.uint8)
    split = Split(images=images, labels=torch.arange(8) % 2, ids=tuple("abcdefgh"))
    source = Data(data_set=DIGITS.data_set, train=split, held_out=split, class_names=("0", "1"))
    network = Watched(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)))
    classifier = Classifier(network, (0.0,) * 3, (1.0,) * 3)
    judge_images(PGD(IMAGENET, steps=(10,)), classifier, source, device=CPU)
    start, second, *_ = network.attacked
    off = start - images / 255
    assert len(network.attacked) == 10
    assert 3.9 / 255 < off.abs().max() < 4.0001 / 255
    assert off.abs().mean() == pytest.approx(2 / 255, rel=0.05)
    step = (second - start).abs()
    assert step.median() == pytest.approx(1 / 255, rel=1e-3)
    assert step.max() == pytest.approx(1 / 255, rel=1e-3)
    # Eight steps lead from one side of the ball to the other.
    final = (network.judged[-1] - images / 255).abs()
    assert final.min() == pytest.approx(4 / 255, rel=1e-3)
    assert final.max() == pytest.approx(4 / 255, rel=1e-3)


BUDGET = {"images": 9, "patches": 3, "area": 0.1, "textures": 2, "samples": 9, "steps": 9}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pgd", {"epsilon": Fraction(1, 255)}),
        ("pgd", {"attack_subset": 9}),
        ("autoattack", {"epsilon": Fraction(1, 255)}),
        ("autoattack", {"autoattack_subset": 9}),
        ("autoattack", {"square_queries": 9}),
        ("autoattack-small", {"small_epsilon": Fraction(1, 255)}),
        *(("tpa", {"patch": replace(DIGITS.patch, **{k: v})}) for k, v in BUDGET.items()),
    ],
)
def test_what_a_scale_says_of_an_attack_is_part_of_the_question(name, changes, digits):
    usual, changed = (evaluator_named(name, s) for s in (DIGITS, replace(DIGITS, **changes)))
    assert cell_digest(usual, digits) != cell_digest(changed, digits)


def test_who_judges_every_image_does_so_whatever_number_is_stated():
    assert evaluator_named("tpa", DIGITS, images=7).asked_about(597) == 7
    assert evaluator_named("tpa", DIGITS, images=700).asked_about(597) == 597
    assert evaluator_named("clean", DIGITS, images=7).asked_about(597) == 597


class Forgetful(Clean):
    """Runs out of memory on more than ten images."""

    def judge(self, classifier, batch):
        if len(batch.ids) > 10:
            raise torch.OutOfMemoryError("too many images")
        return super().judge(classifier, batch)


def test_out_of_memory_halves_the_batch_and_goes_on_at_the_same_image(classifier, few_digits):
    whole = judge_images(Clean(DIGITS), classifier, few_digits, device=CPU)
    halved = judge_images(Forgetful(DIGITS), classifier, few_digits, device=CPU)
    assert halved.combine_chunks().equals(whole.combine_chunks())


def test_batches_keep_order_and_unit_range(few_digits):
    batches = list(split_batches(few_digits.held_out, batch_size=25))
    assert [len(batch.ids) for batch in batches] == [25, 25, 10]
    assert tuple(i for batch in batches for i in batch.ids) == few_digits.held_out.ids
    assert all(batch.images.min() >= 0 and batch.images.max() <= 1 for batch in batches)


def numbered(count):
    for number in range(count):
        yield Batch(torch.zeros(1, 3, 4, 4), torch.tensor([0]), (str(number),))


def test_batches_are_made_one_ahead_in_order():
    made = []
    ready = one_ahead(made.append(batch.ids) or batch for batch in numbered(4))
    first = next(ready)
    while len(made) < 2:  # the second is made while the first is in use
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [("0",), ("1",)]
    assert [batch.ids for batch in (first, *ready)] == [(str(n),) for n in range(4)]


def test_no_thread_is_left_when_judging_fails(classifier, few_digits, monkeypatch):
    def judge(*_):
        raise RuntimeError("no verdict")

    monkeypatch.setattr(Clean, "judge", judge)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no verdict"):
        judge_images(Clean(DIGITS), classifier, few_digits, device=CPU, batch_size=7)
    assert threading.active_count() == before


@pytest.mark.parametrize(("count", "n"), [(0, 20), (3, 20), (20, 20), (450, 597)])
def test_intervals_are_wilsons(count, n):
    score = share("clean", count, n)
    low, high = proportion_confint(count, n, method="wilson")
    assert score.value == count / n
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-12)


def test_survival_is_counted_by_question():
    batch = Batch(torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, 2]), ("a", "b", "c"))
    ledger = pa.concat_tables(
        [
            verdicts(batch, "one", torch.tensor([0, 1, 0])),
            verdicts(batch, "two", torch.tensor([0, 0, 0]), queries=[5, 6, 7]),
        ]
    )
    scores = survival_scores(ledger)
    assert [(s.name, s.value, s.n) for s in scores] == [("one", 2 / 3, 3), ("two", 1 / 3, 3)]
    assert ledger["queries"].to_pylist() == [None, None, None, 5, 6, 7]


def test_pgd_as_published_starts_half_of_the_images_at_themselves(digits):
    few = digits.held_out.subset(400, seed=3)
    batch = Batch(to_unit(few.images), few.labels, few.ids)
    start = PublishedPGD(DIGITS)._start(batch, 16 / 255)
    moved = (start != batch.images).flatten(1).any(dim=1)
    # A standard deviation of 400 fair coins is 10.
    assert 160 < int(moved.sum()) < 240
    assert torch.equal(start[moved], PGD(DIGITS)._start(batch, 16 / 255)[moved])


def test_pgd_as_published_attacks_in_half_precision(digits):
    dtypes = set()

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 16 * 16, 10)

        def forward(self, images):
            logits = self.head(images.flatten(1))
            if len(images) > 1:  # one image alone shows how wide the head is
                dtypes.add(logits.dtype)
            return logits

    data = replace(digits, held_out=digits.held_out.subset(4, seed=0))
    for evaluator, expected in ((PublishedPGD, torch.bfloat16), (PGD, torch.float32)):
        dtypes.clear()
        ledger = judge_images(evaluator(DIGITS), Recording(), data, device=CPU)
        assert dtypes == {expected}
        assert ledger["question"][0].as_py() == f"{evaluator.name}-5"
