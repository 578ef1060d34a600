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

from pyautoattack import AutoAttack as PlainAutoAttack

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, rate, require
from benchmarks.pgd import trained, untrained
from evaluators import evaluator_named
from evaluators.base import Batch
from grid.study import base_named
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.recipe import Adversary, Recipe
from trainables.scale import DIGITS
from trainables.train.norms import NORMS

# model, epochs, PGD steps while training, images, Square's queries (the standard ones, or fewer),
# the norm and its radius
EPSILON = 16 / 255
CASES = (
    ("resnet18", 6, 0, 100, 5000, "linf", EPSILON),
    ("resnet50", 8, 3, 20, 1000, "linf", EPSILON),
    ("resnet18", 6, 0, 30, 1000, "l2", 0.4),
    ("resnet18", 6, 0, 30, 1000, "l1", 4.0),
)
TINY_RADIUS, FEW_QUERIES = 1e-6, 500


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for each case."""
    cases = (("resnet18", 1, 0, 8, 20, "linf", EPSILON),) if quick else CASES
    for model, epochs, steps, images, queries, norm, epsilon in cases:
        split = load_data(DIGITS).held_out.subset(images, seed=0)
        images_BCHW, labels_B = to_unit(split.images.to(DEVICE)), split.labels.to(DEVICE)
        attack = Attack(
            trained(recipe_of(model, attack_steps=steps), epochs=epochs),
            Batch(images_BCHW, labels_B, split.ids),
            epsilon=epsilon,
            queries=queries,
            norm=norm,
        )
        within = "" if norm == "linf" else f" in {NORMS[norm].title}"
        name = f"{model}{f' trained against PGD-{steps}' if steps else ''}{within}"
        yield beside_pyautoattack(name, attack, repeats=1 if quick else 5)
    if DEVICE.type == "cuda":
        for recipe in (base_named("resnet50"), base_named("deit_small")):
            yield beside_pyautoattack(
                f"{recipe.model} at 224 px", unbreakable(recipe, 8), repeats=3
            )


@dataclass(frozen=True)
class Attack:
    """A model, the images to attack, the radius, Square's queries and the norm."""

    classifier: Classifier
    batch: Batch
    epsilon: float
    queries: int
    norm: str = "linf"


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


def recipe_of(model: str, *, attack_steps: int) -> Recipe:
    """Return a recipe for the digits, adversarial where `attack_steps` is not 0."""
    attack = {"epsilon": EPSILON, "step_size": EPSILON / 2, "steps": attack_steps}
    return Recipe(
        scale=DIGITS.name,
        model=model,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        scheduler="cosine",
        epochs=1,
        batch_size=64,
        adversary=Adversary(**attack) if attack_steps else None,
    )


def attacked_here(attack: Attack) -> list[bool]:
    """Return which images survive this project's AutoAttack."""
    scale = replace(DIGITS, square_queries=attack.queries)
    name = "autoattack" if attack.norm == "linf" else f"autoattack-{attack.norm}"
    evaluator = evaluator_named(name, scale, radii=[Fraction(attack.epsilon)])
    ledger = evaluator.judge(attack.classifier, attack.batch)
    survived: list[bool] = ledger["survived"].to_pylist()
    return survived


def attacked_plainly(attack: Attack) -> list[bool]:
    """Return which images survive pyautoattack, called the ordinary way."""
    plain = PlainAutoAttack(
        attack.classifier,
        eps=attack.epsilon,
        norm=NORMS[attack.norm].title,
        seed=0,
        version="standard",
        device=DEVICE,
    )
    plain.square.n_queries = attack.queries
    batch = attack.batch
    _, answers = plain.run_standard_evaluation(batch.images.contiguous(), batch.labels)
    survived: list[bool] = (answers == batch.labels).tolist()
    return survived
