"""A benchmark's figures, and how its sides are timed: in turns, so that noise meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Clock = Callable[[], float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DisagreementError(Exception):
    """The two sides of a benchmark did not compute the same thing."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured, once a repeat, beside the target; `same`: what both sides agreed on."""

    name: str
    values: tuple[float, ...]
    target: float
    better: Literal["more", "less"] = "more"
    unit: str = "x"
    same: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> bool:
        """Whether the median meets the target."""
        return self.median >= self.target if self.better == "more" else self.median <= self.target

    def spread(self) -> str:
        """Write the median with the quartiles, or alone where there are too few values."""
        if len(self.values) < 4:
            return f"{self.median:.2f}"
        low, middle, high = statistics.quantiles(self.values, n=4)
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def in_turns(*sides: Callable[[], object], repeats: int, clock: Clock) -> list[tuple[float, ...]]:
    """Return the seconds of each side, repeat by repeat; a first, uncounted one warms up.

    A clock of the process's own CPU time is not moved by other work on the machine.
    """
    rounds = [tuple(seconds(side, clock) for side in sides) for _ in range(1 + repeats)]
    return rounds[1:]


def device_seconds() -> float:
    """Return the process's own CPU time, or a GPU's: the wall's once all it was given is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    """Name what the models run on."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def rate(images: int, taken: Iterable[float]) -> str:
    """Say how many images a second of ours the median time comes to, and on what."""
    return f"ours {images / statistics.median(taken):.3g} images a second on {device_name()}"


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Return how long the work takes by a clock."""
    began = clock()
    work()
    return clock() - began


def require(agreed: bool, what: str) -> None:
    """Raise DisagreementError unless both sides agree."""
    if not agreed:
        raise DisagreementError(f"the two sides differ: {what}")
