"""Run a plan: Ray Tune trains what is missing while the evaluator pool judges what is trained."""

from __future__ import annotations

import fcntl
import logging
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from evaluators import evaluator_named
from grid.assess import EvaluatorPool
from grid.plan import Plan
from grid.plan import Trial as PlannedTrial
from grid.progress import ProgressLine
from grid.record import Recorder
from grid.report.build import write_report
from grid.studies import Study
from trainables.data import load_data
from trainables.scale import Scale
from trainables.source import EMBEDDED, DataSource
from trainables.tracking import Tracker, check_address
from trainables.trial import RecipeTrial

MAX_FAILURES = 2
TUNE_FOLDER = "tune"
SHARDS_FOLDER = "shards"
OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The resources of one trial; they must not change its result, beyond rounding."""

    cpus: int = 1
    gpus: float = 0.0
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run of the command ended."""

    trained: int
    judged: int
    failures: tuple[str, ...]
    report: Path


def tracking_uri(results: Path, mlflow: str | None) -> str:
    """Return the MLflow address: the one given, or the database in the results folder."""
    return mlflow or f"sqlite:///{results.resolve()}/mlflow.db"


def open_tracker(
    results: Path, mlflow: str | None, scale: Scale, say: Callable[[str], None] = print
) -> Tracker:
    """Open the experiment of a scale; its database is made on first use.

    `say` is told when the server is away.
    """
    check_address(mlflow or "")
    artifacts = None if mlflow else results.resolve() / "artifacts"
    return Tracker(
        tracking_uri(results, mlflow),
        experiment=f"robustness-{scale.name}",
        artifacts=artifacts,
        say=say,
    )


@contextmanager
def sole_run(results: Path) -> Iterator[None]:
    """Hold the results folder for one run of the command; ValueError when it cannot be had."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock = (results / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"results folder {results} is not writable: {error.strerror}") from None
    with lock:
        _lock(lock, results)
        yield


def _lock(file: IO[str], results: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"another run is using {results}; wait for it, or give --results another folder"
        ) from None


def run_study(
    study: Study,
    plan: Plan,
    scale: Scale,
    *,
    results: Path,
    mlflow: str | None,
    placement: Placement,
    source: DataSource = EMBEDDED,
    manifest: str = "",
) -> Finished:
    """Train and judge what is missing of a plan, then write the report.

    Raises ValueError before any compute when the run cannot be; KeyboardInterrupt after a clean
    stop. What is done already is found in MLflow and left alone. `manifest` names the data as the
    doctor found it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_address(mlflow or "")
    data = load_data(scale, source)
    _check_plan(plan, scale)
    with sole_run(results):
        line = ProgressLine()
        try:
            lanes = _start_ray(placement)
            uri = tracking_uri(results, mlflow)
            pool = _pool(lanes, uri, scale, source, results, placement)
            tracker = open_tracker(results, mlflow, scale, say=line.say)
            parent = tracker.open_study(study.name, _describe(study, plan, scale))
            recorder = Recorder(
                tracker,
                plan,
                pool,
                study=study.name,
                parent=parent,
                scale=scale,
                data=data,
                manifest=manifest,
                line=line,
            )
            todo = recorder.trials_to_train()
            line.say(_opening(plan, todo, recorder, lanes))
            recorder.start()
            try:
                if todo:
                    _train(todo, recorder, results, placement, lanes, source)
                recorder.finish()
            except KeyboardInterrupt:
                recorder.abandon()
                raise
            report = write_report(tracker, study, plan, scale, results / "report")
            tracker.close_study(parent, report.parent, complete=not recorder.failures)
        finally:
            line.close()
            ray.shutdown()
    return Finished(
        trained=recorder.progress.trials_done,
        judged=recorder.progress.cells_done,
        failures=tuple(recorder.failures),
        report=report,
    )


def _pool(
    lanes: int, uri: str, scale: Scale, source: DataSource, results: Path, placement: Placement
) -> EvaluatorPool:
    folder = results / SHARDS_FOLDER
    threads, gpus = placement.cpus, placement.gpus / 4
    return EvaluatorPool(lanes, uri, scale, source, folder, threads=threads, gpus=gpus)


def _check_plan(plan: Plan, scale: Scale) -> None:
    """Build what only a name stands for so far: evaluators and timm's models."""
    for name in {name for trial in plan for name in trial.evaluators}:
        evaluator_named(name, scale)
    from_timm = {t.recipe.model: t.recipe for t in plan if t.recipe.family == "timm"}
    if from_timm:
        from trainables.models import check_model

        for recipe in from_timm.values():
            check_model(recipe)


def _start_ray(placement: Placement) -> int:
    """Start Ray; return how many trials run at once. ValueError if not even one can."""
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    there = ray.cluster_resources()
    lanes = math.floor(there.get("CPU", 0) / placement.cpus)
    if placement.gpus:
        lanes = min(lanes, math.floor(there.get("GPU", 0) / placement.gpus))
    if lanes < 1:
        raise ValueError(
            f"a trial needs {placement.cpus} CPUs and {placement.gpus:g} GPUs, but Ray has "
            f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; "
            "lower --cpus-per-trial or --gpus-per-trial"
        )
    return int(lanes)


class _PlanOrder(FIFOScheduler):  # type: ignore[misc]
    """Start trials in the plan's order, and a student only when its teacher has ended.

    Tune starts whatever is pending, in no order, so trials wait as paused. As many as run at
    once are let go ahead of time: Tune only keeps an actor for reuse if one is.
    """

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self._lanes = lanes
        self._known: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.trial_id not in self._known:
            self._known.add(trial.trial_id)
            trial.set_status(Trial.PAUSED)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trials = tune_controller.get_trials()
        pending = [trial for trial in trials if trial.status == Trial.PENDING]
        if len(pending) < self._lanes:
            unended = {_digest_of(trial) for trial in trials if not trial.is_finished()}
            for trial in trials:
                if trial.status == Trial.PAUSED and trial.config["trial"]["teacher"] not in unended:
                    return trial
        return pending[0] if pending else None


class _Events(tune.Callback):  # type: ignore[misc]
    """Hand Tune's events to the recorder; nothing here may block or raise."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks; a thread cannot be, and a copy must not write.
        return {"_recorder": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._recorder:
            self._recorder.started(_digest_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._recorder:
            self._recorder.reported(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._recorder:
            self._recorder.failed(_digest_of(trial), _last_line(trial))


def _digest_of(trial: Trial) -> str:
    return str(trial.config["trial"]["digest"])


def _last_line(trial: Any) -> str:
    error = trial.get_error()
    lines = [line for line in str(error).splitlines() if line.strip()] if error else []
    return lines[-1].strip() if lines else "unknown error"


def _train(
    todo: list[PlannedTrial],
    recorder: Recorder,
    results: Path,
    placement: Placement,
    lanes: int,
    source: DataSource,
) -> None:
    """Train trials with Tune: one grid search over resolved recipes, in the plan's order.

    `lanes` run at once, as their resources allow, on actors that are reused.
    """
    storage = str(results.resolve())
    shutil.rmtree(results / TUNE_FOLDER, ignore_errors=True)
    configs = [
        {
            "digest": trial.digest,
            "teacher": trial.recipe.teacher.digest() if trial.recipe.teacher else None,
            "recipe": trial.recipe.model_dump(mode="json"),
            "storage": storage,
            "threads": placement.cpus,
            "device": "cuda" if placement.gpus else "cpu",
            "source": source,
            "compile": placement.compile,
        }
        for trial in todo
    ]
    resources = {"cpu": placement.cpus, "gpu": placement.gpus}
    tuner = tune.Tuner(
        tune.with_resources(RecipeTrial, resources),
        param_space={"trial": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            scheduler=_PlanOrder(lanes),
            trial_name_creator=_digest_of,
            trial_dirname_creator=_digest_of,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=storage,
            # Trials keep their own checkpoints, by digest.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[_Events(recorder)],
            verbose=0,
        ),
    )
    tuner.fit()


def _describe(study: Study, plan: Plan, scale: Scale) -> str:
    tables = ", ".join(table.name for table in plan.tables) or "no tables"
    return f"{len(plan.trials)} trials of study {study.name} ({tables}) at scale {scale.title}"


def _opening(plan: Plan, todo: list[PlannedTrial], recorder: Recorder, lanes: int) -> str:
    progress = recorder.progress
    return (
        f"{len(plan.trials)} trials: {len(plan.trials) - len(todo)} done, {len(todo)} to train "
        f"({lanes} at once); {progress.cells} cells to judge"
    )
