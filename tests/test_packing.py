"""Class folders packed into shards: the same data set, what is damaged, and what is staged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from grid.check import check
from grid.options import RunOptions
from grid.plan import Plan
from grid.run import main
from tests.paper import resnet50
from tests.pictures import write_folder
from tests.servers import s3_bucket
from trainables.data import layouts, staging
from trainables.data.layouts import INDEX, SHARDS, images_by_class
from trainables.data.listing import DataSource, list_splits, scale_of
from trainables.data.load import load_data, stored_split
from trainables.data.packing import BEGUN, pack
from trainables.data.registry import STORED_SETS
from trainables.layers import Classifier
from trainables.store.storage import ASIDE, below
from trainables.train.loop import train

SMALL = 20_000  # bytes: several shards a split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Class folders with a class without images, a stored set, textures and a file of labels."""
    root = write_folder(tmp_path_factory.mktemp("data"), per_class=4, held_out=1)
    for name in ("val/class-12", "train/class-12"):
        (root / name).mkdir()
    for name in ("imagenet-a/class-00/a.b.png", "textures/1/a.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (7, 8, 9)).save(root / name)
    (root / "labels.csv").write_text("class-00,sky\n")
    return root


@pytest.fixture(scope="module")
def shards(root, tmp_path_factory):
    to = tmp_path_factory.mktemp("shards")
    count = pack(root, str(to), shard_bytes=SMALL)
    assert count == f"61 images in {len([*to.rglob('*.tar')])} shards"
    return to


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copied")


def test_a_packed_folder_is_the_same_data_set(root, shards, tmp_path):
    sources = DataSource(root=root), DataSource(root=shards)
    names, manifests = set(), set()
    listed = [list_splits(source) for source in sources]
    for parts in zip(*listed, strict=True):
        assert parts[0].ids == parts[1].ids == parts[0].paths
        assert parts[0].labels == parts[1].labels
        assert parts[0].class_names == parts[1].class_names
    assert len(listed[1][0].class_names) == 13
    for number, source in enumerate(sources):
        scale = scale_of(None, source)
        names.add(scale.name)
        manifests.add(check(scale, source, Plan(trials=()), results=tmp_path / str(number))[1])
    assert len(names) == len(manifests) == 1
    data = [load_data(scale, source) for source in sources]
    views = torch.tensor([47, 3, 20])
    assert torch.equal(*(d.train.images[views] for d in data))
    assert torch.equal(*(d.held_out.images[:] for d in data))
    stored = [
        stored_split(STORED_SETS["imagenet-a"], source.root / "imagenet-a", d)
        for source, d in zip(sources, data, strict=True)
    ]
    assert stored[0].ids == stored[1].ids == ("class-00/a.b",)
    assert (shards / "textures/1/a.png").read_bytes() == (root / "textures/1/a.png").read_bytes()
    assert not (shards / "train/class-00").exists()


KILLED_AT_ITS_THIRD_SHARD = """
import os, signal, sys
from pathlib import Path
from trainables.data.packing import BEGUN, pack
replace = Path.replace
def killed(aside, to):
    if to.name == "packed-000002.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(aside, to)
Path.replace = killed
pack(Path(sys.argv[1]), sys.argv[2], shard_bytes=int(sys.argv[3]))
"""


def test_packing_that_was_killed_goes_on_and_packs_no_shard_twice(root, shards, tmp_path):
    to = tmp_path / "to"
    command = [sys.executable, "-c", KILLED_AT_ITS_THIRD_SHARD, str(root), str(to), str(SMALL)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    there = {path: path.stat().st_ino for path in to.rglob("packed-*")}
    assert sorted(path.name for path in there) == ["packed-000000.tar", "packed-000001.tar"]
    (aside,) = to.rglob(".packed-*")
    for _ in range(2):  # what is whole is left alone
        assert pack(root, str(to), shard_bytes=SMALL).startswith("61 images in ")
        assert {path: path.stat().st_ino for path in there} == there
        assert not aside.exists()
        files = {path.relative_to(to) for path in to.rglob("*") if path.is_file()}
        assert files == {p.relative_to(shards) for p in shards.rglob("*") if p.is_file()}
        assert all((to / file).read_bytes() == (shards / file).read_bytes() for file in files)
        there = {path: path.stat().st_ino for path in to.rglob("packed-*")}


def test_packing_goes_on_only_with_the_images_that_it_began_with(root, tmp_path):
    data = shutil.copytree(root / "val", tmp_path / "data")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / f"{ASIDE}{BEGUN}.0123").touch()  # a kill came at the first file
    pack(data, str(tmp_path / "to"))
    shutil.copytree(data, tmp_path / "moved")
    pack(tmp_path / "moved", str(tmp_path / "to"))
    picture = next(path for path in data.rglob("*") if path.is_file())
    picture.write_bytes(picture.read_bytes())  # later than before
    with pytest.raises(ValueError, match="to holds shards of other images than"):
        pack(data, str(tmp_path / "to"))


def test_shards_are_plain_archives_of_the_files_as_they_were(root, shards, tmp_path):
    for shard in sorted((shards / "train").glob("*.tar")):
        with tarfile.open(shard) as archive:
            archive.extractall(tmp_path, filter="data")
    for file in (root / "train").rglob("*.*"):
        assert (tmp_path / file.relative_to(root / "train")).read_bytes() == file.read_bytes()


def test_a_training_has_the_same_weights_from_folders_and_shards(root, shards):
    weights = []
    for place in (root, shards):
        source = DataSource(root=place)
        scale = scale_of("folder", source, image_size=32)
        recipe = scale.shrink(resnet50()).replace(epochs=1, batch_size=16)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Flatten(), nn.Linear(4 * 49, 13))
        classifier = Classifier(network, scale.data_set.mean, scale.data_set.std)
        deque = [*train(recipe, classifier, load_data(scale, source), device=torch.device("cpu"))]
        assert deque[-1].epoch == 1
        weights.append(torch.cat([p.flatten() for p in classifier.parameters()]))
    assert torch.equal(*weights)


def test_class_folders_without_a_split_are_packed_where_they_lie(root, shards, tmp_path):
    pack(root / "val", str(tmp_path / "packed"), shard_bytes=SMALL)
    parts = [
        list_splits(DataSource(root=place, hold_out=0.5))
        for place in (root / "val", tmp_path / "packed")
    ]
    assert [part.ids for part in parts[0]] == [part.ids for part in parts[1]]


def test_a_files_labels_rename_packed_classes_as_they_do_folders(root, shards):
    listed = [
        list_splits(DataSource(root=place, labels=root / "labels.csv"))[0]
        for place in (root, shards)
    ]
    assert listed[0].ids == listed[1].ids
    assert listed[1].class_names == ("sky",)


def lose(folder):
    (folder / "packed-000001.tar").unlink()


def cut(folder):
    shard = folder / "packed-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-100])


def lengthen(folder):
    with (folder / "packed-000000.tar").open("ab") as shard:
        shard.write(b"x")


def lose_index(folder):
    (folder / INDEX).unlink()


def cut_index(folder):
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-20])


def drop_rows(folder):
    table = pq.read_table(folder / INDEX)
    pq.write_table(table.drop_columns(["first"]), folder / INDEX)


def mix(folder):
    (folder / "class-00").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "class-00" / "a.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose, r"packed-000001.tar has 0 bytes of [\d,]+: \d+ images are lost"),
        (cut, r"packed-000001.tar has ([\d,]+) bytes of [\d,]+: \d+ images are lost"),
        (lengthen, r"packed-000000.tar has ([\d,]+) bytes of [\d,]+: \d+ images are lost"),
        (
            lose_index,
            r"train/packed-index.parquet cannot be read: .*; remove .staged and stage",
        ),
        (
            cut_index,
            r"packed-index.parquet cannot be read: .*remove .staged and stage",
        ),
        (
            drop_rows,
            r"packed-index.parquet cannot be read: .*remove .staged and stage",
        ),
        (mix, r"train holds shards and class folders \(train/class-00/a.png\): keep one form"),
    ],
)
def test_shards_that_are_not_whole_are_refused_in_words(copied, tmp_path, spoil, message):
    source = DataSource(root=copied)
    scale = scale_of("folder", source, image_size=32)
    spoil(copied / "train")
    with pytest.raises(ValueError, match=message):
        list_splits(source)
    findings, _ = check(scale, source, Plan(trials=()), results=tmp_path / "results")
    with pytest.raises(ValueError, match=message):
        raise ValueError(next(text for _, level, text in findings if level == "error"))


def test_the_check_names_an_image_that_is_damaged_in_its_shard(copied, tmp_path):
    source = DataSource(root=copied)
    train, _ = list_splits(source)
    shard, first = (
        train.paths[7].split("/class")[0],
        int(train.paths[7].split("@")[1].split("+")[0]),
    )
    content = bytearray((copied / shard).read_bytes())
    content[first : first + 200] = bytes(200)
    (copied / shard).write_bytes(content)
    scale = scale_of("folder", source, image_size=32)
    findings, _ = check(scale, source, Plan(trials=()), results=tmp_path / "results")
    (error,) = [text for *_, text in findings if "unreadable" in text]
    assert error.startswith("1 unreadable images in 1 classes, the first ")
    assert f"{train.paths[7]} (class class-01)" in error


def test_a_class_whose_name_begins_like_a_shard_is_a_class(tmp_path):
    for label in ("packed-lunch", "fresh"):
        (tmp_path / "train" / label).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "train" / label / "a.png")
    classes = images_by_class(tmp_path, tmp_path / "train")
    assert sorted(classes) == ["fresh", "packed-lunch"]
    assert not layouts._is_packed(tmp_path / "train")


def test_what_cannot_be_packed_is_refused(root, tmp_path, capsys):
    with pytest.raises(ValueError, match="must be a place outside --data"):
        pack(root, str(root / "packed"))
    before = sorted(path.stat().st_size for path in root.rglob("*"))
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(ValueError, match="must be a place outside --data"):
        pack(tmp_path / "link", str(root))
    assert sorted(path.stat().st_size for path in root.rglob("*")) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="full holds files already: name an empty place"):
        pack(root, str(tmp_path / "full"))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "train" / "a.png")
    with pytest.raises(ValueError, match="flat holds no class folders of images"):
        pack(tmp_path / "flat", str(tmp_path / "packed"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--pack .*file/packed: "):
        pack(root, str(tmp_path / "file" / "packed"))
    with pytest.raises(SystemExit):
        RunOptions.read(["--pack", str(tmp_path / "packed")])
    assert "--pack goes with --data" in capsys.readouterr().err


def test_one_command_packs_into_an_object_store_and_staging_goes_on_where_it_stopped(
    root, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trainables.data.packing.SHARD_BYTES", SMALL)
    with s3_bucket() as uri:
        to, node = below(uri, "packed"), tmp_path / "node"
        assert main(["--data", str(root), "--pack", to]) == 0
        assert f"{to} has 61 images in " in capsys.readouterr().out
        copy, copied = staging._copy_file, []

        def copy_some(files, to, entry):
            if len(copied) == 5:
                raise ValueError("the node goes")
            copied.append(to.name)
            return copy(files, to, entry)

        monkeypatch.setattr(staging, "COPIES", 1)
        monkeypatch.setattr(staging, "_copy_file", copy_some)
        source = DataSource(root=node, origin=to)
        with pytest.raises(ValueError, match="the node goes"):
            list_splits(source)
        there = {path: path.stat().st_ino for path in node.rglob("*.tar")}
        monkeypatch.setattr(staging, "_copy_file", copy)
        listed = list_splits(source)
    assert {path: path.stat().st_ino for path in there} == there
    assert [part.ids for part in listed] == [
        part.ids for part in list_splits(DataSource(root=root))
    ]


def test_an_index_states_its_shards_sizes(shards):
    stated = json.loads(pq.read_schema(shards / "val" / INDEX).metadata[SHARDS.encode()])
    assert stated == {p.name: p.stat().st_size for p in (shards / "val").glob("*.tar")}
    rows = pq.read_table(shards / "val" / INDEX).to_pylist()
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    first = rows[0]
    content = np.fromfile(shards / "val" / first["shard"], dtype=np.uint8)
    jpeg = content[first["first"] : first["first"] + first["size"]]
    assert bytes(jpeg[:2]) == b"\xff\xd8"
