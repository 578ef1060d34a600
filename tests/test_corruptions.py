"""The fifteen corruptions, ImageNet-C's reader, and the errors and mCE computed from a ledger."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import imagecorruptions
import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F

from evaluators import column_named
from evaluators.base import Batch, judge_images, verdicts
from evaluators.corruption_kinds import corrupt, smear
from evaluators.corruptions import (
    ALEXNET_ERRORS,
    GENERATED_IMAGES,
    Corruptions,
)
from evaluators.ledger import LEDGER
from tests.golden import corruptions as golden
from trainables.data.base import to_unit
from trainables.data.load import CorruptedSet, load_data
from trainables.data.registry import EXTRA_KINDS, KINDS, SEVERITIES, STORED_SETS
from trainables.layers import Classifier
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
IDS = tuple(f"photo/{i}" for i in range(4))


@cache
def photographs(side):
    """Return four pieces of scikit-learn's two photographs, reduced from 224 px."""
    pieces = [
        torch.from_numpy(image[top : top + 224, left : left + 224].copy())
        for image in load_sample_images().images
        for top, left in ((100, 200), (150, 30))
    ]
    images = torch.stack(pieces).permute(0, 3, 1, 2).float()
    small = F.interpolate(images, size=side, mode="area")
    return small.round() / 255


class Darkness(nn.Module):
    """Answer 1 for a bright image, 0 for a dark one."""

    def __init__(self, classes):
        super().__init__()
        self.others = classes - 2

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack((0.5 - mean, mean - 0.5, *[mean - 9] * self.others), dim=1)


def classifier(classes=10):
    return Classifier(Darkness(classes), (0.0,) * 3, (1.0,) * 3)


# The photographs' draws on our side: so many that the mean's standard error is about 1 %.
DRAWS = {"motion_blur": 10, "snow": 2, "frost": 100, "fog": 30, "elastic_transform": 2}
GOLDEN = json.loads(golden.FILE.read_text())["mean_change"]


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_photographs_of_224_px_change_as_much_as_by_imagecorruptions(kind, severity):
    def corrupt_pixels(pixels, draw):
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        ids = [f"photo/{i}/{draw}" for i in range(len(images))]
        corrupted = corrupt(images, ids, kind=kind, severity=severity)
        return (corrupted * 255).round().byte().permute(0, 2, 3, 1).numpy()

    changes = golden.mean_changes(corrupt_pixels, DRAWS.get(kind, 1))
    assert changes.mean() == pytest.approx(GOLDEN[kind][severity - 1]["value"], rel=0.05)


def test_each_pane_of_frost_is_as_bright_as_one_of_the_six_photographs():
    """A photograph's darkest frost adds less than half of its brightest, as in imagecorruptions."""
    black = torch.zeros(300, 3, 224, 224)
    frosted = corrupt(black, [f"{i}" for i in range(300)], kind="frost", severity=3)
    # 0.7 times the photographs' means: the darkest is 0.34, the two brightest 0.80.
    means = frosted.mean(dim=(1, 2, 3)) / 0.7
    assert means.quantile(0.08).item() == pytest.approx(0.34, abs=0.04)
    assert means.quantile(0.83).item() == pytest.approx(0.80, abs=0.04)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_severity_keeps_the_range_and_the_highest_is_the_furthest(kind, side):
    images = photographs(side).repeat(16 if side == 64 else 48, 1, 1, 1)
    ids = [f"photo/{i}" for i in range(len(images))]
    distances = []
    for severity in SEVERITIES:
        corrupted = corrupt(images, ids, kind=kind, severity=severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.float32
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        distances.append(float((corrupted - images).abs().mean()))
    assert distances[0] > 1 / 255
    assert distances[-1] > 1.15 * distances[0]
    # Fog's and frost's upper severities are about as far from the image in the original, too.
    assert all(b > 0.9 * a for a, b in pairwise(distances))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_whatever_its_batch(kind):
    images = photographs(32)
    before = images.clone()
    together = corrupt(images, IDS, kind=kind, severity=3)
    assert torch.equal(images, before)
    for index in (3, 1):
        alone = corrupt(images[index : index + 1], IDS[index : index + 1], kind=kind, severity=3)
        difference = (alone[0] - together[index]).abs()
        assert difference.max() * 255 < 1.01  # a float at an integer may be cut off either way
        assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("kind", [*KINDS[:3], "glass_blur", "motion_blur", "snow", "frost", "fog"])
def test_another_id_draws_another_corruption(kind):
    images = photographs(32)[:1].expand(2, -1, -1, -1)
    one, other = corrupt(images, ("a", "b"), kind=kind, severity=5)
    assert (one - other).abs().mean() > 1e-3


def test_a_cell_on_digits_asks_75_questions_of_each_image_and_keeps_the_images():
    corruptions, data = Corruptions(DIGITS), load_data(DIGITS)
    ledger = judge_images(corruptions, classifier(), data, device=CPU)
    assert len(ledger) == GENERATED_IMAGES * 75
    assert len(set(ledger["image_id"].to_pylist())) == GENERATED_IMAGES
    assert set(ledger["question"].to_pylist()) == {f"{k}-{s}" for k in KINDS for s in SEVERITIES}
    assert corruptions.identity(data)["data"] == "corruptions (digits)"
    assert judge_images(corruptions, classifier(), data, device=CPU).equals(ledger)
    scores = {score.name: score for score in corruptions.summarize(ledger)}
    wrong = 1 - np.mean(ledger["survived"].to_pylist())
    assert scores["corruptions"].value == pytest.approx(wrong)
    assert scores["corruptions"].low < wrong < scores["corruptions"].high
    assert scores["corruptions"].n == GENERATED_IMAGES
    assert "corruptions/mCE" not in scores


def ledger_of(wrong, kinds, images=4):
    """Return a ledger in which image i survives (kind, severity) unless wrong(...) says so."""
    parts = []
    ids = tuple(f"i{i}" for i in range(images))
    batch = Batch(torch.zeros(images, 1), torch.zeros(images, dtype=torch.long), ids)
    for kind in kinds:
        for severity in SEVERITIES:
            answers = torch.tensor([int(wrong(i, kind, severity)) for i in range(images)])
            parts.append(verdicts(batch, f"{kind}-{severity}", answers))
    return LEDGER.empty_table().from_batches([b for p in parts for b in p.to_batches()])


def test_errors_and_mce_of_a_hand_worked_example():
    def wrong(image, kind, severity):
        # Gaussian noise: every image from severity 3 on, 0.6. Fog: image 0 always, 0.25. Pixelate:
        # every image at severity 5, 0.2.
        return (
            (kind == "gaussian_noise" and severity >= 3)
            or (kind == "fog" and image == 0)
            or (kind == "pixelate" and severity == 5)
        )

    scores = {s.name: s for s in Corruptions(IMAGENET).summarize(ledger_of(wrong, KINDS))}
    expected = {
        "corruptions": (0.6 + 0.25 + 0.2) / 15,
        "corruptions/noise": 0.6 / 3,
        "corruptions/weather": 0.25 / 4,
        "corruptions/digital": 0.2 / 4,
        "corruptions/blur": 0.0,
        "corruptions/gaussian_noise": 0.6,
        "corruptions/fog": 0.25,
        "corruptions/mCE": (0.6 / 0.886428 + 0.25 / 0.819324 + 0.2 / 0.717840) / 15,
    }
    for name, value in expected.items():
        assert scores[name].value == pytest.approx(value, abs=1e-6)
    assert "corruptions-19" not in scores
    # Fog: {1, 0, 0, 0} has a standard error of 1/4 and three degrees of freedom: 0.25 +- 0.796.
    fog = scores["corruptions/fog"]
    assert (fog.low, fog.high) == (0.0, 1.0)
    assert scores["corruptions/blur"].high > 0.4  # four images without an error prove little


# AlexNet's errors per severity, as forks of timm keep them (imagenetc_alexnet_error_rates_list).
ALEXNET_BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


@pytest.mark.parametrize("kind", KINDS)
def test_alexnets_error_is_the_mean_of_its_errors_at_five_severities(kind):
    assert ALEXNET_ERRORS[kind] == pytest.approx(sum(ALEXNET_BY_SEVERITY[kind]) / 5, abs=1e-6)


def test_means_over_fifteen_and_nineteen_and_mce_are_three_numbers():
    """Errors: gaussian noise 1, brightness 0.5, spatter 1, saturate 0.2, the other fifteen 0."""

    def wrong(image, kind, severity):
        return (
            kind in ("gaussian_noise", "spatter")
            or (kind == "brightness" and image < 2)
            or (kind == "saturate" and severity == 5)
        )

    ledger = ledger_of(wrong, KINDS + EXTRA_KINDS)
    scores = {s.name: s.value for s in Corruptions(IMAGENET).summarize(ledger)}
    assert scores["corruptions"] == pytest.approx(0.1)  # (1 + 0.5) / 15
    assert scores["corruptions-19"] == pytest.approx(0.1421053)  # (1 + 0.5 + 1 + 0.2) / 19
    # (1 / 0.886428 + 0.5 / 0.564592) / 15 = (1.128123 + 0.885595) / 15
    assert scores["corruptions/mCE"] == pytest.approx(0.1342479)
    assert scores["corruptions/spatter"] == pytest.approx(1)
    assert scores["corruptions/saturate"] == pytest.approx(0.2)


def test_who_is_always_wrong_has_an_mce_above_one_and_an_interval():
    ledger = ledger_of(lambda *_: True, KINDS)
    scores = {s.name: s for s in Corruptions(IMAGENET).summarize(ledger)}
    mce = scores["corruptions/mCE"]
    assert mce.value == pytest.approx(1.29345, abs=1e-5)  # the mean of the fifteen 1 / error
    # Clopper and Pearson, 4 of 4: from 0.025 ** (1 / 4) = 0.3976 up to 1, here times 1.29345.
    assert (mce.low, mce.high) == pytest.approx((0.5143, 1.2935), abs=1e-4)


def test_a_score_that_lacks_a_kind_is_left_out():
    ledger = ledger_of(lambda *_: False, [kind for kind in KINDS if kind != "fog"])
    names = {s.name for s in Corruptions(IMAGENET).summarize(ledger)}
    assert names.isdisjoint({"corruptions", "corruptions/mCE", "corruptions/weather"})
    assert {"corruptions/noise", "corruptions/snow"} <= names


def test_an_image_that_lacks_a_kind_is_left_out():
    ledger = ledger_of(lambda image, *_: image == 0, KINDS)
    lacking = pc.and_(pc.equal(ledger["image_id"], "i0"), pc.starts_with(ledger["question"], "fog"))
    for score in Corruptions(DIGITS).summarize(ledger.filter(pc.invert(lacking))):
        assert (score.value, score.n) == (0, 3)


def write_set(root, kinds):
    for kind in kinds:
        for severity in SEVERITIES:
            for name, value in (("n01", 255), ("n02", 0)):
                folder = root / kind / str(severity) / name
                folder.mkdir(parents=True)
                Image.new("RGB", (16, 16), (value,) * 3).save(folder / "a.JPEG")


def test_the_stored_set_is_read_by_class_name(tmp_path):
    write_set(tmp_path, (*KINDS, "spatter"))
    source = replace(
        load_data(DIGITS),
        data_set=replace(IMAGENET.data_set, image_size=16, generated=True),
        class_names=("n02", "n01"),
        roots={"imagenet-c": tmp_path},
    )
    corruptions = Corruptions(IMAGENET)
    ledger = judge_images(corruptions, classifier(2), source, device=CPU)
    assert len(ledger) == 16 * 5 * 2
    scores = {score.name: score.value for score in corruptions.summarize(ledger)}
    assert scores["corruptions"] == scores["corruptions/spatter"] == scores["corruptions/mCE"] == 0
    assert corruptions.identity(source)["kinds"] == (*KINDS, "spatter")


def test_generated_images_have_no_mce_and_no_published_name_even_at_imagenets_scale():
    """Sixteen digits stand for ImageNet without ImageNet-C."""
    digits = load_data(DIGITS)
    few = digits.held_out.at(np.arange(16))
    bare = replace(digits, data_set=replace(IMAGENET.data_set, image_size=16), held_out=few)
    corruptions = Corruptions(IMAGENET)
    assert corruptions.identity(bare)["data"] == "corruptions (imagenet, generated)"
    ledger = judge_images(corruptions, classifier(), bare, device=CPU)
    assert len(ledger) == 15 * 5 * 16
    names = {score.name for score in corruptions.summarize(ledger)}
    assert "corruptions" in names
    assert "corruptions/mCE" not in names
    column = column_named("corruptions").at("imagenet", names)
    assert column.title == "Corruptions error (imagenet, generated)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 20, 28), (3, 28, 20)])
def test_grey_and_oblong_images_are_corrupted_too(kind, shape):
    images = photographs(28)[:2, : shape[0], : shape[1], : shape[2]]
    corrupted = corrupt(images, IDS[:2], kind=kind, severity=3)
    assert corrupted.shape == images.shape
    assert 0.005 < (corrupted - images).abs().mean() < 0.5


def test_kinds_and_severities_that_lack_are_named(tmp_path):
    write_set(tmp_path, set(KINDS) - {"fog"})
    (tmp_path / "saturate" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"lacks 9 of 80: fog/1, .*saturate/2") as error:
        CorruptedSet(STORED_SETS["imagenet-c"], tmp_path, load_data(DIGITS))
    assert "spatter" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    "kind",
    ["defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"],
)
def test_a_kind_without_draws_gives_the_pixels_of_imagecorruptions(kind, severity):
    images = photographs(224)[1:3]
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    theirs = [imagecorruptions.corrupt(p, corruption_name=kind, severity=severity) for p in pixels]
    ours = corrupt(images, IDS[:2], kind=kind, severity=severity).permute(0, 2, 3, 1).numpy() * 255
    difference = np.abs(ours.round() - np.stack(theirs))
    assert difference.max() <= 1
    assert difference.mean() <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "severity"), [("glass_blur", 1), ("snow", 2), ("frost", 3), ("brightness", 1)]
)
def test_the_golden_values_are_those_of_the_installed_imagecorruptions(kind, severity):
    """With the file's own draws, so that only another version of a package can differ."""
    changes = golden.reference_changes(kind, severity)
    assert changes.mean() == pytest.approx(GOLDEN[kind][severity - 1]["value"], rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_a_smear_in_a_given_direction_is_that_of_imagecorruptions():
    images = photographs(224)[:1]
    for angle in (-40.0, 17.0):
        ours = smear(images, 20, 15, torch.tensor([angle]))[0].permute(1, 2, 0).numpy()
        theirs = imagecorruptions.corruptions._motion_blur(
            images[0].permute(1, 2, 0).numpy(), 20, 15, angle
        )
        assert np.abs(ours - theirs).max() < 1e-3


def test_a_stored_quality_gives_the_pixels_of_files_saved_as_imagenet_cs(tmp_path):
    """make_imagenet_c.py: Image.fromarray(np.uint8(img)).save(path, quality=85, optimize=True)."""
    images_BCHW = to_unit(load_data(DIGITS).held_out.images[:3])
    ids = ("a", "b", "c")
    for kind in ("fog", "gaussian_noise"):
        plain = corrupt(images_BCHW, ids, kind=kind, severity=3)
        stored = corrupt(images_BCHW, ids, kind=kind, severity=3, jpeg=85)
        for number, pixels in enumerate((plain * 255).round().byte().permute(0, 2, 3, 1)):
            file = tmp_path / f"{kind}{number}.JPEG"
            Image.fromarray(pixels.numpy()).save(file, quality=85, optimize=True)
            again = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
            assert torch.equal((stored[number] * 255).round().byte(), again)
        assert not torch.equal(plain, stored)


def test_a_stored_quality_is_another_question_and_no_matter_of_a_stored_set(tmp_path):
    data, at_85 = load_data(DIGITS), replace(DIGITS, stored_jpeg=85)
    plain = Corruptions(DIGITS).identity(data)
    assert Corruptions(at_85).identity(data) == plain | {"jpeg": 85}
    write_set(tmp_path, KINDS)
    entry = replace(data.data_set, counterparts=("imagenet-c",))
    there = replace(
        data, data_set=entry, roots={"imagenet-c": tmp_path}, class_names=("n01", "n02")
    )
    with pytest.raises(ValueError, match="ImageNet-C is read as it is stored: leave out jpeg 85"):
        Corruptions(at_85).identity(there)
