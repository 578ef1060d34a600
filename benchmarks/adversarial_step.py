"""What a PGD-1 training step costs, as a ratio of a clean step of the same model.

    python -m benchmarks.adversarial_step

Arithmetic floor: a clean step is a forward, an input-gradient and a weight-gradient pass; PGD-1
adds a forward and an input-gradient pass, so 1 + 2/3. Both sides are interleaved; printed are the
median ratio and its quartiles.
"""

from __future__ import annotations

import statistics
import time

import torch

from grid.studies import adversarial_resnet50, deit, resnet50, with_axis
from trainables.adversary import training_attack
from trainables.data import load_data, to_unit
from trainables.loop import training_loss
from trainables.models import build_classifier
from trainables.optim import build_optimizer
from trainables.recipe import Recipe
from trainables.scale import DIGITS

REPEATS = 60


def main() -> None:
    """Measure and print the ratio for both families."""
    torch.set_num_threads(1)
    attacked_deit = with_axis(deit(), "training", "adversarial")
    plain_resnet = adversarial_resnet50().replace(norm="batch")
    for clean, adversarial in ((resnet50(), plain_resnet), (deit(), attacked_deit)):
        ratios = measure(DIGITS.shrink(clean), DIGITS.shrink(adversarial))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{clean.model}: {middle:.3f} [{low:.3f}, {high:.3f}] (target 1.667 + 5 % = 1.717)")


def measure(clean: Recipe, adversarial: Recipe) -> list[float]:
    """Return the ratio of an adversarial step to a clean one, step after step."""
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

    for _ in range(5):
        step(clean), step(adversarial)
    return [step(adversarial) / step(clean) for _ in range(REPEATS)]


if __name__ == "__main__":
    main()
