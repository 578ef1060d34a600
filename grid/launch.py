"""Run a plan: Ray Tune trains what is missing while the evaluator pool judges what is trained."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evaluators import evaluator_named
from grid.assess import EvaluatorPool
from grid.check import Finding, check_data_here
from grid.cluster import (
    Placement,
    check_nodes,
    check_room,
    connect,
    gpu_kinds,
    nodes_there,
    on_others,
    stage_everywhere,
    wait_for_nodes,
    workers_on_gpus,
)
from grid.lending import Home, lendable
from grid.options import RunOptions
from grid.plan import Plan
from grid.record import Lease, Recorder
from grid.status import ProgressLine, open_tracker
from grid.study import EarlyStop, Study
from trainables.data.base import Data
from trainables.data.listing import EMBEDDED, DataSource
from trainables.data.load import load_data
from trainables.options import again
from trainables.ray_internals import keep_credentials_here, nodes_gone
from trainables.recipe import OF_STEP, Recipe
from trainables.scale import Scale
from trainables.store.results import DATABASE, code_version, sole_run
from trainables.store.retries import MAX_FAILURES, patiently, wait_after
from trainables.store.tracking import STOPPED, Tracker
from trainables.trial import CONTROLLER, RecipeTrial, teams_placed, train_together, trial_config

SHARDS_FOLDER = "shards"
TUNE_FOLDER = "tune"
DRY_SECONDS = 1800
A_LITTLE = 0.001  # of a node's resource that stands for its kind of GPU
# The figures by which trials are stopped early.
ACCURACY, PROBE = "held_out/accuracy", "probe/pgd-10"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run of the command ended; `comparison` is where the MLflow UI shows its trials."""

    trained: int
    judged: int
    failures: tuple[str, ...]
    report: Path
    comparison: str


@dataclass(frozen=True)
class Launch:
    """What is to be run, and how.

    `manifest` names the data as the check found it. address: of the Ray cluster, None to start
    Ray here.
    """

    study: Study
    plan: Plan
    scale: Scale
    options: RunOptions
    source: DataSource = EMBEDDED
    manifest: str = ""
    address: str | None = None

    @property
    def placement(self) -> Placement:
        """How trials are placed unless their family is placed otherwise."""
        return Placement(
            workers=self.options.workers,
            cpus=self.options.cpus_per_worker,
            gpus=self.options.gpus_per_worker,
            compile=self.options.compile,
            numerics=self.options.numerics or "",
            hung_after=self.options.hung_after,
        )

    def placement_of(self, family: str) -> Placement:
        """Return how a family's trials are placed: as the study says, else as the command does."""
        theirs = self.study.placement.get(family)
        return replace(self.placement, **(theirs.model_dump(exclude_none=True) if theirs else {}))

    @property
    def placements(self) -> list[Placement]:
        """The default placement, then the others that trials have."""
        theirs = {self.placement_of(trial.recipe.family): None for trial in self.plan}
        return list({self.placement: None} | theirs)

    @property
    def code(self) -> str:
        """The version that a cluster's nodes must have; '' where all is on this machine."""
        return code_version() if self.address else ""

    @property
    def on_gpus(self) -> bool:
        return any(placement.gpus for placement in self.placements)

    @property
    def storage_root(self) -> str:
        """The path or URI in which trials keep their files."""
        place = self.options.storage or str(self.options.results)
        return place if "://" in place else str(Path(place).resolve())

    def check_nodes(self, tracker: Tracker) -> dict[str, str]:
        """Return the problem of every other node of the cluster, '' where there is none.

        Nodes have brought the data to their disks first.
        """
        stage_everywhere(self.source)
        artifacts = tracker.artifacts
        if artifacts.startswith("file:///"):
            artifacts = url2pathname(artifacts.removeprefix("file://"))
        through_server = artifacts.startswith(("mlflow-artifacts:", "http:", "https:"))
        storage = [self.storage_root]
        if "://" not in artifacts and not through_server:
            storage.append(artifacts)
        root = self.source.root
        data = () if root is None else (root, *self.source.folders.values())
        return check_nodes(storage, data, (self.options.mlflow or "") if through_server else "")


def run_study(launch: Launch) -> Finished:
    """Train and judge what is missing of a plan, then write the report.

    Raises ValueError before any compute when the run cannot be; KeyboardInterrupt after a clean
    stop. Trials and cells that MLflow has are left alone; where that is all, Ray is not started.
    """
    data = load_data(launch.scale, launch.source)
    _check_plan(launch, data)
    with sole_run(launch.options.results):
        line = ProgressLine()
        try:
            may_be_done = launch.options.mlflow or (launch.options.results / DATABASE).exists()
            recorder = _recorder(launch, data, line) if may_be_done else None
            if recorder and recorder.is_all_done:
                line.say(_opening(recorder, launch.plan))
                recorder.open_study()
                finished = _report(launch, recorder, line)
                if not finished.failures:
                    return finished
                recorder = _recorder(launch, data, line)  # some ledgers are damaged
            handler = signal.getsignal(signal.SIGTERM)
            connect(launch.address)
            signal.signal(signal.SIGTERM, handler)  # Ray has set a handler of its own
            check_room(launch.placements, joined=bool(launch.address))
            recorder = recorder or _recorder(launch, data, line)
            problems = launch.check_nodes(recorder.tracker).items()
            if ill := "; ".join(f"node {node}: {problem}" for node, problem in problems if problem):
                raise ValueError(ill)
            missing = (trial.recipe for trial in recorder.trials_to_train())
            kinds = _kinds_of_gpus(launch, missing, line.say)
            recorder.mend(launch.storage_root)
            pool = _start_pool(launch, recorder.tracker.uri, line.say)
            recorder.open_study()
            line.say(_opening(recorder, launch.plan))
            line.say(f"Status: {again('--status')}")
            with recorder.recording(pool):
                train_missing(launch, recorder, kinds)
                # Takes seconds, in which the last cells are judged.
                import_module("grid.report.build")
            return _report(launch, recorder, line)
        finally:
            line.close()
            ray.shutdown()


def _check_plan(launch: Launch, data: Data) -> None:
    """Build what only a name stands for so far: evaluators, and models of weights.

    ValueError also where a model as it is answers among other classes than those of the data.
    """
    plan = launch.plan
    for name in plan.evaluators:
        evaluator_named(name, launch.scale)
    unsure = {
        (t.recipe.model, str(t.recipe.model_args), t.recipe.init, t.recipe.preprocessing): t.recipe
        for t in plan
        if t.recipe.init
    }
    if unsure:
        from trainables.networks import check_model

        for recipe in unsure.values():
            try:
                data.columns_of_head(check_model(recipe))
            except ValueError as error:
                raise ValueError(f"{recipe.describe()}: {error}") from None


def _kinds_of_gpus(
    launch: Launch, recipes: Iterable[Recipe], say: Callable[[str], None] = print
) -> dict[str, str]:
    """Return by digest the kind of GPU of trainings that do not fit every kind that is there.

    Dry steps tell, on a node of each kind. ValueError where a training fits none.
    """
    steps: defaultdict[Placement, defaultdict[str, list[Recipe]]]
    steps = defaultdict(lambda: defaultdict(list))
    for recipe in recipes:
        placement = launch.placement_of(recipe.family)
        if placement.gpus and recipe.epochs:
            key = recipe.with_seed(0).model_dump_json(include=OF_STEP)
            steps[placement][key].append(recipe)
    kinds: dict[str, str] = {}
    misfits: list[str] = []
    for placement, alike in steps.items():
        said = _dry_steps(placement, [first for first, *_ in alike.values()], say)
        for index, same_steps in enumerate(alike.values()):
            texts = {kind: answers[index] for kind, answers in said.items()}
            fitting = [replace(placement, kind=k) for k, text in texts.items() if k and not text]
            if any(texts.values()) and fitting:
                best = max(fitting, key=lambda of_kind: of_kind.lanes(nodes_there().values()))
                check_room([best], joined=bool(launch.address))
                kinds |= {recipe.digest(): best.kind for recipe in same_steps}
            else:
                misfits += filter(None, texts.values())
    if misfits:
        raise ValueError("; ".join(misfits))
    return kinds


def _dry_steps(
    placement: Placement, recipes: Sequence[Recipe], say: Callable[[str], None]
) -> dict[str, list[str]]:
    """Return by kind of GPU why each recipe cannot be trained there, '' where it can."""
    # It imports timm, which a driver spares.
    dry = import_module("trainables.train.memory").misfits
    kinds: dict[Any, str] = {}
    for kind, node in gpu_kinds().items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        held = {"num_gpus": min(1, placement.gpus), "num_cpus": 0}
        dry_steps = ray.remote(**held, scheduling_strategy=there)(dry)
        arguments = recipes, placement.workers, placement.gpus
        kinds[dry_steps.remote(*arguments, is_fast=placement.is_fast)] = kind
    ready, late = ray.wait([*kinds], num_returns=max(1, len(kinds)), timeout=DRY_SECONDS)
    for reference in late:
        ray.cancel(reference)
    if late:
        say(f"no GPU came free in {DRY_SECONDS / 60:.0f} min to try the trainings' memory on")
    said = {}
    for reference in ready:
        with suppress(RayError):  # a node that has left says nothing
            said[kinds[reference]] = ray.get(reference)
    return said


def _recorder(launch: Launch, data: Data, line: ProgressLine) -> Recorder:
    return Recorder(
        open_tracker(launch.options.results, launch.options.mlflow, launch.scale, say=line.say),
        launch.plan,
        study=launch.study.name,
        scale=launch.scale,
        data=data,
        source=launch.source,
        manifest=launch.manifest,
        line=line,
    )


def _opening(recorder: Recorder, plan: Plan) -> str:
    todo = recorder.trials_to_train()
    untrained = sum(not trial.recipe.epochs for trial in todo)
    as_they_are = f", {untrained} to take as they are" if untrained else ""
    return (
        f"{len(plan.trials)} trials: {len(plan.trials) - len(todo)} done, "
        f"{len(todo) - untrained} to train{as_they_are}; "
        f"{recorder.progress.cells} cells to judge"
    )


def _start_pool(launch: Launch, uri: str, say: Callable[[str], None] = print) -> EvaluatorPool:
    """Start the evaluators: on CPUs one for each lane, on GPUs those that no trial waits for."""
    default = launch.placement

    def places(there: Counter[Home], wanted: int) -> Counter[Home]:
        nodes = nodes_there()
        if not launch.on_gpus:
            one = replace(default, workers=1)
            slots = [node for node, has in nodes.items() for _ in range(one.lanes([has]))]
            return Counter((node, "") for node in slots[:: default.workers] or [*nodes][:1])
        share = launch.options.evaluator_share * sum(node.get("GPU", 0) for node in nodes.values())
        return lendable(nodes, *workers_on_gpus(), there, wanted=wanted, kept=share)

    return EvaluatorPool(
        places,
        uri,
        launch.scale,
        launch.source,
        launch.options.results / SHARDS_FOLDER,
        threads=default.cpus,
        on_gpus=launch.on_gpus,
        hung_after=default.hung_after,
        code=launch.code,
        say=say,
    )


def train_missing(launch: Launch, recorder: Recorder, kinds: Mapping[str, str]) -> None:
    """Train a plan's missing trials with Tune, in its order, as many at once as there is room for.

    They share actors; where some have several workers, each trial has processes of its own. kinds:
    by digest, the kind of GPU that a trial needs.
    """
    todo = recorder.trials_to_train()
    configs = {t.digest: _config(launch, t, kinds.get(t.digest, "")) for t in todo}
    if not configs:
        return
    shutil.rmtree(launch.options.results / TUNE_FOLDER, ignore_errors=True)
    keep_credentials_here()
    # Its last word lists trials that failed, those that were tried again too; the recorder does.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    alone = all(trial_config(config)["workers"] == 1 for config in configs.values())
    if alone:
        trainable = tune.with_resources(RecipeTrial, _resources)
    else:
        trainable = tune.with_resources(train_together, CONTROLLER)
    order = PlanOrder(configs, None if alone else teams_placed, nodes_gone, recorder.lease)
    rule = launch.study.early_stop
    stopping = EarlyStopping(rule, configs) if rule else None
    tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=order,
            scheduler=stopping,
            num_samples=-1,
            # One that is reused keeps its GPU: evaluators would wait for all trials.
            reuse_actors=alone and not launch.on_gpus,
            trial_name_creator=_digest_of,
            trial_dirname_creator=_digest_of,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(launch.options.results.resolve()),
            # Trials keep their own checkpoints, by digest.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Events(recorder, order, stopping.reasons if stopping else {})],
            verbose=0,
        ),
    ).fit()


def _config(launch: Launch, trial: Any, kind: str = "") -> dict[str, Any]:
    """Return what `RecipeTrial` or `train_together` needs to train a trial of the plan."""
    placement = launch.placement_of(trial.recipe.family)
    settings = {
        "digest": trial.digest,
        "needs": [recipe.digest() for recipe in trial.recipe.prerequisites],
        "recipe": trial.recipe.model_dump(mode="json"),
        "storage": launch.storage_root,
        "threads": placement.cpus,
        "workers": placement.workers if trial.recipe.epochs else 1,
        "gpus": placement.gpus,
        "kind": {kind: A_LITTLE} if kind else {},
        "hung_after": placement.hung_after,
        "device": "cuda" if placement.gpus else "cpu",
        "compile": placement.compile,
        "code": launch.code,
        "numerics": "fast" if placement.is_fast else "exact",
        "checkpoints": trial.checkpoints,
        "stops_from": trial.stops_from,
    }
    return {"trial": json.dumps(settings), "source": launch.source}


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    trial = trial_config(config)
    gpus = {"GPU": trial["gpus"]}
    return tune.PlacementGroupFactory([{"CPU": trial["threads"]} | gpus | trial["kind"]])


class PlanOrder(Searcher):  # type: ignore[misc]
    """Suggest trials in the plan's order, each once the trials that it needs have ended.

    Tune has them wait for room, and asks for more while few wait. teams_placed: says how many
    teams have their workers, which are not Tune's: only one team at a time waits for them. A trial
    whose process has died is suggested again after a wait, up to MAX_FAILURES times in a row, and
    without limit where a node went meanwhile (nodes_gone: returns the ids of dead nodes, with True
    also of those that are about to leave); to get any further makes good its earlier failures.
    configs, by digest and in the plan's order: what Tune hands to each trial. lease: says whether
    a trial is this command's; another's is passed over until it is over.
    """

    def __init__(
        self,
        configs: Mapping[str, dict[str, Any]],
        teams_placed: Callable[[], int] | None = None,
        nodes_gone: Callable[[bool], set[str]] = lambda _: set(),
        lease: Callable[[str], Lease] = lambda _: Lease.OURS,
    ) -> None:
        super().__init__()
        self._lease = lease
        self._configs, self._teams_placed, self._nodes_gone = configs, teams_placed, nodes_gone
        self._needs = {d: trial_config(config)["needs"] for d, config in configs.items()}
        self._waiting = list(configs)
        self._under_way: dict[str, str] = {}  # digests, by Tune's id of a try
        self._failures: Counter[str] = Counter()
        self._furthest: dict[str, tuple[int, int]] = {}
        self._gone_before: dict[str, set[str]] = {}  # nodes that were dead as a try began
        self._not_before: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Searcher, ()  # Tune pickles it, and what gives leases has a thread

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self._waiting and not self._under_way:
            return str(Searcher.FINISHED)
        if self._teams_placed and self._teams_placed() < len(self._under_way):
            return None
        for digest in filter(self._is_ready, list(self._waiting)):
            lease = self._lease(digest)
            if lease is Lease.ASKED:
                return None
            if lease is Lease.OVER:
                self._waiting.remove(digest)
            if lease is Lease.OURS:
                break
        else:
            return None
        self._waiting.remove(digest)
        self._under_way[trial_id] = digest
        self._gone_before[trial_id] = self._nodes_gone(False)
        return self._configs[digest]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        digest = self._under_way[trial_id]
        reached = result.get("epoch", 0), result.get("forward", 0)
        if reached > self._furthest.get(digest, (0, 0)):
            self._furthest[digest] = reached
            self._failures[digest] = 0

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        digest = self._under_way.pop(trial_id)
        gone_before = self._gone_before.pop(trial_id)
        if not error:
            return
        if self._nodes_gone(True) <= gone_before:
            self._failures[digest] += 1
        if (failures := self._failures[digest]) <= MAX_FAILURES:
            self._not_before[digest] = time.monotonic() + wait_after(max(1, failures))
            self._waiting.insert(0, digest)

    def will_retry(self, digest: str) -> bool:
        """Say whether a trial that has just failed is tried again."""
        return digest in self._waiting

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a run that is started again finds in MLflow what is done."""

    def _is_ready(self, digest: str) -> bool:
        missing = {*self._waiting, *self._under_way.values()}.intersection(self._needs[digest])
        return not missing and time.monotonic() >= self._not_before.get(digest, 0.0)


class EarlyStopping(FIFOScheduler):  # type: ignore[misc]
    """Stop trials that are behind others by a rule of Tune's, to which it hands every figure.

    Clean trainings are compared by their held-out accuracy, adversarial ones with those of the same
    radius by the PGD-10 probe. A trial that is tried again is the same one to the rule. `reasons`,
    by digest: why trials were stopped. configs: as of `PlanOrder`.
    """

    def __init__(self, rule: EarlyStop, configs: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self._rule = rule
        trials = [trial_config(config) for config in configs.values()]
        self._trials = {trial["digest"]: trial for trial in trials if trial["stops_from"]}
        # Of each group of trials that are compared: Tune's rule, and figures by digest and epoch.
        self._rules: dict[tuple[str, ...], FIFOScheduler] = {}
        self._figures: defaultdict[Any, dict[str, dict[int, float]]] = defaultdict(dict)
        self._first_tries: dict[str, Trial] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        digest = _digest_of(trial)
        if digest not in self._trials or digest in self.reasons:
            return str(self.CONTINUE)
        adversary = self._trials[digest]["recipe"]["adversary"]
        metric = PROBE if adversary else ACCURACY
        group = (metric, *(str(adversary[key]) for key in ("norm", "epsilon") if adversary))
        if group not in self._rules:
            self._rules[group] = self._new_rule(metric)
        rule, figures = self._rules[group], self._figures[group].setdefault(digest, {})
        if digest not in self._first_tries:
            self._first_tries[digest] = trial
            rule.on_trial_add(tune_controller, trial)
        for entry in result.get("epochs", ()):
            epoch = int(entry["epoch"])
            if metric not in entry or epoch in figures:
                continue
            figures[epoch] = entry[metric]
            figure, first = {"epoch": epoch, metric: entry[metric]}, self._first_tries[digest]
            if rule.on_trial_result(tune_controller, first, figure) == self.STOP:
                # A trial whose files lack room is in training after its last epoch, too.
                last = self._trials[digest]["recipe"]["epochs"]
                going_on = result["outcome"] == "training" and epoch < last
                self.reasons[digest] = self._reason(group, digest, epoch) if going_on else ""
                return str(self.STOP if going_on else self.CONTINUE)
        return str(self.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self.on_trial_result(tune_controller, trial, result)

    def _new_rule(self, metric: str) -> FIFOScheduler:
        trials, name = self._trials.values(), self._rule.rule
        grace = min(trial["stops_from"] for trial in trials)
        about = {"time_attr": "epoch", "metric": metric, "mode": "max", "grace_period": grace}
        if name == "median":
            # By default it pauses trials that it has nothing to compare with.
            return MedianStoppingRule(**about, min_time_slice=math.inf)
        longest = max(trial["recipe"]["epochs"] for trial in trials)
        return ASHAScheduler(
            **about, max_t=longest, reduction_factor=self._rule.reduction, stop_last_trials=False
        )

    def _reason(self, group: tuple[str, ...], digest: str, epoch: int) -> str:
        """Say by which rule a trial stops, at which figure, and which ones others had then."""
        name, compared = self._rule.rule, self._figures[group]
        rule = f"asha, the best 1 in {self._rule.reduction} go on" if name == "asha" else name
        past = (
            {e: v for e, v in f.items() if e <= epoch} for d, f in compared.items() if d != digest
        )
        others = [figures[max(figures)] for figures in past if figures]
        return (
            f"{rule}: {group[0]} was {compared[digest][epoch]:.1%} after epoch {epoch}, when the "
            f"figures of others ({len(others)}) were {min(others):.1%} to {max(others):.1%}"
        )


class _Events(tune.Callback):  # type: ignore[misc]
    """Hand Tune's events to the recorder, without which Tune stops; nothing here may block."""

    def __init__(self, recorder: Recorder, order: PlanOrder, stopped: Mapping[str, str]) -> None:
        self._recorder, self._order, self._stopped = recorder, order, stopped

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its callbacks; a thread cannot be, and a copy must not write.
        return tune.Callback, ()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._recorder.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._recorder.started(_digest_of(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if reason := self._stopped.get(result["digest"]):
            result = result | {"outcome": STOPPED, "reason": reason}
        self._recorder.reported(result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # The file on this machine: Tune's own answer is read from the storage, later.
        path, digest = Path(trial.error_file or ""), _digest_of(trial)
        trace = path.read_text().strip() if path.is_file() else "unknown error"
        reason = trace.rpartition("\n")[2].strip()
        if self._order.will_retry(digest):
            self._recorder.retried(digest, reason)
        else:
            self._recorder.failed(digest, reason, trace)


def _digest_of(trial: Trial) -> str:
    return str(trial_config(trial.config)["digest"])


def _report(launch: Launch, recorder: Recorder, line: ProgressLine) -> Finished:
    """Write the report of all that there is by now, and end the study's run."""
    # What draws and tests is imported when there is something to tell.
    from grid.report.build import write_ledgers, write_report

    tracker, plan, folder = recorder.tracker, launch.plan, launch.options.results / "report"
    page = patiently(
        lambda: write_report(tracker, launch.study, plan, launch.scale, folder), say=line.say
    )
    patiently(lambda: write_ledgers(tracker, plan, folder / "ledgers"), say=line.say)
    failures = (*recorder.failures, *_forgotten(tracker, plan))
    tracker.close_study(recorder.parent, folder, complete=not failures)
    return Finished(
        trained=recorder.progress.trials_trained,
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
            yield f"{evaluator} of {trial.name}: {run.failed_cells[evaluator]}"


def _data_on_nodes(launch: Launch) -> Iterator[Finding]:
    """Open every image on every other node, and say whether they are those of this one."""
    looked = (launch.scale, launch.source, launch.plan, launch.options.results.resolve())
    answers = on_others(check_data_here, *looked) if launch.source.root else {}
    for node, reference in answers.items():
        try:
            findings, manifest = ray.get(reference)
            problem = next((text for _, level, text in findings if level == "error"), "")
        except RayError as error:
            manifest, problem = "", str(error).splitlines()[0]
        if manifest != launch.manifest and not problem:
            problem = f"it has other images: their manifest is {manifest}, here {launch.manifest}"
        text = f"node {node}: {problem}" if problem else "every image is sound, and the same"
        yield f"data on {node}", "error" if problem else "ok", text


def check_cluster(launch: Launch) -> list[Finding]:
    """Look at a cluster as a run would need it, once the nodes of the cluster file are there."""
    connect(launch.address)
    try:
        well, text = wait_for_nodes(launch.options.wait)
        findings: list[Finding] = [("nodes", "ok" if well else "error", text)]
        try:
            check_room(launch.placements, joined=bool(launch.address))
        except ValueError as error:
            findings.append(("room", "error", str(error)))
        tracker = open_tracker(launch.options.results, launch.options.mlflow, launch.scale)
        sound = f"writes {launch.storage_root} and sees the data"
        for node, problem in launch.check_nodes(tracker).items():
            findings.append((f"node {node}", "error" if problem else "ok", problem or sound))
        findings += _data_on_nodes(launch)
        if all(level == "ok" for _, level, _ in findings):
            try:
                _kinds_of_gpus(launch, (trial.recipe for trial in launch.plan))
            except ValueError as error:
                findings.append(("memory", "error", str(error)))
    finally:
        ray.shutdown()
    return findings
