"""The evaluator's PGD-5, -10, -50 and -100 against torchattacks' PGD called four times.

Same model and images, and the radius and step of each scale written by hand; each side starts at
random for itself; float32. On a GPU the study's models at 224 px are attacked as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, rate, require
from evaluators.base import Batch
from evaluators.pgd import PGD
from grid.study import base_named
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS, IMAGENET, Scale, scale_named
from trainables.train.loop import train


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for both families."""
    held_out = load_data(DIGITS).held_out.subset(8 if quick else DIGITS.attack_subset, seed=0)
    images, labels = to_unit(held_out.images.to(DEVICE)), held_out.labels.to(DEVICE)
    batch = Batch(images, labels, held_out.ids)
    for recipe in (base_named("resnet50"), base_named("deit_small")):
        classifier = trained(DIGITS.shrink(recipe), epochs=1 if quick else 4)
        attack = Attack(classifier, batch, DIGITS, epsilon=27 / 255, step_size=27 / 4 / 255)
        yield beside_torchattacks(recipe.model, attack, repeats=1 if quick else 7)
    if DEVICE.type == "cuda":
        for recipe in (base_named("resnet50"), base_named("deit_small")):
            classifier, images, labels = untrained(recipe, 128)
            batch = Batch(images, labels, tuple(map(str, range(128))))
            attack = Attack(classifier, batch, IMAGENET, epsilon=4 / 255, step_size=1 / 255)
            yield beside_torchattacks(f"{recipe.model} at 224 px", attack, repeats=5)


@dataclass(frozen=True)
class Attack:
    """A model, images, the scale whose evaluator attacks them, and what torchattacks is told."""

    classifier: Classifier
    batch: Batch
    scale: Scale
    epsilon: float
    step_size: float


def beside_torchattacks(name: str, attack: Attack, *, repeats: int) -> Figure:
    """Time both sides in turns; but for what their starts explain they must agree."""
    ours, theirs, theirs_again = (side(attack) for side in (one_trajectory, four_calls, four_calls))
    differing, by_starts = (int((side != theirs).sum()) for side in (ours, theirs_again))
    told = (
        f"{differing} of {ours.numel()} verdicts differ, {by_starts} of theirs from start to start"
    )
    require(differing <= 2 * by_starts + ours.numel() // 50, told)
    sides = (lambda: one_trajectory(attack)), (lambda: four_calls(attack))
    pairs = in_turns(*sides, repeats=repeats, clock=device_seconds)
    return Figure(
        name=f"PGD-5, 10, 50 and 100 of {name}, torchattacks / ours",
        values=tuple(their_s / our_s for our_s, their_s in pairs),
        target=2,
        same=f"{told}, {rate(len(attack.batch.ids), (our_s for our_s, _ in pairs))}",
    )


def trained(recipe: Recipe, *, epochs: int) -> Classifier:
    """Train a recipe of the digits for a few epochs: enough to be worth attacking."""
    recipe = recipe.replace(epochs=epochs, warmup_epochs=0.0)
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
    """Return right_SB, for each length S and image B, as the evaluator finds it."""
    ledger = PGD(attack.scale).judge(attack.classifier, attack.batch)
    return torch.tensor(ledger["survived"].to_pylist()).view(-1, len(attack.batch.ids))


def four_calls(attack: Attack) -> Tensor:
    """Return right_SB by one call of torchattacks for each length."""
    import torchattacks  # asks for a requests of 2021: pip install --no-deps torchattacks==3.5.1

    images, labels = attack.batch.images, attack.batch.labels
    found = []
    for steps in (5, 10, 50, 100):
        plain = torchattacks.PGD(
            attack.classifier, eps=attack.epsilon, alpha=attack.step_size, steps=steps
        )
        attacked_images = plain(images, labels)
        with torch.no_grad():
            found.append(attack.classifier(attacked_images).argmax(dim=1) == labels)
    return torch.stack(found).cpu()
