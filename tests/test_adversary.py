from __future__ import annotations

import pytest
import torch
from torch import nn
from torchattacks import PGDL2, TPGD

from trainables.data.base import to_unit
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Adversary
from trainables.train.adversary import (
    apgd,
    attacked,
    folded,
    pgd_iterates,
    training_attack,
    training_start,
)
from trainables.train.norms import random_start
from trainables.train.optim import build_optimizer

EPSILON = 16 / 255


class Linear(nn.Module):
    """Two classes by the sign of a weighted pixel sum: the worst perturbation is known."""

    def __init__(self) -> None:
        super().__init__()
        signs = torch.tensor([1.0, -1.0]).repeat(3 * 4 * 4 // 2).view(1, 3, 4, 4)
        self.weight = nn.Parameter(signs / 10)

    def forward(self, images):
        score = (images * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([score, -score], dim=1)


def run_pgd(
    model, images, labels, *, stops, start=None, step_size=EPSILON / 4, epsilon=EPSILON, norm="linf"
):
    with attacked(model):
        return dict(
            pgd_iterates(
                model,
                images,
                labels,
                epsilon=epsilon,
                step_size=step_size,
                stops=stops,
                start_BCHW=images if start is None else start,
                norm=norm,
            )
        )


def test_pgd_reaches_the_known_worst_case_of_a_linear_model():
    model = Linear()
    images = torch.full((2, 3, 4, 4), 0.5)
    labels = torch.tensor([0, 1])
    final = run_pgd(model, images, labels, stops=(4,))[4]
    signs = torch.stack([-model.weight[0], model.weight[0]]).detach().sign()
    assert torch.allclose(final, images + EPSILON * signs, atol=1e-6)


def test_pgd_fills_the_ball_stays_in_it_and_passes_through_all_stops(small, few_digits):
    model = build_classifier(small()).eval()
    images, labels = to_unit(few_digits.held_out.images), few_digits.held_out.labels
    start = random_start(images, torch.arange(len(images)), epsilon=EPSILON, key=(0,))
    drawn = (start - images)[(images > EPSILON) & (images < 1 - EPSILON)]
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02 * EPSILON)
    assert float(drawn.std()) == pytest.approx(EPSILON / 3**0.5, rel=0.02)
    iterates = run_pgd(model, images, labels, stops=(1, 3, 10), start=start)
    for iterate in iterates.values():
        assert (iterate - images).abs().max() <= EPSILON + 1e-6
        assert iterate.min() >= 0
        assert iterate.max() <= 1
    assert torch.equal(iterates[3], run_pgd(model, images, labels, stops=(3,), start=start)[3])


class ThreeAndFour(nn.Module):
    """Class 1 rather than 0 by three times the first pixel and four times the second."""

    def forward(self, images_BCHW):
        score_B = images_BCHW.flatten(1) @ torch.tensor([3.0, 4.0])
        return torch.stack([-score_B, score_B], dim=1)


def test_l2_steps_go_along_the_gradient_and_end_on_the_ball_or_at_white():
    images = torch.tensor([[0.5, 0.5], [0.5, 0.95]]).view(2, 2, 1, 1)
    labels = torch.tensor([0, 0])
    iterates = run_pgd(
        ThreeAndFour(), images, labels, stops=(1, 3), step_size=0.05, epsilon=0.1, norm="l2"
    )
    first, last = (iterates[step].view(2, 2) for step in (1, 3))
    # The unit gradient is (0.6, 0.8).
    assert torch.allclose(first, torch.tensor([[0.53, 0.54], [0.53, 0.99]]), atol=1e-5)
    assert torch.allclose(last[0], torch.tensor([0.56, 0.58]), atol=1e-5)
    # From (0.53, 0.99) on to offset (0.06, 0.08), cut at 1; then (0.09, 0.09), shortened to 0.1.
    assert torch.allclose(last[1], torch.tensor([0.5 + 0.1 / 2**0.5, 1.0]), atol=1e-5)


def test_l2_pgd_is_torchattacks(generator):
    layers = nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10)
    model = nn.Sequential(*layers).double().eval()
    images = torch.rand(16, 3, 4, 4, generator=generator, dtype=torch.double)
    labels = torch.arange(16) % 10
    settings = {"eps": 0.5, "alpha": 0.2, "steps": 4, "random_start": False}
    expected = PGDL2(model, **settings)(images, labels)
    iterates = run_pgd(model, images, labels, stops=(4,), step_size=0.2, epsilon=0.5, norm="l2")
    assert torch.allclose(iterates[4], expected, atol=1e-6)
    assert ((iterates[4] - images).flatten(1).norm(dim=1) > 0.4).all()


def test_an_l2_start_is_uniform_in_the_images_ball_and_its_own_in_any_part():
    images, numbers = torch.full((4000, 3, 2, 2), 0.5), torch.arange(4000)
    start = random_start(images, numbers, epsilon=0.25, key=(0,), norm="l2")
    offsets = (start - images).flatten(1)
    # Of a ball in 12 dimensions a share r^12 lies within r; 0.29 is 1 / 12^0.5.
    within = (offsets.norm(dim=1) / 0.25) ** 12
    assert float(within.max()) <= 1 + 1e-5
    assert float(within.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(within.std()) == pytest.approx(0.2887, abs=0.01)
    directions = offsets / offsets.norm(dim=1, keepdim=True)
    assert directions.mean(dim=0).abs().max() < 0.03
    assert directions.square().mean(dim=0).sub(1 / 12).abs().max() < 0.01
    part = random_start(images[::3], numbers[::3], epsilon=0.25, key=(0,), norm="l2")
    assert torch.allclose(part, start[::3], atol=1e-7)


class Hill(nn.Module):
    """One pixel; the loss of label 0 is highest at the grey of 0.56. It keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.path = []

    def forward(self, images_BCHW):
        self.path.append(float(images_BCHW.detach()))
        below_B = -(images_BCHW.flatten(1)[:, 0] - 0.56).abs()
        return torch.stack([torch.zeros_like(below_B), below_B], dim=1)


def run_apgd(model, images, targets, *, steps, epsilon=EPSILON, norm="linf"):
    adversary = Adversary(attack="apgd", epsilon=epsilon, steps=steps, norm=norm)
    with attacked(model):
        return apgd(adversary, model, images, targets, images)


def test_autopgd_follows_its_rule_of_steps_and_returns_the_best():
    """Croce and Hein's rule at radius 0.1, with a checkpoint after every one of 8 steps."""
    images = torch.full((1, 1, 1, 1), 0.5)
    hill = Hill()
    final = run_apgd(hill, images, torch.tensor([0]), steps=8, epsilon=0.1)
    path = [
        0.5,
        0.6,  # a step of 0.2, cut at the ball's edge
        0.475,  # 3/4 of -0.2, 1/4 of the last 0.1: lower, so the step is halved, back to 0.6
        0.525,  # 3/4 of -0.1
        0.5625,  # 3/4 of 0.1, 1/4 of -0.075
        0.496875,  # 3/4 of -0.1, 1/4 of 0.0375: lower, halved, back to 0.5625
        0.525,  # 3/4 of -0.05: higher than the last one
        0.553125,  # 3/4 of 0.05, 1/4 of -0.0375: twice no better than 0.5625, halved, back to it
        0.553125,  # 3/4 of -0.025, 1/4 of the 0.0375 since 0.525
    ]
    assert hill.path == pytest.approx(path, abs=1e-6)
    assert float(final) == pytest.approx(0.5625, abs=1e-6)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.5)])
def test_autopgd_stays_in_the_ball_and_takes_soft_targets(small, few_digits, norm, epsilon):
    model = build_classifier(small()).eval()
    images, labels = to_unit(few_digits.train.images[:16]), few_digits.train.labels[:16]
    drawn = torch.get_rng_state()
    final = run_apgd(model, images, labels, steps=5, epsilon=epsilon, norm=norm)
    assert torch.equal(torch.get_rng_state(), drawn)
    size = (final - images).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert size.max() <= epsilon + 1e-6
    assert size.min() > 0.5 * epsilon
    assert 0 <= final.min() <= final.max() <= 1
    loss = nn.CrossEntropyLoss(reduction="none")
    assert (loss(model(final), labels) > loss(model(images), labels)).all()
    soft = nn.functional.one_hot(labels, 10).float()
    of_soft = run_apgd(model, images, soft, steps=5, epsilon=epsilon, norm=norm)
    assert torch.allclose(of_soft, final, atol=1e-6)


def test_attack_leaves_the_model_as_it_was(small, few_digits):
    model = build_classifier(small()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_pgd(model, to_unit(few_digits.train.images[:4]), few_digits.train.labels[:4], stops=(2,))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def adversarial(small, **changes):
    adversary = {"epsilon": EPSILON, "step_size": EPSILON} | changes.pop("adversary", {})
    return small(adversary=adversary, **changes)


@pytest.mark.parametrize("changed", [{"epoch": 1}, {"step": 1}, {"seed": 1}])
def test_training_starts_differ_by_epoch_step_and_seed(small, changed):
    recipe, images = adversarial(small), torch.full((4, 3, 8, 8), 0.5)

    def start(*, seed=0, epoch=0, step=0):
        own = recipe.replace(seed=seed)
        return training_start(own, own.adversary, images, torch.arange(4), epoch=epoch, step=step)

    assert (start() != start(**changed)).float().mean() > 0.99


def test_a_training_start_is_the_images_own_in_any_part_of_the_batch(small):
    recipe = adversarial(small, adversary={"plain_start": 0.2})
    images, places = torch.rand(64, 3, 8, 8), torch.randperm(1000)[:64]

    def start(part):
        own = images[part], places[part]
        return training_start(recipe, recipe.adversary, *own, epoch=3, step=7)

    whole = start(slice(None))
    for rank in range(4):
        assert torch.equal(start(slice(rank, None, 4)), whole[rank::4])


def moved_images(start, images):
    return (start != images).flatten(1).any(dim=1)


def test_corrected_start_is_drawn_for_each_image(small):
    recipe = adversarial(small, adversary={"plain_start": 0.2})
    images = torch.full((4000, 3, 2, 2), 0.5)
    start = training_start(recipe, recipe.adversary, images, torch.arange(4000), epoch=0, step=0)
    assert float(moved_images(start, images).float().mean()) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("plain_start", "share"), [(0.0, 0.5), (0.2, 0.42)])
def test_as_published_start_is_drawn_for_the_whole_batch(small, plain_start, share):
    recipe = adversarial(small, adversary={"plain_start": plain_start}, protocol="as-published")
    images, places = torch.full((4, 3, 2, 2), 0.5), torch.arange(4)

    def start(step):
        return training_start(recipe, recipe.adversary, images, places, epoch=0, step=step)

    moved = [moved_images(start(step), images) for step in range(2000)]
    assert all(m.all() or not m.any() for m in moved)
    assert sum(bool(m.all()) for m in moved) / 2000 == pytest.approx(share, abs=0.03)


def test_an_attack_through_the_twin_is_that_on_the_weights_as_they_are(small, few_digits):
    recipe = adversarial(small)
    images, labels = to_unit(few_digits.train.images[:16]), few_digits.train.labels[:16]
    model = build_classifier(recipe).double().eval()
    twin = folded(model, images)
    model.load_state_dict(build_classifier(recipe.replace(seed=1)).state_dict())

    def attack(twin):
        places = torch.arange(16)
        return training_attack(recipe, model, images, labels, places, epoch=0, step=0, twin=twin)

    assert torch.equal(attack(twin), attack(None))


@pytest.mark.parametrize("protocol", ["corrected", "as-published"])
@pytest.mark.parametrize("soft", [False, True])
def test_training_attack_raises_the_loss_and_follows_from_the_step(
    small, few_digits, protocol, soft
):
    recipe = adversarial(small, protocol=protocol)
    model = build_classifier(recipe).train()
    images, labels = to_unit(few_digits.train.images[:16]), few_digits.train.labels[:16]
    targets = torch.nn.functional.one_hot(labels, 10).float() * 0.9 + 0.01 if soft else labels

    def attack(step):
        return training_attack(recipe, model, images, targets, torch.arange(16), epoch=0, step=step)

    final = attack(0)
    assert (final - images).abs().max() <= EPSILON + 1e-6
    assert torch.equal(final, attack(0))
    model.eval()
    loss = nn.CrossEntropyLoss()
    assert loss(model(final), targets) > loss(model(images), targets)


def test_fgsm_rs_is_one_step_of_five_quarters_of_the_radius(small):
    images, labels = torch.full((8, 3, 4, 4), 0.5), torch.tensor([0, 1] * 4)
    recipe, model = adversarial(small, adversary={"step_size": 1.25 * EPSILON}), Linear()
    places = torch.arange(8)
    start = training_start(recipe, recipe.adversary, images, places, epoch=0, step=0)
    final = training_attack(recipe, model, images, labels, places, epoch=0, step=0)
    rises = model.weight.detach().sign() * torch.where(labels == 0, -1, 1).view(-1, 1, 1, 1)
    offset = (start - images + 1.25 * EPSILON * rises).clamp(-EPSILON, EPSILON)
    assert torch.allclose(final, images + offset, atol=1e-6)
    # From less than -epsilon / 4 the step ends within the ball: 3/8 of the draws.
    assert float((offset.abs() < EPSILON - 1e-6).float().mean()) == pytest.approx(3 / 8, abs=0.1)


def test_trades_attacks_the_answers_to_the_clean_images_as_torchattacks(
    small, few_digits, monkeypatch
):
    changes = {"loss": "trades", "step_size": EPSILON / 4, "steps": 3}
    recipe = adversarial(small, adversary=changes)
    model = build_classifier(recipe).double().eval()
    images, labels = to_unit(few_digits.train.images[:16]).double(), few_digits.train.labels[:16]
    places = torch.arange(16)
    start = training_start(recipe, recipe.adversary, images, places, epoch=0, step=0)
    monkeypatch.setattr(torch, "randn_like", lambda _: (start - images) / 0.001)
    expected = TPGD(model, eps=EPSILON, alpha=EPSILON / 4, steps=3)(images)
    final = training_attack(recipe, model, images, labels, places, epoch=0, step=0)
    assert torch.allclose(final, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("linear", [0, 0.25, 0.5, 0.75, 1, 1]), ("sine", [0, 0.14645, 0.5, 0.85355, 1, 1])],
)
def test_epsilon_grows_from_epoch_to_epoch(small, schedule, shares):
    settings = {"epsilon": 0.1, "step_size": 0.15, "epsilon_schedule": schedule}
    adversary = Adversary(**settings, epsilon_epochs=4)
    epsilons = [adversary.in_epoch(epoch).epsilon for epoch in range(6)]
    assert epsilons == pytest.approx([0.1 * share for share in shares], abs=1e-6)
    assert {adversary.in_epoch(epoch).step_size for epoch in range(6)} == {0.15}


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_has_the_radius_of_its_epoch(small, attack, norm):
    settings = {"attack": attack, "norm": norm, "step_size": 1.5 * EPSILON, "epsilon_epochs": 4}
    recipe = adversarial(small, epochs=6, adversary=settings)
    images = torch.full((4, 3, 4, 4), 0.5)
    labels, places = torch.tensor([0, 1, 0, 1]), torch.arange(4)
    for epoch, radius in ((0, 0.0), (1, EPSILON / 4), (4, EPSILON)):
        final = training_attack(recipe, Linear(), images, labels, places, epoch=epoch, step=0)
        size = (final - images).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
        assert torch.allclose(size, torch.full((4,), radius), atol=1e-5)


def trained_a_little(recipe, images):
    classifier = build_classifier(recipe).train()
    optimizer = build_optimizer(recipe, classifier)
    for _ in range(2):
        classifier(images).square().mean().backward()
        optimizer.step()
    return classifier


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("resnet", {}),
        ("resnet", {"model": "resnet50", "norm": "ghost", "ghost_batch": 32}),
        ("deit", {"model": "hybrid_deit"}),
    ],
)
def test_the_twin_answers_and_ascends_as_the_classifier_does(small, generator, base, changes):
    images = torch.rand(64, 3, 16, 16, generator=generator)
    classifier = trained_a_little(small(base, **changes), images)
    with attacked(classifier):
        twin = folded(classifier, images)
        assert twin is not None
        gradients = []
        for network in (classifier, twin):
            inputs = images.clone().requires_grad_(True)
            logits = network(inputs)
            gradients.append(torch.autograd.grad(logits[:, 0].sum(), inputs)[0])
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[0].abs().max()))


def test_a_twin_follows_the_weights_when_it_is_refreshed(small):
    images = torch.rand(64, 3, 16, 16)
    recipe = small()
    classifier = trained_a_little(recipe, images)
    with attacked(classifier):
        twin = folded(classifier, images)
    classifier.load_state_dict(trained_a_little(recipe.replace(seed=1), images).state_dict())
    with attacked(classifier), torch.no_grad():
        expected = classifier(images)
        assert not torch.allclose(twin(images), expected, atol=1e-4)
        twin.refresh()
        assert torch.allclose(twin(images), expected, atol=1e-4)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images_BCHW):
        return self.norm(images_BCHW) if images_BCHW.sum() > 0 else images_BCHW


def test_a_merge_that_would_lose_precision_has_no_twin():
    """Means far above the spread: the merged sums cancel in float32."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(1e6)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 10))
    network[0].bias.data.fill_(1e6)
    classifier = Classifier(network, (0.0,) * 3, (1.0,) * 3).eval()
    with torch.no_grad():
        assert folded(classifier, torch.rand(2, 3, 8, 8)) is None


def test_what_does_not_fold_has_no_twin(small):
    images = torch.rand(2, 3, 16, 16)
    branching = Classifier(Branching(), (0.0,) * 3, (1.0,) * 3).eval()
    for classifier in (build_classifier(small("deit")).eval(), branching):
        assert folded(classifier, images) is None
