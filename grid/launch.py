"""Run a plan: Ray Tune trains what is missing while the evaluator pool judges what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from urllib.request import url2pathname

import ray

from evaluators import EVALUATORS, columns_of, evaluator_named
from grid.assess import EvaluatorPool
from grid.cluster import (
    Needs,
    Placement,
    Placements,
    Room,
    check_nodes,
    connect,
    describe_nodes,
    wait_for_nodes,
)
from grid.plan import Plan
from grid.progress import ProgressLine
from grid.record import Recorder
from grid.signals import stop_on_signals
from grid.status import open_tracker
from grid.study import Study
from grid.training import train_missing
from trainables.data.base import Data
from trainables.data.listing import EMBEDDED, DataSource
from trainables.data.load import load_data
from trainables.models import MODELS
from trainables.scale import Scale
from trainables.store.patience import patiently
from trainables.store.results import DATABASE, sole_run
from trainables.store.tracking import Tracker, check_address

SHARDS_FOLDER = "shards"
EVALUATOR_GPUS = 0.25


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run of the command ended; `comparison` is where the MLflow UI shows its trials."""

    trained: int
    judged: int
    failures: tuple[str, ...]
    report: Path
    comparison: str


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is to be run, and where.

    `manifest` names the data as the check found it. address: of the Ray cluster, None to start
    Ray here. storage: a path or URI for what trials keep, None for the results folder.
    """

    study: Study
    plan: Plan
    scale: Scale
    results: Path
    mlflow: str | None
    placement: Placement
    source: DataSource = EMBEDDED
    manifest: str = ""
    address: str | None = None
    storage: str | None = None

    @property
    def placements(self) -> Placements:
        """How trials are placed: as the command says, but for what the study says of a family."""
        changes = self.study.placement.items()
        by_family = {family: replace(self.placement, **fields) for family, fields in changes}
        return Placements(self.placement, by_family)

    @property
    def is_begun(self) -> bool:
        """Whether MLflow may hold something of it already."""
        return bool(self.mlflow) or (self.results / DATABASE).exists()

    def needs(self, tracker: Tracker) -> Needs:
        """Return what it needs of every node."""
        results = str(self.results.resolve())
        shared = _path_of(tracker.artifacts) if self.mlflow else results
        through_server = shared.startswith(("mlflow-artifacts:", "http:", "https:"))
        places = [self.storage or results]
        if "://" not in shared and not through_server:
            places.append(shared)
        root = self.source.root
        return Needs(
            storage=tuple(dict.fromkeys(places)),
            data=() if root is None else (root, *self.source.folders.values()),
            mlflow=self.mlflow if through_server else None,
            gpus=any(placement.gpus for placement in self.placements.of_all(self.plan)),
        )


def _path_of(uri: str) -> str:
    """Return the path that a file URI names; any other URI as it is."""
    return url2pathname(uri.removeprefix("file://")) if uri.startswith("file:///") else uri


def run_study(launch: Launch) -> Finished:
    """Train and judge what is missing of a plan, then write the report.

    Raises ValueError before any compute when the run cannot be; KeyboardInterrupt after a clean
    stop. What is done already is found in MLflow and left alone; where that is all, Ray is not
    started.
    """
    stop_on_signals()
    check_address(launch.mlflow or "")
    data = load_data(launch.scale, launch.source)
    _check_plan(launch)
    with sole_run(launch.results):
        line = ProgressLine()
        try:
            recorder = _recorder(launch, data, line) if launch.is_begun else None
            if recorder and recorder.is_all_done:
                line.say(_opening(recorder, launch.plan))
                parent = _open_study(launch, recorder, data)
                finished = _report(launch, recorder, parent, line)
                if not finished.failures:
                    return finished
                recorder = _recorder(launch, data, line)  # some ledgers are damaged
            connect(launch.address)
            stop_on_signals()  # again: Ray has set a handler of its own
            Room().check(launch.placements.of_all(launch.plan))
            recorder = recorder or _recorder(launch, data, line)
            needs = launch.needs(recorder.tracker)
            ill = {node: why for node, why in check_nodes(needs).items() if why}
            if ill:
                raise ValueError("; ".join(f"node {node}: {why}" for node, why in ill.items()))
            recorder.mend(needs.storage[0])
            pool, room = _share_out(launch, recorder.tracker.uri, line.say)
            parent = _open_study(launch, recorder, data)
            line.say(_opening(recorder, launch.plan, room.lanes(launch.placement)))
            with _recording(recorder, parent, pool):
                train_missing(
                    recorder,
                    launch.placements,
                    launch.source,
                    storage=needs.storage[0],
                    results=launch.results,
                    room=room,
                )
                # Takes seconds, in which the last cells are judged.
                import_module("grid.report.build")
            return _report(launch, recorder, parent, line)
        finally:
            line.close()
            ray.shutdown()


def _recorder(launch: Launch, data: Data, line: ProgressLine) -> Recorder:
    return Recorder(
        open_tracker(launch.results, launch.mlflow, launch.scale, say=line.say),
        launch.plan,
        study=launch.study.name,
        scale=launch.scale,
        data=data,
        manifest=launch.manifest,
        line=line,
    )


def _open_study(launch: Launch, recorder: Recorder, data: Data) -> str:
    """Return the id of the study's run in MLflow, where its trials' runs are noted to serve it."""
    study, plan = launch.study, launch.plan
    described = describe(study, plan, launch.scale)
    parent = recorder.tracker.open_study(study.name, described, scores_of(plan), data.class_names)
    recorder.enrol()
    return parent


def _report(launch: Launch, recorder: Recorder, parent: str, line: ProgressLine) -> Finished:
    """Write the report of all that there is by now, and end the study's run."""
    # What draws and tests is imported when there is something to tell.
    from grid.report.build import write_report
    from grid.report.export import write_ledgers

    tracker, plan, folder = recorder.tracker, launch.plan, launch.results / "report"
    page = patiently(
        lambda: write_report(tracker, launch.study, plan, launch.scale, folder), say=line.say
    )
    patiently(lambda: write_ledgers(tracker, plan, folder / "ledgers"), say=line.say)
    failures = (*recorder.failures, *_forgotten(tracker, plan))
    complete = not failures
    tracker.close_study(parent, folder, complete=complete)
    return Finished(
        trained=recorder.progress.trials_done,
        judged=recorder.progress.cells_done,
        failures=failures,
        report=page,
        comparison=tracker.page(study=launch.study.name),
    )


def _forgotten(tracker: Tracker, plan: Plan) -> Iterator[str]:
    """Name the cells whose answers count no more: the report found their ledgers damaged."""
    runs = tracker.trials()
    for trial in (trial for trial in plan if trial.digest in runs):
        run = runs[trial.digest]
        for evaluator in filter(run.is_forgotten, run.failed_cells):
            yield f"{evaluator} of {trial.name} ({trial.digest}): {run.failed_cells[evaluator]}"


@contextmanager
def _recording(recorder: Recorder, parent: str, pool: EvaluatorPool) -> Iterator[None]:
    """Write down what happens meanwhile, to the last cell, or up to Ctrl-C or an error."""
    recorder.begin(parent, pool)
    try:
        yield
        recorder.finish()
    except BaseException as error:
        # What asks Ray again once it is shut down would start another one.
        recorder.abandon()
        if isinstance(recorder.error, ValueError):
            raise recorder.error from error
        raise


def check_cluster(launch: Launch, seconds: float) -> dict[str, tuple[bool, str]]:
    """Look at a cluster as a run would need it: what was looked at, whether it is well, and why.

    Waits `seconds` for the nodes that the cluster file promises.
    """
    check_address(launch.mlflow or "")
    connect(launch.address)
    try:
        missing = wait_for_nodes(seconds, print)
        findings = {"nodes": (not missing, "; ".join(missing) or describe_nodes())}
        try:
            Room().check(launch.placements.of_all(launch.plan))
        except ValueError as error:
            findings["room"] = (False, str(error))
        tracker = open_tracker(launch.results, launch.mlflow, launch.scale)
        needs = launch.needs(tracker)
        problems = check_nodes(needs)
    finally:
        ray.shutdown()
    return findings | {f"node {n}": (not p, p or str(needs)) for n, p in problems.items()}


def _share_out(
    launch: Launch, uri: str, say: Callable[[str], None] = print
) -> tuple[EvaluatorPool, Room]:
    """Give the evaluators their share, and return what trials may take beside them.

    On GPUs evaluators have a quarter each of one GPU in eight, or of the only one.
    """
    placements, default = launch.placements.of_all(launch.plan), launch.placement
    room = Room()
    room.check(placements)
    on_gpus = any(placement.gpus for placement in placements)
    size = max(1, room.gpus // 2) if on_gpus else room.lanes(default)
    pool = EvaluatorPool(
        size,
        uri,
        launch.scale,
        launch.source,
        launch.results / SHARDS_FOLDER,
        threads=default.cpus,
        gpus=EVALUATOR_GPUS if on_gpus else 0.0,
        hung_after=default.hung_after,
        say=say,
    )
    if not on_gpus:
        return pool, room
    pool.wait_until_placed()
    room = Room(pool.gpus_held)
    try:
        room.check(placements)
    except ValueError as error:
        advice = f": give --gpus-per-worker {1 - EVALUATOR_GPUS:g}" if size == 1 else ""
        raise ValueError(
            f"{error} (evaluators hold {size * EVALUATOR_GPUS:g} GPUs){advice}"
        ) from None
    return pool, room


def _check_plan(launch: Launch) -> None:
    """Build what only a name stands for so far: evaluators and timm's models.

    ValueError also where a recipe cannot be trained by as many workers as it is to have.
    """
    plan, placements = launch.plan, launch.placements
    for trial in plan:
        placement = placements.of(trial.recipe.family)
        if placement.workers > 1:
            from trainables.train.team import check_team

            check_team(trial.recipe, placement.workers)
    for name in {name for trial in plan for name in trial.evaluators}:
        evaluator_named(name, launch.scale)
    from_timm = {t.recipe.model: t.recipe for t in plan if t.recipe.model not in MODELS}
    if from_timm:
        from trainables.networks import check_model

        for recipe in from_timm.values():
            check_model(recipe)


def scores_of(plan: Plan) -> list[str]:
    """Return the score that stands for each evaluator of a plan, the cheapest first."""
    names = {name for trial in plan for name in trial.evaluators}
    columns = {name: list(columns_of(name)) for name in EVALUATORS if name in names}
    return [name if name in scores else scores[-1] for name, scores in columns.items() if scores]


def describe(study: Study, plan: Plan, scale: Scale) -> str:
    """Say in a sentence what a study is, for its run in MLflow."""
    tables = ", ".join(table.name for table in plan.tables) or "no tables"
    return f"{len(plan.trials)} trials of study {study.name} ({tables}) at scale {scale.title}"


def _opening(recorder: Recorder, plan: Plan, lanes: int | None = None) -> str:
    todo = recorder.progress.trials
    at_once = "" if lanes is None else f" ({lanes} at once)"
    return (
        f"{len(plan.trials)} trials: {len(plan.trials) - todo} done, {todo} to train{at_once}; "
        f"{recorder.progress.cells} cells to judge"
    )
