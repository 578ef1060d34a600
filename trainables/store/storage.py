"""Where trials keep their files: a folder, or a URI that pyarrow reaches (s3://, gs://)."""

from __future__ import annotations

import errno
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

WEIGHTS = "weights.safetensors"  # of a finished trial
RECIPE = "recipe.json"  # beside the weights in MLflow
ASIDE = "."  # begins the name of a file that is being written
# Of what pyarrow raises for a store, S3 or Google's, that may answer in a while.
STORE_AWAY = re.compile(
    r"AWS Error (NETWORK_CONNECTION|INTERNAL_FAILURE|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|SLOW_DOWN"
    r"|THROTTLING)|Status\(UNAVAILABLE"
)
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


class Folder:
    """A flat set of named files in a folder, or below a URI that pyarrow reaches.

    It is made by its first `write`, which leaves a file whole or absent. ValueError where the URI
    cannot be used.
    """

    def __init__(self, where: str | Path) -> None:
        self._files, self._path = reached(where)

    def names(self) -> list[str]:
        entries = self._files.get_file_info(FileSelector(self._path, allow_not_found=True))
        return [entry.base_name for entry in entries if entry.is_file]

    def read(self, name: str) -> bytes:
        return _read(self._files, f"{self._path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        _write(self._files, f"{self._path}/{name}", content)

    def rename(self, name: str, new: str) -> None:
        self._files.move(f"{self._path}/{name}", f"{self._path}/{new}")

    def remove(self, name: str) -> None:
        """Remove a file; another process may have done so already."""
        with suppress(FileNotFoundError):
            self._files.delete_file(f"{self._path}/{name}")


def read_file(where: str) -> bytes | None:
    """Return the content of a file at a path or URI, None where there is none."""
    try:
        return _read(*reached(where))
    except FileNotFoundError:
        return None


def write_file(where: str, content: bytes) -> None:
    """Write a file at a path or URI, whole or not at all."""
    _write(*reached(where), content)


def reached(where: str | Path) -> tuple[FileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    ValueError where the URI cannot be used; ConnectionError where nobody answers now, which may
    say which region a bucket is in.
    """
    if "://" not in str(where):
        return LocalFileSystem(), str(Path(where).absolute())
    try:
        files, path = FileSystem.from_uri(where)
    except (OSError, ValueError) as error:
        if STORE_AWAY.search(str(error)):
            raise ConnectionError(f"storage {where!r} does not answer: {error}") from None
        raise ValueError(f"storage {where!r} cannot be used: {error}") from None
    return files, path


def _read(files: FileSystem, path: str) -> bytes:
    with files.open_input_file(path) as file:
        return bytes(file.read())


def _write(files: FileSystem, path: str, content: bytes) -> None:
    if isinstance(files, LocalFileSystem):
        write_atomically(Path(path), content)
        return
    # An object of a store appears when it is complete.
    with files.open_output_stream(path) as file:
        file.write(content)


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
        needed = f"{len(content) / 1e6:.1f} MB"
        raise NoRoomError(f"no room for {path}, which takes {needed}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that its names (after a rename, too) survive a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
