"""A thousand classes at 224 px: one training step and every evaluator, on a tiny sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from evaluators import EVALUATORS, evaluator_named
from evaluators.base import judge_images
from evaluators.textures import LAYOUT
from tests.paper import STRONG, resnet50
from tests.pictures import write_picture
from trainables.data.images import ImageFiles
from trainables.data.listing import EMBEDDED, DataSource
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.scale import DIGITS, IMAGENET, PatchBudget
from trainables.train.loop import train

CPU = torch.device("cpu")
THRIFTY = replace(
    IMAGENET,
    attack_subset=2,
    autoattack_subset=2,
    square_queries=5,
    smoothing_samples=20,
    patch=PatchBudget(images=1, textures=2, samples=4, steps=3),
)
NAMES = ImageNetInfo().label_names()
SHOWN = (3, 500, 999)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """ImageNet's class folders, three of which hold images; textures of two classes."""
    root = tmp_path_factory.mktemp("imagenet")
    for name in NAMES:
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
    for label in SHOWN:
        for number in range(2):
            write_picture(root / "train" / NAMES[label], number, label % 12, side=200)
        write_picture(root / "val" / NAMES[label], 1, label % 12, side=260)
    for label in (3, 4):
        for cluster in range(2):
            path = root / "textures" / LAYOUT.format(label=label, cluster=cluster)
            path.parent.mkdir(parents=True)
            torch.save(torch.zeros(1).expand(3, 224, 224), path)
    found = load_data(IMAGENET, DataSource(root=root))
    # Under another name, so that counterparts are generated for the sets that are not there.
    return replace(found, data_set=replace(found.data_set, name="a sample", generated=True))


@pytest.fixture(scope="module")
def judged():
    """A classifier that costs little: what is asked of it is the size of its images and head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 16, stride=16),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 1000),
        )
    return Classifier(network, IMAGENET.data_set.mean, IMAGENET.data_set.std).eval()


def test_images_stay_in_their_files_until_they_are_asked_for(data):
    assert isinstance(data.train.images, ImageFiles)
    assert data.train.images.shape == (6, 3, 224, 224)
    assert data.held_out.labels.tolist() == list(SHOWN)


def test_a_training_step_goes_through_a_head_of_a_thousand(data):
    fields = {"model": "timm:test_resnet", "epochs": 1, "batch_size": 6, "micro_batch": 2}
    recipe = IMAGENET.shrink(resnet50()).replace(augmentations=STRONG, **fields)
    (report,) = train(recipe, build_classifier(recipe), data, device=CPU)
    assert report.outcome == "finished"
    assert report.metrics["train/loss"] == pytest.approx(6.9, abs=0.5)


@pytest.mark.parametrize("name", sorted(EVALUATORS.keys() - EMBEDDED.missing(DIGITS.data_set)))
def test_every_evaluator_judges_a_thousand_classes(name, judged, data, monkeypatch):
    monkeypatch.setattr("evaluators.autoattack.ITERATIONS", 3)
    evaluator = evaluator_named(name, THRIFTY)
    assert evaluator.identity(data)
    # The model is right about one image, so that there is something to attack.
    with torch.inference_mode():
        predicted = judged(data.held_out.images[:].float() / 255).argmax(dim=1)
    labels = torch.where(torch.arange(3) == 0, predicted, data.held_out.labels)
    source = replace(data, held_out=replace(data.held_out, labels=labels))
    ledger = judge_images(evaluator, judged, source, device=CPU, batch_size=3)
    assert ledger.num_rows > 0
    assert evaluator.summarize(ledger)
