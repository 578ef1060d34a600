"""95 % intervals of means over images and of differences between two models, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.optimize import brentq
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
    its trainings, 0 where each side has one. sides: the two means. at: the interval's ends at any
    confidence.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float | None
    discordance: float = 0.0
    spread: float = 0.0
    sides: Interval | None = None
    at: Callable[[float], Interval] | None = field(default=None, repr=False, compare=False)

    def reversed(self) -> Paired:
        """Return the other side minus this one."""
        difference, low, high = (0.0 - v for v in (self.difference, self.high, self.low))
        sides, at = self.sides and self.sides[::-1], self.at and partial(_mirrored, self.at)
        return replace(self, difference=difference, low=low, high=high, sides=sides, at=at)

    def p_of(self, bound: float) -> float:
        """Return the two-sided p of a difference of `bound`: the test that the interval inverts.

        It is 1 minus the confidence at which the interval ends at `bound`, but at least 1e-9.
        """
        assert self.at is not None
        interval, above = self.at, self.difference > bound

        def room(exponent: float) -> float:
            low, high = interval(1 - 10**exponent)
            return low - bound if above else bound - high

        if self.difference == bound or room(0) <= 0:
            return 1.0
        return 1e-9 if room(-9) >= 0 else float(10 ** brentq(room, -9, 0, xtol=1e-6))


def _mirrored(at: Callable[[float], Interval], confidence: float) -> Interval:
    low, high = at(confidence)
    return 0.0 - high, 0.0 - low


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
    sides, p = (float(ours_N.mean()), float(reference_N.mean())), None
    if np.isin(np.concatenate([ours_SN, reference_SN]), (0, 1)).all():
        gained = float((ours_N * (1 - reference_N)).sum())
        lost = float(((1 - ours_N) * reference_N).sum())
        over_images = partial(of_gained_and_lost, gained, lost, len(shared))
        if len(ours) == len(reference) == 1:
            discordant = int(gained + lost)
            p = float(binomtest(int(gained), discordant).pvalue) if discordant else 1.0
    else:
        over_images = partial(of_mean, ours_N - reference_N, least=-1, most=1)
    difference = float((ours_N - reference_N).mean())
    trainings = (ours_SN.mean(axis=1), reference_SN.mean(axis=1))
    at = partial(_over_both, difference, over_images, trainings)
    squares_N = (ours_SN**2).mean(axis=0) + (reference_SN**2).mean(axis=0)
    discordance = float((squares_N - 2 * ours_N * reference_N).mean())
    noise = (discordance, _spread(*trainings))
    return Paired(difference, *at(CONFIDENCE), len(shared), p, *noise, sides, at)


def minus_none(ours: Sequence[Mapping[str, float]]) -> Paired:
    """Return a model's score minus 0, a mapping per seed of images' scores from 0 to 1.

    Over images it has the score's own interval: Wilson's of a share, else Student's.
    """
    shared = sorted(set.intersection(*map(set, ours)))
    ours_SN = np.array([[seed[image] for image in shared] for seed in ours])
    value = float(ours_SN.mean())
    over_images = (
        partial(_wilson, ours_SN.sum(axis=1), len(shared))
        if np.isin(ours_SN, (0, 1)).all()
        else partial(of_mean, ours_SN.mean(axis=0), least=0, most=1)
    )
    at = partial(_over_both, value, over_images, (ours_SN.mean(axis=1),))
    return Paired(value, *at(CONFIDENCE), len(shared), None, at=at)


def mean_of(pairs: Sequence[Paired]) -> Paired:
    """Return the mean of differences, whose interval takes in what they vary by among themselves.

    Source: Student (1908).
    """
    value, discordance, spread = (
        fmean(figures)
        for figures in zip(*((p.difference, p.discordance, p.spread) for p in pairs), strict=True)
    )
    at = partial(_over_pairs, pairs)
    ours, theirs = (
        fmean(means) for means in zip(*(p.sides for p in pairs if p.sides), strict=True)
    )
    n = min(pair.n for pair in pairs)
    return Paired(value, *at(CONFIDENCE), n, None, discordance, spread, (ours, theirs), at)


def over_several(
    values: Sequence[float], intervals: Sequence[Interval], confidence: float = CONFIDENCE
) -> Interval:
    """Return the interval of the mean of several values, each of which has one.

    It is the mean interval, widened by Student's over the values.
    """
    low, high = (fmean(ends) for ends in zip(*intervals, strict=True))
    value, trainings = fmean(values), (np.array(values),)
    return with_trainings(value, (low, high), _reach_over_trainings(trainings, confidence))


def _over_pairs(pairs: Sequence[Paired], confidence: float) -> Interval:
    intervals = [pair.at(confidence) for pair in pairs if pair.at]
    return over_several([pair.difference for pair in pairs], intervals, confidence)


def _over_both(
    value: float,
    over_images: Callable[..., Interval],
    trainings: Sequence[np.ndarray],
    confidence: float,
) -> Interval:
    reach = _reach_over_trainings(trainings, confidence)
    return with_trainings(value, over_images(confidence=confidence), reach)


def _wilson(counts_S: np.ndarray, n: int, *, confidence: float) -> Interval:
    """Return the mean over seeds of Wilson's interval (1927) of a share."""
    ends = [binomtest(int(k), n).proportion_ci(confidence, method="wilson") for k in counts_S]
    return fmean(e.low for e in ends), fmean(e.high for e in ends)


def of_mean(
    values_N: np.ndarray, *, least: float, most: float, confidence: float = CONFIDENCE
) -> Interval:
    """Return Student's interval of the mean over images of values from `least` to `most`.

    Images that are all alike say nothing of those unseen: as many as Clopper and Pearson (1934)
    allow may lie at either end. Source: Student (1908).
    """
    if np.ptp(values_N) < ROUNDING:
        common, unseen = float(values_N[0]), _clopper_pearson(0, len(values_N), confidence)[1]
        return common - unseen * (common - least), common + unseen * (most - common)
    interval = ttest_1samp(values_N, 0).confidence_interval(confidence)
    return max(float(interval.low), least), min(float(interval.high), most)


def mean_score(name: str, values_N: np.ndarray, *, most: float) -> Score:
    """Return the mean over images of values from 0 to `most`, with Student's interval."""
    low, high = of_mean(values_N, least=0, most=most)
    return Score(name, float(values_N.mean()), low, high, len(values_N))


def of_gained_and_lost(
    gained: float, lost: float, n: int, *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the interval of a difference of paired answers, each right or wrong, to n images.

    MOVER (Zou and Donner 2008) out of Clopper and Pearson's intervals of the images gained and
    lost, two counts of a multinomial. Newcombe's method 10 (1998) is alike, out of Wilson's.
    """
    gain, loss = gained / n, lost / n
    correlation = -math.sqrt(gain * loss / ((1 - gain) * (1 - loss))) if gain * loss else 0.0
    least_gain, most_gain = _clopper_pearson(gained, n, confidence)
    least_loss, most_loss = _clopper_pearson(lost, n, confidence)

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a + b * b - 2 * correlation * a * b)

    return (
        gain - loss - reach(gain - least_gain, most_loss - loss),
        gain - loss + reach(most_gain - gain, loss - least_loss),
    )


def _clopper_pearson(count: float, n: int, confidence: float) -> Interval:
    """Return the exact interval of a share; over seeds the count is a mean, not a whole number."""
    tail = (1 - confidence) / 2
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


def _reach_over_trainings(trainings: Sequence[np.ndarray], confidence: float) -> float:
    """Return half the width of Welch's interval (1947) of a difference of means; 0 of one seed.

    Where one side is a single model, which was not trained here, or there is but one side, it is
    Student's of the other.
    """
    several = [values_S for values_S in trainings if len(values_S) > 1]
    if not any(map(np.ptp, several)):
        return 0.0
    test = ttest_ind(*several, equal_var=False) if len(several) > 1 else ttest_1samp(several[0], 0)
    interval = test.confidence_interval(confidence)
    return float(interval.high - interval.low) / 2
