"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from evaluators import EVALUATORS
from evaluators.actor import EvaluatorActor
from evaluators.ledger import from_parquet, to_parquet
from evaluators.shards import Pace, ShardStore
from trainables.data.base import Shard
from trainables.data.listing import DataSource
from trainables.ray_internals import nodes_of_actors
from trainables.scale import Scale
from trainables.store.patience import patiently
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.store.tracking import Credentials
from trainables.watchdog import HUNG_SECONDS

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


@dataclass
class _Work:
    """A cell's images: judged ones in the store, `waiting` ones, and the shards to ask again."""

    store: ShardStore
    pace: Pace
    waiting: list[Shard]
    again: list[Shard] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.store.total - self.store.judged

    @property
    def has_waiting(self) -> bool:
        return bool(self.waiting or self.again)

    def next_shard(self) -> Shard:
        """Take the next shard out of those that wait."""
        if self.again:
            return self.again.pop()
        shard, rest = self.pace.cut(self.waiting.pop())
        if rest:
            self.waiting.append(rest)
        return shard


class EvaluatorPool:
    """Long-lived actors, one shard of a cell at a time each, the cheapest evaluators first.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. On GPUs each holds its share of one for as long as it lives. An actor that
    dies is restarted by Ray, and its shard is asked again after a wait, a few times; so is one that
    ran out of memory. One whose device failed is ended, for a new one. Shards that are done lie in
    `folder` until their cell is: a run that was stopped judges the other images, in shards of
    whatever size takes about 30 s. `say` is told what is
    tried again, and of a full disk.
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
        hung_after: float = HUNG_SECONDS,
        say: Callable[[str], None] = print,
    ) -> None:
        actor = ray.remote(EvaluatorActor)
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1}
        settings = {
            "threads": threads,
            "device": "cuda" if gpus else "cpu",
            "hung_after": hung_after,
            "credentials": Credentials.of_environment(),
        }
        self._idle = [
            actor.options(**options).remote(tracking_uri, scale, source, **settings)
            for _ in range(size)
        ]
        self._actors, self._gpus = list(self._idle), gpus
        self._homes: dict[str, str] = {}  # the nodes of actors
        self._size, self._folder = size, folder
        self._order = itertools.count()
        self._side = scale.image_size
        self._waiting: list[tuple[int, int, Cell]] = []
        self._asked: dict[Any, tuple[Cell, Shard, Any]] = {}
        self._whole: list[Cell] = []
        self._unfinished: dict[Cell, _Work] = {}
        self._restarting: dict[Any, Any] = {}
        self._failures: Counter[tuple[Cell, Shard]] = Counter()
        self._resting: list[tuple[float, Cell, Shard]] = []
        self._say = say
        # Of each evaluator: the images judged, and the seconds of all of them.
        self._judged: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

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

    def gpus_held(self) -> dict[str, float]:
        """Return the GPUs that actors hold now, by the id of their node: they move as nodes die."""
        # One that is being restarted keeps its place.
        self._homes |= nodes_of_actors(self._actors) if self._gpus else {}
        nodes = Counter(self._homes.values())
        return {node: count * self._gpus for node, count in nodes.items()}

    def submit(self, cell: Cell, total: int, *, least: int = 1) -> None:
        """Ask for those of a cell's `total` images that are not judged yet; they wait their turn.

        least: the fewest images that are worth a shard.
        """
        store = ShardStore(self._folder / f"{cell.trial}-{cell.question}", total)
        pace = Pace(side=self._side, least=least)
        self._unfinished[cell] = work = _Work(store, pace, store.missing())
        if work.left:
            self._await_turn(cell)
        else:
            self._whole.append(cell)
        self._hand_out()

    def poll(self, timeout: float) -> list[Judged]:
        """Return the cells judged by now, waiting up to `timeout` seconds for a shard."""
        failed = []
        self._wake()
        if under_way := [*self._asked, *self._restarting]:
            ready, _ = ray.wait(under_way, timeout=0 if self._whole else timeout)
            failed = [judged for reference in ready if (judged := self._collect(reference))]
            self._hand_out()
        elif self._resting:
            time.sleep(timeout)
        whole, self._whole = self._whole, []
        return failed + [self._merge(cell) for cell in whole]

    def settle(self, cell: Cell) -> None:
        """Forget a judged cell, now that its ledger is kept elsewhere."""
        self._unfinished.pop(cell).store.clear()

    def seconds_left(self, coming: Counter[str]) -> float | None:
        """Estimate the time for all images asked for, and for those `coming`, by evaluator.

        None until a shard of each evaluator has been timed.
        """
        images = Counter(coming)
        for cell, work in self._unfinished.items():
            images[cell.evaluator] += work.left
        images = +images
        if any(name not in self._judged for name in images):
            return None
        each = {name: self._seconds[name] / self._judged[name] for name in images}
        return sum(count * each[name] for name, count in images.items()) / self._size

    def _collect(self, reference: Any) -> Judged | None:
        """Keep a shard; return its cell where that has failed."""
        if actor := self._restarting.pop(reference, None):
            self._idle.append(actor)
            return None
        cell, shard, actor = self._asked.pop(reference)
        content, error = _answer(reference)
        unusable = _has_lost_its_device(error)
        if unusable:
            actor.__ray_call__.remote(lambda _: os._exit(1))
        if unusable or isinstance(error, RayError):
            until_there = actor.__ray_ready__.options(max_task_retries=-1)
            self._restarting[until_there.remote()] = actor
        else:
            self._idle.append(actor)
        if cell not in self._unfinished:
            return None
        if error:
            return self._failed(cell, shard, error)
        seconds = from_parquet(content)[1]
        self._seconds[cell.evaluator] += seconds
        self._judged[cell.evaluator] += len(shard)
        work = self._unfinished[cell]
        work.pace.add(len(shard), seconds)
        patiently(lambda: work.store.add(shard, content), say=self._say)
        if not work.left:
            self._whole.append(cell)
        return None

    def _failed(self, cell: Cell, shard: Shard, cause: Exception) -> Judged | None:
        """Have a shard wait to be asked again; return its cell where that is of no use."""
        why = f"{type(cause).__name__}: {cause}".splitlines()[0]
        self._failures[cell, shard] += 1
        failures = self._failures[cell, shard]
        if isinstance(cause, OWN_FAULTS) or failures > MAX_FAILURES:
            self._drop(cell)
            return Judged(cell, error=why)
        reason = "its process died" if isinstance(cause, RayError) else why
        self._say(f"{cell.evaluator} of {cell.trial} is asked again: {reason}")
        self._resting.append((time.monotonic() + wait_after(failures), cell, shard))
        return None

    def _wake(self) -> None:
        """Have the shards that have waited long enough take their turn again."""
        now = time.monotonic()
        for entry in [entry for entry in self._resting if entry[0] <= now]:
            self._resting.remove(entry)
            _, cell, shard = entry
            work = self._unfinished[cell]
            if not work.has_waiting:
                self._await_turn(cell)
            work.again.append(shard)
        self._hand_out()

    def _await_turn(self, cell: Cell) -> None:
        heapq.heappush(self._waiting, (EXPENSE[cell.evaluator], next(self._order), cell))

    def _merge(self, cell: Cell) -> Judged:
        store = self._unfinished[cell].store
        ledger, seconds = store.merged()
        content = to_parquet(ledger, seconds=seconds, judged_by=store.judged_by())
        return Judged(cell, content)

    def _drop(self, cell: Cell) -> None:
        del self._unfinished[cell]
        self._waiting = [entry for entry in self._waiting if entry[2] != cell]
        self._resting = [entry for entry in self._resting if entry[1] != cell]
        heapq.heapify(self._waiting)

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            cell = self._waiting[0][2]
            shard = self._unfinished[cell].next_shard()
            if not self._unfinished[cell].has_waiting:
                heapq.heappop(self._waiting)
            actor = self._idle.pop()
            reference = actor.judge.remote(cell.artifact_uri, cell.trial, cell.evaluator, shard)
            self._asked[reference] = (cell, shard, actor)


def _has_lost_its_device(error: Exception | None) -> bool:
    """Tell whether a process may be of no more use: an error of CUDA is raised by all that follows.

    torch's word for it is RuntimeError, of which these are others.
    """
    others = (torch.OutOfMemoryError, *OWN_FAULTS)
    return isinstance(error, RuntimeError) and not isinstance(error, others)


def _answer(reference: Any) -> tuple[bytes, Exception | None]:
    """Return a shard's ledger, or what the evaluator raised, or a RayError where it died."""
    try:
        return ray.get(reference), None
    except RayTaskError as error:
        return b"", error.cause or error
    except RayError as error:
        return b"", error
