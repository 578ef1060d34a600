"""Data that are brought to a node's own disk, once, from a place that all nodes reach."""

from __future__ import annotations

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem
from tqdm import tqdm

from trainables.store.storage import ASIDE, reached, write_atomically
from trainables.watchdog import beat

COPIES = 16  # at once
SAY_SECONDS = 10.0
GIGABYTE = 10**9


def stage(origin: str, root: Path) -> None:
    """Copy what an origin, a folder or URI, has and `root` lacks; a node's processes take turns.

    A file counts as there by its size. ValueError where the origin cannot be read or the disk has
    no room for it.
    """
    done = root / f"{ASIDE}staged"
    try:
        root.mkdir(parents=True, exist_ok=True)
        turn = (root / f"{ASIDE}lock").open("w")
    except OSError as error:
        raise ValueError(f"--stage-from cannot fill {root}: {error}") from None
    with turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if done.exists() and done.read_text() == origin:
            return
        files, path = reached(origin)
        try:
            entries = files.get_file_info(FileSelector(path, recursive=True))
        except OSError as error:
            raise ValueError(f"--stage-from {origin} cannot be read: {error}") from None
        listed = {root / Path(e.path).relative_to(path): e for e in entries if e.is_file}
        if not listed:
            raise ValueError(f"--stage-from {origin} has no files")
        _copy(files, {to: e for to, e in listed.items() if _size(to) != e.size}, origin, root)
        write_atomically(done, origin.encode())


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _copy(files: FileSystem, missing: dict[Path, FileInfo], origin: str, root: Path) -> None:
    whole, free = sum(e.size for e in missing.values()), shutil.disk_usage(root).free
    if whole > free:
        figures = f"{whole / GIGABYTE:.1f} GB, and {root} has room for {free / GIGABYTE:.1f}"
        raise ValueError(f"--stage-from {origin} brings {figures}")
    shown = {"unit": "B", "unit_scale": True, "mininterval": SAY_SECONDS, "desc": str(root)}
    with tqdm(total=whole, **shown) as copied, ThreadPoolExecutor(COPIES) as threads:
        for size in threads.map(partial(_copy_file, files), missing, missing.values()):
            beat()
            copied.update(size)


def _copy_file(files: FileSystem, to: Path, entry: FileInfo) -> int:
    """Copy a file, whole or not at all, and return its size."""
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f"{ASIDE}{to.name}.staging")
    with files.open_input_stream(entry.path) as source, aside.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    aside.replace(to)
    return int(entry.size)
