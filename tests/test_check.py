"""The check: what it finds on folders that are sound, and on folders that are not."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from evaluators.textures import LAYOUT
from grid import check as module
from grid.check import check
from grid.plan import Plan, build_plan
from grid.run import main
from grid.study import Study
from tests.paper import STUDY, resnet50
from tests.pictures import write_folder, write_picture
from tests.test_cifar import CLASSES, write_arrays, write_classes
from trainables.data.listing import DataSource, scale_of
from trainables.data.registry import KINDS
from trainables.scale import CIFAR10, DIGITS, IMAGENET


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "data", per_class=2, held_out=1)


def look(root, tmp_path, *, scale=None, **options):
    """Return the findings as (subject, level, text), and the manifest."""
    source = DataSource(root=root, **options)
    scale = scale or scale_of("folder", source, image_size=32)
    plan = build_plan(Study(name="one", base=resnet50()), scale)
    return check(scale, source, plan, results=tmp_path / "results")


def problem(*args, **options):
    """Return the first error, '' where there is none."""
    return next((text for _, level, text in look(*args, **options)[0] if level == "error"), "")


def warnings(*args, **options):
    return [text for _, level, text in look(*args, **options)[0] if level == "warning"]


def texts(*args, **options):
    return {subject: text for subject, _, text in reversed(look(*args, **options)[0])}


def damage(path):
    path.write_bytes(path.read_bytes()[:-300])


def write_stored(root, name, classes, *, side=32):
    for label in classes:
        folder = root / name / f"class-{label:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (side, side)).save(folder / "a.png")


def test_a_sound_folder_is_found_sound(root, tmp_path):
    findings, manifest = look(root, tmp_path)
    assert {level for _, level, _ in findings} == {"ok"}
    assert [subject for subject, *_ in findings] == ["images", "disk", "device"]
    assert findings[0][2] == "12 classes, 24 to train, 12 held out"
    assert len(manifest) == 12


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
    findings, manifest = look(root, tmp_path, scale=scale)
    assert {level for _, level, _ in findings} == {"ok"}
    subjects = {subject: text for subject, _, text in findings}
    assert subjects["imagenet-a"].startswith("2 images of 2 classes")
    assert subjects["imagenet-c"].startswith("12 images of 12 classes")
    manifests = [manifest]
    for name in (
        "val/class-00/picture 0.JPEG",
        "imagenet-a/class-03/a.png",
        "imagenet-c/gaussian_noise/1/class-00/a.png",
        "imagenet-c/jpeg_compression/1/class-00/a.png",
        "imagenet-stylized/val/class-05/a.png",
    ):
        Image.effect_noise((32, 32), 50).convert("RGB").save(root / name)
        manifests.append(look(root, tmp_path, scale=scale)[1])
    (root / "textures" / textures[1]).write_text("another")
    manifests.append(look(root, tmp_path, scale=scale)[1])
    assert len(set(manifests)) == len(manifests)
    moved = root.rename(tmp_path / "elsewhere")
    assert look(moved, tmp_path, scale=scale)[1] == manifests[-1]


def test_every_damaged_image_is_listed_and_the_first_is_named_with_its_class(root, tmp_path):
    damaged = root / "train/class-05/picture 0.JPEG", root / "train/class-07/picture 1.JPEG"
    for path in damaged:
        damage(path)
    said = problem(root, tmp_path)
    assert said.startswith(f"2 unreadable images in 2 classes, the first {damaged[0]} (class ")
    listed = tmp_path / "results" / module.DAMAGED_FILE
    assert said.endswith(f"(class class-05): replace or remove those in {listed}")
    assert listed.read_text().splitlines() == list(map(str, damaged))


def test_only_lists_with_a_changed_image_are_opened_again(root, tmp_path, monkeypatch):
    opened = []
    real = module.size_or_problem
    monkeypatch.setattr(module, "size_or_problem", lambda path: opened.append(path) or real(path))
    findings = look(root, tmp_path)
    assert len(opened) == 36
    assert look(root, tmp_path) == findings
    assert len(opened) == 36
    write_picture(root / "val" / "class-00", 0, 5, side=60)
    look(root, tmp_path)
    assert len(opened) == 36 + 12
    (tmp_path / "results" / module.SOUND_FILE).write_bytes(b"nothing")
    look(root, tmp_path)
    assert len(opened) == 2 * 36 + 12


def test_images_smaller_than_the_crop_are_said_and_enlarged(root, tmp_path):
    Image.new("RGB", (20, 50)).save(root / "train" / "class-02" / "tiny.png")
    (said,) = warnings(root, tmp_path)
    assert "1 images are smaller than 32 px, the first" in said
    assert said.endswith("tiny.png (20 x 50): they are enlarged")


def test_classes_without_an_image_are_named(root, tmp_path):
    shutil.rmtree(root / "val" / "class-04")
    (warning,) = warnings(root, tmp_path)
    assert warning == "1 classes (the first: class-04) have no held-out images"
    for path in (root / "train" / "class-04").iterdir():
        path.unlink()
    said = problem(root, tmp_path)
    assert said.startswith("1 classes (the first: class-04) have no image to train on: add images")


def test_classes_that_lack_stop_a_training_and_are_said_where_nothing_is_trained(tmp_path):
    root = tmp_path / "some"
    write_classes(root, names=CLASSES[:2])
    assert "is not CIFAR-10: it lacks 8 of 10 classes" in problem(root, tmp_path, scale=CIFAR10)
    nothing = Plan(trials=())
    findings, _ = check(CIFAR10, DataSource(root=root), nothing, results=tmp_path / "results")
    levels = {text: level for _, level, text in findings}
    assert "error" not in levels.values()
    assert [levels[text] for text in levels if "lacks 8 of 10 classes" in text] == ["warning"]


def test_images_read_from_files_by_one_process_are_a_warning(root, tmp_path):
    (warning,) = warnings(root, tmp_path, memory_bytes=1000, workers=0)
    assert warning.endswith("reads them from files by one process; give --data-workers N")
    for workers in (2, None):
        assert warnings(root, tmp_path, memory_bytes=1000, workers=workers) == []


def test_imagenet_has_its_own_thousand_classes_and_imagenet_a_its_two_hundred(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    Image.new("RGB", (224, 224)).save(root / "one.jpg")
    synsets = Path(timm.data.__file__).with_name("_info") / "imagenet_a_synsets.txt"
    names = timm.data.ImageNetInfo().label_names()
    sets = {"train": names, "val": names, "imagenet-a": synsets.read_text().split()}
    for name, classes in sets.items():
        for folder in [root / name / known for known in classes]:
            folder.mkdir(parents=True)
            os.link(root / "one.jpg", folder / "a.jpg")
    assert problem(root, tmp_path, scale=IMAGENET) == ""
    assert warnings(root, tmp_path, scale=IMAGENET) == [
        "1,000 to train, 1,000 held out; as published 1,281,167 and 50,000",
        "200 images of 200 classes (as published: 7,500)",
    ]
    plan = build_plan(STUDY, IMAGENET, tables=["T5"])
    findings, _ = check(IMAGENET, DataSource(root=root), plan, results=tmp_path / "results")
    warned = {subject: text for subject, level, text in findings if level == "warning"}
    said = "ImageNet-C is not there: corruptions is judged on generated images; --stored"
    assert warned["imagenet-c"].startswith(said)
    assert "imagenet-stylized" in warned
    assert "textures" not in warned
    natural = root / "imagenet-a"
    (natural / "n01498041").rename(natural / "n01440764")
    said = "is not ImageNet-A: it lacks 1 of 200 classes, the first 'n01498041', and has 1 foreign"
    assert said in problem(root, tmp_path, scale=IMAGENET)
    for split in ("train", "val"):
        (root / split / "n01443537").rename(root / split / "n00000001")
    said = problem(root, tmp_path, scale=IMAGENET)
    assert "is not ImageNet: it lacks 1 of 1000 classes, the first 'n01443537', and has" in said
    assert "1 foreign ones, the first 'n00000001'; --scale folder takes any classes" in said


@pytest.mark.parametrize(
    ("name", "classes", "side", "message"),
    [
        ("imagenet-a", (0, 99), 32, "is no class of the data"),
        ("imagenet-stylized/val", range(11), 32, "lacks 1 classes; first: ['class-11']"),
        ("imagenet-stylized/val", range(12), 30, "12 images are not 32 x 32 px, the first"),
        ("imagenet-c/fog/1", range(12), 32, "imagenet-c lacks 74 of 75: gaussian_noise/1, "),
        ("textures", range(1), 32, "holds textures of 0 classes; first: attention-style"),
    ],
)
def test_what_is_wrong_with_a_stored_set_is_named(root, tmp_path, name, classes, side, message):
    write_stored(root, name, classes, side=side)
    assert message in problem(root, tmp_path)


def test_cifar_sets_are_looked_at(tmp_path):
    root = tmp_path / "data"
    write_classes(root)
    write_arrays(root)
    assert problem(root, tmp_path, scale=CIFAR10) == ""
    sound = texts(root, tmp_path, scale=CIFAR10)
    assert sound["cifar10.1"] == "3 images of 2 classes (as published: 2,000)"
    assert sound["cifar10-c"] == "2 images of 2 classes (as published: 10,000)"
    manifests = [look(root, tmp_path, scale=CIFAR10)[1]]
    for name in ("cifar10-c/fog.npy", "cifar10.1/cifar10.1_v6_data.npy"):
        array = np.load(root / name)
        array[-1] = 1
        np.save(root / name, array)
        manifests.append(look(root, tmp_path, scale=CIFAR10)[1])
    assert len(set(manifests)) == 3
    fog = root / "cifar10-c" / "fog.npy"
    fog.write_bytes(fog.read_bytes()[:-1])
    assert "fog.npy cannot be read" in problem(root, tmp_path, scale=CIFAR10)
    fog.unlink()
    assert "lacks 1 of 15: fog.npy" in problem(root, tmp_path, scale=CIFAR10)


def test_cifar_10_has_its_own_classes_and_size(tmp_path):
    (tmp_path / "bare").mkdir()
    said = problem(tmp_path / "bare", tmp_path, scale=CIFAR10)
    assert "holds neither torchvision's archive of CIFAR-10 nor train/" in said
    write_classes(tmp_path / "other", names=[*CLASSES[:9], "van"])
    said = problem(tmp_path / "other", tmp_path, scale=CIFAR10)
    assert "is not CIFAR-10: it lacks 1 of 10 classes, the first 'truck', and has 1" in said
    write_classes(tmp_path / "large", side=40)
    said = problem(tmp_path / "large", tmp_path, scale=CIFAR10)
    assert said.startswith("30 images are not 32 x 32 px, the first")
    assert "(40 x 40): --scale folder takes images of any size" in said
    (tmp_path / "empty" / "cifar-10-batches-py").mkdir(parents=True)
    assert "is not CIFAR-10 as published" in problem(tmp_path / "empty", tmp_path, scale=CIFAR10)


def test_a_full_or_read_only_disk_is_an_error_with_a_remedy(root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1, 1, 2**20))
    assert "make room, or give --results a folder on another disk" in problem(root, tmp_path)
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert "is read-only: give --results another folder" in problem(root, tmp_path)


def test_without_data_the_machine_is_looked_at(tmp_path):
    plan = build_plan(Study(name="one", base=resnet50()), DIGITS)
    findings, manifest = check(DIGITS, DataSource(), plan, results=tmp_path)
    assert [subject for subject, *_ in findings] == ["disk", "device"]
    assert manifest == ""


def test_check_prints_the_findings_and_stops(root, tmp_path, capsys):
    arguments = ["--scale", "folder", "--data", str(root), "--image-size", "32", "--check"]
    arguments += ["--results", str(tmp_path / "r"), "--tables", "T6"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 classes, 24 to train" in printed
    assert look(root, tmp_path)[1] in printed
    damage(root / "train" / "class-05" / "picture 0.JPEG")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "error" in printed.out
    assert "grid/run.py: 1 unreadable images in 1 classes, the first " in printed.err
    assert not (tmp_path / "r" / "mlflow.db").exists()
