"""Intervals and paired comparisons: against statsmodels, by exhaustion, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import multinomial
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.weightstats import DescrStatsW

from evaluators.base import Batch, verdicts
from evaluators.corruptions import Corruptions
from evaluators.intervals import compare, image_scores, of_mean, with_trainings
from evaluators.proportions import of_gained_and_lost
from trainables.data.registry import EXTRA_KINDS, KINDS, SEVERITIES
from trainables.scale import DIGITS


def answers(right, n):
    return {str(i): float(i in right) for i in range(n)}


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (10, 2), (0, 6), (41, 59)])
def test_the_exact_mcnemar_is_statsmodels(gained, lost):
    expected = 1.0
    if gained or lost:
        expected = reference_mcnemar([[50, lost], [gained, 20]], exact=True).pvalue
    ours = answers(range(50 + gained), 300)
    reference = answers([*range(50), *range(150, 150 + lost)], 300)
    assert compare([ours], [reference]).p == pytest.approx(float(expected), abs=1e-12)


def test_a_difference_is_taken_on_the_images_that_both_have():
    ours = {"a": 1.0, "b": 1.0, "c": 0.0, "only ours": 0.0}
    reference = {"a": 0.0, "b": 1.0, "c": 0.0, "only theirs": 1.0}
    paired = compare([ours], [reference])
    assert (paired.n, paired.p) == (3, 1.0)
    assert paired.difference == pytest.approx(1 / 3)
    # Clopper and Pearson's: of 1 in 3 from 1 - 0.975 ** (1 / 3), of 0 in 3 to 1 - 0.025 ** (1 / 3).
    gain, loss = 1 / 3 - (1 - 0.975 ** (1 / 3)), 1 - 0.025 ** (1 / 3)
    assert paired.low == pytest.approx(1 / 3 - math.hypot(gain, loss))
    # The highest share g that leaves 2.5 % for at most 1 in 3 solves (1 - g)^2 (1 + 2 g) = 0.025.
    assert paired.high == pytest.approx(0.9057, abs=1e-4)
    assert compare([{"a": 1.0}], [{"b": 1.0}]) is None


@pytest.mark.parametrize("n", [30, 64])
@pytest.mark.parametrize(
    ("gain", "loss"), [(0.05, 0.05), (0.1, 0.02), (0.25, 0.25), (0.3, 0.1), (0.06, 0)]
)
def test_an_interval_misses_a_difference_no_more_often_than_it_says(n, gain, loss):
    drawn = multinomial(n, [gain, loss, 1 - gain - loss])
    above = below = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            if (chance := drawn.pmf([gained, lost, n - gained - lost])) > 1e-9:
                low, high = of_gained_and_lost(gained, lost, n)
                above += chance * (low > gain - loss)
                below += chance * (high < gain - loss)
    assert max(above, below) <= 0.025


def test_the_interval_is_the_normal_one_on_many_images():
    ours = {str(i): float(i % 10 < 8) for i in range(2000)}
    reference = {str(i): float((i // 10) % 10 < 7) for i in range(2000)}
    paired = compare([ours], [reference])
    assert paired.difference == pytest.approx(0.1)
    # Independent: the variance is 0.8 * 0.2 + 0.7 * 0.3.
    reach = 1.96 * (0.37 / 2000) ** 0.5
    assert (paired.low, paired.high) == pytest.approx((0.1 - reach, 0.1 + reach), abs=0.004)


def test_trainings_that_disagree_widen_the_interval_to_welchs():
    shares = ([0.9, 0.5, 0.7], [0.5, 0.6, 0.62])
    paired = compare(*[[answers(range(int(1000 * s)), 1000) for s in side] for side in shares])
    # Variances 0.04 and 0.0041333 over three trainings each: by Welch and Satterthwaite 2.409
    # degrees of freedom, of which Student's t is 3.6732.
    reach = 3.6732 * (0.04 / 3 + 0.0041333 / 3) ** 0.5
    middle = 0.7 - 0.57333
    # An image's mean difference is 1/3 on 220 of 1000 images, 2/3 on 80: half the normal width is
    # 1.96 x (0.06 - 0.12667^2)^0.5 / 1000^0.5 = 0.013, the exact one 0.0146. It adds
    # 0.0146^2 / (2 x 0.4455) = 0.00024.
    assert (paired.low, paired.high) == pytest.approx(
        (middle - reach - 0.00024, middle + reach + 0.00024), abs=1e-5
    )
    assert paired.p is None
    assert with_trainings(50.0, (47.0, 55.0), 4.0) == pytest.approx((45.0, 50 + 41**0.5))


def test_three_trainings_that_answer_independently_count_as_three_times_the_images():
    # All eight patterns of three answers, ten images each: an answer varies by 1/4, a mean by 1/12.
    seeds = [answers([i for i in range(80) if i >> training & 1], 80) for training in range(3)]
    paired = compare(seeds, [answers((), 80)])
    assert (paired.low, paired.high) == pytest.approx(of_gained_and_lost(120, 0, 240))
    alike = compare([seeds[0]] * 3, [answers((), 80)])
    assert (alike.low, alike.high) == pytest.approx(of_gained_and_lost(40, 0, 80))


def test_a_mean_has_students_interval_and_room_for_unseen_images_where_all_are_alike():
    values = np.random.default_rng(0).uniform(size=60)
    expected = DescrStatsW(values).tconfint_mean()
    assert of_mean(values, least=0, most=1) == pytest.approx(expected)
    # Clopper and Pearson's bound of 0 in 50 is 1 - 0.025 ** (1 / 50).
    unseen = 1 - 0.025 ** (1 / 50)
    assert of_mean(np.full(50, 0.25), least=0, most=1) == pytest.approx(
        (0.25 - 0.25 * unseen, 0.25 + 0.75 * unseen)
    )


def test_an_images_score_is_its_survival_or_its_error_over_the_fifteen_corruptions():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ("a", "b"))
    wrong = {"a": KINDS[:3], "b": (*KINDS[:1], *EXTRA_KINDS)}
    ledger = pa.concat_tables(
        verdicts(
            batch,
            f"{kind}-{severity}",
            torch.tensor([kind in wrong["a"], kind not in wrong["b"]]).long(),
        )
        for kind in (*KINDS, *EXTRA_KINDS)
        for severity in SEVERITIES
    )
    assert image_scores(ledger, "spatter-1") == {"a": 1.0, "b": 0.0}
    assert image_scores(ledger, "corruptions/mCE") is None
    errors = image_scores(ledger, "corruptions")
    assert errors == pytest.approx({"a": 3 / 15, "b": 1 / 15})
    score = next(s for s in Corruptions(DIGITS).summarize(ledger) if s.name == "corruptions")
    assert np.mean(list(errors.values())) == pytest.approx(score.value)
    assert (score.low, score.high) == of_mean(np.array([3 / 15, 1 / 15]), least=0, most=1)


def test_an_images_score_leaves_the_questions_of_other_scores_out():
    batch = Batch(torch.zeros(1, 3, 4, 4), torch.tensor([0]), ("a",))
    wrong = {"fog-2", "mine-1", "mine-5", "pgd-5", "transfer", "imagenet-c-bar/cold-1"}
    corrupted = [f"{kind}-{severity}" for kind in (*KINDS, "mine") for severity in SEVERITIES]
    of_sets = ("transfer", "transfer/clean", "imagenet-c-bar/cold-1", "imagenet-c-bar/hot-1")
    ledger = pa.concat_tables(
        verdicts(batch, question, torch.tensor([int(question in wrong)]))
        for question in ("clean", *corrupted, "pgd-5", "pgd-10", *of_sets)
    )
    errors = {score: image_scores(ledger, score) for score in ("corruptions", "mine")}
    assert errors == {"corruptions": {"a": pytest.approx(1 / 75)}, "mine": {"a": 2 / 5}}
    assert image_scores(ledger, "clean") == image_scores(ledger, "pgd-10") == {"a": 1.0}
    assert image_scores(ledger, "pgd-5") == image_scores(ledger, "transfer") == {"a": 0.0}
    # Of a set accuracy, of its kinds as well.
    assert image_scores(ledger, "imagenet-c-bar") == {"a": 1 / 2}
    assert image_scores(ledger, "imagenet-c-bar/cold") == {"a": 0.0}
