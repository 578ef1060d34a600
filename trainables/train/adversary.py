"""Projected gradient descent in the max-norm, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.networks import by_own_ghost
from trainables.recipe import Adversary, Recipe
from trainables.train.exactness import uniform
from trainables.train.folding import FoldedClassifier
from trainables.watchdog import beat


@contextmanager
def attacked(module: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode with frozen weights; both are put back on leaving.

    Eval mode: the attack must not move running statistics. Frozen: it wants input gradients only.
    """
    was_training = module.training
    trainable = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        module.train(was_training)


def random_start(
    images_BCHW: Tensor, numbers_B: Tensor, *, epsilon: float, key: Sequence[int | str]
) -> Tensor:
    """Return a uniform draw from each image's max-norm ball, cut to [0, 1].

    It follows from the image's number and the key: the same bits in any batch, on any device.
    """
    noise = uniform(numbers_B.to(images_BCHW.device), images_BCHW.shape[1:], key=key)
    return (images_BCHW + noise.mul_(2).sub_(1).mul_(epsilon)).clamp_(0, 1)


def pgd_iterates(
    classifier: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    epsilon: float,
    step_size: float,
    stops: Sequence[int],
    start_BCHW: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """Ascend the cross-entropy by signed gradients; yield (steps, iterate) at each of `stops`.

    One trajectory passes through all stops. targets: labels_B or soft targets_BK. Iterates stay
    within `epsilon` of the images and in [0, 1]. Call under `attacked`. Source: Madry et al.
    (2018), section 2.1; STUDY section 3.
    """
    low = (images_BCHW - epsilon).clamp_(min=0)
    high = (images_BCHW + epsilon).clamp_(max=1)
    current = start_BCHW.detach()
    for step in range(1, max(stops) + 1):
        beat()
        current = current.detach().requires_grad_(True)
        loss = F.cross_entropy(classifier(current), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, current)
        with torch.no_grad():
            current = torch.clamp(current + step_size * gradient.sign(), low, high)
        if step in stops:
            yield step, current


def training_attack(
    recipe: Recipe,
    classifier: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    places_B: Tensor,
    *,
    epoch: int,
    step: int,
    micro: int = 0,
    twin: FoldedClassifier | None = None,
) -> Tensor:
    """Attack a training batch by the recipe's adversary, on its labels_B or soft targets_BK.

    places_B: the images' places in their split. step, micro: the optimizer step of the epoch and
    the forward batch within it. The model is in eval mode meanwhile, each image normalised by its
    own ghost's running statistics where it has ghosts; its folded `twin` is asked in its place
    where there is one. as-published: gradients in half precision.
    """
    adversary = recipe.adversary
    assert adversary is not None
    start_BCHW = training_start(
        recipe, adversary, images_BCHW, places_B, epoch=epoch, step=step, micro=micro
    )
    half = half_precision(images_BCHW.device, enabled=recipe.protocol == "as-published")
    with attacked(classifier), by_own_ghost(classifier), half:
        if twin is not None:
            twin.refresh()
        iterates = pgd_iterates(
            classifier if twin is None else twin,
            images_BCHW,
            targets,
            epsilon=adversary.epsilon,
            step_size=adversary.step_size,
            stops=(adversary.steps,),
            start_BCHW=start_BCHW,
        )
        _, final_BCHW = next(iterates)
    return final_BCHW


def half_precision(device: torch.device, *, enabled: bool) -> torch.autocast:
    """Return the half precision of attacks as published: float16, on CPUs bfloat16."""
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else None, enabled)


def training_start(
    recipe: Recipe,
    adversary: Adversary,
    images_BCHW: Tensor,
    places_B: Tensor,
    *,
    epoch: int,
    step: int,
    micro: int = 0,
) -> Tensor:
    """Return where a training attack starts.

    corrected: each image at random in its ball with chance 1 - plain_start, else at itself.
    as-published: the whole batch at random if a normal draw exceeds plain_start.
    """
    key = (recipe.seed, epoch, step)
    started_BCHW = random_start(
        images_BCHW, places_B, epsilon=adversary.epsilon, key=(*key, "start")
    )
    if recipe.protocol == "as-published":
        drawn = float(uniform(torch.zeros(1, dtype=torch.long), (), key=(*key, micro, "batch")))
        return started_BCHW if drawn > NormalDist().cdf(adversary.plain_start) else images_BCHW
    draws_B = uniform(places_B.to(images_BCHW.device), (), key=(*key, "plain"))
    plain_B = draws_B < adversary.plain_start
    return torch.where(plain_B.view(-1, 1, 1, 1), images_BCHW, started_BCHW)
