"""Where a study stands: the line of a run, and what MLflow says of any."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from grid.plan import Plan, format_seconds
from trainables.scale import Scale
from trainables.store.results import ARTIFACTS, DATABASE, database_uri, is_in_use
from trainables.store.tracking import STOPPED, Tracker, TrialRun, create_database

QUIET_SECONDS = 15.0
WATCH_SECONDS = 2.0


@dataclass
class Progress:
    """Where a run stands. `cost_total` and `cost_done` are training costs in the plan's unit.

    `training_seconds`: of all trials together, for the cost done, the first of which `began` then.
    """

    trials: int
    cells: int
    epochs: int
    cost_total: float
    cost_done: float = 0.0
    training_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    began: float = math.inf
    trials_done: int = 0
    trials_trained: int = 0
    epochs_done: int = 0
    cells_done: int = 0
    running: dict[str, str] = field(default_factory=dict)

    @property
    def pace(self) -> float:
        """The seconds that a unit of cost has taken to train; 0: not known yet."""
        return self.training_seconds / self.cost_done if self.cost_done else 0.0

    def trained(self, cost: float, seconds: float, now: float) -> None:
        """Count work that a trial has done by now; what another run did is none of this one's."""
        if now - seconds < self.started:
            self.cost_total -= cost
            return
        self.began = min(self.began, now - seconds)
        self.cost_done += cost
        self.training_seconds += seconds

    def line(self, judged: tuple[float, float], now: float) -> str:
        """Say where the run stands, in one line.

        judged: the seconds of all evaluators together that cells have taken, and those left.
        """
        running, seconds = "; ".join(self.running.values()), self.seconds_left(judged, now)
        left = (
            "time left unknown yet" if seconds is None else f"about {format_seconds(seconds)} left"
        )
        return (
            f"trials {self.trials_done}/{self.trials} | epochs {self.epochs_done}/{self.epochs} | "
            f"cells {self.cells_done}/{self.cells} | {left}"
            + (f" | {len(self.running)} running: {running}" if running else "")
        )

    def seconds_left(self, judged: tuple[float, float], now: float) -> float | None:
        """Estimate the time left: the work left by as many as have worked at once so far.

        Work is counted in the seconds of trials and evaluators; the start of processes is none.
        None before a fiftieth of the work is done.
        """
        spent, left = self.training_seconds + judged[0], judged[1]
        left += max(0.0, self.cost_total - self.cost_done) * self.pace
        if not spent or spent < 0.02 * (spent + left):
            return None
        if self.began == math.inf:  # nothing has been trained
            self.began = now - judged[0]
        return left * (now - self.began) / spent


class ProgressLine:
    """Show one changing line on a terminal, or a line every 15 seconds elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        self._shown_at = time.monotonic()
        if self._status:
            self._status.start()

    def show(self, text: str) -> None:
        """Show where things stand now, as much of it as one line of the terminal holds."""
        width = self._console.width - 3  # beside the spinner
        text = text if len(text) <= width else f"{text[: width - 1]}…"
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


def open_tracker(
    results: Path, mlflow: str | None, scale: Scale, say: Callable[[str], None] = print
) -> Tracker:
    """Open the experiment of a scale; its database is made on first use.

    Only one command at a time runs on a results folder, so only it writes to the database there.
    `say` is told when the server is away.
    """
    if not mlflow:
        create_database(results)
    return Tracker(
        mlflow or database_uri(results),
        experiment=f"robustness-{scale.name}",
        artifacts=None if mlflow else results.resolve() / ARTIFACTS,
        owner=f"{platform.node()}:{results.resolve()}",
        say=say,
    )


def open_existing(results: Path, mlflow: str | None, scale: Scale) -> Tracker:
    """Open the experiment of a study that was run; ValueError when there is no database."""
    if not mlflow and not (results / DATABASE).exists():
        raise ValueError(f"{results} holds no {DATABASE}: run the study first, or --mlflow")
    tracker = open_tracker(results, mlflow, scale)
    # Other commands, which hold other folders, may be using a server.
    tracker.live = is_in_use(results) or (None if mlflow else False)
    return tracker


def print_status(
    results: Path, mlflow: str | None, scale: Scale, plan: Plan, *, watch: bool
) -> None:
    """Print where a plan stands; `watch`: again every two seconds while a run uses the results.

    What a server has is watched until the command is stopped.
    ValueError when there is no database.
    """
    console = Console(soft_wrap=True)
    while True:
        tracker = open_existing(results, mlflow, scale)
        described = describe_status(tracker, plan, now=time.time())
        if watch:
            console.clear()
        print(described, flush=True)
        if not watch or tracker.live is False:
            return
        time.sleep(WATCH_SECONDS)


def describe_status(tracker: Tracker, plan: Plan, *, now: float) -> str:
    """Say which outcomes a plan's trials have, cells judged, time spent, and what is under way.

    now: seconds since the epoch.
    """
    runs = tracker.trials()
    states = Counter(_state(runs[t.digest]) if t.digest in runs else "waiting" for t in plan)
    there = [(trial, runs[trial.digest]) for trial in plan if trial.digest in runs]
    over = ("collapsed", STOPPED)
    judgeable = [t for t in plan if t.digest not in runs or runs[t.digest].outcome not in over]
    cells = sum(len(trial.evaluators) for trial in judgeable)
    judged = sum(len(set(trial.evaluators) & set(run.cells)) for trial, run in there)
    spent = sum(tracker.seconds(run) for _, run in there)
    lines = [
        f"{len(plan.trials)} trials: "
        + ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        f"{judged} of {cells} cells judged; {format_seconds(spent)} of training and judging",
    ]
    for trial, run in there:
        if run.outcome == "training":
            began = format_seconds(now - run.start_time / 1000)
            epochs = f"epoch {run.logged_epochs}/{trial.recipe.epochs}"
            epochs = epochs if trial.recipe.epochs else "its weights are read"
            lines.append(f"{_state(run)}: {trial.name}: {epochs}, begun {began} ago")
        elif run.outcome in ("failed", "blocked", *over):
            lines.append(f"{run.outcome}: {trial.name}: {run.reason}")
    return "\n".join(lines)


def _state(run: TrialRun) -> str:
    """Return a trial's state without the epoch that it stopped at."""
    return run.state.partition(" at epoch")[0]
