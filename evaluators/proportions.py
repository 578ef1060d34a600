"""Intervals of shares, and of differences of shares, by counts; plans import no more than this."""

from __future__ import annotations

import math

from scipy.special import betaincinv

from evaluators.ledger import CONFIDENCE

Interval = tuple[float, float]


def of_gained_and_lost(
    gained: float, lost: float, n: float, *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the interval of a difference of paired answers, each right or wrong, to n images.

    MOVER (Zou and Donner 2008) out of Clopper and Pearson's intervals of the images gained and
    lost, two counts of a multinomial. Newcombe's method 10 (1998) is alike, out of Wilson's.
    """
    gain, loss = gained / n, lost / n
    correlation = -math.sqrt(gain * loss / ((1 - gain) * (1 - loss))) if gain * loss else 0.0
    least_gain, most_gain = clopper_pearson(gained, n, confidence)
    least_loss, most_loss = clopper_pearson(lost, n, confidence)

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a + b * b - 2 * correlation * a * b)

    return (
        gain - loss - reach(gain - least_gain, most_loss - loss),
        gain - loss + reach(most_gain - gain, loss - least_loss),
    )


def clopper_pearson(count: float, n: float, confidence: float) -> Interval:
    """Return the exact interval of a share; over seeds the count is a mean, not a whole number."""
    tail = (1 - confidence) / 2
    low = float(betaincinv(count, n - count + 1, tail)) if count > 0 else 0.0
    return low, float(betaincinv(count + 1, n - count, 1 - tail)) if count < n else 1.0
