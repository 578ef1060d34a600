"""Stylized-ImageNet's two readings, the cue conflict, and shape-bias arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn
from torchvision import transforms

from evaluators.base import Batch, evaluate, verdicts
from evaluators.stylized import Stylized, mix_cues, texture_partners
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.data.registry import folder_data_set
from trainables.networks import Classifier
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")


class Zeros(nn.Module):
    def forward(self, images):
        return torch.zeros(len(images), 10)


def test_shape_bias_is_shape_over_shape_and_texture():
    labels = torch.zeros(10, dtype=torch.long)
    stage = ("texture:7",) * 10
    batch = Batch(torch.zeros(10, 3, 16, 16), labels, tuple("abcdefghij"), "stylized", stage)
    # Three answers by shape, two by texture, five by neither.
    predicted = torch.tensor([0, 0, 0, 7, 7, 1, 2, 3, 4, 5])
    scores = Stylized(DIGITS).summarize(verdicts(batch, "stylized", predicted, stage=stage))
    by_shape, bias = scores
    assert (by_shape.name, by_shape.value, by_shape.n) == ("stylized", 0.3, 10)
    assert (bias.name, bias.value, bias.n) == ("stylized/shape-bias", 0.6, 5)
    wilson = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert (bias.low, bias.high) == pytest.approx((wilson.low, wilson.high))


def test_no_shape_bias_without_an_answer_for_either():
    batch = Batch(torch.zeros(1, 3, 16, 16), torch.tensor([0]), ("a",))
    ledger = verdicts(batch, "stylized", torch.tensor([1]), stage=("texture:7",))
    assert [score.name for score in Stylized(DIGITS).summarize(ledger)] == ["stylized"]


def test_the_texture_is_of_another_class_and_follows_from_the_id():
    data = load_data(DIGITS)
    partners = texture_partners(data.held_out.ids, data.held_out.labels)
    assert (data.held_out.labels[partners] != data.held_out.labels).all()
    assert (partners == texture_partners(data.held_out.ids, data.held_out.labels)).all()
    assert len(set(partners.tolist())) > 300


def test_the_mix_keeps_the_phases_of_one_and_the_mean_of_the_other():
    shapes = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mix_cues(shapes, shapes), shapes, atol=1e-5)
    textures = 0.4 + 0.2 * shapes.flip(0)
    mixed = mix_cues(shapes, textures)
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), textures.mean(dim=(1, 2, 3)), atol=1e-3)
    turn = torch.fft.rfft2(mixed) * torch.fft.rfft2(shapes).conj()
    assert turn.real.flatten()[1:].gt(0).float().mean() > 0.99


def test_conflicts_are_the_same_whatever_the_batch():
    data = load_data(DIGITS)
    whole = next(iter(Stylized(DIGITS).batches(data, batch_size=597)))
    parts = list(Stylized(DIGITS).batches(data, batch_size=100))
    assert torch.allclose(torch.cat([part.images for part in parts]), whole.images, atol=1e-6)
    assert sum((part.stage for part in parts), ()) == whole.stage
    shapes = to_unit(data.held_out.images)
    assert not torch.allclose(whole.images, shapes, atol=0.1)


def test_the_stored_set_is_read_at_native_size_and_cropped(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name / "a.png")
    stylized = Stylized(DIGITS)
    source = replace(
        load_data(DIGITS),
        data_set=folder_data_set(image_size=16, num_classes=2, train_images=9, content="0" * 8),
        class_names=("n02", "n01"),
        roots={"imagenet-stylized": tmp_path},
    )
    classifier = Classifier(Zeros(), (0.0,) * 3, (1.0,) * 3)
    ledger = evaluate(stylized, classifier, source, device=CPU)
    scores = {score.name: score.value for score in stylized.summarize(ledger)}
    assert scores == {"stylized": 0.5, "stylized-cropped": 0.5}
    imagenet = replace(IMAGENET.data_set, image_size=16)
    with pytest.raises(ValueError, match="2 images instead of 50000"):
        list(stylized.batches(replace(source, data_set=imagenet), batch_size=2))


def test_the_cropped_reading_is_the_studys_and_the_native_one_as_stored(tmp_path):
    """Resize 256 and CenterCrop 224, torchvision's bilinear default: datasets.py of the study."""
    (tmp_path / "val" / "n01").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "val" / "n01" / "a.png")
    source = replace(
        load_data(DIGITS),
        data_set=replace(IMAGENET.data_set, generated=True),
        class_names=("n01",),
        roots={"imagenet-stylized": tmp_path},
    )
    batches = Stylized(IMAGENET).batches(source, batch_size=1)
    shown = {batch.question: batch.images[0] for batch in batches}
    cropped = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    )
    assert torch.equal(shown["stylized-cropped"], cropped(picture))
    assert torch.equal(shown["stylized"], transforms.ToTensor()(picture))


def test_halving_a_batch_halves_its_remarks_too():
    batch = Batch(torch.zeros(3, 1), torch.arange(3), ("a", "b", "c"), "q", ("x", "y", "z"), (1,))
    first, second = batch.parts(2)
    assert (first.ids, first.stage, first.question) == (("a", "b"), ("x", "y"), "q")
    assert (second.ids, second.stage, second.candidates) == (("c",), ("z",), (1,))
