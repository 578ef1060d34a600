"""The check: what it finds on folders that are sound, and on folders that are not."""

from __future__ import annotations

import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image
from rich.console import Console

from evaluators.textures import LAYOUT
from grid import check as module
from grid.check import check
from grid.plan import build_plan
from grid.run import main
from grid.study import Study
from tests.paper import resnet50
from tests.pictures import write_folder, write_picture
from trainables.data.images import ImageFiles, keep_decoded
from trainables.data.listing import DataSource, scale_of
from trainables.data.registry import KINDS
from trainables.data.scan import Scan
from trainables.scale import CIFAR10, DIGITS, IMAGENET

CIFAR_CLASSES = CIFAR10.data_set.classes


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "data", per_class=2, held_out=1)


def look(root, tmp_path, *, scale=None, **options):
    source = DataSource(root=root, **options)
    scale = scale or scale_of("folder", source, image_size=32)
    plan = build_plan(Study(name="one", base=resnet50()), scale)
    return check(scale, source, plan, results=tmp_path / "results")


def damage(path):
    path.write_bytes(path.read_bytes()[:-300])
    return path


def test_a_sound_folder_is_found_sound_and_named_by_a_manifest(root, tmp_path):
    found = look(root, tmp_path)
    assert found.problem == ""
    assert found.warnings == []
    texts = [f.text for f in found.findings]
    assert "12 classes, 24 to train, 12 held out" in texts
    assert any("kept in memory" in text for text in texts)
    assert {f.subject for f in found.findings} == {"images", "disk", "device"}
    assert len(found.manifest) == 12
    console = Console(record=True, width=100)
    found.print(console)
    assert found.manifest in console.export_text()


def test_the_manifest_follows_the_files(root, tmp_path):
    before = look(root, tmp_path).manifest
    assert look(root, tmp_path).manifest == before
    write_picture(root / "train" / "class-00", 1, 5, side=60)
    assert look(root, tmp_path).manifest != before


def test_a_file_of_any_set_changes_the_manifest_and_another_place_does_not(root, tmp_path):
    scale = scale_of("folder", DataSource(root=root), image_size=32)
    write_stored(root, "imagenet-a", (0, 3))
    write_stored(root, "imagenet-stylized/val", range(12))
    for kind in KINDS:
        for severity in range(1, 6):
            write_stored(root, f"imagenet-c/{kind}/{severity}", range(12))
    textures = [LAYOUT.format(label=k, cluster=c) for k in (0, 1) for c in range(50)]
    for path in [root / "textures" / name for name in textures]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a texture")
    assert look(root, tmp_path, scale=scale).problem == ""
    found = [look(root, tmp_path, scale=scale).manifest]
    for name in (
        "val/class-00/picture 0.JPEG",
        "imagenet-a/class-03/a.png",
        "imagenet-c/gaussian_noise/1/class-00/a.png",
        "imagenet-c/jpeg_compression/1/class-00/a.png",
        "imagenet-stylized/val/class-05/a.png",
    ):
        Image.effect_noise((32, 32), 50).convert("RGB").save(root / name)
        found.append(look(root, tmp_path, scale=scale).manifest)
    (root / "textures" / textures[1]).write_text("another")
    found.append(look(root, tmp_path, scale=scale).manifest)
    assert len(set(found)) == len(found)
    moved = root.rename(tmp_path / "elsewhere")
    assert look(moved, tmp_path, scale=scale).manifest == found[-1]


def test_every_damaged_image_is_counted_and_the_first_is_named_with_its_class(root, tmp_path):
    damage(root / "train" / "class-05" / "picture 0.JPEG")
    (root / "val" / "class-07" / "picture 0.JPEG").write_text("no image")
    found = look(root, tmp_path)
    assert "2 unreadable images in 2 classes, the first" in found.problem
    assert "picture 0.JPEG (class class-05): replace or remove them" in found.problem


def test_a_scan_opens_only_what_has_changed(root, tmp_path, monkeypatch):
    opened = []
    real = Image.open
    look(root, tmp_path)

    def counted(path, **options):
        opened.append(Path(path).name)
        return real(path, **options)

    monkeypatch.setattr("trainables.data.images.Image.open", counted)
    look(root, tmp_path)
    assert opened == []
    write_picture(root / "train" / "class-00", 1, 5, side=60)
    look(root, tmp_path)
    assert opened == ["picture 1.JPEG"]


def test_what_the_system_refused_is_tried_again_by_the_next_scan(root, tmp_path):
    kept, paths = tmp_path / "scan.parquet", ["train/class-00/picture 0.JPEG"]
    scan = Scan(kept)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, old[1]))
    try:
        (refused,) = scan.open(root, paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert "Too many open files" in refused.problem
    scan.save()
    (opened,) = Scan(kept).open(root, paths)
    assert (opened.problem, opened.width, opened.height) == ("", 47, 40)
    assert (opened.bytes, opened.changed_ns) == (refused.bytes, refused.changed_ns)


def test_a_scan_file_that_is_damaged_is_made_anew(root, tmp_path):
    look(root, tmp_path)
    kept = tmp_path / "results" / module.SCAN_FILE
    kept.write_bytes(b"nothing")
    assert look(root, tmp_path).problem == ""
    assert len(Scan(kept)._sound) == 36


def test_images_smaller_than_the_crop_are_named(root, tmp_path):
    Image.new("RGB", (20, 50)).save(root / "train" / "class-02" / "tiny.png")
    problem = look(root, tmp_path).problem
    assert "1 images are smaller than 32 px, the first" in problem
    assert "tiny.png (20 x 50): give a smaller --image-size" in problem


def test_a_class_without_held_out_images_is_a_warning(root, tmp_path):
    shutil.rmtree(root / "val" / "class-04")
    (warning,) = look(root, tmp_path).warnings
    assert warning == "1 classes have no held-out images; first: ['class-04']"


def test_classes_without_a_train_image_are_an_error_that_names_them(root, tmp_path):
    for path in (root / "train" / "class-04").iterdir():
        path.unlink()
    problem = look(root, tmp_path).problem
    assert problem.startswith("1 classes have no image to train on; first: ['class-04']: add")


def test_images_read_from_files_by_one_process_are_a_warning(root, tmp_path):
    (warning,) = look(root, tmp_path, memory_bytes=1000).warnings
    assert warning.endswith("from files, by one process of each trial: give --data-workers N")
    assert look(root, tmp_path, memory_bytes=1000, workers=2).warnings == []


def test_folders_that_are_no_imagenet_are_told_so(root, tmp_path):
    problem = look(root, tmp_path, scale=IMAGENET).problem
    assert "is not ImageNet: it lacks 1000 of 1000 classes, the first 'n01440764', and" in problem
    assert "12 foreign ones, the first 'class-00'; --scale folder --image-size 224 takes" in problem


def write_imagenet(root):
    """Write ImageNet's and ImageNet-A's classes, one image in each."""
    root.mkdir()
    Image.new("RGB", (224, 224)).save(root / "one.jpg")
    synsets = Path(timm.data.__file__).with_name("_info") / "imagenet_a_synsets.txt"
    names = timm.data.ImageNetInfo().label_names()
    sets = {"train": names, "val": names, "imagenet-a": synsets.read_text().split()}
    for name, classes in sets.items():
        for folder in [root / name / known for known in classes]:
            folder.mkdir(parents=True)
            os.link(root / "one.jpg", folder / "a.jpg")
    return root


def test_imagenet_has_its_own_thousand_classes_and_imagenet_a_its_two_hundred(tmp_path):
    root = write_imagenet(tmp_path / "data")
    found = look(root, tmp_path, scale=IMAGENET)
    assert found.problem == ""
    assert "1,000 and 1,000 images; as published 1,281,167 and 50,000" in found.warnings
    assert "200 images of 200 classes (as published: 7,500)" in found.warnings
    natural = root / "imagenet-a"
    (natural / "n01498041").rename(natural / "n01440764")
    said = "is not ImageNet-A: it lacks 1 of 200 classes, the first 'n01498041', and has 1 foreign"
    assert said in look(root, tmp_path, scale=IMAGENET).problem
    for split in ("train", "val"):
        (root / split / "n01443537").rename(root / split / "n00000001")
    problem = look(root, tmp_path, scale=IMAGENET).problem
    assert "is not ImageNet: it lacks 1 of 1000 classes, the first 'n01443537', and has" in problem
    assert "1 foreign ones, the first 'n00000001'; --scale folder" in problem


def write_stored(root, name, classes, *, side=32):
    for label in classes:
        folder = root / name / f"class-{label:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (side, side)).save(folder / "a.png")


def write_arrays(root):
    for name in ("cifar10-c", "cifar10.1"):
        (root / name).mkdir()
    for kind in KINDS:
        np.save(root / "cifar10-c" / f"{kind}.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(root / "cifar10-c" / "labels.npy", np.array([3, 5] * 5))
    np.save(root / "cifar10.1" / "cifar10.1_v6_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(root / "cifar10.1" / "cifar10.1_v6_labels.npy", np.array([0, 9, 1]))


def test_what_is_passed_over_is_a_warning_for_each_split_and_stored_set(root, tmp_path):
    write_stored(root, "imagenet-a", (0, 3))
    write_stored(root, "imagenet-stylized/val", range(12))
    for kind in KINDS:
        for severity in range(1, 6):
            write_stored(root, f"imagenet-c/{kind}/{severity}", range(12))
    assert look(root, tmp_path).warnings == []
    folders = (
        "train/class-01",
        "val/class-02",
        "imagenet-a/class-03",
        "imagenet-c/fog/2/class-04",
        "imagenet-stylized/val/class-05",
    )
    for folder in folders:
        (root / folder / "a.jfif").write_text("")
        (root / folder / "more").mkdir()
    warnings = look(root, tmp_path).warnings
    for folder, warning in zip(folders, warnings, strict=True):
        first = f"the first {root / folder / 'a.jfif'}: images lie right below their "
        assert warning.startswith(f"2 files or folders are passed over, {first}")


def test_what_is_passed_over_is_said_once_where_a_share_is_held_out(root, tmp_path):
    (root / "train" / "class-01" / "a.gif").write_text("")
    found = look(root / "train", tmp_path, hold_out=0.5)
    assert [w.partition(",")[0] for w in found.warnings] == ["1 files or folders are passed over"]


def test_stored_sets_are_looked_at(root, tmp_path):
    write_stored(root, "imagenet-a", (0, 3))
    write_stored(root, "imagenet-stylized/val", range(12))
    texts = {f.subject: f.text for f in look(root, tmp_path).findings}
    assert texts["imagenet-a"].startswith("2 images of 2 classes")
    assert texts["imagenet-stylized"].startswith("12 images")


@pytest.mark.parametrize(
    ("name", "classes", "side", "message"),
    [
        ("imagenet-a", (0, 99), 32, "class-99 is no class of the data: remove it"),
        ("imagenet-stylized/val", range(11), 32, "lacks 1 classes; first: ['class-11']"),
        ("imagenet-stylized/val", range(12), 30, "12 images are not 32 px, the first"),
        ("imagenet-c/fog/1", range(12), 32, "imagenet-c lacks 74 of 75: gaussian_noise/1, "),
    ],
)
def test_what_is_wrong_with_a_stored_set_is_named(root, tmp_path, name, classes, side, message):
    write_stored(root, name, classes, side=side)
    assert message in look(root, tmp_path).problem


def test_a_stored_dictionary_without_textures_is_an_error(root, tmp_path):
    (root / "textures").mkdir()
    assert "holds textures of 0 classes; first: attention-style" in look(root, tmp_path).problem


def test_cifar_sets_are_looked_at(tmp_path):
    root = write_cifar_classes(tmp_path / "data")
    (root / "cifar10-c").mkdir()
    assert "lacks 15 of 15: gaussian_noise.npy" in look(root, tmp_path, scale=CIFAR10).problem
    shutil.rmtree(root / "cifar10-c")
    write_arrays(root)
    sound = look(root, tmp_path, scale=CIFAR10)
    assert sound.problem == ""
    texts = {f.subject: f.text for f in sound.findings}
    assert texts["cifar10.1"] == "3 images (as published: 2,000)"
    assert texts["cifar10-c"].startswith("2 images of each kind and severity")
    manifests = [sound.manifest]
    for name in ("cifar10-c/fog.npy", "cifar10.1/cifar10.1_v6_data.npy"):
        array = np.load(root / name)
        array[-1] = 1
        np.save(root / name, array)
        manifests.append(look(root, tmp_path, scale=CIFAR10).manifest)
    assert len(set(manifests)) == 3
    fog = root / "cifar10-c" / "fog.npy"
    fog.write_bytes(fog.read_bytes()[:-1])
    assert "fog.npy cannot be read" in look(root, tmp_path, scale=CIFAR10).problem
    shutil.rmtree(root / "cifar10-c")
    np.save(root / "cifar10.1" / "cifar10.1_v6_labels.npy", np.array([0, 9, 10]))
    problem = look(root, tmp_path, scale=CIFAR10).problem
    assert "does not hold 3 labels from 0 to 9" in problem


def test_a_full_disk_is_an_error_with_a_remedy(root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1, 1, 2**20))
    assert "make room, or give --results a folder on another disk" in look(root, tmp_path).problem


def test_a_read_only_disk_is_an_error_with_a_remedy(root, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert "is read-only: give --results another folder" in look(root, tmp_path).problem


def test_a_disk_that_fills_while_images_are_decoded_is_named(root, tmp_path):
    files = ImageFiles(root, ["train/class-00/picture 0.JPEG"], size=32)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(ValueError, match=r"decoded images cannot be kept in .*--data-memory 0"):
            keep_decoded(files, tmp_path / "cache", 2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list((tmp_path / "cache").glob("*u8*"))


def test_without_data_the_machine_is_looked_at(tmp_path):
    plan = build_plan(Study(name="one", base=resnet50()), DIGITS)
    found = check(DIGITS, DataSource(), plan, results=tmp_path)
    assert [f.subject for f in found.findings] == ["disk", "device"]
    assert found.manifest == ""


def test_check_prints_the_findings_and_stops(root, tmp_path, capsys):
    arguments = ["--scale", "folder", "--data", str(root), "--image-size", "32", "--check"]
    arguments += ["--results", str(tmp_path / "r"), "--tables", "T6"]
    assert main(arguments) == 0
    assert "12 classes, 24 to train" in capsys.readouterr().out
    damage(root / "train" / "class-05" / "picture 0.JPEG")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "error" in printed.out
    assert "grid/run.py: 1 unreadable images in 1 classes, the first " in printed.err
    assert not (tmp_path / "r" / "mlflow.db").exists()


def test_a_cifar_archive_that_is_not_the_published_one_is_an_error(tmp_path):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    assert (
        "is not CIFAR-10 as published" in look(tmp_path / "data", tmp_path, scale=CIFAR10).problem
    )


def write_cifar_classes(root, *, names=CIFAR_CLASSES, side=32):
    for folder in [root / split / name for split in ("train", "val") for name in names]:
        folder.mkdir(parents=True)
        Image.new("RGB", (side, side)).save(folder / "a.png")
    return root


def test_cifar_10_as_class_folders_has_its_classes_and_size(tmp_path):
    sound = write_cifar_classes(tmp_path / "sound")
    assert look(sound, tmp_path, scale=CIFAR10).problem == ""
    other = write_cifar_classes(tmp_path / "other", names=[*CIFAR_CLASSES[:9], "van"])
    problem = look(other, tmp_path, scale=CIFAR10).problem
    assert "is not CIFAR-10: it lacks 1 of 10 classes, the first 'truck', and has 1" in problem
    bare = look(sound / "train", tmp_path, scale=CIFAR10, hold_out=0.5)
    assert "holds neither torchvision's archive of CIFAR-10 nor" in bare.problem


@pytest.mark.parametrize("side", [24, 40])
def test_cifar_10_of_another_size_is_offered_the_scale_of_folders(tmp_path, side):
    root = write_cifar_classes(tmp_path / "data", side=side)
    problem = look(root, tmp_path, scale=CIFAR10).problem
    assert problem.startswith("20 images are not 32 x 32 px, the first")
    assert f"({side} x {side}): --scale folder --image-size N takes images of N px" in problem


def test_a_test_folder_beside_val_is_a_warning(root, tmp_path):
    shutil.copytree(root / "train", root / "test")
    (warning,) = look(root, tmp_path).warnings
    assert warning == f"{root / 'test'} is not used: {root / 'val'} is judged by"
