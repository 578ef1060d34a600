"""Class folders packed into tar shards: few large files, which copy fast and are read in place."""

from __future__ import annotations

import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem, copy_files
from tqdm import tqdm

from trainables.data.layouts import (
    CLASSES,
    HELD_OUT,
    INDEX,
    SHARD,
    SHARDS,
    TRAIN,
    Paths,
    images_by_class,
)
from trainables.data.registry import STORED_SETS
from trainables.store.storage import reached

TEXTURES = {stored.name for stored in STORED_SETS.values() if stored.evaluator == "tpa"}
SHARD_BYTES = 2**28  # after which the next shard begins


def pack(root: Path, to: str, *, shard_bytes: int = 0) -> str:
    """Pack each folder of class folders below a root into shards and an index; say how many.

    `to`: a folder or URI, in which they take the folders' places; other files are copied. Images
    keep their bytes, classes, names and order, and so their ids. The index of a folder is written
    last. ValueError where there is nothing to pack, or no place for it.
    """
    files, base = reached(to)
    if Path(base).resolve().is_relative_to(root.resolve()) or not root.is_dir():
        raise ValueError(f"--pack {to} must be a place outside --data {root}, which is a folder")
    parts, shards = [*_parts(root)], 0
    images = sum(len(paths) for _, classes, _ in parts for paths in classes.values())
    if not images:
        raise ValueError(f"--pack: {root} holds no class folders of images")
    try:
        if files.get_file_info(FileSelector(base, allow_not_found=True)):
            raise ValueError(f"--pack {to} holds files already: name an empty place")
        for folder, classes, others in parts:
            place = "/".join((base, *folder.relative_to(root).parts))
            files.create_dir(place)
            if any(classes.values()):
                shards += _pack(files, folder, place, classes, shard_bytes or SHARD_BYTES)
            for name in others:
                at = {"source_filesystem": LocalFileSystem(), "destination_filesystem": files}
                copy_files(str(folder / name), f"{place}/{name}", **at)
    except OSError as error:
        raise ValueError(f"--pack {to}: {error}") from None
    return f"{images:,} images in {shards:,} shards"


def _parts(root: Path) -> Iterator[tuple[Path, Paths, list[str]]]:
    """Yield the folders below a root that are no class, their images by class and their files."""
    for place, below, files in os.walk(root, followlinks=True):
        folder = Path(place)
        classes = images_by_class(folder, folder)
        of_splits = any(classes.get(name) for name in (TRAIN, *HELD_OUT))
        if of_splits or TEXTURES.intersection(folder.relative_to(root).parts):
            classes = {}
        yield folder, classes, files
        if any(classes.values()):  # beside which stored sets may lie
            below[:] = STORED_SETS.keys() & {*below}


def _pack(files: FileSystem, folder: Path, place: str, classes: Paths, most: int) -> int:
    """Write a folder's images into shards and then their index; return the number of shards."""
    rows, sizes = list[dict[str, Any]](), dict[str, int]()
    images = deque(chain(*classes.values()))
    with tqdm(total=len(images), desc=str(folder), unit=" images") as packed:
        while images:
            shard = SHARD.format(len(sizes))
            out = files.open_output_stream(f"{place}/{shard}")
            with out, tarfile.open(fileobj=out, mode="w") as tar:
                while images and tar.offset < most:
                    member = tarfile.TarInfo(images.popleft())
                    content = (folder / member.name).read_bytes()
                    member.size, first = len(content), tar.offset + len(member.tobuf())
                    tar.addfile(member, BytesIO(content))
                    row = {"image": member.name, "shard": shard, "first": first}
                    rows.append(row | {"size": member.size})
                    packed.update()
                tar.close()
                sizes[shard] = out.tell()
    stated = {CLASSES: json.dumps([*classes]), SHARDS: json.dumps(sizes)}
    with files.open_output_stream(f"{place}/{INDEX}") as out:
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(stated), out)
    return len(sizes)
