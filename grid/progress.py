"""The line a person follows: trials, epochs, accuracy, cells and the time left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console

QUIET_SECONDS = 15.0


@dataclass
class Progress:
    """Where a run stands. `cost_total` and `cost_done` are training costs in the plan's unit."""

    trials: int
    cells: int
    epochs: int
    cost_total: float
    cost_done: float = 0.0
    trials_done: int = 0
    epochs_done: int = 0
    cells_done: int = 0
    running: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def line(self, judging: float | None) -> str:
        """Say where the run stands, in one line.

        judging: the seconds that the cells asked for by now will take, None where unknown.
        """
        waiting = self.trials - self.trials_done - len(self.running)
        now = "; ".join(self.running.values())
        return (
            f"trials {self.trials_done} done, {len(self.running)} running, {waiting} waiting | "
            f"epochs {self.epochs_done}/{self.epochs} | cells {self.cells_done}/{self.cells} | "
            f"{self.time_left(judging)}" + (f" | {now}" if now else "")
        )

    def time_left(self, judging: float | None) -> str:
        """Estimate the time left: to train, from the cost done so far, or to judge if longer."""
        share = self.cost_done / self.cost_total if self.cost_total else 1.0
        if share < 0.02 or (share >= 1 and judging is None):
            return "time left unknown yet"
        training = (time.monotonic() - self.started) * (1 - min(share, 1.0)) / share
        return f"about {format_seconds(max(training, judging or 0.0))} left"


class ProgressLine:
    """Show one changing line on a terminal, or a line every 15 seconds elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        self._shown_at = time.monotonic()
        if self._status:
            self._status.start()

    def show(self, text: str) -> None:
        """Show where things stand now."""
        if self._status:
            self._status.update(text)
        elif time.monotonic() - self._shown_at >= QUIET_SECONDS:
            self._shown_at = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the changing line away."""
        if self._status:
            self._status.stop()


def format_seconds(seconds: float) -> str:
    """Write a duration as people say it: '45 s', '12 min', '3.5 h', '2.1 days'."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"
