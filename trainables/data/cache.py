"""One cache: files of decoded images, made once and mapped by every process of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from trainables.store.storage import ASIDE

logger = logging.getLogger(__name__)

UNUSED_SECONDS = 30 * 86400
HASH_BYTES = 32  # behind the content
BLOCK_BYTES = 2**24
LOCK = ".lock"
Mapped = np.memmap[Any, np.dtype[np.uint8]]


def cached(file: Path, write: Callable[[BinaryIO], None]) -> Mapped:
    """Map a file's bytes, written on first use by one process while the others wait.

    Writing to the array leaves the file alone. A damaged file is written anew; ValueError where
    it cannot be kept.
    """
    try:
        with sole_writer(file.parent):
            pass  # who writes it now has written it by then
        # Without the lock: the processes of a machine look at the same time.
        content = _content(file)
        if content is None:
            with sole_writer(file.parent):
                content = _content(file)
                if content is None:
                    _remove_unused(file.parent)
                    content = _written(file, write)
    except OSError as error:
        raise ValueError(
            f"decoded images cannot be kept in {file.parent}: {error.strerror}; "
            "--data-memory 0 does without"
        ) from error
    return content


def mapped(file: Path) -> Mapped:
    """Map a cached file's bytes, without a look at their hash."""
    count = file.stat().st_size - HASH_BYTES
    return np.memmap(file, dtype=np.uint8, mode="c", shape=(count,))


def _content(file: Path) -> Mapped | None:
    """Map a file as it was written; None where there is none, or a damaged one, which is logged."""
    if not file.exists():
        return None
    if file.stat().st_size > HASH_BYTES:
        digest = np.memmap(file, dtype=np.uint8, mode="r")[-HASH_BYTES:].tobytes()
        content = mapped(file)
        if _hash(file.name, content) == digest:
            file.touch()
            return content
    logger.warning("%s is damaged: its images are decoded again", file)
    return None


def _written(file: Path, write: Callable[[BinaryIO], None]) -> Mapped:
    aside = file.with_name(f"{ASIDE}{file.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as opened:
            write(opened)
        digest = _hash(file.name, np.memmap(aside, dtype=np.uint8, mode="r"))
        with aside.open("ab") as opened:
            opened.write(digest)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    return mapped(file)


def _hash(name: str, content: np.ndarray) -> bytes:
    """Return the SHA-256 of a name and of every block's SHA-256: threads share the work."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        blocks = range(0, len(content), BLOCK_BYTES)
        parts = (content[first : first + BLOCK_BYTES] for first in blocks)
        hashes = pool.map(lambda part: hashlib.sha256(part.data).digest(), parts)
        return hashlib.sha256(name.encode() + b"".join(hashes)).digest()


def _remove_unused(cache: Path) -> None:
    """Remove what nobody mapped for a month; a process that has it mapped keeps it."""
    for file in cache.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > UNUSED_SECONDS:
                file.unlink()


@contextmanager
def sole_writer(cache: Path) -> Iterator[None]:
    """Hold a cache, made where it is not there, without what killed writers left half written."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in cache.glob(f"{ASIDE}*"):
            if file.name != LOCK:
                file.unlink()
        yield
