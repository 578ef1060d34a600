"""Verdicts of attacks that seek in bf16 beside those in float32: `python -m benchmarks.bf16`.

Small networks of the digits (benchmarks/bounded.py: five shapes, trained plainly and against
PGD-3), each attacked by PGD-100 and by all of AutoAttack at a radius that it withstands in part. A
verdict flips where one search breaks an image and the other does not; an image counts as broken
where float32 errs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product

from benchmarks.bounded import RADII, SHAPES, Counting, trained
from benchmarks.measure import DEVICE
from evaluators import evaluator_named
from evaluators.base import judge_images
from evaluators.ledger import by_question
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS, Scale


def survivors(
    name: str, question: str, classifier: Classifier, scale: Scale, radius: float
) -> list[bool]:
    """Return which images survive an attack."""
    evaluator = evaluator_named(name, scale, radii=(radius,))
    ledger = judge_images(evaluator, classifier, load_data(DIGITS), device=DEVICE)
    survived: list[bool] = by_question(ledger)[question]["survived"].to_pylist()
    return survived


def main() -> None:
    """Print the flips of each network and attack, and of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    scale = replace(DIGITS, attack_subset=options.images, autoattack_subset=options.images)
    totals = {name: [0, 0, 0, 0, 0] for name in ("pgd", "autoattack")}
    for shape, adversarial, seed in product(SHAPES, (False, True), range(options.seeds)):
        network = Counting(*shape[:2])
        classifier = trained(network, shape[2], adversarial=adversarial, seed=seed)
        for name, total in totals.items():
            question = "pgd-100" if name == "pgd" else name
            args = name, question, classifier
            exact = survivors(*args, scale, RADII[adversarial])
            half = survivors(*args, replace(scale, attacks_in="bf16"), RADII[adversarial])
            weaker = sum(h and not e for h, e in zip(half, exact, strict=True))
            stronger = sum(e and not h for h, e in zip(half, exact, strict=True))
            counts = len(exact), sum(exact), sum(half), weaker, stronger
            total[:] = [a + b for a, b in zip(total, counts, strict=True)]
            print(f"{shape[0]} wide, adversarial {adversarial}: {name} {counts}", flush=True)
    for name, (images, exact, half, weaker, stronger) in totals.items():
        print(
            f"{name}: of {images} verdicts {exact} survive float32, {half} bf16; "
            f"{weaker} survive bf16 alone, {stronger} float32 alone"
        )


if __name__ == "__main__":
    main()
