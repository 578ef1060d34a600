"""AutoAttack, bounded, beside all of AutoAttack: coverage, gradient passes and time.

Thirty small networks of the digits: five shapes, trained plainly and against PGD-3, by three seeds.
Each is attacked at a radius that it withstands in part. The interval must hold the share that all
of AutoAttack leaves of the same images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.measure import DEVICE, Figure, require
from evaluators.autoattack import AutoAttack
from evaluators.autoattack_bounded import BoundedAutoAttack
from evaluators.base import judge_images
from evaluators.ledger import Score
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.recipe import Adversary, Recipe
from trainables.scale import DIGITS, Scale
from trainables.train.loop import train

SHAPES = ((8, nn.ReLU, 4), (12, nn.ReLU, 12), (12, nn.GELU, 8), (16, nn.ReLU, 6), (16, nn.GELU, 12))
SEEDS = 3
RADII = {False: 8 / 255, True: 24 / 255}  # of plain and of adversarial training
IMAGES = 400
BOUNDS = 0.1, 0.05, 0.02


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the shares of intervals that hold, of gradient passes and of time, at each bound."""
    scale = replace(
        DIGITS,
        autoattack_subset=20 if quick else IMAGES,
        square_queries=20 if quick else DIGITS.square_queries,
    )
    cases = [*product(SHAPES, (False, True), range(SEEDS))]
    rows = [beside_exact(*case, scale) for case in (cases[:1] if quick else cases)]
    for bound in BOUNDS:
        sides = [row[bound] for row in rows]
        covered = sum(side.covers for side in sides)
        agreement = f"{covered} of {len(sides)} intervals hold; {scale.autoattack_subset} images"
        require(covered >= 0.95 * len(sides), agreement)
        ratios = {
            "gradient passes": ([side.passes for side in sides], 0.25),
            "time": ([side.seconds for side in sides], 0.4),
        }
        for ratio, (values, target) in ratios.items():
            name = f"AutoAttack, bounded to {100 * bound:.0f} points / exact, {ratio}"
            yield Figure(
                name=name, values=tuple(values), target=target, better="less", same=agreement
            )


@dataclass(frozen=True)
class Sides:
    """Whether the interval holds the exact score; the shares of gradient passes and of time."""

    covers: bool
    passes: float
    seconds: float


def beside_exact(
    shape: tuple[int, type[nn.Module], int], adversarial: bool, seed: int, scale: Scale
) -> dict[float, Sides]:
    """Train a network and attack it with all of AutoAttack, and bounded by each bound."""
    network = Counting(*shape[:2])
    classifier = trained(network, shape[2], adversarial=adversarial, seed=seed)

    def attack(kind: type[AutoAttack], bound: float) -> tuple[Score, int, float]:
        evaluator = kind(replace(scale, autoattack_bound=bound), radii=[RADII[adversarial]])
        network.passes, began = 0, time.process_time()
        ledger = judge_images(evaluator, classifier, load_data(DIGITS), device=DEVICE)
        seconds = time.process_time() - began
        score = next(s for s in evaluator.summarize(ledger) if s.name == evaluator.name)
        return score, network.passes, seconds

    exact, all_passes, all_seconds = attack(AutoAttack, scale.autoattack_bound)
    sides = {}
    for bound in BOUNDS:
        score, passes, seconds = attack(BoundedAutoAttack, bound)
        covers = score.low <= exact.value <= score.high
        sides[bound] = Sides(covers, passes / all_passes, seconds / all_seconds)
    return sides


class Counting(nn.Sequential):
    """A small network that counts the images of which a gradient is taken."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2),
            activation(),
            nn.Conv2d(width, 2 * width, 3, stride=2),
            activation(),
            nn.Flatten(),
            nn.Linear(2 * width * 9, 10),
        )
        self.passes = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.passes += len(images_BCHW) if images_BCHW.requires_grad else 0
        logits: Tensor = super().forward(images_BCHW)
        return logits


def trained(network: nn.Module, epochs: int, *, adversarial: bool, seed: int) -> Classifier:
    """Return a network trained on the digits, plainly or against PGD-3."""
    radius = RADII[True]
    attack = {"epsilon": radius, "step_size": radius / 2, "steps": 3}
    recipe = Recipe(
        scale=DIGITS.name,
        model="resnet18",
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=1e-4,
        scheduler="cosine",
        epochs=epochs,
        batch_size=64,
        seed=seed,
        adversary=Adversary(**attack) if adversarial else None,
    )
    torch.manual_seed(seed)
    for layer in (layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)):
        layer.reset_parameters()
    classifier = Classifier(network, DIGITS.data_set.mean, DIGITS.data_set.std).to(DEVICE)
    for _ in train(recipe, classifier, load_data(DIGITS), device=DEVICE):
        pass
    return classifier.eval()
