"""A model's differentiable surrogate: gradients where it hides them, logits of any scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SCALE = 5.0  # of logits whose standard deviation is 1
LEAST_SIZE = 1e-12  # of logits that are all alike
ALIKE = 0.5  # a layer's relative change of its input, up to which the input stands for its output


class View(nn.Module):
    """A model's logits as an attack sees them; they always have a gradient, be it zero.

    rescaled: of standard deviation 5, in float32's range whatever their own. noise: images are
    moved by up to so much, and the logits of `draws` moves averaged. straight: gradients go
    straight through whatever has none, and the logits are those of the last layer with weights
    where it gives the model's answers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rescaled: bool = False,
        straight: bool = False,
        noise: float = 0.0,
        draws: int = 1,
    ) -> None:
        super().__init__()
        self.model, self.rescaled, self.straight = model, rescaled, straight
        self.noise, self.draws = noise, draws
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits = [self._logits(self._moved(images_BCHW)) for _ in range(self.draws)]
        total = torch.stack(logits).mean(dim=0)
        return total if total.requires_grad else total + 0 * images_BCHW.sum()

    def _moved(self, images_BCHW: Tensor) -> Tensor:
        if not self.noise:
            return images_BCHW
        # All images move alike, so that none depends on the rest of the batch.
        draw = torch.rand(images_BCHW.shape[1:], generator=self.generator).to(images_BCHW)
        return images_BCHW + self.noise * (2 * draw - 1)

    def _logits(self, images_BCHW: Tensor) -> Tensor:
        if self.straight:
            with _Straight(self.model) as straight:
                logits: Tensor = self.model(images_BCHW)
            head = straight.head
            if head is not None and head.shape == logits.shape and head.requires_grad:
                # Saturated logits may be as large for several classes.
                at_head_B1 = logits.gather(1, head.argmax(dim=1, keepdim=True))
                same_B1 = at_head_B1 >= logits.amax(dim=1, keepdim=True)
                logits = torch.where(same_B1, _rescaled(head), _rescaled(logits))
        else:
            logits = self.model(images_BCHW)
        return _rescaled(logits) if self.rescaled else logits


def _rescaled(logits_BK: Tensor) -> Tensor:
    centred = logits_BK - logits_BK.mean(dim=1, keepdim=True)
    size = centred.detach().std(dim=1, keepdim=True).clamp(min=LEAST_SIZE)
    return SCALE * centred / size


class _Tap(torch.autograd.Function):
    """The identity; where a layer's gradient vanishes, the gradient of its output is taken."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, after: list[Tensor]) -> Tensor:
        ctx.after = after
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        for after in (a for a in ctx.after if a.shape == gradient.shape):
            flat = gradient.flatten(1)
            dead_B = ~flat.isfinite().all(dim=1) | (flat == 0).all(dim=1)
            gradient = torch.where(_like(dead_B, gradient), after, gradient)
        return gradient, None


class _Straight:
    """Let gradients pass straight through what has none, while it is entered (BPDA).

    It is a layer without weights that hardly changes its input, one whose output has no gradient,
    and, image by image, one that lets none through. An input like that of the layer around it has
    the gradient of that one.
    Source: Athalye et al. (2018), backward pass differentiable approximation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head: Tensor | None = None  # the last logits of a layer with weights
        self._inputs: list[Tensor | None] = []
        self._taps: list[list[Tensor]] = []

    def __enter__(self) -> _Straight:
        self._hooks = [m.register_forward_pre_hook(self._before) for m in self.model.modules()]
        self._hooks += [m.register_forward_hook(self._after) for m in self.model.modules()]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: Any) -> Any:
        images: Any = args[0] if args else None
        self._taps.append([])
        if not _is_batch(images):
            self._inputs.append(None)
            return None
        around: Any = next((i for i in reversed(self._inputs) if i is not None), images)
        if around is not images and around.requires_grad and around.shape == images.shape:
            images = _where_alike(around, images)
        if images.requires_grad:
            images = _Tap.apply(images, self._taps[-1])
        self._inputs.append(images)
        return (images, *args[1:])

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        images, taps = self._inputs.pop(), self._taps.pop()
        if not _is_batch(output):
            return None
        has_weights = next(module.parameters(), None) is not None
        if images is not None and images.requires_grad and output.shape == images.shape:
            if not output.requires_grad:
                output = _through(images, output)
            elif not has_weights:
                output = _where_alike(images, output)
        if output.requires_grad:
            output.register_hook(taps.append)
        if output.ndim == 2 and next(module.parameters(recurse=False), None) is not None:
            self.head = output
        return output


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _through(source: Tensor, value: Tensor) -> Tensor:
    """Return the value with the gradient of its source."""
    return value.detach() + (source - source.detach())


def _where_alike(source: Tensor, value: Tensor) -> Tensor:
    """Return the value; of images of which it is like its source, with the gradient of that."""
    change_B = (value - source).detach().flatten(1).norm(dim=1)
    alike_B = change_B <= ALIKE * source.detach().flatten(1).norm(dim=1)
    return torch.where(_like(alike_B, value), _through(source, value), value)


def _like(mask_B: Tensor, values: Tensor) -> Tensor:
    return mask_B.view(-1, *[1] * (values.ndim - 1))
