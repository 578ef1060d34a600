"""How many images an attack holds at once."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from evaluators import memory
from evaluators.base import judge_images
from evaluators.memory import images_at_once
from evaluators.pgd import PGD
from tests.tiny import Watched
from trainables.layers import Classifier
from trainables.scale import DIGITS

CPU = torch.device("cpu")


@pytest.fixture
def layers():
    """Three layers of 1,000 float32: autograd holds what each of the three ReLUs returns."""
    wide = [nn.Linear(1000, 1000) for _ in range(3)]
    for layer in wide:
        layer.requires_grad_(False)
    return nn.Sequential(*(part for layer in wide for part in (layer, nn.ReLU())))


def test_images_fit_by_what_autograd_holds_of_one(layers, monkeypatch):
    # 3 x 4,000 bytes of activations, four more of a layer at work, 40 images of 4,000.
    monkeypatch.setattr(memory, "CPU_BYTES", 100 * (3 + 4 + 40) * 4000)
    images = torch.rand(2, 1000)
    assert images_at_once(layers, images, most=200) == 100
    assert images_at_once(layers, images, most=7) == 7
    monkeypatch.setattr(memory, "CPU_BYTES", 1)
    assert images_at_once(layers, images, most=7) == 1


def test_an_attack_shows_a_model_no_more_images_than_fit(few_digits, monkeypatch):
    network = Watched(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)))
    classifier = Classifier(network, (0.0,) * 3, (1.0,) * 3)
    pgd = PGD(DIGITS, steps=(2,), radii=[Fraction(1, 255), Fraction(2, 255)])
    whole = judge_images(pgd, classifier, few_digits, device=CPU)
    network.attacked.clear()
    monkeypatch.setattr(memory, "images_at_once", lambda *_, most: min(most, 25))
    monkeypatch.setattr("evaluators.pgd.images_at_once", memory.images_at_once)
    parts = judge_images(pgd, classifier, few_digits, device=CPU)
    assert {len(images) for images in network.attacked} == {25, 10}
    for column in ("image_id", "question", "survived"):
        assert parts[column].equals(whole[column])
