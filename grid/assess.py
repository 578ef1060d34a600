"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from evaluators import EVALUATORS
from evaluators.actor import EvaluatorActor
from evaluators.shards import ShardStore, from_parquet, to_parquet
from trainables.data import Shard
from trainables.scale import Scale
from trainables.source import DataSource
from trainables.tracking import Credentials

PLACED_SECONDS = 1800
EXPENSE = {name: rank for rank, name in enumerate(EVALUATORS)}


@dataclass(frozen=True)
class Cell:
    """One evaluator on one trial's weights; `question` is the digest of what is asked."""

    trial: str
    artifact_uri: str
    evaluator: str
    question: str


@dataclass(frozen=True)
class Judged:
    """A cell's ledger as Parquet, or why there is none; `settle` it once it is kept."""

    cell: Cell
    ledger: bytes = b""
    error: str = ""


class EvaluatorPool:
    """Long-lived actors, one shard of a cell at a time each, the cheapest evaluators first.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. On GPUs each holds its share of one for as long as it lives. An actor that
    dies is restarted and its shard is asked again. Shards that are done lie in `folder` until their
    cell is: a run that was stopped goes on behind them.
    """

    def __init__(
        self,
        size: int,
        tracking_uri: str,
        scale: Scale,
        source: DataSource,
        folder: Path,
        *,
        threads: int,
        gpus: float,
    ) -> None:
        actor = ray.remote(EvaluatorActor)
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        given = {
            "threads": threads,
            "device": "cuda" if gpus else "cpu",
            "credentials": Credentials.of_environment(),
        }
        self._idle = [
            actor.options(**options).remote(tracking_uri, scale, source, **given)
            for _ in range(size)
        ]
        self._size, self._folder = size, folder
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, Cell, Shard]] = []
        self._asked: dict[Any, tuple[Cell, Shard, Any]] = {}
        self._whole: list[Cell] = []
        self._unfinished: dict[Cell, tuple[ShardStore, set[Shard]]] = {}
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._unfinished)

    def wait_until_placed(self) -> None:
        """Wait until every actor holds its resources; ValueError where none come for long."""
        placed = [actor.__ray_ready__.remote() for actor in self._idle]
        try:
            ray.get(placed, timeout=PLACED_SECONDS)
        except GetTimeoutError:
            raise ValueError(
                f"{len(placed)} evaluators have waited {PLACED_SECONDS / 60:.0f} min for their "
                "share of a GPU: `ray status` shows which nodes are missing"
            ) from None

    def submit(self, cell: Cell, shards: int) -> None:
        """Ask for the shards of a cell that are not done yet; they wait their turn."""
        store = ShardStore(self._folder / f"{cell.trial}-{cell.question}", shards)
        missing = store.missing()
        self._unfinished[cell] = (store, set(missing))
        for shard in missing:
            entry = (EXPENSE[cell.evaluator], next(self._order), cell, shard)
            heapq.heappush(self._waiting, entry)
        if not missing:
            self._whole.append(cell)
        self._hand_out()

    def poll(self, timeout: float) -> list[Judged]:
        """Return the cells judged by now, waiting up to `timeout` seconds for a shard."""
        failed = []
        if self._asked:
            ready, _ = ray.wait(list(self._asked), timeout=0 if self._whole else timeout)
            failed = [judged for reference in ready if (judged := self._collect(reference))]
            self._hand_out()
        whole, self._whole = self._whole, []
        return failed + [self._merge(cell) for cell in whole]

    def settle(self, cell: Cell) -> None:
        """Forget a judged cell, now that its ledger is kept elsewhere."""
        store, _ = self._unfinished.pop(cell)
        store.clear()

    def seconds_left(self, coming: Counter[str]) -> float | None:
        """Estimate the time for all shards asked for, and for those `coming`, by evaluator.

        None until a shard of each evaluator has been timed.
        """
        shards = coming + Counter(cell.evaluator for _, _, cell, _ in self._waiting)
        shards += Counter(cell.evaluator for cell, _, _ in self._asked.values())
        if any(name not in self._seconds for name in shards):
            return None
        each = {name: statistics.fmean(self._seconds[name]) for name in shards}
        return sum(count * each[name] for name, count in shards.items()) / self._size

    def _collect(self, reference: Any) -> Judged | None:
        """Keep a shard; return its cell where that has failed."""
        cell, shard, actor = self._asked.pop(reference)
        self._idle.append(actor)
        if cell not in self._unfinished:
            return None
        try:
            content = ray.get(reference)
        except RayError as error:
            self._drop(cell)
            cause = getattr(error, "cause", None) or error
            return Judged(cell, error=f"{type(cause).__name__}: {cause}".splitlines()[0])
        self._seconds[cell.evaluator].append(from_parquet(content)[1])
        store, missing = self._unfinished[cell]
        store.add(shard, content)
        missing.discard(shard)
        if not missing:
            self._whole.append(cell)
        return None

    def _merge(self, cell: Cell) -> Judged:
        store, _ = self._unfinished[cell]
        ledger, seconds = store.merged()
        return Judged(cell, to_parquet(ledger, seconds=seconds))

    def _drop(self, cell: Cell) -> None:
        del self._unfinished[cell]
        self._waiting = [entry for entry in self._waiting if entry[2] != cell]
        heapq.heapify(self._waiting)

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            _, _, cell, shard = heapq.heappop(self._waiting)
            actor = self._idle.pop()
            reference = actor.judge.remote(cell.artifact_uri, cell.evaluator, shard)
            self._asked[reference] = (cell, shard, actor)
