"""What a PGD-1 training step costs, as a ratio of a clean step of the same model.

    python -m benchmarks.adversarial_step

In arithmetic a clean step is a forward, an input-gradient and a weight-gradient pass; PGD-1 adds a
forward and an input-gradient pass, so 1 + 2/3. The floor is that sum as this machine runs it: a
clean step and a bare forward and input-gradient pass in plain PyTorch. The sides are interleaved;
printed are median ratios and their quartiles.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F

from grid.studies import adversarial_resnet50, deit, resnet50, with_axis
from trainables.adversary import attacked, training_attack
from trainables.data import load_data, to_unit
from trainables.loop import training_loss
from trainables.models import build_classifier
from trainables.optim import build_optimizer
from trainables.recipe import Recipe
from trainables.scale import DIGITS

REPEATS = 60
WARMUP = 5


def main() -> None:
    """Measure and print the ratio for both families."""
    torch.set_num_threads(1)
    attacked_deit = with_axis(deit(), "training", "adversarial")
    plain_resnet = adversarial_resnet50().replace(norm="batch")
    for clean, adversarial in ((resnet50(), plain_resnet), (deit(), attacked_deit)):
        to_clean, to_floor = measure(DIGITS.shrink(clean), DIGITS.shrink(adversarial))
        print(f"{clean.model}: {spread(to_clean)} of a clean step (target 1.667 + 5 % = 1.717)")
        print(f"{clean.model}: {spread(to_floor)} of the floor (target 1.05)")


def spread(ratios: list[float]) -> str:
    """Write a median with its quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def measure(clean: Recipe, adversarial: Recipe) -> tuple[list[float], list[float]]:
    """Return the ratios of an adversarial step to a clean one and to the floor, step by step."""
    classifier = build_classifier(adversarial)
    optimizer = build_optimizer(adversarial, classifier)
    train = load_data(DIGITS).train
    images, labels = to_unit(train.images[:64]), train.labels[:64]

    def step(recipe: Recipe) -> float:
        began = time.perf_counter()
        classifier.train()
        optimizer.zero_grad()
        inputs = images
        if recipe.adversary:
            inputs = training_attack(recipe, classifier, images, labels, epoch=0, step=0)
        training_loss(recipe, classifier(inputs), labels).backward()
        optimizer.step()
        return time.perf_counter() - began

    def bare_pass() -> float:
        began = time.perf_counter()
        with attacked(classifier):
            inputs = images.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(classifier(inputs), labels), inputs)
        return time.perf_counter() - began

    triples = [(step(adversarial), step(clean), bare_pass()) for _ in range(WARMUP + REPEATS)]
    kept = triples[WARMUP:]
    return [a / c for a, c, _ in kept], [a / (c + b) for a, c, b in kept]


if __name__ == "__main__":
    main()
