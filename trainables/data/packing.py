"""Class folders packed into tar shards: few large files, which copy fast and are read in place."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

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
    if Path(base).is_relative_to(root) or not root.is_dir():
        raise ValueError(f"--pack {to} must be a place outside --data {root}, which is a folder")
    parts = [*_parts(root)]
    images = sum(len(paths) for _, classes, _ in parts for paths in classes.values())
    if not images:
        raise ValueError(f"--pack: {root} holds no class folders of images")
    shards = 0
    try:
        for folder, classes, others in parts:
            place = "/".join((base, *folder.relative_to(root).parts))
            files.create_dir(place)
            if any(classes.values()):
                shards += _pack(files, folder, place, classes, shard_bytes or SHARD_BYTES)
            for name in others:
                with (
                    (folder / name).open("rb") as file,
                    files.open_output_stream(f"{place}/{name}") as out,
                ):
                    shutil.copyfileobj(file, out)
    except OSError as error:
        raise ValueError(f"--pack {to}: {error}") from None
    return f"{images:,} images in {shards:,} shards"


def _parts(root: Path) -> Iterator[tuple[Path, Paths, list[str]]]:
    """Yield the folders below a root that are no class, their images by class and their files."""
    for place, below, files in os.walk(root, followlinks=True):
        folder = Path(place)
        classes = images_by_class(folder, folder)
        of_splits = any(classes.get(name) for name in (TRAIN, *HELD_OUT))
        if of_splits or any(name in TEXTURES for name in folder.relative_to(root).parts):
            classes = {}
        yield folder, classes, files
        if any(classes.values()):  # beside which stored sets may lie
            below[:] = STORED_SETS.keys() & {*below}


def _pack(files: FileSystem, folder: Path, place: str, classes: Paths, most: int) -> int:
    """Write a folder's images into shards and then their index; return the number of shards."""
    rows, sizes = list[tuple[str, str, int, int]](), dict[str, int]()
    images = [*chain(*classes.values())]
    while len(rows) < len(images):
        shard = SHARD.format(len(sizes))
        with (
            files.open_output_stream(f"{place}/{shard}") as out,
            tarfile.open(fileobj=out, mode="w") as tar,
        ):
            while len(rows) < len(images) and tar.offset < most:
                image = images[len(rows)]
                member, content = tarfile.TarInfo(image), (folder / image).read_bytes()
                member.size = len(content)
                first = tar.offset + len(member.tobuf())
                tar.addfile(member, BytesIO(content))
                rows.append((image, shard, first, len(content)))
            tar.close()
            sizes[shard] = out.tell()
    table = pa.table(
        [*map(list, zip(*rows, strict=True))], names=["image", "shard", "first", "size"]
    )
    stated = {CLASSES: json.dumps([*classes]), SHARDS: json.dumps(sizes)}
    with files.open_output_stream(f"{place}/{INDEX}") as out:
        pq.write_table(table.replace_schema_metadata(stated), out)
    return len(sizes)
