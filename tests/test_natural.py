"""ImageNet-A's class mapping, and the natural-adversarial counterpart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC
from torch import nn
from torchvision import transforms

from evaluators import natural
from evaluators.base import evaluate
from evaluators.natural import Natural, hardest
from trainables.data.base import Data, Split
from trainables.data.load import load_data
from trainables.data.registry import folder_data_set
from trainables.networks import Classifier
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
CUT = folder_data_set(image_size=16, num_classes=4, train_images=1200, content="0" * 8)
IMAGENET_16 = replace(IMAGENET.data_set, image_size=16)


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def classifier(*logits):
    return Classifier(Fixed(*logits), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def source(tmp_path):
    """Four classes in scrambled order, two of them in the folder."""
    for name in ("n01", "n04"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20)).save(tmp_path / name / "a.jpg")
    names = ("n03", "n04", "n02", "n01")
    data = load_data(DIGITS)
    return replace(data, data_set=CUT, class_names=names, roots={"imagenet-a": tmp_path})


def test_answers_are_restricted_to_the_classes_present_and_mapped_by_name(source):
    evaluator = Natural(DIGITS)
    ledger = evaluate(evaluator, classifier(9.0, 2.0, 5.0, 1.0), source, device=CPU)
    rows = {(r["question"], r["image_id"]): r for r in ledger.to_pylist()}
    assert rows["natural", "n04/a"]["label"] == 1
    assert rows["natural", "n01/a"]["label"] == 3
    assert rows["natural", "n01/a"]["predicted"] == 1  # the best of labels 1 and 3
    assert rows["natural-1000", "n01/a"]["predicted"] == 0
    scores = {score.name: score.value for score in evaluator.summarize(ledger)}
    assert scores == {"natural": 0.5, "natural-1000": 0.0}
    assert evaluator.identity(source)["data"] == "ImageNet-A"


def test_images_are_shown_as_the_study_shows_them(source, tmp_path):
    """Resize 256 and CenterCrop 224, torchvision's bilinear default: datasets.py of the study."""
    pixels = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((400, 300))
    picture.save(tmp_path / "n01" / "a.png")
    (tmp_path / "n01" / "a.jpg").unlink()
    study = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    )
    at_224 = replace(source, data_set=replace(CUT, image_size=224))
    batch = next(iter(Natural(IMAGENET).batches(at_224, batch_size=2)))
    shown = dict(zip(batch.ids, batch.images, strict=True))["n01/a"]
    assert torch.equal(shown, study(picture))


def test_a_folder_that_is_no_class_is_an_error(source, tmp_path):
    (tmp_path / "n05").mkdir()
    with pytest.raises(ValueError, match="n05 is no class of the data: remove it"):
        Natural(DIGITS).identity(source)


def test_imagenet_a_must_have_its_two_hundred_classes(source):
    said = (
        "is not ImageNet-A: it lacks 200 of 200 classes, the first 'n01498041', and has 2 foreign"
    )
    with pytest.raises(ValueError, match=said):
        next(iter(Natural(DIGITS).batches(replace(source, data_set=IMAGENET_16), batch_size=2)))


def test_imagenet_without_the_set_names_the_option(source):
    with pytest.raises(ValueError, match="--stored imagenet-a=DIR"):
        Natural(DIGITS).identity(replace(source, data_set=IMAGENET_16, roots={}))


def test_the_counterpart_is_a_sixth_that_the_reference_finds_hardest():
    data = load_data(DIGITS)
    chosen = hardest(data)
    assert len(chosen) == 100  # of 597
    assert chosen.ids == hardest(replace(data)).ids
    grey = [s.images[:, 0].flatten(1).float().numpy() / 255 for s in (data.train, data.held_out)]
    right = SVC().fit(grey[0], data.train.labels).predict(grey[1]) == data.held_out.labels.numpy()
    wrong = {i for i, r in zip(data.held_out.ids, right, strict=True) if not r}
    assert wrong
    assert wrong <= set(chosen.ids)


@pytest.fixture(scope="module")
def many():
    """Sixty classes of noisy bars in eight images each; three held out lie about their class."""
    draw = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (60, 1, 12, 12), generator=draw).expand(-1, 3, -1, -1)
    labels = torch.arange(60).repeat(8)
    noise = torch.randint(-40, 41, (480, 3, 12, 12), generator=draw)
    images = (prototypes[labels] + noise).clamp(0, 255).byte()
    images[:3] = images[60 + 30 : 60 + 33]
    ids = tuple(f"many/{i}" for i in range(480))
    whole = Split(images=images, labels=labels, ids=ids)
    return Data(
        data_set=CUT,
        train=whole.at(np.arange(120, 480)),
        held_out=whole.at(np.arange(120)),
        class_names=tuple(str(i) for i in range(60)),
    )


def test_many_classes_have_a_reference_that_is_linear_in_them_and_named(many, monkeypatch):
    monkeypatch.setattr(SVC, "fit", None)
    chosen = hardest(many)
    assert len(chosen) == 20
    assert {"many/0", "many/1", "many/2"} <= set(chosen.ids)
    monkeypatch.setattr(natural, "AT_ONCE", 7)
    assert hardest(replace(many)).ids == chosen.ids
    assert Natural(DIGITS).identity(many)["reference"] == "kernel ridge regression"


def test_the_counterpart_does_not_call_itself_imagenet_a():
    evaluator = Natural(DIGITS)
    data = load_data(DIGITS)
    identity = {"data": "natural-adversarial (digits)", "images": hardest(data).ids_hash()}
    assert evaluator.identity(data) == identity
    ledger = evaluate(evaluator, classifier(*[1.0] + [0.0] * 9), data, device=CPU)
    assert set(ledger["question"].to_pylist()) == {"natural"}
