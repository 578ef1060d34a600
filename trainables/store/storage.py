"""Where trials keep their files: a folder, or a URI that pyarrow reaches (s3://, gs://)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

WEIGHTS = "weights.safetensors"  # of a finished trial
ASIDE = "."  # begins the name of a file that is being written
FULL = (errno.ENOSPC, errno.EDQUOT)


class DamagedError(ValueError):
    """A stored file is not as it was written, or belongs elsewhere; the message names it."""


class NoRoomError(OSError):
    """A disk is full, or a quota used up: nothing was written, and what was there is there."""


def below(where: str, *names: str) -> str:
    """Return the place of some names below a folder or URI; a URI's query stays at its end."""
    base, mark, query = where.partition("?") if "://" in where else (where, "", "")
    return "/".join((base.rstrip("/"), *names)) + mark + query


def weights_path(storage: str, digest: str) -> str:
    """Return where a trial's trained weights lie, once it has finished."""
    return below(storage, "trials", digest, WEIGHTS)


def parted(where: str) -> tuple[str, str]:
    """Return the folder and the name of a file at a path or URI."""
    base, mark, query = where.partition("?") if "://" in where else (where, "", "")
    folder, _, name = base.rpartition("/")
    return (folder or ".") + mark + query, name


class Folder:
    """A flat set of named files in a folder, or below a URI that pyarrow reaches.

    It is made by its first `write`, which leaves a file whole or absent. ValueError where the URI
    cannot be used.
    """

    def __init__(self, where: str | Path) -> None:
        self._is_local = "://" not in str(where)
        self._path: str
        try:
            self._files, self._path = (
                (LocalFileSystem(), str(Path(where).absolute()))
                if self._is_local
                else FileSystem.from_uri(where)
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"storage {where!r} cannot be used: {error}") from None

    def names(self) -> list[str]:
        entries = self._files.get_file_info(FileSelector(self._path, allow_not_found=True))
        return [entry.base_name for entry in entries if entry.is_file]

    def read(self, name: str) -> bytes:
        with self._files.open_input_file(f"{self._path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        if self._is_local:
            write_atomically(Path(self._path, name), content)
            return
        # An object of a store appears when it is complete.
        with self._files.open_output_stream(f"{self._path}/{name}") as file:
            file.write(content)

    def rename(self, name: str, new: str) -> None:
        self._files.move(f"{self._path}/{name}", f"{self._path}/{new}")

    def remove(self, name: str) -> None:
        """Remove a file; another process may have done so already."""
        with suppress(FileNotFoundError):
            self._files.delete_file(f"{self._path}/{name}")


def read_file(where: str) -> bytes | None:
    """Return the content of a file at a path or URI, None where there is none."""
    folder, name = parted(where)
    files = Folder(folder)
    return files.read(name) if name in files.names() else None


def write_file(where: str, content: bytes) -> None:
    """Write a file at a path or URI, whole or not at all."""
    folder, name = parted(where)
    Folder(folder).write(name, content)


@contextmanager
def fetched(where: str) -> Iterator[Path]:
    """Lend a file at a path or URI as one of this machine."""
    if "://" not in where:
        yield Path(where)
        return
    folder, name = parted(where)
    with tempfile.TemporaryDirectory() as here:
        path = Path(here) / name
        path.write_bytes(Folder(folder).read(name))
        yield path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the machine stops, it is there whole or not at all.

    NoRoomError where the disk is full.
    """
    aside = path.with_name(f"{ASIDE}{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        aside.unlink(missing_ok=True)
        raise NoRoomError(_without_room(path, len(content))) from None
    finally:
        aside.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder outlive a loss of power: a rename is one of them."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _without_room(path: Path, needed: int) -> str:
    there = next(folder for folder in path.parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    return f"no room for {path}: it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
