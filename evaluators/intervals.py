"""95 % intervals: of a mean, of a difference of paired answers, and over several trainings."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta, ttest_1samp, ttest_ind

from evaluators.ledger import CONFIDENCE

Interval = tuple[float, float]
ROUNDING = 1e-9  # of float sums, where values differ by one answer or more


def of_mean(values_N: np.ndarray, *, least: float, most: float) -> Interval:
    """Return Student's interval of the mean over images of values from `least` to `most`.

    Images that are all alike say nothing of those unseen: as many as Clopper and Pearson (1934)
    allow may lie at either end. Source: Student (1908).
    """
    if np.ptp(values_N) < ROUNDING:
        common, unseen = float(values_N[0]), _clopper_pearson(0, len(values_N))[1]
        return common - unseen * (common - least), common + unseen * (most - common)
    interval = ttest_1samp(values_N, 0).confidence_interval(CONFIDENCE)
    return max(float(interval.low), least), min(float(interval.high), most)


def of_gained_and_lost(gained: float, lost: float, n: int) -> Interval:
    """Return the interval of a difference of paired answers, each right or wrong, to n images.

    MOVER (Zou and Donner 2008) out of Clopper and Pearson's intervals of the images gained and
    lost, two counts of a multinomial. Newcombe's method 10 (1998) is alike, out of Wilson's.
    """
    gain, loss = gained / n, lost / n
    correlation = -math.sqrt(gain * loss / ((1 - gain) * (1 - loss))) if gain * loss else 0.0
    least_gain, most_gain = _clopper_pearson(gained, n)
    least_loss, most_loss = _clopper_pearson(lost, n)

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a + b * b - 2 * correlation * a * b)

    return (
        gain - loss - reach(gain - least_gain, most_loss - loss),
        gain - loss + reach(most_gain - gain, loss - least_loss),
    )


def with_trainings(value: float, over_images: Interval, reach: float) -> Interval:
    """Widen an interval over images by half the width of one over trainings, which is independent.

    Source: MOVER (Zou and Donner 2008).
    """
    low, high = over_images
    return value - math.hypot(value - low, reach), value + math.hypot(high - value, reach)


def reach_over_trainings(ours_S: np.ndarray, reference_S: np.ndarray) -> float:
    """Return half the width of Welch's interval (1947) of a difference of means; 0 of one seed."""
    if min(len(ours_S), len(reference_S)) < 2 or np.ptp(ours_S) == np.ptp(reference_S) == 0:
        return 0.0
    interval = ttest_ind(ours_S, reference_S, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.high - interval.low) / 2


def _clopper_pearson(count: float, n: int) -> Interval:
    """Return the exact interval of a share; over seeds the count is a mean, not a whole number."""
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, count, n - count + 1)) if count > 0 else 0.0
    return low, float(beta.ppf(1 - tail, count + 1, n - count)) if count < n else 1.0
