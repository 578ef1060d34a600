"""Layouts beside class folders: files of labels, tar shards, tables; the same images in each."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

from grid.check import check
from grid.plan import Plan
from trainables.data.listing import DataSource, list_splits, scale_of
from trainables.data.load import load_data
from trainables.data.packing import pack
from trainables.scale import CIFAR10, IMAGENET

SIDE = 32
CLASSES = ("cat", "dog", "emu")
# Of each split: an image's name, its class, its grey.
PICTURES = {
    "train": [(f"{k}{n}.png", CLASSES[k], 60 * k + n) for k in (2, 0, 1) for n in range(3)],
    "val": [(f"v{k}.png", CLASSES[k], 200 + k) for k in (1, 2, 0)],
}


def picture(grey):
    return Pictures.new("RGB", (SIDE, SIDE), (grey,) * 3)


def png(grey):
    content = io.BytesIO()
    picture(grey).save(content, "png")
    return content.getvalue()


def as_folders(root):
    for split, pictures in PICTURES.items():
        for name, label, grey in pictures:
            (root / split / label).mkdir(parents=True, exist_ok=True)
            picture(grey).save(root / split / label / name)


def as_flat(root, *, splits=True):
    rows = ["image,label"]
    for split, pictures in PICTURES.items():
        folder = root / split if splits else root
        folder.mkdir(parents=True, exist_ok=True)
        for name, label, grey in pictures:
            picture(grey).save(folder / name)
            rows.append(f"{name},{label}")
    return labels_file(root, rows)


def labels_file(root, rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text("\n".join(rows))
    return root / "labels.csv"


def as_shards(root, *, folders=False):
    root.mkdir(parents=True, exist_ok=True)
    for split, pictures in PICTURES.items():
        for number in range(2):
            with tarfile.open(root / f"{split}-{number:06d}.tar", "w") as shard:
                for name, label, grey in pictures[number::2]:
                    key = f"{label}/{name}" if folders else name
                    add(shard, key, png(grey))
                    if not folders:
                        add(shard, name.replace("png", "cls"), str(CLASSES.index(label)).encode())


def add(shard, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def as_tables(root, *, saved):
    kinds = Features(
        {"img": Image(), "label": ClassLabel(names=[*CLASSES]), "note": Value("string")}
    )
    tables = DatasetDict()
    for split, pictures in PICTURES.items():
        rows = {
            "img": [picture(grey) for *_, grey in pictures],
            "label": [label for _, label, _ in pictures],
            "note": ["odd" if grey % 2 else "even" for *_, grey in pictures],
        }
        tables[{"val": "validation"}.get(split, split)] = Dataset.from_dict(rows, features=kinds)
    if saved:
        tables.save_to_disk(root)
        return
    (root / "data").mkdir(parents=True)
    for split, table in tables.items():
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")


def as_packed(root):
    as_folders(root.with_name("folders"))
    pack(root.with_name("folders"), str(root), shard_bytes=1)


LAYOUTS = {
    "folders": as_folders,
    "packed folders": as_packed,
    "a folder a split": as_flat,
    "shards": as_shards,
    "shards of folders": lambda root: as_shards(root, folders=True),
    "saved tables": lambda root: as_tables(root, saved=True),
    "parquet": lambda root: as_tables(root, saved=False),
}


def source_of(root, layout, **options):
    return DataSource(root=root, labels=LAYOUTS[layout](root), **options)


def greys(split):
    """Return a split's classes by the grey of each image."""
    return dict(zip(split.images[:][:, 0, 0, 0].tolist(), split.labels.tolist(), strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_with_the_same_labels(tmp_path, layout, in_memory):
    cache = tmp_path / "cache" if in_memory else None
    source = source_of(tmp_path / "data", layout, cache=cache)
    data = load_data(scale_of(None, source), source)
    names = ("0", "1", "2") if layout == "shards" else CLASSES
    assert data.class_names == names
    assert data.train.images[:].shape == (9, 3, SIDE, SIDE)
    for split, pictures in ((data.train, PICTURES["train"]), (data.held_out, PICTURES["val"])):
        assert greys(split) == {grey: CLASSES.index(label) for _, label, grey in pictures}
        assert len(set(split.ids)) == len(split)
    places = torch.tensor([7, 2])
    assert torch.equal(data.train.images[places], data.train.images[:][places])
    assert torch.equal(data.train.at(np.array([7])).images[:], data.train.images[:][7:8])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layouts_name_follows_its_images_and_labels_and_not_its_place(tmp_path, layout):
    source = source_of(tmp_path / "data", layout)
    name = scale_of(None, source).name
    assert name.startswith("folder-32px-3classes-9train-")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = source.labels and tmp_path / "moved" / source.labels.name
    assert scale_of(None, DataSource(root=tmp_path / "moved", labels=moved)).name == name


@pytest.mark.parametrize(
    ("layout", "classes"),
    [("shards of folders", "emu emu cat emu cat cat"), ("saved tables", "emu emu emu cat cat cat")],
)
def test_relabelled_images_are_in_the_order_of_their_files(tmp_path, layout, classes):
    source = source_of(tmp_path / "data", layout)
    labels = labels_file(tmp_path, ["dog,a", "cat,b", "emu,b"])
    train, _ = list_splits(DataSource(root=source.root, labels=labels))
    assert train.labels == (0, 0, 0, 1, 1, 1, 1, 1, 1)
    assert [path.split("/")[-2] for path in train.paths[3:]] == classes.split()


@pytest.mark.parametrize(
    "layout", ["folders", "packed folders", "shards of folders", "saved tables"]
)
def test_a_map_of_classes_relabels_them_and_is_part_of_the_name(tmp_path, layout):
    source = source_of(tmp_path / "data", layout)
    rows = ["dog,n02084071", "cat,n02121620", "emu,n02121620"]
    mapped = DataSource(root=source.root, labels=labels_file(tmp_path, rows))
    data = load_data(scale_of(None, mapped), mapped)
    assert data.class_names == ("n02084071", "n02121620")
    assert sorted(data.train.labels.tolist()) == [0] * 3 + [1] * 6
    assert data.held_out.labels[list(greys(data.held_out)).index(201)] == 0
    other = labels_file(tmp_path / "other", [*rows[:2], "emu,n02084071"])
    names = {
        scale_of(None, s).name for s in (source, mapped, DataSource(root=source.root, labels=other))
    }
    assert len(names) == 3
    assert data.held_out.ids_hash() != load_data(scale_of(None, source), source).held_out.ids_hash()


def test_one_image_of_another_class_is_another_data_set_and_another_question(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / "val").mkdir(exist_ok=True)
        picture(7).save(tmp_path / "val" / name)
    names, questions = set(), set()
    for second in ("cat", "dog"):
        rows = ["a,cat", f"b,{second}", "c,dog", "d,dog"]
        labels = labels_file(tmp_path / second, rows)
        source = DataSource(root=tmp_path, labels=labels)
        scale = scale_of(None, source)
        names.add(scale.name)
        questions.add(load_data(scale, source).held_out.ids_hash())
    assert len(names) == len(questions) == 2


@pytest.mark.parametrize(
    "rows",
    [
        ["{name},{label}"],
        ["id,breed", "{stem},{label}"],
        ["filename\tlabel", "{name}\t{label}"],
        ["{name} {label}"],
        ["", "./{name};{label}"],
    ],
)
def test_a_file_of_labels_may_have_any_usual_form(tmp_path, rows):
    as_flat(tmp_path / "data", splits=False)
    *header, row = rows
    pictures = [p for pictures in PICTURES.values() for p in pictures]
    lines = [row.format(name=n, stem=n[:-4], label=label) for n, label, _ in pictures]
    labels = labels_file(tmp_path, [*header, *lines])
    train, held_out = list_splits(DataSource(root=tmp_path / "data", labels=labels, hold_out=0.25))
    assert train.class_names == CLASSES
    assert (len(train), len(held_out)) == (9, 3)


def test_images_without_a_label_are_left_out_and_counted(tmp_path, caplog):
    labels = as_flat(tmp_path)
    rows = [r for r in (tmp_path / "labels.csv").read_text().splitlines() if "02.png" not in r]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    train, held_out = list_splits(DataSource(root=tmp_path, labels=labels))
    assert (len(train), len(held_out)) == (8, 3)
    source = DataSource(root=tmp_path, labels=labels)
    load_data(scale_of(None, source), source)
    assert caplog.messages == [f"{labels} does not label 1 images: they are left out"]


def test_indices_are_in_the_order_of_numbers(tmp_path):
    as_folders(tmp_path)
    labels = labels_file(tmp_path, ["cat,10", "dog,9", "emu,2"])
    assert list_splits(DataSource(root=tmp_path, labels=labels))[0].class_names == ("2", "9", "10")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([""], r"labels\.csv is empty"),
        (["20.png"], r"labels\.csv: '20\.png' is not NAME,LABEL"),
        (["20.png,cat", "20.png,dog"], r"'20\.png' has two labels"),
        (["x.png,cat"], r"labels none of 9 images: its first name is 'x\.png', and the first .*00"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_refused(tmp_path, rows, message):
    as_flat(tmp_path / "data")
    source = DataSource(root=tmp_path / "data", labels=labels_file(tmp_path, rows))
    with pytest.raises(ValueError, match=message):
        list_splits(source)


def test_a_flat_folder_without_labels_and_labels_that_are_not_there_are_refused(tmp_path):
    as_flat(tmp_path)
    with pytest.raises(ValueError, match="expected <class>/<image>, or --labels FILE"):
        list_splits(DataSource(root=tmp_path))
    with pytest.raises(ValueError, match=r"--labels labels\.txt cannot be read: .*No such file"):
        list_splits(DataSource(root=tmp_path, labels=Path("labels.txt")))


def test_a_held_out_class_that_no_train_image_has_is_named_with_the_nearest(tmp_path):
    labels = as_flat(tmp_path)
    rows = (tmp_path / "labels.csv").read_text().replace("v1.png,dog", "v1.png,dgo")
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(ValueError, match=r"'dgo', the class of val/v1\.png.*Did you mean 'dog'"):
        list_splits(DataSource(root=tmp_path, labels=labels))


def test_a_table_with_two_columns_of_labels_is_refused(tmp_path):
    rows = {"image": [picture(1)], "fine": [0], "coarse": [0]}
    names = ClassLabel(names=["a", "b"])
    kinds = Features({"image": Image(), "fine": names, "coarse": names})
    Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="needs one column of labels, and has image, fine, coarse"):
        list_splits(DataSource(root=tmp_path))


def test_a_single_saved_table_is_held_out_in_part(tmp_path):
    rows = {"image": [picture(k) for k in range(8)], "label": [0, 1] * 4}
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path)
    train, held_out = list_splits(DataSource(root=tmp_path, hold_out=0.25))
    assert (len(train), len(held_out)) == (6, 2)


def test_damaged_images_and_shards_are_named(tmp_path):
    as_shards(tmp_path)
    shard = tmp_path / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[520:560] = b"x" * 40
    shard.write_bytes(content)
    source = DataSource(root=tmp_path)
    with pytest.raises(ValueError, match=r"/1/v1\.png@512\+\d+ \(class 1\) cannot be read"):
        load_data(scale_of(None, source), source).held_out.images[:]
    shard.write_bytes(content[100:])
    with pytest.raises(ValueError, match=r"val-000000\.tar cannot be read: "):
        list_splits(source)


@pytest.mark.parametrize("layout", ["a folder a split", "shards"])
def test_the_check_opens_every_image_of_a_layout_and_names_what_is_damaged(tmp_path, layout):
    source = source_of(tmp_path / "data", layout)
    scale = scale_of(None, source)
    findings, manifest = check(scale, source, Plan(trials=()), results=tmp_path / "results")
    assert findings[0] == ("images", "ok", "3 classes, 9 to train, 3 held out")
    assert {level for _, level, _ in findings} == {"ok"}
    for path in (tmp_path / "data").rglob("*.*"):
        content = path.read_bytes()
        at = content.find(png(201)[40:])  # of the dog that is held out
        if at >= 0:
            path.write_bytes(content[:at] + b"x" * 20 + content[at + 20 :])
    damaged, other = check(scale, source, Plan(trials=()), results=tmp_path / "results")
    (error,) = [text for _, level, text in damaged if level == "error"]
    assert error.startswith("1 unreadable images in 1 classes, the first ")
    assert manifest == other


def test_a_table_without_labels_is_refused(tmp_path):
    rows = {"image": [picture(1), picture(2)], "label": [-1, -1]}
    kinds = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match="row 0 has no label, but -1"):
        list_splits(DataSource(root=tmp_path))


def test_an_image_of_a_shard_without_a_label_is_refused(tmp_path):
    with tarfile.open(tmp_path / "val-0.tar", "w") as shard:
        add(shard, "a.png", png(1))
    with pytest.raises(ValueError, match=r"a\.png@512\+\d+ has neither \.cls nor a class folder"):
        list_splits(DataSource(root=tmp_path))


# Some of a data set's classes.


@pytest.mark.parametrize("names", [("n01443537", "n01440764"), ("goldfish", "tench"), ("1", "000")])
def test_some_of_imagenets_classes_are_taken_by_any_usual_name_in_imagenets_order(tmp_path, names):
    for name, grey in zip(names, (10, 20), strict=True):
        (tmp_path / "val" / name).mkdir(parents=True)
        picture(grey).save(tmp_path / "val" / name / "a.png")
    _, held_out = list_splits(DataSource(root=tmp_path), IMAGENET.data_set)
    assert held_out.class_names == ("n01440764", "n01443537")
    assert held_out.labels == (0, 1)
    assert [path.split("/")[1] for path in held_out.paths] == [names[1], names[0]]


def test_a_class_that_is_none_of_the_data_sets_is_refused(tmp_path):
    (tmp_path / "val" / "unicorn").mkdir(parents=True)
    picture(1).save(tmp_path / "val" / "unicorn" / "a.png")
    with pytest.raises(ValueError, match=r"is not ImageNet: .* foreign ones, the first 'unicorn'"):
        list_splits(DataSource(root=tmp_path), IMAGENET.data_set)
    with pytest.raises(ValueError, match=r"is not CIFAR-10: .* --scale folder takes any classes"):
        list_splits(DataSource(root=tmp_path), CIFAR10.data_set)
