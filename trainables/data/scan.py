"""Every image of a data set opened once: its size, or why it cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainables.data.images import UNREADABLE, as_rgb, in_threads, opened
from trainables.store.storage import write_atomically

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("changed_ns", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
SMALLEST = (1, 1)


@dataclass(frozen=True, slots=True)
class Opened:
    """One file: its bytes and time of change, its size in pixels, or why it cannot be read."""

    bytes: int
    changed_ns: int
    width: int = 0
    height: int = 0
    problem: str = ""


class Scan:
    """Opens files in parallel, and remembers the sound ones in a file for the next scan.

    A remembered file is opened again only when its size or its time of change is another.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._sound = _read(file) if file else {}
        self._new = False

    def open(self, root: Path, paths: Sequence[str], *, workers: int = 0) -> list[Opened]:
        """Return what each file is; every one is decoded, down to its last byte."""
        files = [f"{root}/{path}" for path in paths]
        results = list(in_threads(self._open, files, workers))
        for path, result in zip(files, results, strict=True):
            if not result.problem:
                self._new |= self._sound.get(path) is not result
                self._sound[path] = result
        return results

    def save(self) -> None:
        """Remember the sound files for the next scan."""
        if self._file is None or not self._new:
            return
        rows = ((path, *astuple(result)[:-1]) for path, result in self._sound.items())
        arrays = map(pa.array, zip(*rows, strict=True), SCHEMA.types)
        sink = pa.BufferOutputStream()
        table = pa.Table.from_arrays(list(arrays), schema=SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_atomically(self._file, sink.getvalue().to_pybytes())

    def _open(self, path: str) -> Opened:
        try:
            stat = Path(path).stat()
        except OSError as error:
            return Opened(0, 0, problem=error.strerror or str(error))
        state = partial(Opened, stat.st_size, stat.st_mtime_ns)
        known = self._sound.get(path)
        if known and state(known.width, known.height) == known:
            return known
        try:
            with opened(path) as file:
                size = file.size
                # An eighth of a JPEG's size: every byte is read, few pixels are made.
                file.draft("RGB", SMALLEST)
                as_rgb(file)
        except UNREADABLE as error:
            return state(problem=str(error) or type(error).__name__)
        return state(*size)


def _read(file: Path) -> dict[str, Opened]:
    """Return what an earlier scan remembered; a file that cannot be read holds nothing."""
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
            return {}
        paths, *rest = table.to_pydict().values()
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return {path: Opened(*row) for path, row in zip(paths, zip(*rest, strict=True), strict=True)}
