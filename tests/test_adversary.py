from __future__ import annotations

import pytest
import torch
from torch import nn

from trainables.data.base import to_unit
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.train.adversary import (
    attacked,
    folded,
    pgd_iterates,
    random_start,
    training_attack,
    training_start,
)
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


def run_pgd(model, images, labels, *, stops, start=None, step_size=EPSILON / 4):
    with attacked(model):
        return dict(
            pgd_iterates(
                model,
                images,
                labels,
                epsilon=EPSILON,
                step_size=step_size,
                stops=stops,
                start_BCHW=images if start is None else start,
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
