"""See that designs keep their promise: `python -m benchmarks.power [--studies N]`.

Many studies of models that differ as assumed are drawn and judged as the report judges them; the
share that tells the difference stands beside the power that the design promises. Two points apart
is the most that a design may be off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

import numpy as np

from evaluators.intervals import compare
from evaluators.proportions import of_gained_and_lost
from grid.power import ALPHA, Noise, images_for, power_of

DIFFERENCES = (0.05, 0.10)
DISCORDANCES = (0.15, 0.25, 0.35)
CLAIMS = (1, 22)
SPREADS = (0.01, 0.02, 0.04)
TRAININGS = (3, 5)
POWER = 0.8
IMAGES = 300  # of studies with several trainings
FAR = 0.15  # the difference of these


def main() -> None:
    """Print the promise and the share of each design, and how far they are apart at most."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power", description=__doc__)
    parser.add_argument("--studies", type=int, default=10_000, metavar="N", help="of each design")
    studies, apart = parser.parse_args().studies, []
    rng = np.random.default_rng(0)
    for text, promised, told in (*of_one_training(rng, studies), *of_trainings(rng, studies)):
        apart.append(abs(promised - told))
        print(f"{text}: promised {promised:.3f}, told {told:.3f}", flush=True)
    print(f"{100 * max(apart):.1f} points apart at most, {studies:,} studies a design")


def of_one_training(rng: np.random.Generator, studies: int) -> Iterator[tuple[str, float, float]]:
    """Yield designs by images alone, each with its promise and the share that tells."""
    for difference, discordance, claims in product(DIFFERENCES, DISCORDANCES, CLAIMS):
        noise, alpha = Noise(discordance), ALPHA / claims
        images = images_for(difference, (), noise, alpha, POWER) or 0
        told = share_told(rng, studies, difference, images, 1, noise, alpha)
        of = f"discordance {discordance}, {claims} claims, n {images}"
        text = f"{100 * difference:g} points, {of}"
        yield text, power_of(difference, images, (), noise, alpha), told


def of_trainings(rng: np.random.Generator, studies: int) -> Iterator[tuple[str, float, float]]:
    """Yield designs of several trainings of each side."""
    for spread, count in product(SPREADS, TRAININGS):
        noise = Noise(0.25, spread)
        told = share_told(rng, studies, FAR, IMAGES, count, noise, ALPHA)
        text = f"{100 * FAR:g} points, spread {100 * spread:g}, {count} trainings, n {IMAGES}"
        yield text, power_of(FAR, IMAGES, (count, count), noise, ALPHA), told


def share_told(
    rng: np.random.Generator,
    studies: int,
    difference: float,
    images: int,
    trainings: int,
    noise: Noise,
    alpha: float,
) -> float:
    """Return the share of drawn studies whose interval at level alpha lies above 0."""
    if trainings == 1:
        halves = (noise.discordance + difference) / 2, (noise.discordance - difference) / 2
        drawn = rng.multinomial(images, (*halves, 1 - noise.discordance), size=studies)
        counts, times = np.unique(drawn, axis=0, return_counts=True)
        leads = [of_gained_and_lost(*c, images, confidence=1 - alpha)[0] > 0 for c in counts[:, :2]]
        return float(np.average(leads, weights=times))
    told = 0
    for _ in range(studies):
        paired = compare(*drawn_study(rng, difference, images, trainings, noise))
        assert paired and paired.at
        told += paired.at(1 - alpha)[0] > 0
    return told / studies


def drawn_study(
    rng: np.random.Generator, difference: float, images: int, trainings: int, noise: Noise
) -> list[list[dict[int, float]]]:
    """Draw the image scores of two sides whose trainings differ by their accuracy alone.

    On a share of images both sides are right or wrong by one draw, on the others by two.
    """
    apart = 0.5 + difference**2 / 2  # of two draws that many answers are discordant
    joint = rng.random(images) < (apart - noise.discordance) / (apart - difference)
    common, sides = rng.random(images), []
    for mean in (0.5 + difference / 2, 0.5 - difference / 2):
        own = np.where(joint, common, rng.random(images))
        spread = noise.spread if trainings > 1 else 0.0
        accuracies = mean + spread * rng.standard_normal(trainings)
        answers = [(own < accuracy).astype(float).tolist() for accuracy in accuracies]
        sides.append([dict(enumerate(of_training)) for of_training in answers])
    return sides


if __name__ == "__main__":
    main()
