"""Recipes train and PGD attacks as references do: timm and torchattacks, see tests/golden/."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from fractions import Fraction
from itertools import islice

import pytest
import torch

from evaluators.base import Batch
from evaluators.pgd import PGD
from grid.study import base_named
from tests.golden import (
    RECIPES,
    STEPS,
    classifier_of,
    data_of_one_batch,
    recipe_at_digits,
    stored,
)
from tests.golden.pgd import STORED, attack_inputs
from tests.tiny import Watched
from trainables.data.augment import TrainBatches
from trainables.layers import Classifier
from trainables.scale import DIGITS, IMAGENET
from trainables.train.loop import train
from trainables.train.optim import parameter_groups, rate_at


@pytest.mark.parametrize("scale", [IMAGENET, DIGITS], ids=["imagenet", "digits"])
@pytest.mark.parametrize("name", RECIPES)
def test_rates_are_timms_under_the_studys_options(name, scale):
    expected = stored(name)["rates"][scale.name]
    recipe = scale.shrink(base_named(RECIPES[name]))
    published = recipe.replace(protocol="as-published")
    assert recipe.epochs == len(expected)
    found = [rate_at(published, epoch, 3, 10) for epoch in range(recipe.epochs)]
    assert found == pytest.approx(expected, rel=1e-12)
    # The study steps the schedule after the epoch, so its rates lag by one.
    begun = [rate_at(recipe, epoch, 0, 10) for epoch in range(recipe.epochs - 1)]
    assert begun == pytest.approx(expected[1:], rel=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_decayed_as_by_timm(name):
    classifier = classifier_of(recipe_at_digits(name))
    names = {id(p): name for name, p in classifier.named_parameters()}
    groups = parameter_groups(classifier, 0.3)
    decay = {
        names[id(p)]: group["weight_decay"] == 0.3 for group in groups for p in group["params"]
    }
    assert decay == stored(name)["decay"]


@pytest.mark.parametrize("name", RECIPES)
def test_an_augmented_batch_has_the_same_bits(name):
    recipe = recipe_at_digits(name)
    images, _ = next(TrainBatches(recipe, data_of_one_batch(recipe).train, workers=0).epoch(0))
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    assert digest == stored(name)["batch"]


@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_have_the_references_losses(name):
    recipe = recipe_at_digits(name)
    reports = train(
        recipe, classifier_of(recipe), data_of_one_batch(recipe), device=torch.device("cpu")
    )
    losses = [report.metrics["train/loss"] for report in islice(reports, STEPS)]
    # The loop takes its losses in float32.
    assert losses == pytest.approx(stored(name)["losses"], rel=1e-6)


def test_pgd_walks_to_the_iterate_of_torchattacks(monkeypatch):
    classifier, images, labels, start = attack_inputs()
    network = Watched(classifier)
    evaluator = PGD(dataclasses.replace(DIGITS, epsilon=Fraction(8, 255)), steps=[10])
    monkeypatch.setattr(PGD, "_start", lambda *_: start)
    victim = Classifier(network, (0.0,) * 3, (1.0,) * 3).double().eval()
    evaluator.judge(victim, Batch(images, labels, ("0", "1")))
    expected = torch.tensor(json.loads(STORED.read_text())).view_as(images) / 1e7
    assert (start - images).abs().max() > 7.9 / 255
    assert (expected - start).abs().max() > 7.9 / 255
    assert (network.judged[-1] - expected).abs().max() < 1e-6
