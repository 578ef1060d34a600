"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from evaluators.actor import EvaluatorActor
from evaluators.base import Score


@dataclass(frozen=True)
class Cell:
    """One evaluator on one trial's weights; `question` is the digest of what is asked."""

    trial: str
    artifact_uri: str
    evaluator: str
    question: str


@dataclass(frozen=True)
class Judged:
    """A cell's ledger and scores, or why there are none."""

    cell: Cell
    ledger: bytes = b""
    scores: tuple[Score, ...] = ()
    seconds: float = 0.0
    error: str = ""


class EvaluatorPool:
    """Long-lived actors, one cell at a time each.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. An actor that dies is restarted and its cell is asked again.
    """

    def __init__(self, size: int, tracking_uri: str, *, threads: int, gpus: float) -> None:
        actor = ray.remote(EvaluatorActor)
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        device = "cuda" if gpus else "cpu"
        self._idle = [
            actor.options(**options).remote(tracking_uri, threads=threads, device=device)
            for _ in range(size)
        ]
        self._waiting: deque[Cell] = deque()
        self._asked: dict[Any, tuple[Cell, Any]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    def submit(self, cell: Cell) -> None:
        """Ask for a cell; it waits its turn."""
        self._waiting.append(cell)
        self._hand_out()

    def poll(self, timeout: float) -> list[Judged]:
        """Return the cells judged by now, waiting up to `timeout` seconds for the first."""
        if not self._asked:
            return []
        ready, _ = ray.wait(list(self._asked), timeout=timeout)
        judged = [self._collect(reference) for reference in ready]
        self._hand_out()
        return judged

    def _collect(self, reference: Any) -> Judged:
        cell, actor = self._asked.pop(reference)
        self._idle.append(actor)
        try:
            ledger, scores, seconds = ray.get(reference)
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            return Judged(cell, error=f"{type(cause).__name__}: {cause}".splitlines()[0])
        return Judged(cell, ledger, tuple(scores), seconds)

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            cell, actor = self._waiting.popleft(), self._idle.pop()
            self._asked[actor.judge.remote(cell.artifact_uri, cell.evaluator)] = (cell, actor)
