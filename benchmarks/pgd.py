"""PGD-5, -10, -50 and -100 in one trajectory against torchattacks' PGD called four times.

Same model, images, step size and start (none, so that both start at the images); float32. On a
GPU the study's models at 224 px are attacked as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchattacks
from torch import Tensor

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, rate, require
from evaluators.pgd import STEPS
from grid.studies import deit, resnet50
from trainables.adversary import attacked, pgd_iterates
from trainables.data import load_data, to_unit
from trainables.folding import folded
from trainables.loop import train
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS, IMAGENET, scale_named


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for both families."""
    held_out = load_data(DIGITS).held_out.subset(8 if quick else DIGITS.attack_subset, seed=0)
    images, labels = to_unit(held_out.images.to(DEVICE)), held_out.labels.to(DEVICE)
    for recipe in (resnet50(), deit()):
        epochs = 1 if quick else 4
        attack = Attack(
            trained(recipe, epochs=epochs), images, labels, epsilon=float(DIGITS.epsilon)
        )
        yield beside_torchattacks(recipe.model, attack, repeats=1 if quick else 7)
    if DEVICE.type == "cuda":
        for recipe in (resnet50(), deit()):
            attack = Attack(*untrained(recipe, 128), epsilon=float(IMAGENET.epsilon))
            yield beside_torchattacks(f"{recipe.model} at 224 px", attack, repeats=5)


@dataclass(frozen=True)
class Attack:
    """A model, images and labels_B, and the radius of the attack."""

    classifier: Classifier
    images: Tensor
    labels: Tensor
    epsilon: float


def beside_torchattacks(name: str, attack: Attack, *, repeats: int) -> Figure:
    """Time both sides in turns; but for one in a hundred they must come to the same verdicts."""
    ours, theirs = (side(attack) for side in (one_trajectory, four_calls))
    differing, all_verdicts = int((ours != theirs).sum()), ours.numel()
    told = f"{differing} of {all_verdicts} verdicts differ"
    require(differing <= all_verdicts // 100, told)
    sides = (lambda: one_trajectory(attack)), (lambda: four_calls(attack))
    pairs = in_turns(*sides, repeats=repeats, clock=device_seconds)
    return Figure(
        name=f"PGD-5, 10, 50 and 100 of {name}, torchattacks / ours",
        values=tuple(their_s / our_s for our_s, their_s in pairs),
        target=2,
        same=f"{told}, {rate(len(attack.images), (our_s for our_s, _ in pairs))}",
    )


def trained(recipe: Recipe, *, epochs: int) -> Classifier:
    """Train the scale's model by its recipe for a few epochs: enough to be worth attacking."""
    recipe = DIGITS.shrink(recipe).replace(epochs=epochs, warmup_epochs=0.0)
    classifier = build_classifier(recipe)
    for _ in train(recipe, classifier, load_data(DIGITS), device=DEVICE):
        pass
    return classifier.eval()


def untrained(recipe: Recipe, count: int) -> tuple[Classifier, Tensor, Tensor]:
    """Return a recipe's model as it is built, noise of its scale's size, and what it says of it.

    How long an attack takes does not hang on the weights, as long as nothing is broken.
    """
    side = scale_named(recipe.scale).image_size
    classifier = build_classifier(recipe).to(DEVICE).eval()
    images = to_unit(torch.randint(256, (count, 3, side, side), dtype=torch.uint8).to(DEVICE))
    with torch.no_grad():
        return classifier, images, classifier(images).argmax(dim=1)


def one_trajectory(attack: Attack) -> Tensor:
    """Return right_SB, for each length S and image B, as the evaluator asks."""
    classifier, images, labels = attack.classifier, attack.images, attack.labels
    with attacked(classifier):
        iterates = pgd_iterates(
            folded(classifier, images) or classifier,
            images,
            labels,
            epsilon=attack.epsilon,
            step_size=attack.epsilon / 4,
            stops=STEPS,
            start_BCHW=images,
        )
        with_steps = [attacked_images for _, attacked_images in iterates]
        with torch.no_grad():
            return torch.stack([classifier(x).argmax(dim=1) == labels for x in with_steps])


def four_calls(attack: Attack) -> Tensor:
    """Return right_SB by one call of torchattacks for each length."""
    found = []
    for steps in STEPS:
        plain = torchattacks.PGD(
            attack.classifier,
            eps=attack.epsilon,
            alpha=attack.epsilon / 4,
            steps=steps,
            random_start=False,
        )
        attacked_images = plain(attack.images, attack.labels)
        with torch.no_grad():
            found.append(attack.classifier(attacked_images).argmax(dim=1) == attack.labels)
    return torch.stack(found)
