"""Projected gradient descent in the max-norm, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.models import Classifier


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


def random_start(images_BCHW: Tensor, *, epsilon: float, generator: torch.Generator) -> Tensor:
    """Return a uniform draw from each image's max-norm ball, cut to [0, 1]."""
    # Drawn on the generator's own device, so that a GPU starts where a CPU does.
    noise = torch.rand(images_BCHW.shape, generator=generator, device=generator.device)
    offset = (noise.to(images_BCHW.device) * 2 - 1) * epsilon
    return (images_BCHW + offset).clamp_(0, 1)


def pgd_iterates(
    classifier: Classifier,
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
        current = current.detach().requires_grad_(True)
        loss = F.cross_entropy(classifier(current), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, current)
        with torch.no_grad():
            current = torch.clamp(current + step_size * gradient.sign(), low, high)
        if step in stops:
            yield step, current
