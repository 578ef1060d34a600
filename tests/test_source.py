"""Where the images lie: listing, labels, held-out images, and what is refused with a remedy."""

from __future__ import annotations

import os
import pickle
import shutil
from typing import ClassVar

import pytest

from tests.pictures import CLASSES, write_folder, write_picture
from trainables.data.listing import (
    DataSource,
    list_splits,
    passed_over_text,
    scale_of,
    unused_test_folder,
)
from trainables.options import DataOptions
from trainables.scale import IMAGENET, folder_scale, scale_named


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


def test_images_are_listed_by_class_with_labels_of_the_sorted_names(root):
    train, held_out = list_splits(DataSource(root=root))
    assert train.class_names == tuple(f"class-{k:02d}" for k in range(CLASSES))
    assert (len(train), len(held_out)) == (CLASSES * 6, CLASSES * 2)
    for path, label in zip(train.paths, train.labels, strict=True):
        assert path.startswith(f"train/class-{label:02d}/picture ")
    assert not set(train.paths) & set(held_out.paths)


def test_a_folder_scale_is_rebuilt_from_its_name_alone(root):
    scale = scale_of("folder", DataSource(root=root), image_size=32)
    assert scale.name.startswith("folder-32px-12classes-72train-")
    assert scale_named(scale.name) == scale
    assert (scale.num_classes, scale.image_size, scale.patch_size) == (12, 32, 4)


def test_folders_with_other_images_have_other_scales(tmp_path):
    root = write_folder(tmp_path, per_class=2, held_out=1)
    before = scale_of("folder", DataSource(root=root), image_size=32)
    write_picture(root / "val" / "class-03", 9, 3, side=40)
    after = scale_of("folder", DataSource(root=root), image_size=32)
    assert before.name != after.name


def test_large_folders_keep_the_studys_batches_and_small_ones_have_sixteen_steps():
    large = folder_scale(image_size=224, num_classes=3, train_images=10**6, content="0" * 8)
    assert large.batch_size == {}
    assert (large.stem, large.patch_size) == (IMAGENET.stem, IMAGENET.patch_size)
    small = folder_scale(image_size=64, num_classes=3, train_images=600, content="0" * 8)
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
        folder_scale(**(wanted | changes))


def test_held_out_images_are_a_share_of_each_class_chosen_by_name(tmp_path):
    root = write_folder(tmp_path, per_class=5, held_out=0)
    with pytest.raises(ValueError, match=r"no val/.* --hold-out 0\.2, which keeps 12 of the 60"):
        list_splits(DataSource(root=root))
    train, held_out = list_splits(DataSource(root=root, hold_out=0.4))
    assert sorted(held_out.labels) == sorted([*range(CLASSES)] * 2)
    assert len(train) == 36
    assert not set(train.paths) & set(held_out.paths)
    assert (train, held_out) == list_splits(DataSource(root=root, hold_out=0.4))


def test_class_folders_without_train_and_val_are_train_images(tmp_path):
    root = write_folder(tmp_path, per_class=5, held_out=0)
    train, held_out = list_splits(DataSource(root=root / "train", hold_out=0.2))
    assert (len(train), len(held_out)) == (48, 12)


def test_val_alone_can_be_judged_by(tmp_path):
    root = write_folder(tmp_path, per_class=0)
    train, held_out = list_splits(DataSource(root=root))
    assert (len(train), len(held_out)) == (0, 24)
    assert train.class_names == held_out.class_names


def test_images_in_test_are_held_out_where_there_is_no_val(tmp_path):
    root = write_folder(tmp_path, per_class=1, held_out=2)
    (root / "val").rename(root / "test")
    train, held_out = list_splits(DataSource(root=root))
    assert (len(train), len(held_out)) == (CLASSES, CLASSES * 2)
    assert held_out.paths[0].startswith("test/class-00/")
    assert not unused_test_folder(root)


def test_val_is_taken_and_said_where_there_is_test_as_well(tmp_path):
    root = write_folder(tmp_path, per_class=1, held_out=2)
    shutil.copytree(root / "train", root / "test")
    _, held_out = list_splits(DataSource(root=root))
    assert all(path.startswith("val/") for path in held_out.paths)
    assert len(held_out) == CLASSES * 2
    assert unused_test_folder(root) == f"{root}/test is not used: {root}/val is judged by"


def two_spellings(root):
    write_picture(root / "train" / "Class-03", 0, 3, side=40)
    return "two classes of the same name, 'Class-03' and 'class-03': rename or merge one"


def loop_to_itself(root):
    (root / "train" / "again").symlink_to(root / "train" / "again")
    return "train/again is a symbolic link loop: remove it"


def loop_upwards(root):
    (root / "train" / "up").symlink_to(root)
    return "train/up is a symbolic link loop"


def val_is_a_loop(root):
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "val")
    return "val is a symbolic link loop: remove it"


def train_leads_upwards(root):
    shutil.rmtree(root / "train")
    (root / "train").symlink_to(root)
    return "train is a symbolic link loop: remove it"


def val_leads_to_nothing(root):
    shutil.rmtree(root / "val")
    (root / "val").symlink_to(root / "nowhere")
    return "val is a symbolic link to nothing: remove it"


def link_to_nothing(root):
    (root / "val" / "gone").symlink_to(root / "nowhere")
    return "val/gone is a symbolic link to nothing"


def foreign_class(root):
    write_picture(root / "val" / "class-99", 0, 3, side=40)
    return "val/class-99 is no class of"


def no_images(root):
    for path in (root / "val").rglob("*.*"):
        if path.is_file():
            path.unlink()
    return "val holds no image in its classes; expected <class>/<image>$"


def no_images_of_a_known_kind(root):
    for path in (root / "val").rglob("*.*"):
        path.rename(path.with_suffix(".gif"))
    (root / "val" / "class-00" / "more").mkdir()
    return (
        "val holds no image in its classes; expected <class>/<image>; 13 files or folders are "
        r"passed over, the first .*val/class-00/more: images lie right below their class and "
        r"end in \.jpg, \.jpeg, \.png"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        two_spellings,
        loop_to_itself,
        loop_upwards,
        link_to_nothing,
        val_is_a_loop,
        train_leads_upwards,
        val_leads_to_nothing,
        foreign_class,
        no_images,
        no_images_of_a_known_kind,
    ],
)
def test_a_spoilt_folder_is_refused_with_what_to_do(tmp_path, spoil):
    message = spoil(write_folder(tmp_path, per_class=1, held_out=1))
    with pytest.raises(ValueError, match=message):
        list_splits(DataSource(root=tmp_path))


def test_train_and_val_may_be_links_to_elsewhere(tmp_path):
    root = write_folder(tmp_path / "elsewhere", per_class=1, held_out=1)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(root / split)
    linked, there = (list_splits(DataSource(root=r)) for r in (tmp_path / "data", root))
    assert [split.paths for split in linked] == [split.paths for split in there]


def test_what_is_passed_over_is_listed_and_what_is_hidden_is_not(tmp_path):
    write_folder(tmp_path, per_class=5, held_out=0)
    folder = tmp_path / "train" / "class-03"
    (folder / "more").mkdir()
    write_picture(folder / "more", 0, 3, side=40)
    for name in ("b.jfif", "a.gif", ".DS_Store", os.fsdecode(b"\xff.txt")):
        (folder / name).write_text("")
    for name in ("stray.PNG", ".hidden.png", "classes.txt"):
        (folder.parent / name).write_text("")
    train, held_out = list_splits(DataSource(root=tmp_path, hold_out=0.2))
    assert (len(train), len(held_out)) == (48, 12)
    names = ("a.gif", "b.jfif", "more", os.fsdecode(b"\xff.txt"))
    expected = ("train/stray.PNG", *(f"train/class-03/{name}" for name in names))
    assert train.passed_over == held_out.passed_over == expected
    assert passed_over_text(tmp_path, expected[4:]).isprintable()


def test_an_absent_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not there; --data wants train/ and val/"):
        list_splits(DataSource(root=tmp_path / "absent"))
    with pytest.raises(ValueError, match="holds neither train/ nor val/"):
        list_splits(DataSource(root=tmp_path))


def test_a_folder_that_the_system_will_not_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        list_splits(DataSource(root=tmp_path / ("a" * 300)))
    with pytest.raises(ValueError, match="is not a folder: it wants"):
        options("--stored", f"textures={tmp_path / ('a' * 300)}").source()


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
    with pytest.raises(ValueError, match=r"cifar10\.1=.*absent is not a folder: it wants CIFAR"):
        options("--stored", f"cifar10.1={tmp_path / 'absent'}").source()
    assert "Did you mean 'textures'" in refusal(capsys, "--stored", "texture=DIR")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("folder", {}, "--scale folder needs --data DIR and --image-size N"),
        ("imagenet", {"image_size": 64}, "--image-size belongs to --scale folder"),
        ("digits", {"root": True}, "scale 'digits' is embedded"),
        ("mnist", {}, "unknown scale 'mnist'"),
        ("imagenet", {"download": True}, "--download fetches CIFAR-10"),
    ],
)
def test_options_that_do_not_go_together_are_refused(root, name, arguments, message):
    source = DataSource(
        root=root if arguments.get("root") else None, download="download" in arguments
    )
    with pytest.raises(ValueError, match=message):
        scale_of(name, source, image_size=arguments.get("image_size"))


@pytest.mark.parametrize(
    "arguments",
    [["--hold-out", "1.5"], ["--data-memory", "nan"], ["--data-workers", "x"], ["--stored", "x"]],
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    assert f"error: {arguments[0]}: " in refusal(capsys, *arguments)
