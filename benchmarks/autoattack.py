"""AutoAttack here against pyautoattack's `run_standard_evaluation`: CPU seconds and verdicts.

Both sides attack the same images of the digits, the standard version in float32; two models are
trained first, one plainly and one against PGD-3: what few images survive, and what many. On a GPU
the study's models at 224 px are attacked as well, at a radius at which every image goes through
all stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from pyautoattack import AutoAttack as PlainAutoAttack
from torch.nn import functional as F

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, rate, require
from benchmarks.pgd import untrained
from evaluators.autoattack import AutoAttack
from evaluators.base import Batch
from grid.study import base_named
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.networks import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.train.adversary import attacked, pgd_iterates, random_start

# model, epochs, PGD steps while training, images, Square's queries (the standard ones, or fewer)
CASES = (("resnet18", 6, 0, 100, 5000), ("resnet50", 8, 3, 20, 1000))
EPSILON = 16 / 255
TINY_RADIUS, FEW_QUERIES = 1e-6, 500
BATCH = 64


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for each case."""
    cases = (("resnet18", 1, 0, 8, 20),) if quick else CASES
    for model, epochs, steps, images, queries in cases:
        split = load_data(DIGITS).held_out.subset(images, seed=0)
        images_BCHW, labels_B = to_unit(split.images.to(DEVICE)), split.labels.to(DEVICE)
        attack = Attack(
            trained(model, epochs=epochs, attack_steps=steps),
            Batch(images_BCHW, labels_B, split.ids),
            epsilon=EPSILON,
            queries=queries,
        )
        name = f"{model}{f' trained against PGD-{steps}' if steps else ''}"
        yield beside_pyautoattack(name, attack, repeats=1 if quick else 5)
    if DEVICE.type == "cuda":
        for recipe in (base_named("resnet50"), base_named("deit_small")):
            yield beside_pyautoattack(
                f"{recipe.model} at 224 px", unbreakable(recipe, 8), repeats=3
            )


@dataclass(frozen=True)
class Attack:
    """A model, the images to attack, the radius and Square's queries."""

    classifier: Classifier
    batch: Batch
    epsilon: float
    queries: int


def unbreakable(recipe: Recipe, count: int) -> Attack:
    """Return an attack within next to nothing: no image is broken, so each goes through it all."""
    classifier, images_BCHW, labels_B = untrained(recipe, count)
    batch = Batch(images_BCHW, labels_B, tuple(map(str, range(count))))
    return Attack(classifier, batch, epsilon=TINY_RADIUS, queries=FEW_QUERIES)


def beside_pyautoattack(name: str, attack: Attack, *, repeats: int) -> Figure:
    """Time both sides in turns; but for one image, or in a hundred, verdicts must be the same."""
    images = len(attack.batch.ids)
    here, plainly = (side(attack) for side in (attacked_here, attacked_plainly))
    differing = sum(ours != theirs for ours, theirs in zip(here, plainly, strict=True))
    survivors = f"{sum(here)} and {sum(plainly)} images survive"
    told = f"{differing} of {images} verdicts differ; {survivors}"
    require(differing <= max(1, images // 100), told)
    pairs = in_turns(
        lambda: attacked_here(attack),
        lambda: attacked_plainly(attack),
        repeats=repeats,
        clock=device_seconds,
    )
    return Figure(
        name=f"AutoAttack of {name}, {attack.queries:,} queries, pyautoattack / ours",
        values=tuple(their_s / our_s for our_s, their_s in pairs),
        target=1.3,
        same=f"{told}, {rate(images, (our_s for our_s, _ in pairs))}",
    )


def attacked_here(attack: Attack) -> list[bool]:
    """Return which images survive this project's AutoAttack."""
    scale = replace(DIGITS, square_queries=attack.queries)
    evaluator = AutoAttack(scale, radii=[Fraction(attack.epsilon)])
    ledger = evaluator.judge(attack.classifier, attack.batch)
    survived: list[bool] = ledger["survived"].to_pylist()
    return survived


def attacked_plainly(attack: Attack) -> list[bool]:
    """Return which images survive pyautoattack, called the ordinary way."""
    plain = PlainAutoAttack(
        attack.classifier, eps=attack.epsilon, seed=0, version="standard", device=DEVICE
    )
    plain.square.n_queries = attack.queries
    batch = attack.batch
    _, answers = plain.run_standard_evaluation(batch.images.contiguous(), batch.labels)
    survived: list[bool] = (answers == batch.labels).tolist()
    return survived


def trained(model: str, *, epochs: int, attack_steps: int) -> Classifier:
    """Train a model on the digits, on PGD iterates where `attack_steps` is not 0."""
    recipe = Recipe(
        scale=DIGITS.name,
        model=model,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        scheduler="cosine",
        epochs=epochs,
        batch_size=BATCH,
    )
    classifier = build_classifier(recipe).to(DEVICE)
    split = load_data(DIGITS).train
    steps = epochs * (len(split) // BATCH)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(split), (BATCH,), generator=generator)
        images = to_unit(split.images[chosen].to(DEVICE))
        labels = split.labels[chosen].to(DEVICE)
        if attack_steps:
            images = perturbed(classifier, images, labels, attack_steps, step)
        classifier.train()
        optimizer.zero_grad()
        F.cross_entropy(classifier(images), labels).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def perturbed(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    step: int,
) -> torch.Tensor:
    """Return the last iterate of PGD from a random start."""
    with attacked(classifier):
        ((_, iterate),) = pgd_iterates(
            classifier,
            images,
            labels,
            epsilon=EPSILON,
            step_size=EPSILON / 2,
            stops=(steps,),
            start_BCHW=random_start(
                images, torch.arange(len(images)), epsilon=EPSILON, key=(step,)
            ),
        )
    return iterate
