"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from evaluators import EVALUATORS
from evaluators.actor import EvaluatorActor
from evaluators.ledger import from_parquet, to_parquet
from evaluators.shards import ShardStore
from trainables.data import Shard
from trainables.patience import patiently
from trainables.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.scale import Scale
from trainables.source import DataSource
from trainables.tracking import Credentials
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


class EvaluatorPool:
    """Long-lived actors, one shard of a cell at a time each, the cheapest evaluators first.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. On GPUs each holds its share of one for as long as it lives. An actor that
    dies is restarted by Ray, and its shard is asked again after a wait, a few times; so is one that
    ran out of memory. One whose device failed is ended, for a new one. Shards that are done lie in
    `folder` until their cell is: a run that was stopped goes on behind them. `say` is told what is
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
        given = {
            "threads": threads,
            "device": "cuda" if gpus else "cpu",
            "hung_after": hung_after,
            "credentials": Credentials.of_environment(),
        }
        self._idle = [
            actor.options(**options).remote(tracking_uri, scale, source, **given)
            for _ in range(size)
        ]
        self._actors, self._gpus = list(self._idle), gpus
        self._homes: dict[str, str] = {}  # the nodes of actors
        self._size, self._folder = size, folder
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, Cell, Shard]] = []
        self._asked: dict[Any, tuple[Cell, Shard, Any]] = {}
        self._whole: list[Cell] = []
        self._unfinished: dict[Cell, tuple[ShardStore, set[Shard]]] = {}
        self._restarting: dict[Any, Any] = {}
        self._failures: Counter[tuple[Cell, Shard]] = Counter()
        self._resting: list[tuple[float, Cell, Shard]] = []
        self._say = say
        # Of each evaluator: the seconds of the shards judged, their number, and how many wait.
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._judged: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()

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
        known = ray._private.state.actors() if self._gpus else {}
        for actor in (actor._actor_id.hex() for actor in self._actors):
            told = known.get(actor, {})
            # One that is being restarted keeps its place.
            if told.get("State") == "ALIVE":
                self._homes[actor] = told["Address"]["NodeID"]
        nodes = Counter(self._homes.values())
        return {node: count * self._gpus for node, count in nodes.items()}

    def submit(self, cell: Cell, shards: int) -> None:
        """Ask for the shards of a cell that are not done yet; they wait their turn."""
        store = ShardStore(self._folder / f"{cell.trial}-{cell.question}", shards)
        missing = store.missing()
        self._unfinished[cell] = (store, set(missing))
        for shard in missing:
            self._await_turn(cell, shard)
        if not missing:
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
        store, _ = self._unfinished.pop(cell)
        store.clear()

    def seconds_left(self, coming: Counter[str]) -> float | None:
        """Estimate the time for all shards asked for, and for those `coming`, by evaluator.

        None until a shard of each evaluator has been timed.
        """
        shards = coming + self._queued
        shards += Counter(cell.evaluator for cell, _, _ in self._asked.values())
        shards += Counter(cell.evaluator for _, cell, _ in self._resting)
        if any(name not in self._judged for name in shards):
            return None
        each = {name: self._seconds[name] / self._judged[name] for name in shards}
        return sum(count * each[name] for name, count in shards.items()) / self._size

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
        self._seconds[cell.evaluator] += from_parquet(content)[1]
        self._judged[cell.evaluator] += 1
        store, missing = self._unfinished[cell]
        patiently(lambda: store.add(shard, content), say=self._say)
        missing.discard(shard)
        if not missing:
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
        told = "its process died" if isinstance(cause, RayError) else why
        self._say(f"{cell.evaluator} of {cell.trial} is asked again: {told}")
        self._resting.append((time.monotonic() + wait_after(failures), cell, shard))
        return None

    def _wake(self) -> None:
        """Have the shards that have waited long enough take their turn again."""
        now = time.monotonic()
        for entry in [entry for entry in self._resting if entry[0] <= now]:
            self._resting.remove(entry)
            self._await_turn(*entry[1:])
        self._hand_out()

    def _await_turn(self, cell: Cell, shard: Shard) -> None:
        self._queued[cell.evaluator] += 1
        heapq.heappush(self._waiting, (EXPENSE[cell.evaluator], next(self._order), cell, shard))

    def _merge(self, cell: Cell) -> Judged:
        store, _ = self._unfinished[cell]
        ledger, seconds = store.merged()
        content = to_parquet(ledger, seconds=seconds, judged_by=store.judged_by())
        return Judged(cell, content)

    def _drop(self, cell: Cell) -> None:
        del self._unfinished[cell]
        kept = [entry for entry in self._waiting if entry[2] != cell]
        self._queued[cell.evaluator] -= len(self._waiting) - len(kept)
        self._waiting = kept
        self._resting = [entry for entry in self._resting if entry[1] != cell]
        heapq.heapify(self._waiting)

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            _, _, cell, shard = heapq.heappop(self._waiting)
            self._queued[cell.evaluator] -= 1
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
