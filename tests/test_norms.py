"""The norms of attacks: balls, steps, radii, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from evaluators import column_named, evaluate, evaluator_named, in_norm
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.train.adversary import attacked, pgd_iterates
from trainables.train.norms import NORMS, random_start


def projected(norm, image, point, epsilon):
    images = torch.tensor(image).view(1, len(image), 1, 1)
    points = torch.tensor(point).view(1, len(point), 1, 1)
    return NORMS[norm].ball(images, epsilon)(points).flatten().tolist()


def test_the_projection_in_l1_shrinks_every_offset_alike_and_stops_at_white():
    # Offsets 0.3, -0.5, 0.1: 0.1 less of each leaves 0.2, 0.4 and 0.
    point = [0.8, 0.0, 0.6]
    assert projected("l1", [0.5] * 3, point, 0.6) == pytest.approx([0.7, 0.1, 0.5], abs=1e-6)
    # The first can rise by 0.1 alone: the others keep 0.45 and 0.05, 0.05 less each.
    near_white = projected("l1", [0.9, 0.5, 0.5], [1.4, 0.0, 0.6], 0.6)
    assert near_white == pytest.approx([1.0, 0.05, 0.55], abs=1e-6)
    assert projected("l1", [0.5] * 3, point, 0.9) == pytest.approx(point, abs=1e-6)


def test_the_projection_in_l1_is_the_nearest_point_that_scipy_finds(generator):
    for _ in range(5):
        image, offset = torch.rand(5, generator=generator), torch.randn(5, generator=generator)
        ours = np.array(projected("l1", image.tolist(), (image + offset).tolist(), 0.7))
        target = (image + offset).numpy().astype(float)
        # An offset is the difference of two parts, none below 0, that add up to at most 0.7.
        start = image.numpy().astype(float)
        found = minimize(
            lambda x, s=start, t=target: ((s + x[:5] - x[5:] - t) ** 2).sum(),
            np.zeros(10),
            bounds=[*((0, 1 - v) for v in start), *((0, v) for v in start)],
            constraints={"type": "ineq", "fun": lambda x: 0.7 - x.sum()},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert ours == pytest.approx(start + found.x[:5] - found.x[5:], abs=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_and_iterates_stay_in_each_images_own_ball(norm, generator):
    images = torch.rand(8, 3, 6, 6, generator=generator)
    largest = {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm]
    epsilon = largest * torch.arange(1, 9).view(-1, 1, 1, 1) / 8
    start = random_start(images, torch.arange(8), epsilon=epsilon, key=("test",), norm=norm)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 4))
    labels = torch.arange(8) % 4
    settings = {"epsilon": epsilon, "stops": (5,), "start_BCHW": start, "norm": norm}
    with attacked(model):
        ((_, last),) = pgd_iterates(model, images, labels, **settings)
    for points in (start, last):
        length = NORMS[norm].length(points - images)
        assert (length <= epsilon.flatten() * (1 + 1e-5)).all()
        assert points.min() >= 0
        assert points.max() <= 1
    assert (NORMS[norm].length(last - images) > 0.7 * epsilon.flatten()).all()


def test_a_step_in_l1_changes_values_that_can_still_move():
    gradient = torch.full((1, 3, 10, 10), -1e-3)
    gradient[:, 0, 0, :5] = -1.0  # the largest are of black values, which get no darker
    points = torch.full((1, 3, 10, 10), 0.5)
    points[:, 0, 0, :5] = 0.0
    gradient[:, 1, 3, :3] = torch.tensor([0.3, -0.2, 0.1])
    step = NORMS["l1"].ascent(gradient, points)
    assert step[0, 1, 3, :3].tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])
    assert step.abs().sum().item() == pytest.approx(1)


def test_an_l1_start_fills_the_ball():
    images = torch.full((4000, 3, 1, 1), 0.5)
    start = random_start(images, torch.arange(4000), epsilon=0.25, key=(0,), norm="l1")
    lengths = NORMS["l1"].length(start - images) / 0.25
    # Of a ball in 3 dimensions a share r^3 lies within r, and half of it on either side.
    assert float((lengths**3).mean()) == pytest.approx(0.5, abs=0.02)
    assert float((start > 0.5).float().mean()) == pytest.approx(0.5, abs=0.02)
    # Each of three parts has a third of the length, on average 3/4 of the radius.
    assert float((start - images).abs().mean()) == pytest.approx(0.25 / 4, rel=0.03)


def test_default_radii_are_the_fields_on_cifar10_and_grow_with_the_image():
    radii = {n: [*evaluator_named(n, CIFAR10).radii.values()] for n in ("pgd-l2", "autoattack-l1")}
    assert radii == {"pgd-l2": [0.5], "autoattack-l1": [12.0]}
    # 224 px: 7 times the side, half the radius in the max-norm.
    assert [*evaluator_named("pgd-l2", IMAGENET).radii.values()] == [1.75]
    assert [*evaluator_named("pgd-l1", IMAGENET).radii.values()] == [294.0]


@pytest.mark.parametrize(
    ("name", "radius", "message"),
    [
        ("pgd-l2", Fraction(4, 255), r"0.0157 is no radius in L2: .* above 0.05 .*like 0.25"),
        ("pgd-l2", 300, "300 is no radius in L2"),
        ("autoattack-l1", Fraction(1, 2), r"0.5 is no radius in L1: .* above 1 .*like 3"),
        ("autoattack", 2, r"2 is no radius in Linf: .* at most 1, like 8/255"),
    ],
)
def test_a_radius_of_another_norms_order_is_refused_with_a_hint(name, radius, message):
    with pytest.raises(ValueError, match=message):
        evaluator_named(name, DIGITS, radii=[radius])


def test_an_attack_is_named_by_its_norm_and_a_norm_that_it_lacks_is_refused():
    assert in_norm("pgd-10", "L2") == "pgd-l2-10"
    assert in_norm("autoattack-bounded", "L1") == "autoattack-l1-bounded"
    assert in_norm("pgd-l2", "L2") == in_norm("pgd-l2", "L1") == "pgd-l2"
    assert in_norm("clean", "L2") == "clean"
    for name in ("pgd-as-published", "autoattack-small"):
        with pytest.raises(ValueError, match=f"{name} has the norm Linf alone"):
            in_norm(name, "L2")
    with pytest.raises(ValueError, match="unknown norm 'L3'"):
        in_norm("pgd", "L3")
    assert column_named("pgd-l2-100").title == "PGD-100, L2"
    assert column_named("autoattack-l1/after-apgd-t").title == "after APGD-T, L1"


class Threshold(torch.nn.Module):
    """Class 1 where the sum of the pixels exceeds 24, else class 0."""

    def forward(self, images):
        margin = images.sum(dim=(1, 2, 3)) - 24
        return torch.stack([-margin, margin], dim=1)


@pytest.mark.parametrize(("norm", "below", "above"), [("L2", 0.3, 0.4), ("L1", 2.2, 2.6)])
def test_a_linear_model_breaks_where_the_ball_of_the_norm_reaches_it(norm, below, above):
    """48 values of 0.45 sum to 21.6, 2.4 below: 2.4 in L1, 2.4 / 48^0.5 = 0.346 in L2."""
    data = torch.full((2, 3, 4, 4), 0.45), torch.tensor([0, 0])
    epsilon = [below, above]
    scores = evaluate(Threshold(), data, "pgd-100", norm=norm, epsilon=epsilon, progress=False)
    name = f"pgd-{norm.lower()}-100"
    assert [scores[f"{name}@{radius}"].value for radius in epsilon] == [1, 0]
    assert f"note: pgd-{norm.lower()}: {norm} radius {below}, {above}" in str(scores)
