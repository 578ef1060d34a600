"""The shards of a cell that are judged already: a file each, whole or absent."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import suppress
from functools import reduce
from pathlib import Path

import pyarrow as pa

from evaluators.ledger import from_parquet, judged_by
from trainables.data import Shard
from trainables.provenance import joined
from trainables.storage import write_atomically


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

    def judged_by(self) -> dict[str, str]:
        """Return the provenance of the shards, which several processes may have judged."""
        files = [path for s in self._shards for path in self._folder.glob(f"{_name(s)}-*.parquet")]
        return reduce(joined, (judged_by(path.read_bytes()) for path in files), {})

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
