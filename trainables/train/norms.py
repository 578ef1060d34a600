"""The norms that bound an attack: the ball, the step, the random start and the standard radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.train.exactness import uniform

LEAST_DRAW = 2.0**-25  # half of a uniform number's last bit: its quantiles are finite
L1_SHARE = 100  # a step in L1 changes one value of so many: those with the largest gradients
L1_BISECTIONS = 30
CHANNELS, CIFAR_SIDE, CIFAR_EPSILON = 3, 32, Fraction(8, 255)
Within = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm of perturbations of images (B, C, H, W) with pixels in [0, 1].

    ball(images, epsilon): the function that brings points into the images' balls and into [0, 1];
    epsilon is a number or (B, 1, 1, 1). ascent(gradient, points): the step of length 1 that follows
    it. quantile: turns uniform numbers into draws whose direction is uniform; None: the numbers
    fill the ball itself. `cifar_radius`: by which the field judges CIFAR-10; `least`: below it a
    radius is of another norm's order.
    """

    title: str
    order: float
    ball: Callable[[Tensor, float | Tensor], Within]
    ascent: Callable[[Tensor, Tensor], Tensor]
    cifar_radius: Fraction
    least: float = 0.0
    quantile: Callable[[Tensor], Tensor] | None = None

    def standard_radius(self, epsilon: Fraction, side: int) -> Fraction:
        """Return the radius for images of `side` px where `epsilon` is that in the max-norm.

        It is CIFAR-10's, as much larger as a perturbation of `epsilon` at every pixel is.
        """
        area = Fraction(side, CIFAR_SIDE) ** int(2 / self.order)
        return self.cifar_radius * (epsilon / CIFAR_EPSILON) * area

    def check(self, radius: float, side: int) -> None:
        """Raise ValueError where a radius is of the order of another norm's."""
        most = (CHANNELS * side**2) ** (1 / self.order)
        if not self.least < radius <= most:
            like = float(self.standard_radius(CIFAR_EPSILON, side))
            hint = "8/255" if self.order == math.inf else f"{like:.3g}"
            raise ValueError(
                f"{radius:.3g} is no radius in {self.title}: for {side} px, pixels in [0, 1], "
                f"above {self.least:g} and at most {most:.4g}, like {hint}"
            )

    def name_of(self, radius: float) -> str:
        """Write a radius as the norm's users do: 4/255, or in L2 0.5."""
        return f"{255 * radius:g}/255" if self.order == math.inf else f"{radius:g}"

    def length(self, offsets_BCHW: Tensor) -> Tensor:
        """Return each image's norm (B,)."""
        length: Tensor = torch.linalg.vector_norm(offsets_BCHW.flatten(1), self.order, dim=1)
        return length


def _cube(images_BCHW: Tensor, epsilon: float | Tensor) -> Within:
    low = (images_BCHW - epsilon).clamp_(min=0)
    high = (images_BCHW + epsilon).clamp_(max=1)
    return lambda points_BCHW: torch.clamp(points_BCHW, low, high)


def _sphere_and_cube(images_BCHW: Tensor, epsilon: float | Tensor) -> Within:
    def within(points_BCHW: Tensor) -> Tensor:
        offset = points_BCHW - images_BCHW
        length = torch.linalg.vector_norm(offset, dim=(1, 2, 3), keepdim=True)
        shorter = torch.as_tensor(epsilon).to(length) / (length + 1e-7)
        return (images_BCHW + offset * torch.where(length > epsilon, shorter, 1)).clamp_(0, 1)

    return within


def _cross_polytope(images_BCHW: Tensor, epsilon: float | Tensor) -> Within:
    """Return the projection onto the L1 ball's part of [0, 1].

    Every offset shrinks by the same amount, down to 0, and ends at black or white. The amount is
    bisected. Source: Croce and Hein (2021), "Mind the box", proposition 2.1.
    """
    most_B1 = torch.as_tensor(epsilon).to(images_BCHW).reshape(-1, 1)

    def within(points_BCHW: Tensor) -> Tensor:
        offset = (points_BCHW - images_BCHW).flatten(1)
        size, images = offset.abs(), images_BCHW.flatten(1)
        room = torch.where(offset > 0, 1 - images, images)
        high = size.amax(dim=1, keepdim=True)
        low = torch.zeros_like(high)
        for _ in range(L1_BISECTIONS):
            middle = (low + high) / 2
            left = torch.minimum((size - middle).clamp_(min=0), room).sum(dim=1, keepdim=True)
            over = left > most_B1
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        shrunk = offset.sign() * torch.minimum((size - high).clamp_(min=0), room)
        return (images_BCHW + shrunk.view_as(images_BCHW)).clamp_(0, 1)

    return within


def unit(vectors_BCHW: Tensor, order: float = 2.0) -> Tensor:
    """Return each image's vector at length 1; zero stays zero."""
    return F.normalize(vectors_BCHW.flatten(1), p=order).view(vectors_BCHW.shape)


def _sparse_signs(gradient_BCHW: Tensor, points_BCHW: Tensor) -> Tensor:
    """Return the signs of the largest gradients alone, of values that they can move.

    One that is black or white already goes no further. Source: Tramer and Boneh (2019), SLIDE.
    """
    outwards = ((points_BCHW >= 1) & (gradient_BCHW > 0)) | (
        (points_BCHW <= 0) & (gradient_BCHW < 0)
    )
    free = gradient_BCHW.masked_fill(outwards, 0).flatten(1)
    size = free.abs()
    least = size.topk(math.ceil(size.shape[1] / L1_SHARE), dim=1).values[:, -1:]
    signs = free.sign() * (size >= least)
    return F.normalize(signs, p=1).view(gradient_BCHW.shape)


def _laplace(numbers: Tensor) -> Tensor:
    sides = 2 * numbers - 1
    return -sides.sign() * torch.log1p(-sides.abs())


# The radii of CIFAR-10: RobustBench in the max-norm and L2; Croce and Hein (2021) in L1.
NORMS = {
    "linf": Norm("Linf", math.inf, _cube, lambda gradient, _: gradient.sign(), CIFAR_EPSILON),
    "l2": Norm(
        "L2",
        2,
        _sphere_and_cube,
        lambda gradient, _: unit(gradient),
        Fraction(1, 2),
        0.05,
        torch.special.ndtri,
    ),
    "l1": Norm("L1", 1, _cross_polytope, _sparse_signs, Fraction(12), 1.0, _laplace),
}


def random_start(
    images_BCHW: Tensor,
    numbers_B: Tensor,
    *,
    epsilon: float | Tensor,
    key: Sequence[int | str],
    norm: str = "linf",
) -> Tensor:
    """Return a uniform draw from each image's ball, cut to [0, 1].

    It follows from the image's number and the key: in the max-norm the same bits in any batch, on
    any device. epsilon: a number or (B, 1, 1, 1).
    """
    numbers_B, ball = numbers_B.to(images_BCHW.device), NORMS[norm]
    noise = uniform(numbers_B, images_BCHW.shape[1:], key=key)
    if ball.quantile is None:
        return (images_BCHW + noise.mul_(2).sub_(1).mul_(epsilon)).clamp_(0, 1)
    # A ball's volume grows by the radius to the dimension.
    dimension = noise.flatten(1).shape[1]
    radius_B = uniform(numbers_B, (), key=(*key, "radius")) ** (1 / dimension)
    direction = unit(ball.quantile(noise.clamp_(min=LEAST_DRAW)), ball.order)
    return (images_BCHW + epsilon * radius_B.view(-1, 1, 1, 1) * direction).clamp_(0, 1)
