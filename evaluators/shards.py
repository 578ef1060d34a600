"""The shards of a cell that are judged already: a file each, whole or absent."""

from __future__ import annotations

import hashlib
import io
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from evaluators.base import LEDGER
from trainables.data import Shard
from trainables.storage import write_atomically

SECONDS = b"seconds"


def to_parquet(ledger: pa.Table, *, seconds: float) -> bytes:
    """Return a ledger as a Parquet file that also says how long its verdicts took."""
    buffer = io.BytesIO()
    marked = ledger.replace_schema_metadata({SECONDS: repr(seconds)})
    pq.write_table(marked, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def from_parquet(content: bytes) -> tuple[pa.Table, float]:
    """Read what `to_parquet` wrote; ValueError where it is damaged."""
    try:
        ledger = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        ledger.validate(full=True)
        seconds = float(ledger.schema.metadata[SECONDS])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is no whole ledger: {error}") from None
    ledger = ledger.replace_schema_metadata(None)
    if not ledger.schema.equals(LEDGER):
        raise ValueError(f"it is no ledger: its columns are {ledger.schema.names}")
    return ledger, seconds


class ShardStore:
    """Keep one cell's shards, in a folder of the cell's own, until all `count` are there."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._shards = [Shard(index, count) for index in range(count)]

    def missing(self) -> list[Shard]:
        """Return the shards still to be judged; a damaged file counts as none and is removed."""
        return [shard for shard in self._shards if self._read(shard) is None]

    def add(self, shard: Shard, content: bytes) -> None:
        """Keep a shard's ledger, as `to_parquet` made it."""
        digest = hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self._folder / f"{_name(shard)}-{digest}.parquet", content)

    def merged(self) -> tuple[pa.Table, float]:
        """Return the whole cell's ledger and seconds; all shards must be there."""
        read = [self._read(shard) for shard in self._shards]
        found = [entry for entry in read if entry is not None]
        assert len(found) == len(read)
        ledger = pa.concat_tables([part for part, _ in found], promote_options="default")
        return ledger, sum(s for _, s in found)

    def clear(self) -> None:
        """Remove the cell's folder, and the one above it with the last of them."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()

    def _read(self, shard: Shard) -> tuple[pa.Table, float] | None:
        for path in sorted(self._folder.glob(f"{_name(shard)}-*.parquet")):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            try:
                if path.stem.endswith(digest):
                    return from_parquet(content)
            except ValueError:
                pass  # whole, but of another version of the ledger
            path.unlink()
        return None


def _name(shard: Shard) -> str:
    return f"{shard.index}-of-{shard.count}"
