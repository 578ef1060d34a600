"""Class folders packed into tar shards: few large files, which copy fast and are read in place."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, LocalFileSystem, copy_files
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
from trainables.store.storage import ASIDE, Folder, below, reached

TEXTURES = {stored.name for stored in STORED_SETS.values() if stored.evaluator == "tpa"}
SHARD_BYTES = 2**28  # after which the next shard begins; one is held in memory
BEGUN = f"{ASIDE}packed"  # the digest of what is packed there, so that a run after a kill goes on
Row = dict[str, Any]  # of an index


def pack(root: Path, to: str, *, shard_bytes: int = 0) -> str:
    """Pack each folder of class folders below a root into shards and an index; say how many.

    `to`: a folder or URI, in which they take the folders' places; other files are copied. Images
    keep their bytes, classes, names and order, and so their ids. A shard is whole or absent, and
    the index of a folder is written last: the same call again goes on where one was stopped.
    ValueError where there is nothing to pack, or no place for it.
    """
    files, base = reached(to)
    if Path(base).resolve().is_relative_to(root.resolve()) or not root.is_dir():
        raise ValueError(f"--pack {to} must be a place outside --data {root}, which is a folder")
    parts, shards = [*_parts(root)], 0
    images = sum(len(paths) for _, classes, _ in parts for paths in classes.values())
    if not images:
        raise ValueError(f"--pack: {root} holds no class folders of images")
    try:
        is_ours = any(name.startswith((BEGUN, ASIDE + BEGUN)) for name in Folder(to).names())
        if not is_ours and files.get_file_info(FileSelector(base, allow_not_found=True)):
            raise ValueError(f"--pack {to} holds files already: name an empty place")
        for folder, classes, others in parts:
            names = folder.relative_to(root).parts
            files.create_dir(place := "/".join((base, *names)))
            if any(classes.values()) or folder == root:
                rows = _rows(folder, classes, shard_bytes or SHARD_BYTES)
                shards += _pack(below(to, *names), folder, [*classes], rows)
            for name in {*others} - {BEGUN}:
                at = {"source_filesystem": LocalFileSystem(), "destination_filesystem": files}
                copy_files(str(folder / name), f"{place}/{name}", **at)
    except OSError as error:
        raise ValueError(f"--pack {to}: {error}") from None
    return f"{images:,} images in {shards:,} shards"


def _parts(root: Path) -> Iterator[tuple[Path, Paths, list[str]]]:
    """Yield the folders below a root that are no class, their images by class and their files."""
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        classes = images_by_class(folder, folder)
        of_splits = any(classes.get(name) for name in (TRAIN, *HELD_OUT))
        if of_splits or TEXTURES.intersection(folder.relative_to(root).parts):
            classes = {}
        yield folder, classes, files
        if any(classes.values()):  # beside which stored sets may lie
            folders[:] = STORED_SETS.keys() & {*folders}


def _rows(folder: Path, classes: Paths, most: int) -> list[Row]:
    """Return the rows of a folder's index: in which shard each image is to lie, and where."""
    rows, shard, end = list[Row](), 0, 0
    for name in chain(*classes.values()):
        if end >= most:
            shard, end = shard + 1, 0
        first, size = end + len(tarfile.TarInfo(name).tobuf()), (folder / name).stat().st_size
        rows.append({"image": name, "shard": SHARD.format(shard), "first": first, "size": size})
        end = first + math.ceil(size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return rows


def _pack(place: str, folder: Path, classes: Sequence[str], rows: Sequence[Row]) -> int:
    """Write a folder's shards that are not there, then their index; return how many there are."""
    to = Folder(place)
    there, sizes = to.names(), dict[str, int]()
    times = [(folder / row["image"]).stat().st_mtime_ns for row in rows]
    of_images = hashlib.sha256(repr((classes, rows, times)).encode()).hexdigest()
    if BEGUN not in there:
        to.write(BEGUN, of_images.encode())
    elif to.read(BEGUN) != of_images.encode():
        raise ValueError(f"{place} holds shards of other images than {folder}: name an empty place")
    for name in there:  # that a kill left
        if name.startswith(ASIDE) and name != BEGUN:
            to.remove(name)
    with tqdm(total=len(rows), desc=str(folder), unit=" images") as packed:
        for shard, members in ((s, [*m]) for s, m in groupby(rows, lambda row: str(row["shard"]))):
            end = members[-1]["first"] + members[-1]["size"] + 2 * tarfile.BLOCKSIZE
            sizes[shard] = math.ceil(end / tarfile.RECORDSIZE) * tarfile.RECORDSIZE
            if shard not in there:
                to.write(shard, _tar(folder, members))
            packed.update(len(members))
    if rows and INDEX not in there:
        stated = {CLASSES: json.dumps(classes), SHARDS: json.dumps(sizes)}
        pq.write_table(
            pa.Table.from_pylist(rows).replace_schema_metadata(stated), index := BytesIO()
        )
        to.write(INDEX, index.getvalue())
    return len(sizes)


def _tar(folder: Path, rows: Sequence[Row]) -> bytes:
    """Return the archive of a shard's images; ValueError where one has changed meanwhile."""
    with tarfile.open(fileobj=(archive := BytesIO()), mode="w") as tar:
        for row in rows:
            member, content = tarfile.TarInfo(row["image"]), (folder / row["image"]).read_bytes()
            if len(content) != row["size"]:
                raise ValueError(f"{folder / member.name} has changed while it was packed")
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return archive.getvalue()
