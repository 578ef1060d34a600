"""How many images and trainings decide a claim, and which difference so many can tell. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from statistics import NormalDist

import numpy as np
from scipy.special import chdtri, ndtr, stdtrit  # scipy.stats takes a second to import

from evaluators.proportions import of_gained_and_lost
from grid.table import LEADS, Claim

POWER = 0.8  # of the difference that is said to be detectable
ALPHA = 0.05  # of all claims of a study together
MOST_IMAGES = 10**6
MOST_TRAININGS = 30
STEP = 1 / 1000  # in which the detectable difference is searched
FEWEST = 100  # images of a claim of several trainings
MARGIN = 0.05  # two models within five points are level
NEARLY = 1.6  # times the least difference that all images would tell
PRIOR_IMAGES = 20  # that what is assumed beforehand weighs, beside what was measured
QUANTILES = (np.arange(40) + 0.5) / 40


@dataclass(frozen=True)
class Noise:
    """What a difference of two models varies by, in shares.

    discordance: the mean square of an image's difference; where answers are right or wrong, the
    share of images on which the models disagree. spread: the standard deviation of a model's score
    over trainings. images: on so many the discordance was measured, 0: it is assumed. binary: each
    answer is right or wrong. The defaults are assumed of models that are neither alike nor without
    relation: at scale digits 0.13 to 0.33 was measured, and 0.01 to 0.02 of mean errors.
    """

    discordance: float = 0.25
    spread: float = 0.02
    images: int = 0
    binary: bool = True

    def updated(self, measured: Noise | None) -> Noise:
        """Return what was measured, with what is assumed here as so many more images."""
        if not measured:
            return self
        total = measured.images * measured.discordance + PRIOR_IMAGES * self.discordance
        discordance = total / (measured.images + PRIOR_IMAGES)
        return replace(measured, discordance=discordance, spread=measured.spread or self.spread)


def power_of(
    difference: float, images: int, trainings: Sequence[int], noise: Noise, alpha: float
) -> float:
    """Return the chance that a paired test tells a difference from 0, on its side.

    The test is the interval that decides a claim: MOVER's where answers are right or wrong, whose
    width varies with the discordant ones, else Student's. trainings: of each side that is trained
    more than once, how many; the interval then takes in Welch's over trainings, and the chance is
    the mean over their sample variances. alpha: of two sides.
    """
    # Trainings that vary by their accuracy alone disagree on so many images; means vary less.
    alike = sum(1 - 1 / count for count in trainings) * noise.spread / math.sqrt(math.pi)
    square = noise.discordance - alike if noise.binary else noise.discordance
    square = max(square, difference if noise.binary else difference**2)  # of models that differ so
    of_one = max(square - difference**2, STEP**2)
    # The width that is drawn varies, too: by `drawn` over the images, and as the difference does.
    if noise.binary:
        width, drawn = _width_over_images(square, images, alpha), (1 - square) / square
    else:
        width, drawn = -stdtrit(max(images - 1, 1), alpha / 2) * math.sqrt(of_one / images), 2.0
    variance, reach = _over_trainings(tuple(trainings), noise.spread, alpha)
    told_from = np.hypot(width, reach)
    slope = width**2 / (2 * told_from)
    shared = 2 * difference * noise.binary
    deviation = np.sqrt((of_one + drawn * slope * (slope - shared)) / images + variance)
    return float(np.mean(ndtr((difference - told_from) / deviation)))


def _width_over_images(square: float, images: int, alpha: float) -> float:
    """Return how far the interval reaches below a difference that it just tells from 0."""
    width = _normal_quantile(alpha) * math.sqrt(square / images)
    for _ in range(2):
        least = min(width, square)
        halves = (square + least) / 2 * images, (square - least) / 2 * images
        width = least - of_gained_and_lost(*halves, images, confidence=1 - alpha)[0]
    return width


def images_for(
    difference: float, trainings: Sequence[int], noise: Noise, alpha: float, power: float
) -> int | None:
    """Return the fewest images that tell a difference with a power; None where none do.

    Over trainings that vary, no number of images tells a small difference.
    """
    return _first(
        range(1, MOST_IMAGES + 1), power, lambda n: power_of(difference, n, trainings, noise, alpha)
    )


def trainings_for(
    difference: float, images: int, sides: int, noise: Noise, alpha: float, power: float
) -> int | None:
    """Return the fewest trainings of each of some sides that tell a difference by some images."""
    return _first(
        range(2, MOST_TRAININGS + 1),
        power,
        lambda n: power_of(difference, images, (n,) * sides, noise, alpha),
    )


def detectable(
    images: int, trainings: Sequence[int], noise: Noise, alpha: float, power: float
) -> float:
    """Return the least difference that some images and trainings tell with a power; at most 1."""
    steps = range(1, round(1 / STEP))
    chance = partial(power_of, images=images, trainings=trainings, noise=noise, alpha=alpha)
    return STEP * (_first(steps, power, lambda step: chance(step * STEP)) or len(steps) + 1)


def _first(values: range, least: float, of: Callable[[int], float]) -> int | None:
    """Return the first value of which a growing function is not below the least; None: none is."""
    place = bisect_left(values, least, key=of)
    return values[place] if place < len(values) else None


def unbroken_share(images: int, alpha: float) -> float:
    """Return the upper limit of the share that survives where of so many images none does.

    It is Wilson's (1927), of two sides.
    """
    square = _normal_quantile(alpha) ** 2
    return square / (images + square)


@cache
def _over_trainings(
    trainings: tuple[int, ...], spread: float, alpha: float
) -> tuple[float, np.ndarray]:
    """Return the variance over trainings of a difference, and how far Welch's interval reaches.

    The reach (Welch 1947) follows from the sample variance of each side, of which it has the
    equally likely ones.
    """
    several = [count for count in trainings if count > 1]
    if not several or not spread:
        return 0.0, np.zeros(1)
    sampled = [spread**2 / n * chdtri(n - 1, QUANTILES) / (n - 1) for n in several]
    parts = np.array(list(product(*sampled)))
    freedom = parts.sum(axis=1) ** 2 / (parts**2 / (np.array(several) - 1)).sum(axis=1)
    reach = -stdtrit(freedom, alpha / 2) * np.sqrt(parts.sum(axis=1))
    return sum(spread**2 / n for n in several), reach


def _normal_quantile(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha / 2)


@dataclass(frozen=True)
class Design:
    """What decides a claim, and what it gets.

    trainings: of each side. needed: the images that tell the difference that is asked for with the
    power, None where none do in so many trainings, as `needed_trainings` of each side would; both
    None: not even the most would. images: as many as it gets. detectable: the least difference that
    these tell; of a claim that none survive, the share of survivors below which it is decided.
    """

    claim: Claim
    noise: Noise
    trainings: tuple[int, ...]
    images: int
    needed: int | None
    detectable: float
    needed_trainings: int | None = None


@dataclass(frozen=True)
class Goal:
    """What a study is to tell: a difference, in shares, with a power.

    It is told from 0, and 0 from it where a claim is that models are level. alpha: of one claim of
    the study's, as Holm's correction has it of the first.
    """

    difference: float
    power: float
    alpha: float

    @classmethod
    def of_claims(cls, difference: float, power: float, claims: int) -> Goal:
        """Return the goal of a study of so many claims, which together err in ALPHA."""
        return cls(difference, power, ALPHA / max(1, claims))

    def design(
        self,
        claim: Claim,
        trainings: Sequence[int],
        noise: Noise,
        available: int,
        *,
        every: bool = False,
    ) -> Design:
        """Return what decides a claim; it gets no more images than there are.

        Of several trainings, which vary, it gets no more than tell nearly what all of them would:
        the rest tells little, and each training has to judge it. every: it gets all in any case.
        """
        if claim.test == "none survive":
            return self._of_floor(claim, trainings, noise, available)
        sides, several = tuple(trainings), sum(count > 1 for count in trainings)
        # A lead is told from none, or from the difference, each time on one side.
        alpha = min(1.0, self.alpha * (2 if claim.test in LEADS else 1))
        # Level models have to be told from both ends.
        power = (1 + self.power) / 2 if claim.test == "level" else self.power
        rest = (noise, alpha, power)
        needed, more = images_for(self.difference, sides, *rest), None
        images = min(needed or available, available)
        if several:
            if images != needed:
                more = trainings_for(self.difference, available, several, *rest)
            nearly = max(self.difference, NEARLY * detectable(available, sides, *rest))
            images = images_for(nearly, sides, *rest) or available
            images = min(max(images, FEWEST), available)
        images = available if every else images
        tells = detectable(images, sides, *rest)
        return Design(claim, noise, sides, images, needed, tells, more)

    def _of_floor(
        self, claim: Claim, trainings: Sequence[int], noise: Noise, available: int
    ) -> Design:
        square = _normal_quantile(self.alpha) ** 2
        needed = math.floor(square / MARGIN - square) + 1
        images = min(needed, available)
        tells = unbroken_share(images, self.alpha)
        return Design(claim, noise, tuple(trainings), images, needed, tells)
