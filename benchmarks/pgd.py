"""PGD-5, -10, -50 and -100 in one trajectory against torchattacks' PGD called four times.

    python -m benchmarks.pgd [--repeats N]

Same model, images, step size and start (none, so that both start at the images); float32. The
sides are interleaved; printed are the median ratio of the times with its quartiles, and on how
many images the two sides' verdicts differ.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import torchattacks
from torch import Tensor

from evaluators.pgd import STEPS
from grid.studies import deit, resnet50
from trainables.adversary import attacked, pgd_iterates
from trainables.data import load_data, to_unit
from trainables.folding import folded
from trainables.loop import train
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS

EPSILON = float(DIGITS.epsilon)


def main() -> None:
    """Measure and print the ratio for both families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread")
    held_out = load_data(DIGITS).held_out.subset(DIGITS.attack_subset, seed=0)
    images, labels = to_unit(held_out.images), held_out.labels
    for recipe in (resnet50(), deit()):
        compare(recipe, images, labels, repeats)


def compare(recipe: Recipe, images: Tensor, labels: Tensor, repeats: int) -> None:
    """Print one model's ratio."""
    classifier = trained(DIGITS.shrink(recipe).replace(epochs=4, warmup_epochs=0.0))
    ratios, differing = [], 0
    for _ in range(repeats):
        began = time.perf_counter()
        ours = one_trajectory(classifier, images, labels)
        middle = time.perf_counter()
        theirs = four_calls(classifier, images, labels)
        ratios.append((time.perf_counter() - middle) / (middle - began))
        differing = int((ours != theirs).sum())
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"{recipe.model}: {median:.2f}x [{low:.2f}, {high:.2f}] over {repeats} repeats (target 2); "
        f"{differing} of {ours.numel()} verdicts differ",
        flush=True,
    )


def trained(recipe: Recipe) -> Classifier:
    """Train a model for a few epochs: enough to be worth attacking."""
    classifier = build_classifier(recipe)
    for _ in train(recipe, classifier, load_data(DIGITS), device=torch.device("cpu")):
        pass
    return classifier.eval()


def one_trajectory(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Return right_SB, for each length S and image B, as the evaluator asks."""
    with attacked(classifier):
        iterates = pgd_iterates(
            folded(classifier, images) or classifier,
            images,
            labels,
            epsilon=EPSILON,
            step_size=EPSILON / 4,
            stops=STEPS,
            start_BCHW=images,
        )
        with_steps = [attacked_images for _, attacked_images in iterates]
        with torch.no_grad():
            return torch.stack([classifier(x).argmax(dim=1) == labels for x in with_steps])


def four_calls(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Return right_SB by one call of torchattacks for each length."""
    found = []
    for steps in STEPS:
        attack = torchattacks.PGD(
            classifier, eps=EPSILON, alpha=EPSILON / 4, steps=steps, random_start=False
        )
        attacked_images = attack(images, labels)
        with torch.no_grad():
            found.append(classifier(attacked_images).argmax(dim=1) == labels)
    return torch.stack(found)


if __name__ == "__main__":
    main()
