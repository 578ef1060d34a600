"""Run a plan: Ray Tune trains what is missing while the evaluator pool judges what is trained."""

from __future__ import annotations

import fcntl
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from evaluators import evaluator_named
from grid.assess import EvaluatorPool
from grid.cluster import Placement, check_nodes, connect, trials_at_once
from grid.plan import Plan
from grid.plan import Trial as PlannedTrial
from grid.progress import ProgressLine
from grid.record import Recorder
from grid.status import open_tracker, tracking_uri
from grid.studies import Study
from trainables.data import load_data
from trainables.distributed import CONTROLLER, train_together
from trainables.scale import Scale
from trainables.source import EMBEDDED, DataSource
from trainables.tracking import check_address
from trainables.trial import RecipeTrial

MAX_FAILURES = 2
TUNE_FOLDER = "tune"
SHARDS_FOLDER = "shards"
EVALUATOR_GPUS = 0.25


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run of the command ended."""

    trained: int
    judged: int
    failures: tuple[str, ...]
    report: Path


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
    address: str | None = None,
    storage: str | None = None,
) -> Finished:
    """Train and judge what is missing of a plan, then write the report.

    Raises ValueError before any compute when the run cannot be; KeyboardInterrupt after a clean
    stop. What is done already is found in MLflow and left alone. `manifest` names the data as the
    doctor found it. address: of the Ray cluster, None to start Ray here. storage: a path or URI
    for what trials keep, None for the results folder.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_address(mlflow or "")
    data = load_data(scale, source)
    _check_plan(plan, scale, placement.workers)
    with sole_run(results):
        line = ProgressLine()
        try:
            connect(address)
            storage = _checked_storage(storage, results, mlflow)
            uri = tracking_uri(results, mlflow)
            pool, lanes = _share_out(placement, results, uri, scale, source)
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
            with _recording(recorder):
                if todo:
                    _train(todo, recorder, results, storage, placement, lanes, source)
            # What draws and tests is imported when there is something to tell.
            from grid.report.build import write_report

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


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    """Write down what happens meanwhile, to the last cell, or up to Ctrl-C."""
    recorder.start()
    try:
        yield
        recorder.finish()
    except KeyboardInterrupt:
        recorder.abandon()
        raise


def _checked_storage(storage: str | None, results: Path, mlflow: str | None) -> str:
    """Return where trials keep their files; ValueError where a node cannot use it."""
    shared = str(results.resolve())
    storage = storage or shared
    # Without a server the artifacts, which evaluators read, lie in the results.
    for where in {storage} if mlflow else {storage, shared}:
        if ill := check_nodes(where):
            raise ValueError("; ".join(ill))
    return storage


def _share_out(
    placement: Placement, results: Path, uri: str, scale: Scale, source: DataSource
) -> tuple[EvaluatorPool, int]:
    """Give the evaluators their share, and return how many trials fit at once beside them.

    On GPUs they have a quarter each of one GPU in eight, or of the only one.
    """
    lanes = trials_at_once(placement)
    size = max(1, int(ray.cluster_resources()["GPU"] // 2)) if placement.gpus else lanes
    gpus = EVALUATOR_GPUS if placement.gpus else 0.0
    folder = results / SHARDS_FOLDER
    pool = EvaluatorPool(size, uri, scale, source, folder, threads=placement.cpus, gpus=gpus)
    if not placement.gpus:
        return pool, lanes
    pool.wait_until_placed()
    try:
        return pool, trials_at_once(placement)
    except ValueError as error:
        raise ValueError(f"{error} (evaluators hold {size * EVALUATOR_GPUS:g} GPUs)") from None


def _check_plan(plan: Plan, scale: Scale, workers: int) -> None:
    """Build what only a name stands for so far: evaluators and timm's models.

    ValueError also where a recipe cannot be trained by that many workers.
    """
    if workers > 1:
        from trainables.team import check_team

        for trial in plan:
            check_team(trial.recipe, workers)
    for name in {name for trial in plan for name in trial.evaluators}:
        evaluator_named(name, scale)
    from_timm = {t.recipe.model: t.recipe for t in plan if t.recipe.family == "timm"}
    if from_timm:
        from trainables.models import check_model

        for recipe in from_timm.values():
            check_model(recipe)


class _PlanOrder(FIFOScheduler):  # type: ignore[misc]
    """Start trials in the plan's order, and a student only when its teacher has ended.

    Tune starts whatever is pending, in no order, so trials wait as paused. As many as run at
    once are let go ahead of time: Tune only keeps an actor for reuse if one is. But not `strict`ly
    limited trials, whose resources Tune does not know: they are let go only to run.
    """

    def __init__(self, lanes: int, *, strict: bool) -> None:
        super().__init__()
        self._lanes, self._strict = lanes, strict
        self._known: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.trial_id not in self._known:
            self._known.add(trial.trial_id)
            trial.set_status(Trial.PAUSED)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trials = tune_controller.get_trials()
        pending = [trial for trial in trials if trial.status == Trial.PENDING]
        running = [trial for trial in trials if trial.status == Trial.RUNNING]
        if len(pending) + len(running) * self._strict < self._lanes:
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


def _last_line(trial: Trial) -> str:
    # The file on this machine: Tune's own answer is read from the storage, where it may lack yet.
    path = Path(trial.error_file or "")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown error")


def _train(
    todo: list[PlannedTrial],
    recorder: Recorder,
    results: Path,
    storage: str,
    placement: Placement,
    lanes: int,
    source: DataSource,
) -> None:
    """Train trials with Tune: one grid search over resolved recipes, in the plan's order.

    `lanes` run at once, as their resources allow, on actors that are reused.
    """
    shutil.rmtree(results / TUNE_FOLDER, ignore_errors=True)
    # Tune writes these into the environment of its actors, which Ray logs; nodes have their own.
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {n for n in passed_on if not n.startswith("AWS_")}
    configs = [
        {
            "digest": trial.digest,
            "teacher": trial.recipe.teacher.digest() if trial.recipe.teacher else None,
            "recipe": trial.recipe.model_dump(mode="json"),
            "storage": storage,
            "threads": placement.cpus,
            "workers": placement.workers,
            "gpus": placement.gpus,
            "max_failures": MAX_FAILURES,
            "device": "cuda" if placement.gpus else "cpu",
            "source": source,
            "compile": placement.compile,
        }
        for trial in todo
    ]
    alone = placement.workers == 1
    resources = {"cpu": placement.cpus, "gpu": placement.gpus} if alone else CONTROLLER
    tuner = tune.Tuner(
        tune.with_resources(RecipeTrial if alone else train_together, resources),
        param_space={"trial": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            reuse_actors=alone,
            scheduler=_PlanOrder(lanes, strict=not alone),
            trial_name_creator=_digest_of,
            trial_dirname_creator=_digest_of,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(results.resolve()),
            # Trials keep their own checkpoints, by digest.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # A team that loses a worker is put together again by Ray Train.
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES if alone else 0),
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
