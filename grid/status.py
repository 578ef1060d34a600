"""Where a study stands, read from MLflow alone: no Ray, no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from grid.plan import Plan
from grid.progress import format_seconds
from trainables.scale import Scale
from trainables.store.results import ARTIFACTS, DATABASE, database_uri, is_in_use
from trainables.store.tracking import Tracker, TrialRun, check_address, create_database


def open_tracker(
    results: Path, mlflow: str | None, scale: Scale, say: Callable[[str], None] = print
) -> Tracker:
    """Open the experiment of a scale; its database is made on first use.

    Only one command at a time runs on a results folder, so only it writes to the database there.
    `say` is told when the server is away.
    """
    check_address(mlflow or "")
    if not mlflow:
        create_database(results)
    return Tracker(
        mlflow or database_uri(results),
        experiment=f"robustness-{scale.name}",
        artifacts=None if mlflow else results.resolve() / ARTIFACTS,
        shared=mlflow is not None,
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


def describe_status(tracker: Tracker, plan: Plan, *, now: float) -> str:
    """Say which outcomes a plan's trials have, cells judged, time spent, and what is under way.

    now: seconds since the epoch.
    """
    runs = tracker.trials()
    states = Counter(_state(runs[t.digest]) if t.digest in runs else "waiting" for t in plan)
    there = [(trial, runs[trial.digest]) for trial in plan if trial.digest in runs]
    judgeable = [t for t in plan if t.digest not in runs or runs[t.digest].outcome != "collapsed"]
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
            lines.append(f"{_state(run)}: {trial.name}: {epochs}, begun {began} ago")
        elif run.outcome in ("failed", "blocked", "collapsed"):
            lines.append(f"{run.outcome}: {trial.name}: {run.reason}")
    return "\n".join(lines)


def _state(run: TrialRun) -> str:
    """Return a trial's state without the epoch that it stopped at."""
    return run.state.partition(" at epoch")[0]


def print_status(results: Path, mlflow: str | None, scale: Scale, plan: Plan) -> None:
    """Print where a study stands."""
    print(describe_status(open_existing(results, mlflow, scale), plan, now=time.time()))
