"""natural and stylized: the stored sets as the study reads them, and their counterparts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.svm import SVC
from torch import nn
from torchvision import transforms

from evaluators import column_named, natural
from evaluators.base import Batch, judge_images, verdicts
from evaluators.natural import Natural, hardest
from evaluators.stylized import Stylized, mix_cues, texture_partners
from tests.pictures import write_folder
from trainables.data.base import Data, Split, to_unit
from trainables.data.listing import EMBEDDED, DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.registry import folder_data_set
from trainables.layers import Classifier
from trainables.recipe import Preprocessing
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
CUT = folder_data_set(image_size=16, num_classes=4, train_images=1200, content="0" * 8)
IMAGENET_16 = replace(IMAGENET.data_set, image_size=16)
# Resize 256 and CenterCrop 224, torchvision's bilinear default: datasets.py of the study.
CROPPED = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
)


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def classifier(*logits):
    return Classifier(Fixed(*logits), (0.0,) * 3, (1.0,) * 3)


def picture(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def source(tmp_path):
    """Four classes in scrambled order, two of them in each stored set."""
    for folder in (tmp_path / "a", tmp_path / "stylized" / "val"):
        for name in ("n01", "n04"):
            (folder / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(folder / name / "a.png")
    return replace(
        load_data(DIGITS),
        data_set=CUT,
        class_names=("n03", "n04", "n02", "n01"),
        roots={"imagenet-a": tmp_path / "a", "imagenet-stylized": tmp_path / "stylized"},
    )


def test_answers_are_restricted_to_the_classes_present_and_mapped_by_name(source):
    evaluator = Natural(DIGITS)
    ledger = judge_images(evaluator, classifier(9.0, 2.0, 5.0, 1.0), source, device=CPU)
    rows = {(r["question"], r["image_id"]): r for r in ledger.to_pylist()}
    assert rows["natural", "n04/a"]["label"] == 1
    assert rows["natural", "n01/a"]["label"] == 3
    assert rows["natural", "n01/a"]["predicted"] == 1  # the best of labels 1 and 3
    assert rows["natural-1000", "n01/a"]["predicted"] == 0
    scores = {score.name: score.value for score in evaluator.summarize(ledger)}
    assert scores == {"natural": 0.5, "natural-1000": 0.0}
    assert evaluator.identity(source)["data"] == "ImageNet-A"


def test_stored_sets_are_shown_as_the_study_shows_them(source, tmp_path):
    large, native = picture(300), picture(224)
    large.save(tmp_path / "a" / "n01" / "a.png")
    native.save(tmp_path / "stylized" / "val" / "n01" / "a.png")
    at_224 = replace(source, data_set=replace(CUT, image_size=224))
    (batch,) = Natural(IMAGENET).batches(at_224, batch_size=2)
    assert torch.equal(batch.images[batch.ids.index("n01/a")], CROPPED(large))
    (tmp_path / "stylized" / "val" / "n04" / "a.png").unlink()
    (tmp_path / "stylized" / "val" / "n04").rmdir()
    one = replace(at_224, class_names=("n01",))
    shown = {b.question: b.images[0] for b in Stylized(IMAGENET).batches(one, batch_size=1)}
    assert torch.equal(shown["stylized-cropped"], CROPPED(native))
    assert torch.equal(shown["stylized"], transforms.ToTensor()(native))


def test_both_readings_of_the_stylized_set_are_scored(source):
    two = replace(source, class_names=("n04", "n01"))
    ledger = judge_images(Stylized(DIGITS), classifier(1.0, 0.0), two, device=CPU)
    scores = {score.name: score.value for score in Stylized(DIGITS).summarize(ledger)}
    assert scores == {"stylized": 0.5, "stylized-cropped": 0.5}


def test_sets_that_are_not_the_published_ones_are_refused(source, tmp_path):
    imagenet = replace(source, data_set=IMAGENET_16)
    lacking = "is not ImageNet-A: it lacks 200 of 200 classes, the first 'n01498041', and has 2"
    with pytest.raises(ValueError, match=lacking):
        next(iter(Natural(DIGITS).batches(imagenet, batch_size=2)))
    few = replace(imagenet, class_names=("n04", "n01"))
    with pytest.raises(ValueError, match="2 images instead of 50000"):
        list(Stylized(DIGITS).batches(few, batch_size=2))
    (tmp_path / "a" / "n05").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "n05" / "a.png")
    with pytest.raises(ValueError, match=r"'n05', the class of .* is no class of the data"):
        Natural(DIGITS).identity(source)


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
    evaluator = Natural(replace(DIGITS, natural_tilt=0.0))
    identity = {"data": "natural-adversarial (digits)", "images": chosen.ids_hash()}
    assert evaluator.identity(data) == identity
    ledger = judge_images(evaluator, classifier(*[1.0] + [0.0] * 9), data, device=CPU)
    assert set(ledger["question"].to_pylist()) == {"natural"}


def test_at_digits_every_image_is_turned_as_the_reference_finds_it_hardest():
    data = load_data(DIGITS)
    chosen, held_out = Natural(DIGITS).images(data), data.held_out
    assert chosen.ids == held_out.ids
    assert Natural(DIGITS).identity(data)["images"] == chosen.ids_hash()
    train, *views = (
        images[:, 0].flatten(1).float().numpy() / 255
        for images in (data.train.images, held_out.images, chosen.images)
    )
    machine = SVC().fit(train, data.train.labels)
    as_is, turned = (machine.predict(v) == held_out.labels.numpy() for v in views)
    assert turned.sum() < as_is.sum()
    assert not (turned & ~as_is).any()
    # By 90 degrees no pixel is interpolated: each image is one of three, exactly.
    upright = hardest(data, tilt=90.0)
    sides = [held_out.images.rot90(k, (2, 3)) for k in (0, 1, 3)]
    same_SN = torch.stack([(side == upright.images).flatten(1).all(dim=1) for side in sides])
    assert same_SN.any(dim=0).all()
    assert same_SN.any(dim=1).all()
    assert Natural(DIGITS).identity(data)["turned"] == "by -20, 0 or 20 degrees"


def test_many_classes_have_a_reference_that_is_linear_in_them_and_named(monkeypatch):
    """Sixty classes of noisy bars in eight images each; three held out lie about their class."""
    draw = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (60, 1, 12, 12), generator=draw).expand(-1, 3, -1, -1)
    labels = torch.arange(60).repeat(8)
    noise = torch.randint(-40, 41, (480, 3, 12, 12), generator=draw)
    images = (prototypes[labels] + noise).clamp(0, 255).byte()
    images[:3] = images[60 + 30 : 60 + 33]
    whole = Split(images=images, labels=labels, ids=tuple(f"many/{i}" for i in range(480)))
    many = Data(
        data_set=CUT,
        train=whole.at(np.arange(120, 480)),
        held_out=whole.at(np.arange(120)),
        class_names=tuple(str(i) for i in range(60)),
    )
    monkeypatch.setattr(SVC, "fit", None)
    chosen = hardest(many)
    assert len(chosen) == 20
    assert {"many/0", "many/1", "many/2"} <= set(chosen.ids)
    monkeypatch.setattr(natural, "AT_ONCE", 7)
    assert hardest(replace(many)).ids == chosen.ids
    assert Natural(DIGITS).identity(many)["reference"] == "kernel ridge regression"


def test_without_train_images_the_held_out_ones_are_cross_fitted():
    """A tenth of the images lie about their class: the reference of the others finds them."""
    data = load_data(DIGITS)
    held_out, none = data.held_out, data.train.at(np.arange(0))
    labels = held_out.labels.clone()
    labels[::10] = (labels[::10] + 1) % 10
    alone = replace(data, train=none, held_out=replace(held_out, labels=labels))
    liars = set(held_out.ids[::10])
    chosen = hardest(alone)
    assert len(chosen) == 100
    assert len(liars & set(chosen.ids)) >= 58  # of 60
    assert Natural(DIGITS).identity(alone)["reference"] == "cross-fitted"
    # One image of a class of its own: no reference knows it, so it is not among the hardest.
    lone = labels.clone()
    lone[5] = 10
    names = (*data.class_names, "ten")
    apart = replace(alone, held_out=replace(held_out, labels=lone), class_names=names)
    assert held_out.ids[5] not in hardest(apart).ids
    few = replace(alone, held_out=held_out.at(np.arange(3)))
    with pytest.raises(ValueError, match="need two images of each of two classes"):
        hardest(few)


@pytest.mark.parametrize("scale", ["digits", "folder"])
def test_models_of_any_preprocessing_are_shown_the_same_hardest_images(tmp_path, scale):
    source = DataSource(root=write_folder(tmp_path)) if scale == "folder" else EMBEDDED
    own = scale_of(scale, source)
    large = load_data(own.preprocessed(Preprocessing(size=24, crop=0.5)), source)
    assert hardest(large).images[:1].shape[-1] == 24
    assert hardest(large).ids == hardest(load_data(own, source)).ids


def test_at_imagenets_own_scale_counterparts_are_named_as_generated():
    """The digits stand for ImageNet without one of its sets."""
    bare = replace(load_data(DIGITS), data_set=IMAGENET_16)
    assert Natural(IMAGENET).identity(bare)["data"] == "natural-adversarial (imagenet, generated)"
    assert Stylized(IMAGENET).identity(bare)["data"] == "cue conflict (imagenet, generated)"
    ledger = judge_images(Stylized(IMAGENET), classifier(1.0, *[0.0] * 9), bare, device=CPU)
    names = {score.name for score in Stylized(IMAGENET).summarize(ledger)}
    column = column_named("stylized-cropped").at("imagenet", names)
    assert (column.title, column.score) == ("Cue conflict (imagenet, generated)", "stylized")
    assert column.stands_in
    one = replace(bare, held_out=bare.held_out.at(np.flatnonzero(bare.held_out.labels == 3)))
    with pytest.raises(ValueError, match="a cue conflict needs held-out images of two classes"):
        judge_images(Stylized(IMAGENET), classifier(1.0, *[0.0] * 9), one, device=CPU)


def test_shape_bias_is_shape_over_shape_and_texture():
    labels = torch.zeros(10, dtype=torch.long)
    stage = ("texture:7",) * 10
    batch = Batch(torch.zeros(10, 3, 16, 16), labels, tuple("abcdefghij"), "stylized", stage)
    # Three answers by shape, two by texture, five by neither.
    predicted = torch.tensor([0, 0, 0, 7, 7, 1, 2, 3, 4, 5])
    ledger = verdicts(batch, "stylized", predicted, stage=stage)
    by_shape, bias = Stylized(DIGITS).summarize(ledger)
    assert (by_shape.name, by_shape.value, by_shape.n) == ("stylized", 0.3, 10)
    assert (bias.name, bias.value, bias.n) == ("stylized/shape-bias", 0.6, 5)
    wilson = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert (bias.low, bias.high) == pytest.approx((wilson.low, wilson.high))
    (alone,) = Stylized(DIGITS).summarize(ledger.slice(5))
    assert alone.name == "stylized"


def test_the_texture_is_of_another_class_and_follows_from_the_id():
    held_out = load_data(DIGITS).held_out
    partners = texture_partners(held_out.ids, held_out.labels)
    assert (held_out.labels[partners] != held_out.labels).all()
    assert (partners == texture_partners(held_out.ids, held_out.labels)).all()
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
    (whole,) = Stylized(DIGITS).batches(data, batch_size=597)
    parts = list(Stylized(DIGITS).batches(data, batch_size=100))
    assert torch.allclose(torch.cat([part.images for part in parts]), whole.images, atol=1e-6)
    assert sum((part.stage for part in parts), ()) == whole.stage
    assert not torch.allclose(whole.images, to_unit(data.held_out.images), atol=0.1)
    assert sum((part.stage for part in whole.parts(99)), ()) == whole.stage
