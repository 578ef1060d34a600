"""The audit: signs in ledgers, gradients through what has none, and verdicts on real models."""

import pytest
import torch
from torch import nn

from evaluators import evaluate, in_norm
from evaluators.health import SIGNS, is_checked, red_flags, unmasked
from evaluators.surrogate import View
from tests.shams import Decoder, Flip, Saturated, Thermometer, Wrapped, jpeg
from tests.test_health import hand_made
from trainables.data.base import to_unit

N = 60


def ledgers(broken=0, stage="square-search", **signs):
    """Ledgers of an audit of 60 images that all withstand PGD; `signs`: how many do not."""
    stages = [stage] * broken + [None] * (N - broken)
    yield hand_made("audit", [s is None for s in stages], stages)
    survived = {"plain": N, "unbounded": 0} | signs
    for sign in ("repeats", "gradient", "ascends", "one-step", "half", "plain", "unbounded"):
        count = survived.get(sign.replace("-", "_"), N)
        yield hand_made(f"audit/{sign}", [True] * count + [False] * (N - count))


def test_an_audit_without_signs_says_so_and_raises_no_flag():
    sound = [*ledgers()]
    assert red_flags(sound) == []
    assert unmasked(sound) == ["audit: no sign of masked gradients"]
    assert is_checked(sound)


def test_few_images_are_chance_and_many_are_a_reason():
    assert red_flags(ledgers(broken=2)) == []
    (flag,) = red_flags(ledgers(broken=20))
    assert flag.startswith(
        "audit: suspect, Square, a black box, breaks images that PGD leaves: 20 of 60;"
    )
    assert "adapted to the model breaks images that plain PGD leaves: 20 of 60" in flag
    assert unmasked(ledgers(broken=20)) == []


@pytest.mark.parametrize(
    ("sign", "survivors"),
    [("repeats", 0), ("gradient", 30), ("ascends", 30), ("one_step", 30), ("half", 30)],
)
def test_each_question_is_a_sign(sign, survivors):
    (flag,) = red_flags(ledgers(**{sign: survivors}))
    text = SIGNS[sign.replace("_", "-")].format(N - survivors, N)
    assert flag == f"audit: suspect, {text}"


def test_images_that_survive_any_change_are_a_sign():
    (flag,) = red_flags(ledgers(unbounded=30))
    assert "30 of 60 images survive PGD at epsilon 0.5" in flag


class Binary(nn.Module):
    def forward(self, images):
        return 0.5 * (images > 0.3).float() + 0.5 * (images > 0.6).to(torch.float32)


HIDING = {
    "rounding": {"images": lambda x: (x * 6).round() / 6},
    "numpy": {"images": lambda x: torch.from_numpy(x.detach().numpy().copy())},
    "JPEG": {"images": jpeg},
    "sign flip": {"images": Flip.apply},
    "comparisons": {"images": Binary()},
    "thermometer": {"images": nn.Sequential(Thermometer(), Decoder())},
    "rounded logits": {"logits": lambda z: z.round()},
    "scaled logits": {"logits": lambda z: 1e4 * z},
    "saturated layer": {"logits": Saturated()},
}


def slope(view, images):
    images = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(view(images)[:, 0].sum(), images)
    return gradient.flatten()


@pytest.mark.parametrize("name", HIDING)
def test_gradients_go_straight_through_what_hides_them(name):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).requires_grad_(False)
    images = torch.rand(1, 3, 16, 16)
    expected = slope(View(linear, rescaled=True), images)
    found = slope(View(Wrapped(linear, **HIDING[name]), straight=True, rescaled=True), images)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.95


def test_a_sound_networks_gradient_is_its_own():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 14 * 14, 4)
    ).requires_grad_(False)
    images = torch.rand(2, 3, 16, 16)
    plain, straight = View(network, rescaled=True), View(network, rescaled=True, straight=True)
    assert torch.allclose(slope(straight, images), slope(plain, images), atol=1e-7)
    assert not network._forward_hooks


@pytest.fixture(scope="module")
def linear(digits):
    """Least squares: a classifier without any secret."""
    images, labels = to_unit(digits.train.images[:]).flatten(1), digits.train.labels
    ones = torch.ones(len(images), 1)
    targets = nn.functional.one_hot(labels, 10).float()
    table = torch.cat([images, ones], dim=1).double()
    gram = table.T @ table + torch.eye(table.shape[1])
    weights = torch.linalg.solve(gram, table.T @ targets.double()).float()
    layer = nn.Linear(3 * 16 * 16, 10)
    layer.load_state_dict({"weight": weights[:-1].T, "bias": weights[-1]})
    return nn.Sequential(nn.Flatten(), layer).eval()


def judged(model, digits):
    few = digits.held_out.subset(16, seed=0)
    return evaluate(model, (few.images[:], few.labels), "audit", epsilon="8/255", progress=False)


def test_a_sound_model_is_cleared_and_a_sham_around_it_is_suspect(linear, digits):
    sound = judged(linear, digits)
    assert sound.flags == ()
    assert "audit: no sign of masked gradients" in sound.notes
    quantised = judged(Wrapped(linear, images=lambda x: (x * 6).round() / 6), digits)
    (flag,) = quantised.flags
    assert "the gradient is zero, or no number, at 16 of 16 images" in flag
    assert quantised["audit/plain"].value > 0.6
    assert quantised["audit"].value <= sound["audit"].value + 0.07


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="audit has the norm Linf alone"):
        in_norm("audit", "L2")
