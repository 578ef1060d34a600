"""PGD-5, -10, -50 and -100 in one trajectory against torchattacks' PGD called four times.

Same model, images, step size and start (none, so that both start at the images); float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchattacks
from torch import Tensor

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, require
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


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for both families."""
    held_out = load_data(DIGITS).held_out.subset(8 if quick else DIGITS.attack_subset, seed=0)
    images, labels = to_unit(held_out.images.to(DEVICE)), held_out.labels.to(DEVICE)
    for recipe in (resnet50(), deit()):
        epochs = 1 if quick else 4
        classifier = trained(DIGITS.shrink(recipe).replace(epochs=epochs, warmup_epochs=0.0))
        ours, theirs = (side(classifier, images, labels) for side in (one_trajectory, four_calls))
        differing, all_verdicts = int((ours != theirs).sum()), ours.numel()
        require(differing <= all_verdicts // 100, f"{differing} of {all_verdicts} verdicts")
        pairs = in_turns(
            lambda model=classifier: one_trajectory(model, images, labels),
            lambda model=classifier: four_calls(model, images, labels),
            repeats=1 if quick else 7,
            clock=device_seconds,
        )
        yield Figure(
            name=f"PGD-5, 10, 50 and 100 of {recipe.model}, torchattacks / ours",
            values=tuple(theirs_s / ours_s for ours_s, theirs_s in pairs),
            target=2,
            same=f"{differing} of {all_verdicts} verdicts differ",
        )


def trained(recipe: Recipe) -> Classifier:
    """Train a model for a few epochs: enough to be worth attacking."""
    classifier = build_classifier(recipe)
    for _ in train(recipe, classifier, load_data(DIGITS), device=DEVICE):
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
