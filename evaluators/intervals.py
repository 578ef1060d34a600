"""95 % intervals of means over images and of differences between two models, and McNemar's test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.optimize import brentq
from scipy.special import betaincinv, stdtrit
from scipy.stats import binomtest

from evaluators import ERRORS
from evaluators.ledger import CONFIDENCE, OF_SLICE, SPARED, Score, by_question
from evaluators.proportions import Interval, clopper_pearson, of_gained_and_lost
from trainables.data.registry import KINDS

ROUNDING = 1e-9  # of float sums, where values differ by one answer or more
RESAMPLES = 1000
CLEAN_RADIUS = "@0"  # ends the question of clean images, of an attack at several radii


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


@dataclass(frozen=True)
class Rest:
    """The images that the last attacks of a bounded evaluator spared: `spared` of n.

    A random slice speaks for them, of which these attacks broke `broken` of `attacked`.
    """

    spared: int = 0
    attacked: int = 0
    broken: int = 0
    n: int = 1

    def hidden(self, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
        """Return the share of the n images that these attacks would still break.

        Its low end, estimate and high end; the ends are one-sided (Clopper and Pearson 1934).
        """
        spared = self.spared / self.n
        if not self.attacked:
            return 0.0, 0.0, spared
        broken, left = self.broken, self.attacked - self.broken
        share = broken / self.attacked
        low = float(betaincinv(broken, left + 1, 1 - confidence)) if broken else 0.0
        high = float(betaincinv(broken + 1, left, confidence)) if left else 1.0
        return spared * min(low, share), spared * share, spared * max(high, share)

    def __str__(self) -> str:
        most = 100 * self.hidden()[2] * self.n / self.spared
        return (
            f"{self.broken} of {self.attacked} survivors in the slice broken by the last attacks: "
            f"at most {most:.1f} points of the {self.spared} that they spared"
        )


class ImageScores(dict[str, float]):
    """What each image adds to a score, by its id; images of the `rest` count as survivors."""

    def __init__(self, values: Iterable[tuple[str, float]] = (), *, rest: Rest | None = None):
        super().__init__(values)
        self.rest = rest or Rest()


def image_scores(ledger: pa.Table, score: str) -> ImageScores | None:
    """Return what each image adds to a score; None for a score that is no mean over images.

    The ledger may hold the questions of other scores, too.
    """
    by_radius = ledger.filter(pc.starts_with(ledger["question"], f"{score}{CLEAN_RADIUS[:1]}"))
    if f"{score}{CLEAN_RADIUS}" in pc.unique(by_radius["question"]).to_pylist():
        return ImageScores(_areas(by_radius))
    kinds = pc.replace_substring_regex(ledger["question"], r"-[1-5]$", "")
    of_score = pc.is_in(kinds, pa.array(KINDS if score == ERRORS else [score]))
    masks = (
        pc.equal(ledger["question"], score),
        pc.starts_with(ledger["question"], f"{score}/"),
        pc.and_(of_score, pc.not_equal(kinds, ledger["question"])),
    )
    itself, parts, severities = (
        ledger.filter(mask).group_by("image_id").aggregate([("survived", "mean")]) for mask in masks
    )
    rows = itself if len(itself) else parts if len(parts) else severities
    values = rows["survived_mean"]
    if rows is severities and "/" not in score:  # errors; of a set's kind it is accuracy
        values = pc.subtract(1.0, values)
    pairs = zip(rows["image_id"].to_pylist(), values.to_pylist(), strict=True)
    return ImageScores(pairs, rest=rest_of(ledger, score)) or None


def _areas(ledger: pa.Table) -> Iterator[tuple[str, float]]:
    """Yield each image's part of the area under accuracy by radius: its own as a share of the most.

    An image breaks between the last radius that it survives and the next: half-way there. The
    questions end in the radii: radii@0, radii@4/255, radii-l2@0.5.
    """
    names = (q.rpartition("@")[2].partition("/") for q in pc.unique(ledger["question"]).to_pylist())
    edges = np.array(sorted(float(over) / float(under or 1) for over, _, under in names))
    middles = [0.0, *((edges[1:] + edges[:-1]) / 2 / edges[-1]), 1.0]
    survived = ledger.group_by("image_id").aggregate([("survived", "sum")])
    for image_id, count in zip(*(survived[n] for n in ("image_id", "survived_sum")), strict=True):
        yield image_id.as_py(), float(middles[count.as_py()])


def rest_of(ledger: pa.Table, question: str) -> Rest:
    """Return how many images of a question were spared its last attacks, and what speaks for them.

    Nothing is spared but by a bounded evaluator.
    """
    counts = Counter(ledger.filter(pc.equal(ledger["question"], question))["stage"].to_pylist())
    if not counts[SPARED]:
        return Rest()
    broken = sum(counts[stage] for stage in OF_SLICE)
    return Rest(counts[SPARED], counts[None] + broken, broken, counts.total())


def notes_on_rest(ledger: pa.Table) -> list[str]:
    """Say of each question with spared images how many of them may not survive, at most."""
    rests = {question: rest_of(rows, question) for question, rows in by_question(ledger).items()}
    return [f"{question}: {rest}" for question, rest in rests.items() if rest.spared]


def with_rest(score: Score, rest: Rest) -> Score:
    """Take from a share of survivors what the last attacks would break of those they spared."""
    low, estimate, high = rest.hidden()
    value = score.value - estimate
    return replace(
        score,
        value=float(value),
        low=max(0.0, float(value - math.hypot(score.value - score.low, high - estimate))),
        high=min(1.0, float(value + math.hypot(score.high - score.value, estimate - low))),
    )


def compare(
    ours: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]
) -> Paired | None:
    """Compare two models' image scores, a mapping per seed, on the images that all share.

    Returns ours minus reference; None where they share none. Over several seeds it is the mean
    over all pairs of a training of ours and one of theirs. What the last attacks of a bounded
    evaluator spared widens the interval, and leaves no p. Source of p: McNemar (1947).
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
        counts = _effective_counts(ours_SN, reference_SN, gained, lost)
        over_images = partial(of_gained_and_lost, *counts)
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
    paired = Paired(difference, *at(CONFIDENCE), len(shared), p, *noise, sides, at)
    return _less_hidden(paired, ours, reference)


def error_consistency(
    name: str, ours: Mapping[str, float], reference: Mapping[str, float]
) -> Score | None:
    """Return Cohen's kappa of which shared images two models err on, with its interval.

    1: on the same ones; 0: as two independent models of these accuracies; None where an image's
    score is not right or wrong, or a model errs on no image or on all. The interval is by the
    bootstrap over images. Source: Geirhos et al. (NeurIPS 2020), section 2.
    """
    shared = [image for image in ours if image in reference]
    right_2N = np.array([[side[image] for image in shared] for side in (ours, reference)])
    if not np.isin(right_2N, (0, 1)).all() or not right_2N.any(1).all() or right_2N.all(1).any():
        return None
    both, first, second = right_2N.prod(axis=0), *right_2N
    counts = [both.sum(), (first - both).sum(), (second - both).sum()]
    n = len(shared)
    cells = np.array([*counts, n - sum(counts)]) / n
    drawn_R4 = np.random.default_rng(0).multinomial(n, cells, RESAMPLES) / n
    with np.errstate(invalid="ignore"):  # of a resample in which all are alike
        low, high = np.nanpercentile(_kappa(drawn_R4), (2.5, 97.5))
    value = float(_kappa(cells[None])[0])
    return Score(name, value, min(float(low), value), max(float(high), value), n)


def _kappa(cells_R4: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa (1960) of shares of: both right, only ours, only theirs, neither."""
    both, ours, theirs, neither = cells_R4.T
    by_chance = (both + ours) * (both + theirs) + (neither + ours) * (neither + theirs)
    kappa: np.ndarray = (both + neither - by_chance) / (1 - by_chance)
    return kappa


def _effective_counts(
    ours_SN: np.ndarray, reference_SN: np.ndarray, gained: float, lost: float
) -> tuple[float, float, float]:
    """Return images gained, lost and all of them, as many as vary like means over trainings.

    The mean of several answers about an image varies less than one answer does: the counts are
    divided by the design effect, the ratio of both variances (Korn and Graubard 1998).
    """
    differences_N = ours_SN.mean(axis=0) - reference_SN.mean(axis=0)
    n, square = len(differences_N), float(differences_N.mean()) ** 2
    of_answer, of_means = (gained + lost) / n - square, float((differences_N**2).mean()) - square
    most = max(len(ours_SN), len(reference_SN))
    more = min(most, of_answer / of_means) if of_means > ROUNDING else 1.0
    return more * gained, more * lost, more * n


def _less_hidden(paired: Paired, *sides: Sequence[Mapping[str, float]]) -> Paired:
    """Take from each side what the last attacks would break of the images that they spared."""
    rests = [[getattr(seed, "rest", Rest()) for seed in side] for side in sides]
    if not any(rest.spared for side in rests for rest in side):
        return paired
    moved = [fmean(rest.hidden(CONFIDENCE)[1] for rest in side) for side in rests]
    at = partial(_with_hidden, paired, rests)
    difference = paired.difference - moved[0] + sum(moved[1:])
    means = paired.sides and (paired.sides[0] - moved[0], paired.sides[1] - moved[1])
    low, high = at(CONFIDENCE)
    return replace(paired, difference=difference, low=low, high=high, p=None, sides=means, at=at)


def _with_hidden(paired: Paired, rests: Sequence[Sequence[Rest]], confidence: float) -> Interval:
    """Return the interval of a difference less what is hidden on each side, which is independent.

    Source: MOVER (Zou and Donner 2008).
    """
    assert paired.at is not None
    low, high = paired.at(confidence)
    value, below, above = paired.difference, [paired.difference - low], [high - paired.difference]
    for side, sign in zip(rests, (1, -1), strict=False):
        hidden = [rest.hidden(confidence) for rest in side]
        least, middle, most = (fmean(parts) for parts in zip(*hidden, strict=True))
        value -= sign * middle
        reaches = (most - middle, middle - least)[::sign]
        below.append(reaches[0])
        above.append(reaches[1])
    return value - math.hypot(*below), value + math.hypot(*above)


def minus_none(ours: Sequence[Mapping[str, float]]) -> Paired:
    """Return a model's score minus 0, a mapping per seed of images' scores from 0 to 1.

    Over images it has the score's own interval: Wilson's of a share, else Student's.
    """
    shared = sorted(set.intersection(*map(set, ours)))
    ours_SN = np.array([[seed[image] for image in shared] for seed in ours])
    value = float(ours_SN.mean())
    over_images = (
        partial(_wilson, [binomtest(int(k), len(shared)) for k in ours_SN.sum(axis=1)])
        if np.isin(ours_SN, (0, 1)).all()
        else partial(of_mean, ours_SN.mean(axis=0), least=0, most=1)
    )
    at = partial(_over_both, value, over_images, (ours_SN.mean(axis=1),))
    return _less_hidden(Paired(value, *at(CONFIDENCE), len(shared), None, at=at), ours)


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


def _wilson(shares_S: Sequence[Any], *, confidence: float) -> Interval:
    """Return the mean over seeds of Wilson's interval (1927) of a share."""
    ends = [share.proportion_ci(confidence, method="wilson") for share in shares_S]
    return fmean(e.low for e in ends), fmean(e.high for e in ends)


def of_mean(
    values_N: np.ndarray, *, least: float, most: float, confidence: float = CONFIDENCE
) -> Interval:
    """Return Student's interval of the mean over images of values from `least` to `most`.

    Images that are all alike say nothing of those unseen: as many as Clopper and Pearson (1934)
    allow may lie at either end. Source: Student (1908).
    """
    if np.ptp(values_N) < ROUNDING:
        common, unseen = float(values_N[0]), clopper_pearson(0, len(values_N), confidence)[1]
        return common - unseen * (common - least), common + unseen * (most - common)
    error = float(values_N.std(ddof=1)) / math.sqrt(len(values_N))
    value, reach = float(values_N.mean()), error * stdtrit(len(values_N) - 1, (1 + confidence) / 2)
    return max(float(value - reach), least), min(float(value + reach), most)


def mean_score(name: str, values_N: np.ndarray, *, most: float) -> Score:
    """Return the mean over images of values from 0 to `most`, with Student's interval."""
    low, high = of_mean(values_N, least=0, most=most)
    return Score(name, float(values_N.mean()), low, high, len(values_N))


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
    variances = np.array([values_S.var(ddof=1) / len(values_S) for values_S in several])
    if not (total := variances.sum()):
        return 0.0
    freedom = total**2 / sum(variances**2 / [len(values_S) - 1 for values_S in several])
    return float(stdtrit(freedom, (1 + confidence) / 2) * math.sqrt(total))
