"""A part of the digits study by one command, beside a fresh process for every training and cell.

The scripts are what many labs run: one trains a model and stores its weights, one asks one
evaluator of them, each pays for its imports. Two run at a time, of one thread each, so that both
sides have the same cores, and the weights and ledgers must be the same to the last bit.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.measure import Figure, require
from grid.plan import Trial, build_plan
from grid.studies import load_study
from trainables.scale import DIGITS
from trainables.tracking import Tracker

AT_ONCE = 2


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the wall clocks, ours with all that the command brings up."""
    tables = ["T6"] if quick else ["T1", "T5", "T6"]
    evaluators = ["clean"] if quick else None
    plan = build_plan(load_study("paper"), DIGITS, tables=tables, evaluators=evaluators)
    only = ["--evaluators", *evaluators] if evaluators else []
    with tempfile.TemporaryDirectory() as folder:
        results, scripts = Path(folder) / "results", Path(folder) / "scripts"
        began = time.perf_counter()
        run_alone(["grid/run.py", "--tables", *tables, *only, "--results", str(results)])
        between = time.perf_counter()
        run_scripts(list(plan), scripts)
        ended = time.perf_counter()
        cells = require_same(list(plan), results, scripts)
    yield Figure(
        name=f"{len(plan.trials)} trainings and {cells} cells, a script each / ours",
        values=((ended - between) / (between - began),),
        target=5,
        same="the same weights and ledgers to the last bit",
    )


def run_scripts(trials: Sequence[Trial], folder: Path) -> None:
    """Train every trial, then ask every cell, each in a process of its own."""
    folder.mkdir()
    trainings = [
        [*("-m", "benchmarks.study"), t.recipe.model_dump_json(), str(weights_of(t, folder))]
        for t in trials
    ]
    asked = [
        [
            *("-m", "evaluators", "--weights", str(weights_of(trial, folder))),
            *("--evaluators", name, "--ledger", str(folder / trial.digest / name)),
        ]
        for trial in trials
        for name in trial.evaluators
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for commands in (trainings, asked):
            list(pool.map(run_alone, commands))


def run_alone(command: Sequence[str]) -> None:
    """Run Python on some arguments, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)  # noqa: S603


def require_same(trials: Sequence[Trial], results: Path, scripts: Path) -> int:
    """See that both sides left the same weights and ledgers; return how many cells there are."""
    tracker = Tracker(
        f"sqlite:///{results}/mlflow.db",
        experiment="robustness-digits",
        artifacts=results / "artifacts",
    )
    runs, cells = tracker.trials(), 0
    for trial in trials:
        ours = results / "trials" / trial.digest / "weights.safetensors"
        same = ours.read_bytes() == weights_of(trial, scripts).read_bytes()
        require(same, f"the weights of {trial.recipe.describe()}")
        for name in trial.evaluators:
            kept = tracker.ledger(runs[trial.digest], name)
            found = pq.read_table(scripts / trial.digest / name / f"{name}.parquet")
            require(found.equals(pq.read_table(io.BytesIO(kept))), f"{name} of {trial.digest}")
            cells += 1
    return cells


def weights_of(trial: Trial, folder: Path) -> Path:
    """Return where a script leaves a trial's weights."""
    return folder / f"{trial.digest}.safetensors"


def train_alone(recipe_json: str, out: str) -> None:
    """Train a recipe and store its weights: what a script of its own does."""
    import torch

    from trainables.checkpoint import save_weights
    from trainables.data import load_data
    from trainables.loop import train
    from trainables.models import build_classifier
    from trainables.recipe import Recipe

    recipe = Recipe.model_validate_json(recipe_json)
    classifier = build_classifier(recipe)
    for _ in train(recipe, classifier, load_data(DIGITS), device=torch.device("cpu")):
        pass
    save_weights(out, classifier, recipe_json)


if __name__ == "__main__":
    train_alone(*sys.argv[1:])
