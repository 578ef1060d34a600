"""What a PGD-1 training step costs, as a ratio of a clean step of the same model.

    python -m benchmarks.adversarial_step [--scale imagenet --batch 8 --repeats 10]

In arithmetic a clean step is a forward, an input-gradient and a weight-gradient pass; PGD-1 adds a
forward and an input-gradient pass, so 1 + 2/3. The floor is that sum as this machine runs it: a
clean step and a bare forward and input-gradient pass in plain PyTorch. The sides are interleaved;
printed are median ratios and their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from grid.studies import adversarial_resnet50, deit, resnet50, with_axis
from trainables.adversary import attacked, training_attack
from trainables.data import to_unit
from trainables.folding import folded
from trainables.loop import training_loss
from trainables.models import build_classifier
from trainables.optim import build_optimizer
from trainables.recipe import Recipe
from trainables.scale import scale_named

WARMUP = 3


def main() -> None:
    """Measure and print the ratio for both families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    scale = scale_named(options.scale)
    torch.set_num_threads(1)
    attacked_deit = with_axis(deit(), "training", "adversarial")
    plain_resnet = adversarial_resnet50().replace(norm="batch")
    for clean, adversarial in ((resnet50(), plain_resnet), (deit(), attacked_deit)):
        to_clean, to_floor = measure(
            scale.shrink(clean),
            scale.shrink(adversarial),
            images=torch.randint(256, (options.batch, 3, *(scale.image_size,) * 2)).byte(),
            repeats=options.repeats,
        )
        print(f"{clean.model}: {spread(to_clean)} of a clean step (target 1.667 + 5 % = 1.717)")
        print(f"{clean.model}: {spread(to_floor)} of the floor (target 1.05)", flush=True)


def spread(ratios: list[float]) -> str:
    """Write a median with its quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def measure(
    clean: Recipe, adversarial: Recipe, *, images: torch.Tensor, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the ratios of an adversarial step to a clean one and to the floor, step by step."""
    classifier = build_classifier(adversarial)
    optimizer = build_optimizer(adversarial, classifier)
    inputs, labels = to_unit(images), torch.arange(len(images)) % 10
    twin = folded(classifier.eval(), inputs[:1])

    def step(recipe: Recipe) -> float:
        began = time.perf_counter()
        classifier.train()
        optimizer.zero_grad()
        trained_on = inputs
        if recipe.adversary:
            trained_on = training_attack(
                recipe, classifier, inputs, labels, epoch=0, step=0, twin=twin
            )
        training_loss(recipe, classifier(trained_on), labels).backward()
        optimizer.step()
        return time.perf_counter() - began

    def bare_pass() -> float:
        began = time.perf_counter()
        with attacked(classifier):
            start = inputs.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(classifier(start), labels), start)
        return time.perf_counter() - began

    triples = [(step(adversarial), step(clean), bare_pass()) for _ in range(WARMUP + repeats)]
    kept = triples[WARMUP:]
    return [a / c for a, c, _ in kept], [a / (c + b) for a, c, b in kept]


if __name__ == "__main__":
    main()
