"""Data that each node brings to its own disk, from a folder or an object store."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from grid.options import RunOptions
from trainables.data.staging import stage

CONTENT = {"train/a/1.png": b"one", "train/b/2.png": b"two two", "val/a/3.png": b""}


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "origin"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_of(folder):
    paths = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_what_lacks_is_copied_and_what_is_there_is_left_alone(origin, tmp_path):
    root = tmp_path / "node" / "data"
    (root / "train/a").mkdir(parents=True)
    (root / "train/a/1.png").write_bytes(b"ONE")  # of the size that is wanted
    (root / "train/b").mkdir()
    (root / "train/b/2.png").write_bytes(b"two")  # cut short
    stage(str(origin), root)
    assert files_of(root) == CONTENT | {"train/a/1.png": b"ONE"}
    (root / "val/a/3.png").unlink()
    stage(str(origin), root)  # it was complete, and is not listed again
    assert not (root / "val/a/3.png").exists()
    other = shutil.copytree(origin, tmp_path / "other")
    stage(str(other), root)
    assert (root / "val/a/3.png").exists()
    shutil.rmtree(root)  # as a node's own disk is, when its machine is exchanged
    stage(str(other), root)
    assert files_of(root) == CONTENT


def test_places_that_cannot_serve_are_refused(origin, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--stage-from .*absent cannot be read"):
        stage(str(tmp_path / "absent"), tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--stage-from cannot fill .*file/data"):
        stage(str(origin), tmp_path / "file" / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no files"):
        stage(str(tmp_path / "empty"), tmp_path / "data")
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=9))  # of 10 bytes
    with pytest.raises(ValueError, match=r"brings 0.0 GB, and .* has room for 0.0"):
        stage(str(origin), tmp_path / "data")


def test_the_option_needs_a_folder_to_fill(capsys):
    with pytest.raises(SystemExit):
        RunOptions.read(["--stage-from", "s3://bucket/data"])
    assert "give --data DIR, on a node's own disk" in capsys.readouterr().err
