"""What a PGD-1 training step costs, as a ratio of a clean step of the same model.

In arithmetic a clean step is a forward, an input-gradient and a weight-gradient pass; PGD-1 adds a
forward and an input-gradient pass, so 1 + 2/3. The floor is that sum as this machine runs it: a
clean step and a bare forward and input-gradient pass in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, require
from grid.studies import adversarial_resnet50, deit, resnet50, with_axis
from trainables.data.base import to_unit
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS, IMAGENET
from trainables.train.adversary import attacked, training_attack
from trainables.train.folding import FoldedClassifier, folded
from trainables.train.loop import training_loss
from trainables.train.optim import build_optimizer

SAME = "input gradients, within 1e-4 of the largest"


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield both families' ratios, of the digits' small models and of the study's own."""
    attacked_deit = with_axis(deit(), "training", "adversarial")
    plain_resnet = adversarial_resnet50().replace(norm="batch")
    for scale, batch, repeats in ((DIGITS, 64, 60), (IMAGENET, 4, 5)):
        if quick and scale is IMAGENET:
            return
        for clean, adversarial in ((resnet50(), plain_resnet), (deit(), attacked_deit)):
            to_clean, to_floor = measure(
                scale.shrink(clean),
                scale.shrink(adversarial),
                images=torch.randint(256, (batch, 3, *(scale.image_size,) * 2)).byte(),
                repeats=1 if quick else repeats,
            )
            name = f"PGD-1 step, {clean.model} at {scale.name}"
            limits = {
                f"{name}, of a clean step": (to_clean, 1.717),
                f"{name}, of its floor": (to_floor, 1.05),
            }
            for title, (values, target) in limits.items():
                yield Figure(name=title, values=values, target=target, better="less", same=SAME)


def measure(
    clean: Recipe, adversarial: Recipe, *, images: torch.Tensor, repeats: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ratios of an adversarial step to a clean one and to the floor, step by step."""
    classifier = build_classifier(adversarial).to(DEVICE)
    optimizer = build_optimizer(adversarial, classifier)
    inputs = to_unit(images.to(DEVICE))
    labels = torch.arange(len(images), device=DEVICE) % 10
    places = torch.arange(len(images))
    twin = folded(classifier.eval(), inputs[:1])

    def step(recipe: Recipe) -> None:
        classifier.train()
        optimizer.zero_grad()
        trained_on = inputs
        if recipe.adversary:
            trained_on = training_attack(
                recipe, classifier, inputs, labels, places, epoch=0, step=0, twin=twin
            )
        training_loss(recipe, classifier(trained_on), labels).backward()
        optimizer.step()

    def gradient(model: nn.Module) -> Tensor:
        start = inputs.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(F.cross_entropy(model(start), labels), start)
        return found

    def bare_pass() -> None:
        with attacked(classifier):
            gradient(classifier)

    sides = (lambda: step(adversarial), lambda: step(clean), bare_pass)
    triples = in_turns(*sides, repeats=repeats, clock=device_seconds)
    _require_same_gradient(classifier, twin, gradient)
    return tuple(a / c for a, c, _ in triples), tuple(a / (c + b) for a, c, b in triples)


def _require_same_gradient(
    classifier: Classifier, twin: FoldedClassifier | None, gradient: Callable[[nn.Module], Tensor]
) -> None:
    """See that the attack's folded model has the gradient of the classifier that it stands for."""
    if twin is None:
        return
    twin.refresh()
    with attacked(classifier):
        plain, found = gradient(classifier), gradient(twin)
    require(bool((plain - found).abs().max() <= 1e-4 * plain.abs().max()), SAME)
