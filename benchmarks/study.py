"""The digits study by one command, beside a fresh process for every training and cell.

The scripts are what many labs run: one trains a model and stores its weights, one asks one
evaluator of them, each pays for its imports. Two run at a time, of one thread each, so that both
sides have the same cores, and the weights and ledgers must be the same to the last bit. A table is
timed in turns, then the whole study, of which a turn takes half an hour.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.measure import Figure, require, seconds
from grid.design import with_design
from grid.options import RunOptions
from grid.plan import Trial, build_plan
from grid.study import load_study
from trainables.scale import DIGITS
from trainables.store.tracking import Tracker

AT_ONCE = 2


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the wall clocks, ours with all that the command brings up."""
    if quick:
        yield beside_scripts(["--tables", "T6", "--evaluators", "clean"], repeats=1)
    else:
        for arguments in (["--tables", "T6"], []):
            yield beside_scripts(arguments, repeats=5)


def beside_scripts(arguments: Sequence[str], *, repeats: int) -> Figure:
    """Time both sides in turns on what the command's arguments ask for."""
    options = RunOptions.read(arguments)
    study = load_study(options.study)
    plan = build_plan(study, DIGITS, tables=options.tables, evaluators=options.evaluators)
    held_out = DIGITS.data_set.held_out_images
    plan, _ = with_design(options.model_copy(update={"plan": True}), study, plan, DIGITS, held_out)
    cells = sum(len(trial.evaluators) for trial in plan)
    walls = [one_turn(list(plan), arguments) for _ in range(repeats)]
    ours, theirs = (statistics.median(side) for side in zip(*walls, strict=True))
    return Figure(
        name=f"{len(plan.trials)} trainings and {cells} cells, a script each / ours",
        values=tuple(their_s / our_s for our_s, their_s in walls),
        target=5,
        same=f"the same weights and ledgers to the last bit, ours in {ours:.0f} s, {theirs:.0f} s",
    )


def one_turn(trials: Sequence[Trial], arguments: Sequence[str]) -> tuple[float, float]:
    """Return the wall clocks of the command and of the scripts, which must leave the same."""
    with tempfile.TemporaryDirectory() as folder:
        results, scripts = Path(folder) / "results", Path(folder) / "scripts"
        ours = seconds(lambda: run_alone(["grid/run.py", *arguments, "--results", str(results)]))
        theirs = seconds(lambda: run_scripts(trials, scripts))
        require_same(trials, results, scripts)
    return ours, theirs


def run_scripts(trials: Sequence[Trial], folder: Path) -> None:
    """Train every trial, teachers first, then ask every cell, each in a process of its own."""
    folder.mkdir()
    untaught, taught = (
        [
            [*("-m", "benchmarks.study"), trial.recipe.model_dump_json(), str(folder)]
            for trial in trials
            if (trial.recipe.teacher is None) is alone
        ]
        for alone in (True, False)
    )
    asked = [
        [
            *("-m", "evaluators", "--weights", str(weights_of(trial.digest, folder))),
            *("--evaluators", name, "--ledger", str(folder / trial.digest / name)),
            *(["--attack-images", str(trial.images[name])] if name in trial.images else []),
        ]
        for trial in trials
        for name in trial.evaluators
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for commands in (untaught, taught, asked):
            list(pool.map(run_alone, commands))


def run_alone(command: Sequence[str]) -> None:
    """Run Python on some arguments, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)  # noqa: S603


def require_same(trials: Sequence[Trial], results: Path, scripts: Path) -> None:
    """See that both sides left the same weights and ledgers."""
    tracker = Tracker(
        f"sqlite:///{results}/mlflow.db",
        experiment="robustness-digits",
        artifacts=results / "artifacts",
    )
    runs = tracker.trials()
    for trial in trials:
        ours = results / "trials" / trial.digest / "weights.safetensors"
        same = ours.read_bytes() == weights_of(trial.digest, scripts).read_bytes()
        require(same, f"the weights of {trial.recipe.describe()}")
        for name in trial.evaluators:
            kept = tracker.ledger(runs[trial.digest], name)
            found = pq.read_table(scripts / trial.digest / name / f"{name}.parquet")
            require(found.equals(pq.read_table(io.BytesIO(kept))), f"{name} of {trial.digest}")


def weights_of(digest: str, folder: Path) -> Path:
    """Return where a script leaves a trial's weights."""
    return folder / f"{digest}.safetensors"


def train_alone(recipe_json: str, folder: Path) -> None:
    """Train a recipe and store its weights: what a script of its own does."""
    import torch

    from trainables.data.load import load_data
    from trainables.networks import build_classifier
    from trainables.recipe import Recipe
    from trainables.store.checkpoint import save_weights, stored_weights
    from trainables.train.loop import train
    from trainables.weights import fit_weights

    recipe = Recipe.model_validate_json(recipe_json)
    classifier, teacher = build_classifier(recipe), None
    if recipe.teacher:
        digest = recipe.teacher.digest()
        taught_by = str(weights_of(digest, folder))
        teacher = build_classifier(recipe.teacher)
        fit_weights(stored_weights(taught_by, digest), teacher, taught_by)
    data, device = load_data(DIGITS), torch.device("cpu")
    for _ in train(recipe, classifier, data, device=device, teacher=teacher):
        pass
    save_weights(str(weights_of(recipe.digest(), folder)), classifier, recipe_json)


if __name__ == "__main__":
    train_alone(sys.argv[1], Path(sys.argv[2]))
