"""Two models on the same images: the difference of a score, its interval, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest, bootstrap, ttest_ind

from evaluators import EXTRA_KINDS
from evaluators.ledger import CONFIDENCE

RESAMPLES = 1000
ERRORS = "corruptions"  # the one score that is an error, a mean over questions


@dataclass(frozen=True)
class Paired:
    """A difference of shares over n images with its 95 % interval.

    The interval is a bootstrap of images, or as much wider as another says. Of answers that are
    right or wrong: that of the shares of images gained and lost, which holds where few are. Of one
    seed: Clopper and Pearson's of the images answered differently, so that 0 is left out only
    where p, the exact McNemar test's, is below 0.05. Of several seeds: Welch's over the trainings.
    p is None where an image has more than one answer.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float | None


def image_scores(ledger: pa.Table, score: str) -> dict[str, float] | None:
    """Return what each image adds to a score; None for a score that is no mean over images."""
    if score == ERRORS:
        kinds = pc.replace_substring_regex(ledger["question"], r"-\d$", "")
        fifteen = pc.invert(pc.is_in(kinds, pa.array(EXTRA_KINDS)))
        grouped = ledger.filter(fifteen).group_by("image_id").aggregate([("survived", "mean")])
        shares = pc.subtract(1.0, grouped["survived_mean"])
        return dict(zip(grouped["image_id"].to_pylist(), shares.to_pylist(), strict=True))
    rows = ledger.filter(pc.equal(ledger["question"], score))
    if not rows.num_rows:
        return None
    survived = rows["survived"].cast(pa.float64()).to_pylist()
    return dict(zip(rows["image_id"].to_pylist(), survived, strict=True))


def compare(
    ours: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]
) -> Paired | None:
    """Compare two models' image scores, a mapping per seed, on the images that all share.

    Returns ours minus reference; None where they share none.
    """
    shared = sorted(set.intersection(*(set(seed) for seed in (*ours, *reference))))
    if not shared:
        return None
    ours_SN, reference_SN = (
        np.array([[seed[image] for image in shared] for seed in seeds])
        for seeds in (ours, reference)
    )
    difference_N = ours_SN.mean(axis=0) - reference_SN.mean(axis=0)
    intervals, p = [_over_images(difference_N)], None
    if min(len(ours), len(reference)) > 1:
        intervals.append(_over_trainings(ours_SN.mean(axis=1), reference_SN.mean(axis=1)))
    if len(ours) == len(reference) and np.isin([ours_SN, reference_SN], (0, 1)).all():
        counts = [(int((d_N > 0).sum()), int((d_N < 0).sum())) for d_N in ours_SN - reference_SN]
        ends = [_of_gained_and_lost(*count, len(shared)) for count in counts]
        low, high = np.mean(ends, axis=0)
        intervals.append((float(low), float(high)))
        if len(counts) == 1:
            p = mcnemar(*counts[0])
            if any(counts[0]):
                intervals.append(_of_the_discordant(*counts[0], len(shared)))
    lows, highs = zip(*intervals, strict=True)
    return Paired(float(difference_N.mean()), min(lows), max(highs), len(shared), p)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of McNemar's test from the discordant pairs (McNemar 1947)."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _of_gained_and_lost(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the interval of a difference out of Clopper and Pearson's of both shares.

    Source: MOVER (Zou and Donner 2008).
    """
    won, missed = (binomtest(count, n).proportion_ci(CONFIDENCE) for count in (gained, lost))
    gain, loss = gained / n, lost / n
    return (
        gain - loss - math.hypot(gain - won.low, missed.high - loss),
        gain - loss + math.hypot(won.high - gain, loss - missed.low),
    )


def _of_the_discordant(gained: int, lost: int, n: int) -> tuple[float, float]:
    discordant = gained + lost
    found = binomtest(gained, discordant).proportion_ci(CONFIDENCE)
    return (2 * found.low - 1) * discordant / n, (2 * found.high - 1) * discordant / n


def _over_trainings(ours_S: np.ndarray, reference_S: np.ndarray) -> tuple[float, float]:
    if np.ptp(ours_S) == np.ptp(reference_S) == 0:
        difference = float(ours_S[0] - reference_S[0])
        return difference, difference
    found = ttest_ind(ours_S, reference_S, equal_var=False).confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)


def _over_images(difference_N: np.ndarray) -> tuple[float, float]:
    if np.ptp(difference_N) == 0:
        # Resampling sees no other image; as many as this may differ, by all there is, unseen.
        unseen = binomtest(0, len(difference_N)).proportion_ci(CONFIDENCE).high
        common = float(difference_N[0])
        return common - unseen * (1 + common), common + unseen * (1 - common)
    found = bootstrap(
        (difference_N,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
