"""The shards of a cell: those that are judged, and how large the next one is to be."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from contextlib import suppress
from functools import reduce
from pathlib import Path
from statistics import linear_regression

import pyarrow as pa

from evaluators import SHARD_SECONDS
from evaluators.ledger import from_parquet, in_order, judged_by, to_parquet
from trainables.data.base import Shard
from trainables.store.results import joined
from trainables.store.storage import write_atomically

FILE = re.compile(r"(\d+)-(\d+)-([0-9a-f]{16})\.parquet")
FIRST_PIXELS = 2**14  # of the first shard, whose speed nobody knows: 64 images at 16 px, 1 at 224
GROWTH = 4
LATENCY_SHARE = 7 / 8  # at most, of a shard's seconds, does not grow with its images


class ShardStore:
    """One cell's images: judged shards in files of the cell's own folder, and those that wait.

    A file is whole or absent: one that is damaged is removed when the folder is opened. side: of
    the images, in pixels. least: the fewest images that are worth a shard, of which every shard but
    the last is a multiple. Shards should take about 30 s of one process: the first is small, the
    next are as long as the seconds so far suggest. processes: that judge at a time, each of which
    is to have a part.
    """

    def __init__(
        self, folder: Path, total: int, *, side: int = 1, least: int = 1, processes: int = 1
    ) -> None:
        self._folder, self.total = folder, total
        self._least = max(least, 1)
        self._first = max(self._least, FIRST_PIXELS // side**2)
        self._timed: list[tuple[int, float]] = []
        self._paths: dict[Shard, Path] = {}
        for shard, path in sorted(self._sound_files()):
            if not self._paths or shard.first >= max(self._paths).end:
                self._paths[shard] = path
        self.waiting = self.missing()[::-1]
        self._most = self._least * math.ceil(sum(map(len, self.waiting)) / processes / self._least)

    @property
    def judged(self) -> int:
        """Return how many images are judged."""
        return sum(map(len, self._paths))

    @property
    def shards(self) -> int:
        """Return about how many shards wait."""
        each = max(1, min(self._images(), self._most))
        return sum(math.ceil(len(gap) / each) for gap in self.waiting)

    def missing(self) -> list[Shard]:
        """Return what is still to be judged, as few shards."""
        ends = [0, *(shard.end for shard in sorted(self._paths))]
        firsts = [*(shard.first for shard in sorted(self._paths)), self.total]
        gaps = zip(ends, firsts, strict=True)
        return [Shard(end, first) for end, first in gaps if end < first]

    def take(self) -> Shard:
        """Take the next shard out of those that wait."""
        gap, images = self.waiting.pop(), min(self._images(), self._most)
        images -= images % self._least
        if len(gap) <= images * 1.5:
            return gap
        self.waiting.append(Shard(gap.first + images, gap.end))
        return Shard(gap.first, gap.first + images)

    def add(self, shard: Shard, content: bytes) -> float:
        """Store a shard's ledger, as `to_parquet` made it; return the seconds that it took."""
        path = self._folder / f"{shard.first}-{shard.end}-{_digest(content)}.parquet"
        write_atomically(path, content)
        self._paths[shard] = path
        seconds = from_parquet(content)[1]
        self._timed.append((len(shard), seconds))
        return seconds

    def merged(self) -> tuple[pa.Table, float]:
        """Return the ledger and the seconds of all that is judged; there must be something."""
        parts = [from_parquet(self._paths[shard].read_bytes()) for shard in sorted(self._paths)]
        ledger = pa.concat_tables([part for part, _ in parts])
        return in_order(ledger), sum(seconds for _, seconds in parts)

    def whole(self) -> bytes:
        """Return the ledger of all that is judged as Parquet, with the provenance of its shards."""
        ledger, seconds = self.merged()
        contents = (path.read_bytes() for path in self._paths.values())
        provenance: dict[str, str] = reduce(joined, map(judged_by, contents), {})
        return to_parquet(ledger, seconds=seconds, judged_by=provenance)

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

    def _images(self) -> int:
        """Return how many images the next shard should have.

        Seconds are taken for a + b n: of small shards on a GPU most is latency, a, which more
        images do not raise.
        """
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
