"""Choose attack strengths that tell models apart: `python -m benchmarks.calibrate [--scale NAME]`.

The references are the stand-ins of ResNet-50 trained cleanly and of ResNet-50 GELU trained
adversarially. Survival is over all seeds and images together, with its 95 % interval:
  small radius     the clean one keeps 25 to 75 %, the nearest to 50 %
  standard radius  the clean one keeps at most 5 %, the adversarial one 25 to 75 %, nearest to 50 %
  patches, tilt    the least that leaves the clean one 25 to 75 %
Radii are a quarter of an octave apart, angles half an octave. The values stand in
`trainables/scale.py` and `evaluators/texture_patch.py`. Where a scale has no `training_epsilon` the
adversarial one is trained at each radius. Takes minutes at digits, hours on a GPU at cifar10.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.measure import DEVICE
from evaluators.autoattack import AutoAttack
from evaluators.base import Evaluator, judge_images
from evaluators.ledger import Score, share
from evaluators.natural import Natural
from evaluators.texture_patch import TexturePatchAttack
from grid.study import base_named
from trainables.data.base import Data
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_named
from trainables.train.loop import train

LEAST, MOST, FLOOR = 0.25, 0.75, 0.05
CLEAN, ROBUST = "resnet50", "adversarial_resnet50_gelu"
RADII = [round(2 ** (step / 4)) for step in range(24, -1, -1)]  # 64/255 to 1/255
TILTS = (5, 7, 10, 14, 20, 28)  # degrees


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each survival as it is measured, then the chosen strengths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", default="digits")
    parser.add_argument("--data", type=Path, help="where the scale's images lie")
    parser.add_argument("--images", type=int, default=200, help="attacked, of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    scale = replace(
        scale_named(options.scale),
        attack_subset=options.images,
        autoattack_subset=options.images,
    )
    source = DataSource(root=options.data) if options.data else DataSource()
    references = References(scale, load_data(scale, source), range(options.seeds))
    small, standard = references.radii()
    print(f"small_epsilon: {small}\nepsilon: {standard}")
    print(f"patches: {references.patches()}\nnatural_tilt: {references.tilt()}")


def is_in_band(survival: Score) -> bool:
    """Tell whether a strength tells models apart."""
    return LEAST <= survival.value <= MOST


class References:
    """The reference models of a scale, trained when they are asked for, and what they survive."""

    def __init__(self, scale: Scale, data: Data, seeds: Iterable[int]) -> None:
        self.scale, self.data, self.seeds = scale, data, tuple(seeds)
        self._by_digest: dict[str, Classifier] = {}

    def _trained(self, recipe: Recipe) -> Classifier:
        digest = recipe.digest()
        if digest in self._by_digest:
            return self._by_digest[digest]
        classifier = build_classifier(recipe)
        for _ in train(recipe, classifier, self.data, device=DEVICE):
            pass
        self._by_digest[digest] = classifier.eval()
        return self._by_digest[digest]

    def survivals(self, base: str, evaluator: Evaluator) -> dict[str, Score]:
        """Return the share of each question that survives, over the seeds together; print it.

        The models are trained by the evaluator's scale.
        """
        ledgers = []
        for seed in self.seeds:
            recipe = evaluator.scale.shrink(base_named(base)).replace(seed=seed)
            classifier = self._trained(recipe)
            ledgers.append(judge_images(evaluator, classifier, self.data, device=DEVICE))
        return _shares(pa.concat_tables(ledgers), base)

    def radii(self) -> tuple[str, str]:
        """Return the small and the standard radius, or that there is none on the grid."""
        small, standard = {}, {}
        for number in RADII:
            scale = replace(self.scale, epsilon=Fraction(number, 255))
            print(f"radius {number}/255")
            clean = self.survivals(CLEAN, AutoAttack(scale))["autoattack"]
            if clean.value > MOST:
                break
            if is_in_band(clean):
                small[number] = clean
            if clean.value <= FLOOR:
                robust = self.survivals(ROBUST, AutoAttack(scale))["autoattack"]
                if is_in_band(robust):
                    standard[number] = robust
        return _nearest(small), _nearest(standard)

    def patches(self) -> int | None:
        """Return after how many patches the clean reference is in the band."""
        evaluator = TexturePatchAttack(self.scale)
        survivals = self.survivals(CLEAN, evaluator)
        counts = {1: survivals["tpa/patches-1"], self.scale.patch.patches: survivals["tpa"]}
        return next((count for count, kept in counts.items() if is_in_band(kept)), None)

    def tilt(self) -> int | None:
        """Return the least angle at which the clean reference is in the band."""
        for degrees in TILTS:
            print(f"tilt {degrees} degrees")
            natural = Natural(replace(self.scale, natural_tilt=float(degrees)))
            if is_in_band(self.survivals(CLEAN, natural)["natural"]):
                return degrees
        return None


def _nearest(survivals: dict[int, Score]) -> str:
    if not survivals:
        return "none on the grid"
    return f"{min(survivals, key=lambda number: abs(survivals[number].value - 0.5))}/255"


def _shares(ledger: pa.Table, base: str) -> dict[str, Score]:
    shares = {}
    for question in pc.unique(ledger["question"]).to_pylist():
        survived = ledger.filter(pc.equal(ledger["question"], question))["survived"].to_pylist()
        shares[question] = score = share(question, sum(survived), len(survived))
        told = f"{100 * score.value:.1f} % [{100 * score.low:.1f}, {100 * score.high:.1f}]"
        print(f"  {base}, {question}: {told} of {score.n}", flush=True)
    return shares


if __name__ == "__main__":
    main()
