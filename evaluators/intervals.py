"""95 % intervals of means over images and of differences between two models, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import beta, binomtest, ttest_1samp, ttest_ind

from evaluators.ledger import CONFIDENCE, Score
from trainables.data.registry import KINDS

Interval = tuple[float, float]
ROUNDING = 1e-9  # of float sums, where values differ by one answer or more
ERRORS = "corruptions"  # an error over the fifteen kinds; a plug-in's is over one, of its name


@dataclass(frozen=True)
class Paired:
    """A difference of shares over n images with its 95 % interval.

    p is that of the exact McNemar test; None where an image has more than one answer. discordance:
    the mean square of an image's difference. spread: the standard deviation of a side's score over
    its trainings, 0 where each side has one.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float | None
    discordance: float = 0.0
    spread: float = 0.0

    def reversed(self) -> Paired:
        """Return the other side minus this one."""
        difference, low, high = (0.0 - v for v in (self.difference, self.high, self.low))
        return replace(self, difference=difference, low=low, high=high)


def image_scores(ledger: pa.Table, score: str) -> dict[str, float] | None:
    """Return what each image adds to a score; None for a score that is no mean over images.

    The ledger may hold the questions of other scores, too.
    """
    kinds = pc.replace_substring_regex(ledger["question"], r"-[1-5]$", "")
    of_score = pc.is_in(kinds, pa.array(KINDS if score == ERRORS else [score]))
    corrupted = ledger.filter(pc.and_(of_score, pc.not_equal(kinds, ledger["question"])))
    if len(corrupted):
        grouped = corrupted.group_by("image_id").aggregate([("survived", "mean")])
        ids, values = grouped["image_id"], pc.subtract(1.0, grouped["survived_mean"])
    else:
        rows = ledger.filter(pc.equal(ledger["question"], score))
        ids, values = rows["image_id"], rows["survived"].cast(pa.float64())
    return dict(zip(ids.to_pylist(), values.to_pylist(), strict=True)) or None


def compare(
    ours: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]
) -> Paired | None:
    """Compare two models' image scores, a mapping per seed, on the images that all share.

    Returns ours minus reference; None where they share none. Over several seeds it is the mean
    over all pairs of a training of ours and one of theirs. Source of p: McNemar (1947).
    """
    shared = sorted(set.intersection(*(set(seed) for seed in (*ours, *reference))))
    if not shared:
        return None
    ours_SN, reference_SN = (
        np.array([[seed[image] for image in shared] for seed in seeds])
        for seeds in (ours, reference)
    )
    ours_N, reference_N = ours_SN.mean(axis=0), reference_SN.mean(axis=0)
    difference, p = float((ours_N - reference_N).mean()), None
    if np.isin(np.concatenate([ours_SN, reference_SN]), (0, 1)).all():
        gained = float((ours_N * (1 - reference_N)).sum())
        lost = float(((1 - ours_N) * reference_N).sum())
        over_images = of_gained_and_lost(gained, lost, len(shared))
        if len(ours) == len(reference) == 1:
            discordant = int(gained + lost)
            p = float(binomtest(int(gained), discordant).pvalue) if discordant else 1.0
    else:
        over_images = of_mean(ours_N - reference_N, least=-1, most=1)
    reach = _reach_over_trainings(ours_SN.mean(axis=1), reference_SN.mean(axis=1))
    low, high = with_trainings(difference, over_images, reach)
    squares_N = (ours_SN**2).mean(axis=0) + (reference_SN**2).mean(axis=0)
    discordance = float((squares_N - 2 * ours_N * reference_N).mean())
    spread = _spread(ours_SN.mean(axis=1), reference_SN.mean(axis=1))
    return Paired(difference, low, high, len(shared), p, discordance, spread)


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


def mean_score(name: str, values_N: np.ndarray, *, most: float) -> Score:
    """Return the mean over images of values from 0 to `most`, with Student's interval."""
    low, high = of_mean(values_N, least=0, most=most)
    return Score(name, float(values_N.mean()), low, high, len(values_N))


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


def _clopper_pearson(count: float, n: int) -> Interval:
    """Return the exact interval of a share; over seeds the count is a mean, not a whole number."""
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, count, n - count + 1)) if count > 0 else 0.0
    return low, float(beta.ppf(1 - tail, count + 1, n - count)) if count < n else 1.0


def with_trainings(value: float, over_images: Interval, reach: float) -> Interval:
    """Widen an interval over images by half the width of one over trainings, which is independent.

    Source: MOVER (Zou and Donner 2008).
    """
    low, high = over_images
    return value - math.hypot(value - low, reach), value + math.hypot(high - value, reach)


def _spread(*sides: np.ndarray) -> float:
    """Return the standard deviation of scores_S of several trainings, pooled over the sides."""
    variances = [float(scores_S.var(ddof=1)) for scores_S in sides if len(scores_S) > 1]
    return math.sqrt(fmean(variances)) if variances else 0.0


def _reach_over_trainings(ours_S: np.ndarray, reference_S: np.ndarray) -> float:
    """Return half the width of Welch's interval (1947) of a difference of means; 0 of one seed.

    Where one side is a single model, which was not trained here, it is Student's of the other.
    """
    several = [values_S for values_S in (ours_S, reference_S) if len(values_S) > 1]
    if not any(map(np.ptp, several)):
        return 0.0
    test = ttest_ind(*several, equal_var=False) if len(several) > 1 else ttest_1samp(several[0], 0)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.high - interval.low) / 2
