"""How often the audit is right, on honest models and on sham defences.

    python -m benchmarks.audit            # both rates, with exact binomial intervals
    python -m benchmarks.audit --chosen   # the signs of the models that the threshold was chosen on
    python -m benchmarks audit            # both rates, kept in benchmarks/results.json

Honest models are small networks of the digits, of three shapes and two widths, trained plainly or
against PGD within one of four radii, by two seeds; the threshold was chosen on the first 12 of a
third. A model whose training collapsed (it gets less than half of the images right) is none. Sham
defences (tests/shams.py) stand around a network trained plainly; k-winners-take-all is a network
trained against PGD. A sham is broken where the adapted attack leaves at most 3 points more than
AutoAttack leaves of the undefended network, within the same radius.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache, partial
from itertools import islice, product, starmap
from multiprocessing import get_context

import pyarrow as pa
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.measure import DEVICE, Figure
from evaluators.audit import Audit
from evaluators.autoattack import AutoAttack
from evaluators.base import judge_images
from evaluators.health import audit_signs, red_flags
from evaluators.ledger import CONFIDENCE, by_question, survival_scores
from evaluators.proportions import clopper_pearson
from tests.shams import KWinners, network, shams
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.recipe import Adversary, Recipe
from trainables.scale import DIGITS
from trainables.train.loop import train

CHOSEN_ON, JUDGED_ON = (0,), (1, 2)  # seeds
IMAGES = 64
PLAIN_RADIUS, ROBUST_RADIUS = Fraction(8, 255), Fraction(24, 255)  # each is withstood in part
SHAM_RADIUS = Fraction(27, 255)
TRAINING = (None, 6, 12, 18, 24)  # radii of adversarial training, x 255
WIDTHS = (12, 20)
WITHIN = 0.03
LEARNT = 0.5  # of the images, at least; of others the training collapsed
Case = tuple[int, int, int | None, int]  # a seed, a shape, a radius and a width
QUICK, FEW = 1, 12  # honest models, as many shams; images


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the share of honest models that are flagged, of shams that are, and of those broken."""
    images, most = (FEW, QUICK) if quick else (IMAGES, None)
    spawning = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads}
    with ProcessPoolExecutor(1 if quick else os.cpu_count(), **spawning, initargs=(1,)) as pool:
        judged = pool.map(partial(audit_honest, images=images), islice(honest(JUDGED_ON), most))
        flagged = []
        for name, has_learnt, flags in judged:
            print(name + " did not learn" * (not has_learnt), *flags, sep="\n  ", flush=True)
            flagged += [bool(flags)] * has_learnt
        yield rate("honest models flagged", flagged, target=0.02, better="less")
        names = islice(defences(images), most)
        suspects, broken = zip(*pool.map(partial(audit_sham, images=images), names), strict=True)
    yield rate("sham defences flagged", suspects, target=1.0)
    yield rate("sham defences broken to within 3 points", broken, target=0.8)


def audit_honest(case: Case, *, images: int) -> tuple[str, bool, list[str]]:
    """Audit an honest model; return its name, whether it has learnt, and the red flags."""
    name, model, radius = built(*case)
    ledger = audited(model, radius, images)
    return name, accuracy(ledger, "audit/clean") >= LEARNT, red_flags([ledger])


def audit_sham(name: str, *, images: int) -> tuple[bool, bool]:
    """Audit a sham defence; return whether it is flagged, and whether it is broken."""
    sham, truth = defences(images)[name]
    ledger = audited(sham, SHAM_RADIUS, images)
    flags = red_flags([ledger])
    plain, adapted = accuracy(ledger, "audit/plain"), accuracy(ledger, "audit")
    shares = f"plain {plain:.1%}, adapted {adapted:.1%}, undefended {truth:.1%}"
    print(f"{name}: {shares}", *flags, sep="\n  ", flush=True)
    return bool(flags), adapted <= truth + WITHIN


def rate(name: str, answers: Sequence[bool], **wanted: object) -> Figure:
    """Return a share with its exact interval."""
    low, high = clopper_pearson(sum(answers), len(answers), CONFIDENCE)
    told = f"{sum(answers)} of {len(answers)}, exact 95 % interval [{low:.3f}, {high:.3f}]"
    return Figure(
        name=f"Audit, {name}", values=(sum(answers) / len(answers),), unit="", same=told, **wanted
    )


def audited(model: Classifier, radius: Fraction, images: int = IMAGES) -> pa.Table:
    """Return the ledger of an audit."""
    audit = Audit(DIGITS, radii=[radius])
    audit.subset_size = images
    return judge_images(audit, model, load_data(DIGITS), device=DEVICE)


def accuracy(ledger: pa.Table, question: str) -> float:
    """Return the share of images that survive a question."""
    return next(s.value for s in survival_scores(ledger) if s.name == question)


@cache
def defences(images: int) -> dict[str, tuple[Classifier, float]]:
    """Return sham defences with the accuracy that AutoAttack leaves of the undefended network."""
    held_out = load_data(DIGITS).held_out
    torch.manual_seed(0)
    base, *others = (trained(network(), seed=seed) for seed in range(3))
    robust = trained(network(), seed=3, radius=20)
    winners = trained(network(KWinners), seed=3, radius=20)
    leaked = to_unit(held_out.images[:]), held_out.labels
    truths = {model: undefended(model, images) for model in (base, robust)}
    defended = shams(base, others, winners, leaked)
    return {
        name: (sham.to(DEVICE), truths[robust if name == "k-winners-take-all" else base])
        for name, sham in defended.items()
    }


def undefended(model: Classifier, images: int) -> float:
    """Return what AutoAttack leaves of a model."""
    attack = AutoAttack(DIGITS, radii=[SHAM_RADIUS])
    attack.subset_size = images
    ledger = judge_images(attack, model, load_data(DIGITS), device=DEVICE)
    return accuracy(ledger, "autoattack")


def convolutions(width: int) -> nn.Module:
    """Return two convolutions without normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(), nn.Flatten()),
        nn.Linear(18 * width, 10),
    )


def pooled(width: int) -> nn.Module:
    """Return two convolutions with normalisation, GELU and pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.GELU()),
        *(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * width, 10)),
    )


def transformer(width: int) -> nn.Module:
    """Return a plain transformer of two blocks."""
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 2 * width, "depth": 2, "num_heads": 2}
    network = VisionTransformer(**size, num_classes=10, mlp_ratio=2.0)
    # As at scale `digits`: timm's 0.02 starts every token nearly alike.
    for weight in (weight for weight in network.parameters() if weight.ndim == 2):
        nn.init.normal_(weight, std=DIGITS.init_std)
    nn.init.normal_(network.pos_embed, std=DIGITS.position_std)
    return network


SHAPES = (convolutions, pooled, transformer)


def trained(net: nn.Module, *, seed: int, radius: int | None = None) -> Classifier:
    """Return a network trained on the digits, plainly or against PGD-2 within radius/255.

    The radius grows over the first half: within the whole one from the start many never learn.
    """
    epochs, rate = (30, 2e-3) if isinstance(net, VisionTransformer) else (16, 8e-3)
    attack = {"epsilon": (radius or 0) / 255, "step_size": (radius or 0) / 510, "steps": 2}
    recipe = Recipe(
        scale=DIGITS.name,
        model="resnet18",
        optimizer="adamw",
        learning_rate=rate,
        weight_decay=1e-4,
        scheduler="cosine",
        warmup_epochs=2.0,
        epochs=epochs,
        batch_size=64,
        seed=seed,
        adversary=Adversary(**attack, epsilon_epochs=epochs / 2) if radius else None,
    )
    classifier = Classifier(net, DIGITS.data_set.mean, DIGITS.data_set.std).to(DEVICE)
    for _ in train(recipe, classifier, load_data(DIGITS), device=DEVICE):
        pass
    return classifier.eval()


def honest(seeds: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of honest models."""
    yield from product(seeds, range(len(SHAPES)), TRAINING, WIDTHS)


def built(
    seed: int, shape: int, radius: int | None, width: int
) -> tuple[str, Classifier, Fraction]:
    """Return an honest model with its name and a radius that it withstands in part."""
    torch.manual_seed(seed)
    name = f"{SHAPES[shape].__name__} {width}, {radius or 'plain'}, seed {seed}"
    model = trained(SHAPES[shape](width), seed=seed, radius=radius)
    return name, model, ROBUST_RADIUS if radius else PLAIN_RADIUS


def main() -> int:
    """Print the rates, or the signs of the models that the thresholds were chosen on."""
    torch.set_num_threads(1)
    if "--chosen" in sys.argv:
        for name, model, radius in starmap(built, honest(CHOSEN_ON)):
            ledger = audited(model, radius)
            signs = audit_signs(by_question(ledger), "audit")
            print(f"{name}: clean {accuracy(ledger, 'audit/clean'):.0%}, signs {signs}")
        return 0
    for figure in compare(quick=False):
        print(f"{figure.name}: {figure.median:.1%} ({figure.same}), aim {figure.target:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
