from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import binom, multinomial
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from evaluators.base import Batch, verdicts
from evaluators.corruptions import Corruptions
from evaluators.intervals import compare, image_scores, mcnemar, of_gained_and_lost
from trainables.data.registry import EXTRA_KINDS, KINDS, SEVERITIES
from trainables.scale import DIGITS


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (10, 2), (0, 6), (41, 59)])
def test_the_exact_mcnemar_is_statsmodels(gained, lost):
    table = [[50, lost], [gained, 20]]
    expected = 1.0 if gained == lost == 0 else reference_mcnemar(table, exact=True).pvalue
    assert mcnemar(gained, lost) == pytest.approx(float(expected), abs=1e-12)


def test_a_difference_is_taken_on_the_images_that_both_have():
    ours = {"a": 1.0, "b": 1.0, "c": 0.0, "only ours": 0.0}
    reference = {"a": 0.0, "b": 1.0, "c": 0.0, "only theirs": 1.0}
    found = compare([ours], [reference])
    assert (found.n, found.p) == (3, 1.0)
    assert found.difference == pytest.approx(1 / 3)
    # Clopper and Pearson's: of 1 in 3 from 1 - 0.975 ** (1 / 3), of 0 in 3 to 1 - 0.025 ** (1 / 3).
    gain, loss = 1 / 3 - (1 - 0.975 ** (1 / 3)), 1 - 0.025 ** (1 / 3)
    assert found.low == pytest.approx(1 / 3 - math.hypot(gain, loss))
    # The highest share g that leaves 2.5 % for at most 1 in 3 solves (1 - g)^2 (1 + 2 g) = 0.025.
    assert found.high == pytest.approx(0.9057, abs=1e-4)


@pytest.mark.parametrize("n", [30, 64])
@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.05), (0.1, 0.02), (0.25, 0.25), (0.3, 0.1)])
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


@pytest.mark.parametrize(("n", "gain"), [(30, 0.1), (64, 0.05), (64, 0.06), (64, 0.2), (597, 0.01)])
def test_an_interval_misses_a_rare_gain_no_more_often_than_it_says(n, gain):
    nobody = {str(i): 0.0 for i in range(n)}
    counts = range(31)
    found = [compare([{str(i): float(i < k) for i in range(n)}], [nobody]) for k in counts]
    lows, highs = ([getattr(f, end) for f in found] for end in ("low", "high"))
    assert lows == sorted(lows)
    assert highs == sorted(highs)
    chances = binom.pmf(counts, n, gain)
    assert sum(c for c, high in zip(chances, highs, strict=True) if high < gain) <= 0.025
    assert sum(c for c, low in zip(chances, lows, strict=True) if low > gain) <= 0.025


def test_two_images_gained_of_as_many_leave_room_for_those_unseen():
    found = compare([{str(i): float(i < 2) for i in range(64)}], [{str(i): 0.0 for i in range(64)}])
    # Clopper and Pearson's: of 2 in 64 [0.0038, 0.1084], of 0 in 64 [0, 0.0560].
    assert found.high == pytest.approx(0.1084, abs=1e-4)
    assert found.low == pytest.approx(2 / 64 - math.hypot(2 / 64 - 0.0038, 0.0560), abs=1e-4)


def test_the_interval_is_the_normal_one_on_many_images():
    ours = {str(i): float(i % 10 < 8) for i in range(2000)}
    reference = {str(i): float((i // 10) % 10 < 7) for i in range(2000)}
    found = compare([ours], [reference])
    assert found.difference == pytest.approx(0.1)
    # Independent: the variance is 0.8 * 0.2 + 0.7 * 0.3.
    reach = 1.96 * (0.37 / 2000) ** 0.5
    assert found.low == pytest.approx(0.1 - reach, abs=0.004)
    assert found.high == pytest.approx(0.1 + reach, abs=0.004)


def test_images_that_all_agree_leave_room_for_those_unseen():
    answers = {str(i): float(i % 2) for i in range(50)}
    found = compare([answers], [answers])
    # Clopper and Pearson's bound of 0 in 50 is 1 - 0.025 ** (1 / 50).
    assert found.difference == 0
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 50))


def test_seeds_are_averaged_image_by_image_and_have_no_mcnemar():
    ours = [{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    reference = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}]
    found = compare(ours, reference)
    assert (found.difference, found.n, found.p) == (0.5, 2, None)


def test_trainings_that_disagree_widen_the_interval_to_welchs():
    shares = ([0.9, 0.5, 0.7], [0.5, 0.6, 0.62])
    sides = [[{str(i): float(i < 1000 * s) for i in range(1000)} for s in side] for side in shares]
    found = compare(*sides)
    # Variances 0.04 and 0.0041333 over three trainings each: by Welch and Satterthwaite 2.409
    # degrees of freedom, of which Student's t is 3.6732.
    reach = 3.6732 * (0.04 / 3 + 0.0041333 / 3) ** 0.5
    middle = 0.7 - 0.57333
    # Over images half the width is about 0.026, which adds 0.026^2 / (2 x 0.4455) = 0.0008.
    assert (found.low, found.high) == pytest.approx(
        (middle - reach - 0.0008, middle + reach + 0.0008), abs=1e-4
    )


def test_models_without_a_common_image_are_not_compared():
    assert compare([{"a": 1.0}], [{"b": 1.0}]) is None


def test_scores_of_images_are_their_survival_and_for_corruptions_their_error():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ("a", "b"))
    ledger = pa.concat_tables(
        [
            verdicts(batch, "fog-1", torch.tensor([0, 0])),
            verdicts(batch, "fog-2", torch.tensor([1, 0])),
        ]
    )
    assert image_scores(ledger, "fog-1") == {"a": 1.0, "b": 0.0}
    assert image_scores(ledger, "corruptions") == {"a": 0.5, "b": 1.0}
    assert image_scores(ledger, "corruptions/mCE") is None


def test_an_images_error_is_over_the_fifteen_kinds_as_the_score_is():
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
    found = image_scores(ledger, "corruptions")
    assert found == pytest.approx({"a": 3 / 15, "b": 1 / 15})
    score = next(s for s in Corruptions(DIGITS).summarize(ledger) if s.name == "corruptions")
    assert np.mean(list(found.values())) == pytest.approx(score.value)
