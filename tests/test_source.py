"""Where the images lie: listing, labels, held-out images, stored sets, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import CLASSES, write_folder, write_picture
from trainables.data.base import Data, Split, to_unit
from trainables.data.listing import DataSource, list_splits, scale_of
from trainables.data.load import load_data, stored_split
from trainables.data.registry import StoredSet, folder_data_set
from trainables.options import DataOptions
from trainables.recipe import Preprocessing
from trainables.scale import DIGITS, IMAGENET, scale_for, scale_named

SIDE = 16
NOTHING = Split(images=torch.empty(0), labels=torch.empty(0), ids=())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


class Options(DataOptions):
    """Data."""

    prog: ClassVar[str] = "data"


def options(*arguments):
    return Options.read([str(argument) for argument in arguments])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        options(*arguments)
    return capsys.readouterr().err


# Digits.


def test_digits_are_split_once_and_for_all(digits):
    train, held_out = digits.train, digits.held_out
    assert (len(train), len(held_out)) == (1200, 597)
    assert not set(train.ids) & set(held_out.ids)
    assert train.images.shape == (1200, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert torch.bincount(held_out.labels).min() >= 55
    assert held_out.ids_hash() == "cf179190ac48"
    assert digits is load_data(DIGITS)


def test_subset_is_drawn_by_seed_and_keeps_images_labels_and_ids_together(digits):
    subset = digits.held_out.subset(50, seed=0)
    assert len(subset) == 50
    assert subset.ids == digits.held_out.subset(50, seed=0).ids
    assert subset.ids != digits.held_out.subset(50, seed=1).ids
    where = digits.held_out.ids.index(subset.ids[7])
    assert torch.equal(subset.images[7], digits.held_out.images[where])
    assert subset.labels[7] == digits.held_out.labels[where]
    assert digits.held_out.subset(10_000, seed=0) is digits.held_out


def test_pixels_become_unit_floats():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.equal(to_unit(pixels), torch.tensor([0.0, 0.2, 1.0]).view(1, 3, 1, 1))


def test_a_scale_without_embedded_data_says_so():
    with pytest.raises(ValueError, match="'imagenet' has no embedded data"):
        load_data(IMAGENET)


# Folders of one's own.


def test_images_are_listed_by_class_with_labels_of_the_sorted_names(root):
    train, held_out = list_splits(DataSource(root=root))
    assert train.class_names == tuple(f"class-{k:02d}" for k in range(CLASSES))
    assert (len(train), len(held_out)) == (CLASSES * 6, CLASSES * 2)
    for path, label in zip(train.paths, train.labels, strict=True):
        assert path.startswith(f"train/class-{label:02d}/picture ")
    assert not set(train.paths) & set(held_out.paths)


@pytest.mark.parametrize(
    ("threads", "gpus", "node", "workers"),
    [
        (1, 1.0, {"CPU": 48.0, "GPU": 4.0}, 11),
        (1, 2.0, {"CPU": 96.0, "GPU": 8.0}, 23),
        (1, 0.75, {"CPU": 8.0, "GPU": 1.0}, 5),
        (16, 1.0, {"CPU": 48.0, "GPU": 4.0}, 15),
        (4, 0.0, {}, 3),
        (1, 0.0, {}, 0),
        (1, 1.0, {"GPU": 4.0}, 0),
    ],
)
def test_the_processes_that_read_are_a_workers_cores_but_one(threads, gpus, node, workers):
    assert DataSource().fed(threads, gpus, node).workers == workers
    assert DataSource(workers=0).fed(threads, gpus, node).workers == 0
    assert options("--data", ".").source().workers is None


def test_a_subset_of_files_keeps_images_labels_and_ids_together(root):
    source = DataSource(root=root)
    data = load_data(scale_of("folder", source, image_size=32), source)
    subset = data.train.subset(10, seed=0)
    where = data.train.ids.index(subset.ids[7])
    assert torch.equal(subset.images[7:8], data.train.images[where : where + 1])
    assert subset.labels[7] == data.train.labels[where]


def test_a_folders_scale_is_rebuilt_from_its_name_and_follows_its_images(tmp_path):
    root = write_folder(tmp_path)
    scale = scale_of("folder", DataSource(root=root), image_size=32)
    assert scale.name.startswith("folder-32px-12classes-72train-")
    assert scale_named(scale.name) == scale
    assert (scale.num_classes, scale.image_size, scale.patch_size) == (12, 32, 4)
    write_picture(root / "val" / "class-03", 9, 3, side=40)
    assert scale_of("folder", DataSource(root=root), image_size=32).name != scale.name


def test_large_folders_keep_the_studys_batches_and_small_ones_have_sixteen_steps():
    large = scale_for(
        folder_data_set(image_size=224, num_classes=3, train_images=10**6, content="0" * 8)
    )
    assert large.batch_size == {}
    assert (large.stem, large.patch_size) == (IMAGENET.stem, IMAGENET.patch_size)
    small = scale_for(
        folder_data_set(image_size=64, num_classes=3, train_images=600, content="0" * 8)
    )
    assert small.batch_size["cnn"] == 32
    assert small.learning_rate["cnn", "sgd"] == pytest.approx(0.1 * 32 / 256)
    assert small.learning_rate["transformer", "adamw"] == pytest.approx(2e-3 * (32 / 2048) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 33}, "an image size of 33 is not a multiple of 4 from 16 to 1024"),
        ({"image_size": 8}, "an image size of 8"),
        ({"num_classes": 1}, "at least two classes"),
    ],
)
def test_folder_scales_that_cannot_be_are_refused(changes, message):
    wanted = {"image_size": 32, "num_classes": 2, "train_images": 9, "content": "0" * 8}
    with pytest.raises(ValueError, match=message):
        folder_data_set(**(wanted | changes))


def test_held_out_images_are_a_share_of_each_class_chosen_by_name(tmp_path):
    root = write_folder(tmp_path, per_class=5, held_out=0)
    with pytest.raises(ValueError, match=r"no val/.* --hold-out 0\.2, which judges by"):
        list_splits(DataSource(root=root))
    train, held_out = list_splits(DataSource(root=root, hold_out=0.4))
    assert sorted(held_out.labels) == sorted([*range(CLASSES)] * 2)
    assert len(train) == 36
    assert not set(train.paths) & set(held_out.paths)
    assert (train, held_out) == list_splits(DataSource(root=root, hold_out=0.4))
    bare = list_splits(DataSource(root=root / "train", hold_out=0.2))
    assert [len(split) for split in bare] == [48, 12]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_hold_out_leaves_every_class_an_image_to_train_on(tmp_path, share):
    write_folder(tmp_path, per_class=2, held_out=0)
    (tmp_path / "train" / "class-03" / "picture 1.JPEG").unlink()
    (tmp_path / "train" / "class-99").mkdir()
    train, held_out = list_splits(DataSource(root=tmp_path, hold_out=share))
    assert [train.labels.count(label) for label in range(13)] == [1] * 12 + [0]
    assert [held_out.labels.count(label) for label in range(4)] == [1, 1, 1, 0]


def test_hold_out_beside_a_val_folder_is_refused(root):
    with pytest.raises(ValueError, match="--hold-out would put it aside"):
        list_splits(DataSource(root=root, hold_out=0.2))


def test_val_alone_can_be_judged_by_and_test_stands_for_an_absent_val(tmp_path):
    root = write_folder(tmp_path, per_class=0, held_out=2)
    train, held_out = list_splits(DataSource(root=root))
    assert (len(train), len(held_out)) == (0, 24)
    assert train.class_names == held_out.class_names
    shutil.copytree(root / "val", root / "test")
    assert list_splits(DataSource(root=root))[1].paths[0].startswith("val/class-00/")
    shutil.rmtree(root / "val")
    assert list_splits(DataSource(root=root))[1].paths[0].startswith("test/class-00/")


def foreign_class(root):
    write_picture(root / "val" / "class-99", 0, 3, side=40)
    return "'class-99', the class of val/class-99/.* is no class of the data"


def no_images(root):
    for path in (root / "val").rglob("*.*"):
        path.rename(path.with_suffix(".gif"))
    return r"val holds no image; expected <class>/<image>, whose name ends in \.jpg"


def nothing(root):
    for split in ("train", "val"):
        shutil.rmtree(root / split)
    return "data holds no class folders; expected <class>/<image>"


def absent(root):
    shutil.rmtree(root)
    return "is not there; --data wants train/ and val/"


@pytest.mark.parametrize("spoil", [foreign_class, no_images, nothing, absent])
def test_a_spoilt_folder_is_refused_with_what_to_do(tmp_path, spoil):
    message = spoil(write_folder(tmp_path / "data", per_class=1, held_out=1))
    with pytest.raises(ValueError, match=message):
        list_splits(DataSource(root=tmp_path / "data"))


def test_train_and_val_may_be_links_to_elsewhere(tmp_path):
    root = write_folder(tmp_path / "elsewhere", per_class=1, held_out=1)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(root / split)
    linked, there = (list_splits(DataSource(root=r)) for r in (tmp_path / "data", root))
    assert [split.paths for split in linked] == [split.paths for split in there]


def test_hidden_files_and_other_formats_are_no_images(tmp_path):
    write_folder(tmp_path, per_class=1, held_out=1)
    folder = tmp_path / "train" / "class-03"
    write_picture(folder / "more", 0, 3, side=40)
    for name in ("a.gif", ".DS_Store", "._a.png"):
        (folder / name).write_text("")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    train, _ = list_splits(DataSource(root=tmp_path))
    assert len(train) == len(train.class_names) == 12


# Stored sets.


def write(path, value=0, size=(SIDE, SIDE)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def stored(root, *, native=True):
    data = Data(
        data_set=folder_data_set(image_size=SIDE, num_classes=3, train_images=9, content="0" * 8),
        train=NOTHING,
        held_out=NOTHING,
        class_names=("n03", "n01", "n02"),
    )
    known = StoredSet("set", "Set", "natural", complete=False, native=native)
    return stored_split(known, root, data)


def test_labels_follow_the_class_names_and_not_the_folder_order(tmp_path):
    for value, name in enumerate(("n01", "n02", "n03")):
        write(tmp_path / name / "a.png", 10 * value)
    parts = list(stored(tmp_path).parts(batch_size=2))
    assert [part.labels.tolist() for part in parts] == [[0, 1], [2]]
    assert [part.ids for part in parts] == [("n03/a", "n01/a"), ("n02/a",)]
    assert torch.cat([part.images for part in parts])[:, 0, 0, 0].tolist() == [20, 0, 10]


def test_a_wrong_size_is_named_unless_images_are_resized_and_cut(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    write(tmp_path / "n01" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "n01" / "a.png")
    with pytest.raises(ValueError, match="40 x 20 px, not 16 x 16"):
        list(stored(tmp_path).parts(batch_size=1))
    image = stored(tmp_path, native=False).images[:][0, 0]
    assert (image[:, :7] == 0).all()
    assert (image[:, 9:] == 255).all()


def test_stored_sets_lie_below_the_data_or_where_an_option_says(tmp_path, capsys):
    (tmp_path / "data" / "imagenet-a").mkdir(parents=True)
    (tmp_path / "data" / "textures").mkdir()
    (tmp_path / "elsewhere").mkdir()
    words = ["--data", tmp_path / "data", "--stored", f"textures={tmp_path / 'elsewhere'}"]
    source = options(*words).source(cache=tmp_path / "cache")
    assert dict(source.folders) == {
        "imagenet-a": tmp_path / "data" / "imagenet-a",
        "textures": tmp_path / "elsewhere",
    }
    assert pickle.loads(pickle.dumps(source)) == source
    absent = f"cifar10.1={tmp_path / 'absent'}"
    assert f"--stored: {absent} is not a folder: NAME=DIR wants CIF" in refusal(
        capsys, "--stored", absent
    )
    assert "Did you mean 'textures'" in refusal(capsys, "--stored", "texture=DIR")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("folder", {}, "--scale folder needs --data DIR"),
        (None, {"labels": "labels.csv"}, "--labels labels.csv goes with --data DIR"),
        ("digits", {"hold_out": 0.2}, "--hold-out 0.2 goes with --data DIR"),
        ("digits", {"root": True}, "scale 'digits' is embedded"),
        ("mnist", {}, "unknown scale 'mnist'"),
        ("imagenet", {"download": True}, "--download fetches CIFAR-10"),
    ],
)
def test_options_that_do_not_go_together_are_refused(root, name, arguments, message):
    source = DataSource(
        root=root if arguments.get("root") else None,
        download="download" in arguments,
        labels=arguments.get("labels", ""),
        hold_out=arguments.get("hold_out", 0),
    )
    with pytest.raises(ValueError, match=message):
        scale_of(name, source)


def test_a_folder_is_the_scale_of_data_and_digits_that_of_none(root):
    assert scale_of(None, DataSource()) == DIGITS
    assert scale_of(None, DataSource(root=root)) == scale_of("folder", DataSource(root=root))


def test_a_folders_size_is_the_median_of_its_images_and_at_most_224(root, tmp_path):
    # Shorter sides of 40, 43, 46, 49, 40 and 43 in each class.
    assert scale_of("folder", DataSource(root=root)).image_size == 40
    source = DataSource(root=write_folder(tmp_path, per_class=1, held_out=1, side=300))
    assert scale_of("folder", source).image_size == 224
    assert scale_of("folder", source, image_size=64).name.startswith("folder-64px-")
    unusual = scale_of("folder", source, image_size=299)
    assert unusual.image_size == 299
    assert unusual.name.startswith("folder-224px-")


def test_the_line_of_images_says_how_they_are_shown_and_where_the_size_is_from(root):
    source = DataSource(root=root)
    line = options("--data", root).images_line(scale_of(None, source))
    assert (
        ": 40 px, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 224/256; " in line
    )
    assert line.endswith("the median of the shorter sides, at most 224 (--image-size N)")
    chosen = options("--data", root, "--image-size", "32", "--resize", "squash")
    scale = scale_of(None, source, image_size=32).preprocessed(chosen.preprocessing())
    assert ": 32 px, squash, bilinear, mean" in chosen.images_line(scale)
    assert "median" not in chosen.images_line(scale)
    assert "--crop and --resize do nothing" in options("--crop", "0.9").images_line(DIGITS)


def test_what_departs_from_the_entry_is_the_identity_of_a_preprocessing():
    chosen = Preprocessing(size=16, interpolation="bicubic")
    assert DIGITS.preprocessed(chosen).data_set.departure.chosen() == {"interpolation": "bicubic"}
    assert DIGITS.preprocessed(Preprocessing(size=16)) == DIGITS


def test_preprocessing_is_what_options_say_and_open_where_they_are_silent():
    assert options().preprocessing() == Preprocessing()
    words = "--image-size 64 --resize squash --interpolation bicubic --mean .5 --std .1,.2,.3"
    assert options(*words.split()).preprocessing().chosen() == {
        "size": 64,
        "squash": True,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.1, 0.2, 0.3),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mean .5 .5", "--mean: mean has 2 numbers, and the images 3 channels"),
        ("--std 0 1 1", "--std: std 0 1 1 is of other units"),
        ("--resize squsah", "Did you mean 'squash'?"),
        ("--interpolation cubic", "Did you mean 'bicubic'?"),
        ("--resize squash --crop 0.9", "--crop is a share that --resize crop cuts out"),
        ("--image-size 2", "--image-size: Input should be greater than or equal to 4"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(capsys, words, message):
    assert message in refusal(capsys, *words.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mean", "127"],
        ["--hold-out", "1.5"],
        ["--data-memory", "nan"],
        ["--data-workers", "x"],
        ["--stored", "x"],
    ],
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    assert f"error: {arguments[0]}: " in refusal(capsys, *arguments)
