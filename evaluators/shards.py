"""The shards of a cell that are judged already, and how large the next one is to be."""

from __future__ import annotations

import hashlib
import re
import shutil
from contextlib import suppress
from functools import reduce
from pathlib import Path
from statistics import linear_regression

import pyarrow as pa

from evaluators import SHARD_SECONDS
from evaluators.ledger import from_parquet, in_order, judged_by
from trainables.data.base import Shard
from trainables.store.provenance import joined
from trainables.store.storage import write_atomically

FILE = re.compile(r"(\d+)-(\d+)-([0-9a-f]{16})\.parquet")
FIRST_PIXELS = 2**14  # of the first shard, whose speed nobody knows: 64 images at 16 px, 1 at 224
GROWTH = 4
LATENCY_SHARE = 7 / 8  # at most, of a shard's seconds, does not grow with its images


class ShardStore:
    """One cell's shards, of any sizes, in a folder of the cell's own: a file each.

    A file is whole or absent: one that is damaged is removed when the folder is opened.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._folder, self.total = folder, total
        self._paths: dict[Shard, Path] = {}
        for shard, path in sorted(self._sound_files()):
            if not self._paths or shard.first >= max(self._paths).end:
                self._paths[shard] = path

    @property
    def judged(self) -> int:
        """Return how many images are judged."""
        return sum(map(len, self._paths))

    def missing(self) -> list[Shard]:
        """Return what is still to be judged, as few shards."""
        ends = [0, *(shard.end for shard in sorted(self._paths))]
        firsts = [*(shard.first for shard in sorted(self._paths)), self.total]
        gaps = zip(ends, firsts, strict=True)
        return [Shard(end, first) for end, first in gaps if end < first]

    def add(self, shard: Shard, content: bytes) -> None:
        """Keep a shard's ledger, as `to_parquet` made it."""
        path = self._folder / f"{shard.first}-{shard.end}-{_digest(content)}.parquet"
        write_atomically(path, content)
        self._paths[shard] = path

    def merged(self) -> tuple[pa.Table, float]:
        """Return the ledger and the seconds of all that is judged; there must be something."""
        parts = [from_parquet(self._paths[shard].read_bytes()) for shard in sorted(self._paths)]
        ledger = pa.concat_tables([part for part, _ in parts])
        return in_order(ledger), sum(seconds for _, seconds in parts)

    def judged_by(self) -> dict[str, str]:
        """Return the provenance of the shards, which several processes may have judged."""
        contents = (path.read_bytes() for path in self._paths.values())
        return reduce(joined, map(judged_by, contents), {})

    def clear(self) -> None:
        """Remove the cell's folder, and the one above it with the last of them."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()

    def _sound_files(self) -> list[tuple[Shard, Path]]:
        sound = []
        for path in self._folder.glob("*.parquet"):
            named = FILE.fullmatch(path.name)
            content = path.read_bytes()
            with suppress(ValueError):  # whole, but of another version of the ledger
                if named and named[3] == _digest(content):
                    from_parquet(content)
                    sound.append((Shard(int(named[1]), int(named[2])), path))
                    continue
            path.unlink()
        return [(shard, path) for shard, path in sound if shard.end <= self.total]


class Pace:
    """How many images take about 30 s of one process, learned from shards of one cell.

    Seconds are taken for a + b n: of small shards on a GPU most is latency, a, which more images
    do not raise. The first shards of a cell are small, and grow fourfold at most.
    """

    def __init__(self, *, side: int, least: int) -> None:
        self._least = max(least, 1)
        self._first = max(self._least, FIRST_PIXELS // side**2)
        self._timed: list[tuple[int, float]] = []

    def add(self, images: int, seconds: float) -> None:
        """Note what a shard took."""
        self._timed.append((images, seconds))

    def cut(self, gap: Shard) -> tuple[Shard, Shard]:
        """Part what is to be judged into the next shard and the rest, which may be empty."""
        images = self.images()
        if len(gap) <= images * 1.5:
            return gap, Shard(gap.end, gap.end)
        return Shard(gap.first, gap.first + images), Shard(gap.first + images, gap.end)

    def images(self) -> int:
        """Return how many images the next shard should have."""
        if not self._timed:
            return self._first
        sizes = [images for images, _ in self._timed]
        seconds = [seconds for _, seconds in self._timed]
        each = sum(seconds) / sum(sizes)
        if len(set(sizes)) > 1:
            slope = linear_regression(sizes, seconds).slope
            wanted = SHARD_SECONDS / max(slope, each * (1 - LATENCY_SHARE))
        else:
            wanted = SHARD_SECONDS / each
            if wanted < sizes[0]:
                wanted = 2 * sizes[0]  # which tell latency from work
        return max(self._least, min(int(wanted), GROWTH * max(sizes)))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
