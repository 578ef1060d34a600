"""Projected gradient descent in the max-norm, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.folding import FoldedClassifier
from trainables.recipe import Adversary, Recipe
from trainables.team import ALONE, Team
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
    images_BCHW: Tensor, *, epsilon: float, generator: torch.Generator, team: Team = ALONE
) -> Tensor:
    """Return a uniform draw from each image's max-norm ball, cut to [0, 1].

    The images are the team member's part of a batch.
    """
    # Drawn on the generator's own device, so that a GPU starts where a CPU does.
    shape = (len(images_BCHW) * team.size, *images_BCHW.shape[1:])
    noise = torch.rand(shape, generator=generator, device=generator.device)[team.own]
    offset = (noise.to(images_BCHW.device) * 2 - 1) * epsilon
    return (images_BCHW + offset).clamp_(0, 1)


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
    *,
    epoch: int,
    step: int,
    twin: FoldedClassifier | None = None,
    team: Team = ALONE,
) -> Tensor:
    """Attack a training batch by the recipe's adversary, on its labels_B or soft targets_BK.

    The batch may be a team member's part of one. The model is in eval mode meanwhile; its folded
    `twin` is asked in its place where there is one. as-published: gradients in half precision.
    """
    adversary = recipe.adversary
    assert adversary is not None
    seed = np.random.SeedSequence((recipe.seed, epoch, 4, step)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    start_BCHW = training_start(recipe, adversary, images_BCHW, generator=generator, team=team)
    half = torch.float16 if images_BCHW.is_cuda else torch.bfloat16
    as_published = recipe.protocol == "as-published"
    with attacked(classifier), torch.autocast(images_BCHW.device.type, half, as_published):
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


def training_start(
    recipe: Recipe,
    adversary: Adversary,
    images_BCHW: Tensor,
    *,
    generator: torch.Generator,
    team: Team = ALONE,
) -> Tensor:
    """Return where a training attack starts.

    corrected: each image at random in its ball with chance 1 - plain_start, else at itself.
    as-published: the whole batch at random if a normal draw exceeds plain_start.
    """
    epsilon = adversary.epsilon
    started_BCHW = random_start(images_BCHW, epsilon=epsilon, generator=generator, team=team)
    if recipe.protocol == "as-published":
        drawn = float(torch.randn((), generator=generator))
        return started_BCHW if drawn > adversary.plain_start else images_BCHW
    draws_B = torch.rand(len(images_BCHW) * team.size, generator=generator)[team.own]
    plain_B = (draws_B < adversary.plain_start).to(images_BCHW.device)
    return torch.where(plain_B.view(-1, 1, 1, 1), images_BCHW, started_BCHW)
