"""How often an evaluator asks a model, counted from its budget. Pure: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainables.data.listing import DataSource, list_splits
from trainables.scale import Scale

HELD_OUT = {"digits": 597, "cifar10": 10_000, "imagenet": 50_000}
KINDS_AND_SEVERITIES = 15 * 5
GENERATED_CORRUPTED, IMAGENET_A, HARDEST_SHARE = 100, 7_500, 1 / 6
PGD_STEPS, PGD_STOPS = 100, 4
HEALTH_IMAGES, HEALTH_STEPS = 50, 20
ITERATIONS, TARGETS = 100, 9
# Which share of the images withstands AutoAttack and so costs every stage, and which share of its
# queries TPA asks before a patch succeeds: means over the tables T1 to T4 at scale digits.
WITHSTANDING = {"small": 0.9, "vanilla": 0.2, "adversarial": 0.5}
ASKED_BY_PATCHES = 0.2
STEPS_TO_BREAK = 10


@dataclass(frozen=True)
class Passes:
    """Images put through a model once: forward only, or forward and back to the pixels."""

    forward: float
    gradient: float = 0.0


def held_out_images(scale: Scale, source: DataSource) -> int:
    """Return how many images are held out at a scale; those of a folder are listed."""
    return HELD_OUT[scale.name] if scale.name in HELD_OUT else len(list_splits(source)[1])


def passes(
    evaluator: str, scale: Scale, *, held_out: int, adversarial: bool, at_most: bool = False
) -> Passes:
    """Return the passes of one cell.

    Attacks that stop at success are counted by what they took at scale digits, on models trained
    adversarially or not; `at_most`: as if nothing succeeded.
    """
    stored = scale.name == "imagenet"
    attacked = min(scale.attack_subset, held_out)
    if evaluator == "natural":
        return Passes(IMAGENET_A if stored else math.ceil(held_out * HARDEST_SHARE))
    if evaluator == "stylized":
        return Passes(held_out * (2 if stored else 1))
    if evaluator == "corruptions":
        images = held_out if stored else min(GENERATED_CORRUPTED, held_out)
        return Passes(images * KINDS_AND_SEVERITIES)
    if evaluator == "health":
        images = min(HEALTH_IMAGES, attacked)
        return Passes(images, images * (HEALTH_STEPS + 1))
    if evaluator in ("pgd", "pgd-as-published"):
        return Passes(attacked * PGD_STOPS, attacked * PGD_STEPS)
    if evaluator == "tpa":
        budget, images = scale.patch, min(scale.patch.images, held_out)
        asked = 2 * budget.patches * budget.steps * budget.samples
        return Passes(images * (1 + asked * (1 if at_most else ASKED_BY_PATCHES)))
    if evaluator.startswith("autoattack"):
        kind = "adversarial" if adversarial else "vanilla"
        share = WITHSTANDING["small" if evaluator.endswith("small") else kind]
        return _autoattack(scale, min(scale.autoattack_subset, attacked), 1 if at_most else share)
    return Passes(held_out)


def _autoattack(scale: Scale, images: int, withstanding: float) -> Passes:
    """Count APGD-CE, APGD-T, FAB-T (two passes an iteration, one with a gradient) and Square."""
    targets = min(TARGETS, scale.num_classes - 1)
    survivors, broken = images * withstanding, images * (1 - withstanding)
    steps = ITERATIONS + 1
    return Passes(
        forward=2 * images + survivors * (targets * steps + scale.square_queries),
        gradient=broken * STEPS_TO_BREAK + survivors * (steps + 2 * targets * steps),
    )
