"""Every image of a data set opened once: its size, or why it cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainables.data.images import UNREADABLE, as_rgb, opened
from trainables.data.listing import DataSource, list_splits
from trainables.store.storage import write_atomically

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("changed_ns", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("problem", pa.string()),
        ("passing", pa.bool_()),
    ]
)
AT_ONCE = 4096
SMALLEST = (1, 1)


@dataclass(frozen=True, slots=True)
class Opened:
    """One file as it was found: its bytes and time of change, its size in pixels or a problem.

    passing: the problem is the system's (no permission, a failing disk), which may be gone without
    a change of the file.
    """

    bytes: int
    changed_ns: int
    width: int = 0
    height: int = 0
    problem: str = ""
    passing: bool = False


class Scan:
    """Opens files, in parallel; what was found is kept in a file and holds while they do.

    A file is opened again only when its size or its time of change is another, or where its problem
    was a passing one.
    """

    def __init__(self, kept: Path | None) -> None:
        self._kept = kept
        self._known = _read(kept) if kept else {}
        self._new = False

    def open(self, root: Path, paths: Sequence[str]) -> list[Opened]:
        """Return what each file is; every one is decoded, down to its last byte."""
        found: list[Opened] = []
        workers = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            for first in range(0, len(paths), AT_ONCE):
                part = [f"{root}/{path}" for path in paths[first : first + AT_ONCE]]
                for path, opened in zip(part, pool.map(self._opened, part), strict=True):
                    self._new |= self._known.get(path) is not opened
                    self._known[path] = opened
                    found.append(opened)
        return found

    def save(self) -> None:
        """Keep what was found for the next scan."""
        if self._kept is None or not self._new:
            return
        rows = [(path, *astuple(opened)) for path, opened in self._known.items()]
        columns = zip(*rows, strict=True)
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        sink = pa.BufferOutputStream()
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_atomically(self._kept, sink.getvalue().to_pybytes())

    def _opened(self, path: str) -> Opened:
        try:
            stat = Path(path).stat()
        except OSError as error:
            return Opened(0, 0, problem=error.strerror or str(error), passing=True)
        known = self._known.get(path)
        unchanged = (stat.st_size, stat.st_mtime_ns, False)
        if known and (known.bytes, known.changed_ns, known.passing) == unchanged:
            return known
        try:
            with opened(path) as file:
                width, height = file.size
                # An eighth of a JPEG's size: every byte is read, few pixels are made.
                file.draft("RGB", SMALLEST)
                as_rgb(file)
        except UNREADABLE as error:
            return Opened(
                stat.st_size,
                stat.st_mtime_ns,
                problem=str(error) or type(error).__name__,
                # A decoder's own OSError has no number.
                passing=isinstance(error, OSError) and error.errno is not None,
            )
        return Opened(stat.st_size, stat.st_mtime_ns, width, height)


def damaged_images(source: DataSource) -> frozenset[str]:
    """Open every train and held-out image; return those that cannot be read."""
    scan = Scan(None)
    return frozenset(
        path
        for split in list_splits(source)
        for path, opened in zip(split.paths, scan.open(split.root, split.paths), strict=True)
        if opened.problem
    )


def _read(kept: Path) -> dict[str, Opened]:
    """Return what an earlier scan kept; a file that cannot be read holds nothing."""
    try:
        table = pq.read_table(kept, page_checksum_verification=True)
        if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
            return {}
        columns: Mapping[str, list[object]] = table.to_pydict()
    except (OSError, ValueError, pa.ArrowException):
        return {}
    paths, *rest = columns.values()
    rows: Iterable[tuple[object, ...]] = zip(*rest, strict=True)
    return {str(path): Opened(*row) for path, row in zip(paths, rows, strict=True)}  # type: ignore[arg-type]
