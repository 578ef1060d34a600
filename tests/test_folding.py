from __future__ import annotations

import pytest
import torch
from torch import nn

from trainables.networks import Classifier, build_classifier
from trainables.train.adversary import attacked, folded
from trainables.train.optim import build_optimizer


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
def test_the_twin_answers_and_ascends_as_the_classifier_does(small, base, changes):
    images = torch.rand(64, 3, 16, 16)
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
