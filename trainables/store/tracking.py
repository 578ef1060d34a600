"""Everything that is written to MLflow and read back from it; only this module imports mlflow."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import requests
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from packaging.specifiers import SpecifierSet

from trainables.store.patience import PatientClient, patiently
from trainables.store.provenance import PROJECT, version_of
from trainables.store.results import DATABASE, database_uri
from trainables.store.storage import ASIDE, DamagedError

logger = logging.getLogger(__name__)
CELL_TAG = "cell."
ASKED_TAG = "asked."
FAILED_TAG = "failed."
WEIGHTS_TAG = "weights_sha256"
LEDGER_TAG = "ledger."  # the sha256 of a cell's ledger
# Why a cell's answer, whose scores may be there yet, counts no more.
DAMAGED_LEDGER = "damaged ledger: judged again by the next run"
OTHER_WEIGHTS = "other weights: judged again by the next run"
STUDY_TAG = "study."
JUDGED_TAG = "judged."
TRAINED_TAG = "trained."  # the versions and the hardware that trained it, by name
SCHEMA_TAG = f"{PROJECT}.schema"
VERSION_TAG = f"{PROJECT}.version"
SCHEMA = 3  # of runs, tags and artifacts as written here; the first had no tag
EXPERIMENT_KIND = "custom_model_development"  # opens on runs, not on traces of chats
PAGE = 250  # runs asked for at once, which bounds the memory they take
LONGEST_TAG = 5000
SECONDS_SO_FAR = "train/so_far/seconds"
SERVERS = SpecifierSet(">=3.5,<4", prereleases=True)
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
# Under which the UI keeps a view that a link opens. MLflow documents neither this nor what
# `check_address` calls: checked with 3.17.
VIEW_TAG = "mlflow.sharedViewState."
CLASSES_FILE = "classes.json"
LEDGERS = "ledgers"  # the folder of a run's artifacts
LOCAL_UI = "http://127.0.0.1:5000"  # of `mlflow ui` on the database of a results folder


@dataclass
class TrialRun:
    """What MLflow knows of a trial.

    `cells` maps an evaluator to the digest of its question, `failed_cells` to why it has no answer,
    `ledgers` to the sha256 of its answer, `studies` a study's name to the tables that it serves
    there; `trained` is the provenance of its weights, `judged` that of each evaluator's verdicts.
    `described`: it has its parameters and its data set. `live`: a run may be training it; None
    where that is not known. `images` counts those of the data set's splits, "train" and
    "held_out", where that was noted.
    """

    run_id: str
    digest: str
    outcome: str
    reason: str
    artifact_uri: str
    start_time: int
    end_time: int
    recipe: str
    metrics: dict[str, float] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    failed_cells: dict[str, str] = field(default_factory=dict)
    ledgers: dict[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    studies: dict[str, str] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    judged: dict[str, dict[str, str]] = field(default_factory=dict)
    described: bool = True
    live: bool | None = True
    images: dict[str, int] = field(default_factory=dict)

    def is_forgotten(self, evaluator: str) -> bool:
        """Say whether an evaluator's answer was there and counts no more."""
        reason = self.failed_cells.get(evaluator)
        return evaluator not in self.cells and reason in (DAMAGED_LEDGER, OTHER_WEIGHTS)

    @property
    def logged_epochs(self) -> int:
        return int(self.metrics.get("epoch", 0))

    @property
    def state(self) -> str:
        """The outcome; without one yet, whether it is in training or at which epoch it stopped."""
        if self.outcome != "training" or self.live:
            return self.outcome
        stopped = f"stopped at epoch {self.logged_epochs}"
        return f"training or {stopped}" if self.live is None else stopped


class Tracker:
    """The one writer: a parent run per study, a child run per trial, found again by digest.

    uri: an MLflow tracking URI. artifacts: where they lie, or None to leave it to the server.
    shared: other commands may open trials there too, so each is looked for before it is made,
    which takes the longer the more there are.
    Opening makes the database and the experiment; ValueError when they cannot be had. From then
    on a server that is away is waited for, which `say` is told; a run that was deleted meanwhile
    is a ValueError. `live`: whether a run is writing there now, None where nobody knows.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        artifacts: Path | None,
        shared: bool = True,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.uri, self._shared = uri, shared
        self.live: bool | None = True
        try:
            client = MlflowClient(uri)
            self._client = PatientClient(client, say)
            earlier = client.get_experiment_by_name(experiment)
            self.experiment_id: str = (
                earlier.experiment_id
                if earlier
                else client.create_experiment(
                    experiment,
                    artifact_location=artifacts.as_uri() if artifacts else None,
                    tags={"mlflow.experimentKind": EXPERIMENT_KIND} | _made_here(),
                )
            )
            there = client.get_experiment(self.experiment_id)
            self.artifacts: str = there.artifact_location
            unused = SCHEMA_TAG not in there.tags and not self._search("", most=1)
        except Exception as error:  # a scheme, a driver or a disk: each says no in its own way
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"MLflow at {uri} cannot be used: {reason}") from None
        if unused:
            for key, value in _made_here().items():
                self._client.set_experiment_tag(self.experiment_id, key, value)
        else:
            _check_schema(there.tags, uri)

    def open_study(
        self, name: str, description: str, scores: Sequence[str] = (), classes: Sequence[str] = ()
    ) -> str:
        """Return the id of a study's parent run, marked as running.

        `scores` are the columns of the view in which the UI compares the study's trials,
        `classes` the names of the data's classes, by label.
        """
        tags = {"kind": "study", "study": name, "mlflow.note.content": description}
        run = self._create(_study_query(name), True, run_name=f"study: {name}", tags=tags)
        run_id = str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        view = {
            "searchFilter": f"tags.kind = 'trial' and tags.`{STUDY_TAG}{name}` LIKE '%'",
            "selectedColumns": [
                "params.`family`",
                f"tags.`{STUDY_TAG}{name}`",
                "tags.`outcome`",
                *(f"metrics.`{score}`" for score in scores),
            ],
            # By start the UI would fold the trials below their study.
            "orderByKey": "tags.`mlflow.runName`",
            "orderByAsc": True,
        }
        key = VIEW_TAG + name
        self._client.set_experiment_tag(self.experiment_id, key, json.dumps(view))
        if classes:
            content = json.dumps(list(classes)).encode()
            self._store(run.info.artifact_uri, {CLASSES_FILE: content})
        return run_id

    def classes(self, study: str) -> list[str]:
        """Return the names of a study's classes, by label; empty where none were ever kept."""
        runs = self._search(_study_query(study))
        if not runs:
            return []
        content = self.artifact(runs[0].info.artifact_uri, CLASSES_FILE)
        return list(json.loads(content)) if content else []

    def give_up(self) -> None:
        """Wait for no server any more."""
        self._client.give_up()

    def close_study(self, run_id: str, report: Path, *, complete: bool) -> None:
        """Keep the folder of a report with the parent run and end it."""
        artifact_uri = self._client.get_run(run_id).info.artifact_uri
        self._client.log_folder(artifact_uri, str(report), "report")
        self._client.set_terminated(run_id, "FINISHED" if complete else "FAILED")

    def page(self, *, run_id: str = "", study: str = "") -> str:
        """Return where the MLflow UI shows a run, or compares a study's; never a password."""
        parts = urlsplit(self.uri)
        host = parts.netloc.rpartition("@")[2]
        place = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
        address = place if parts.scheme in ("http", "https") else LOCAL_UI
        path = run_id and f"/{run_id}"
        view = study and f"?viewStateShareKey={study}&workflowType=machine_learning"
        return f"{address}/#/experiments/{self.experiment_id}/runs{path}{view}"

    def trials(self) -> dict[str, TrialRun]:
        """Return every trial of the experiment by digest."""
        runs = [_trial_run(run) for run in self._search("tags.kind = 'trial'")]
        return {run.digest: replace(run, live=self.live) for run in runs}

    def start_trial(
        self,
        *,
        digest: str,
        name: str,
        parent: str,
        study: str,
        tables: str,
        recipe_json: str,
        params: Mapping[str, Any],
        dataset: Mapping[str, str],
    ) -> TrialRun:
        """Open a trial's run, or the one that another command has opened meanwhile."""
        tags = {
            "kind": "trial",
            "digest": digest,
            STUDY_TAG + study: _in_order(tables.split()),
            "recipe": recipe_json,
            "outcome": "training",
            "mlflow.parentRunId": parent,
        }
        # A database looks through the tag's values of all runs: only trials have this one.
        query = f"tags.digest = '{digest}'"
        run = _trial_run(self._create(query, self._shared, run_name=name, tags=tags))
        if not run.described:
            self.describe_trial(run, params=params, dataset=dataset)
        self.enrol(run, study, tables)
        if run.outcome != "training":
            self.continue_trial(run)
        return run

    def describe_trial(
        self, run: TrialRun, *, params: Mapping[str, Any], dataset: Mapping[str, str]
    ) -> None:
        """Log a trial's parameters, then its data set: a run that has this has both."""
        self._client.log_batch(run.run_id, params=[Param(k, str(v)) for k, v in params.items()])
        source = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "training")])
        self._client.log_inputs(run.run_id, datasets=[source])
        run.described, run.images = True, dict(json.loads(dataset.get("profile", "{}")))

    def enrol(self, run: TrialRun, study: str, tables: str) -> None:
        """Note that a trial serves these tables of a study, beside those that it serves already."""
        served = {*run.studies.get(study, "").split(), *tables.split()}
        noted = _in_order(served)
        if noted != run.studies.get(study):
            self._client.set_tag(run.run_id, STUDY_TAG + study, noted)
            run.studies[study] = noted

    def continue_trial(self, run: TrialRun) -> None:
        """Mark a trial's run as running again."""
        self._client.update_run(run.run_id, status="RUNNING")
        self._tag(run, outcome="training", reason="")
        run.outcome, run.reason = "training", ""

    def log_epochs(self, run: TrialRun, epochs: Iterable[Mapping[str, float]]) -> None:
        """Log each epoch's metrics at step = epoch; epochs already there are passed over.

        MLflow takes 1,000 at a time: an epoch's own number is its last, so that one which was cut
        in two by a kill is logged again.
        """
        new = [dict(entry) for entry in epochs if entry["epoch"] > run.logged_epochs]
        if not new:
            return
        spent = run.metrics.get(SECONDS_SO_FAR, 0.0)
        for entry in new:
            spent += entry.get("train/seconds", 0.0)
            entry[SECONDS_SO_FAR] = spent
            entry["epoch"] = entry.pop("epoch")
        metrics = [
            Metric(key, value, run.start_time + int(entry["epoch"]), int(entry["epoch"]))
            for entry in new
            for key, value in entry.items()
        ]
        self._client.log_batch(run.run_id, metrics=metrics)
        for entry in new:
            run.metrics |= entry

    def tag_trained(self, run: TrialRun, trained: Mapping[str, str]) -> None:
        """Note the provenance of a trial's weights, where that is news."""
        if news := {k: v for k, v in trained.items() if run.trained.get(k) != v}:
            self._tag(run, **{TRAINED_TAG + name: value for name, value in news.items()})
            run.trained |= news

    def store_weights(
        self, run: TrialRun, weights: Path, sha256: str, *, image_size: int, classes: int
    ) -> None:
        """Store a trial's trained weights and its recipe: a model that MLflow can load."""
        with tempfile.TemporaryDirectory() as temporary:
            model = Path(temporary, "model")
            _describe_model(model, image_size=image_size, classes=classes)
            (model / "recipe.json").write_text(run.recipe)
            (model / weights.name).symlink_to(weights.resolve())
            self._client.log_folder(run.artifact_uri, str(model))
        self._tag(run, **{WEIGHTS_TAG: sha256})
        run.weights_sha256 = sha256

    def end_trial(self, run: TrialRun, *, outcome: str, reason: str, trace: str = "") -> None:
        """End a trial's run with its outcome; failed and blocked ones are tried again.

        trace: the traceback to keep with it, if any.
        """
        if trace:
            self._store(run.artifact_uri, {"error.txt": trace.encode()})
        self._tag(run, outcome=outcome, reason=reason[:LONGEST_TAG])
        over = outcome in ("finished", "collapsed")
        self._client.set_terminated(run.run_id, "FINISHED" if over else "FAILED")
        run.outcome, run.reason = outcome, reason

    def record_cell(
        self,
        run: TrialRun,
        *,
        evaluator: str,
        cell: str,
        asked: str,
        ledger: bytes,
        metrics: Mapping[str, float],
        judged_by: Mapping[str, str] | None = None,
    ) -> None:
        """Store a cell's ledger, its scores, their provenance and what was asked.

        The tag that marks it done is written last.
        """
        self._store(run.artifact_uri, {f"{evaluator}.parquet": ledger}, LEDGERS)
        values = [Metric(key, value, run.start_time, 0) for key, value in metrics.items()]
        self._client.log_batch(run.run_id, metrics=values)
        sha256 = hashlib.sha256(ledger).hexdigest()
        tags = {ASKED_TAG: asked, LEDGER_TAG: sha256}
        if judged_by:
            tags[JUDGED_TAG] = json.dumps(dict(judged_by))
            run.judged[evaluator] = dict(judged_by)
        if run.failed_cells.pop(evaluator, ""):
            tags[FAILED_TAG] = ""
        self._tag(run, **{tag + evaluator: value for tag, value in tags.items()})
        self._client.set_tag(run.run_id, CELL_TAG + evaluator, cell)
        run.metrics |= metrics
        run.cells[evaluator], run.ledgers[evaluator] = cell, sha256

    def fail_cell(self, run: TrialRun, evaluator: str, reason: str) -> None:
        """Note why a cell has no answer; it is asked again by the next run of the command."""
        self._client.set_tag(run.run_id, FAILED_TAG + evaluator, reason[:LONGEST_TAG])
        run.failed_cells[evaluator] = reason

    def forget_cell(self, run: TrialRun, evaluator: str, reason: str) -> None:
        """Note that a cell's answer is lost, and why; it is asked again by the next run."""
        self._tag(run, **{FAILED_TAG + evaluator: reason, CELL_TAG + evaluator: ""})
        run.failed_cells[evaluator] = reason
        run.cells.pop(evaluator, None)

    def history(self, run: TrialRun, metric: str) -> list[tuple[int, float]]:
        """Return a metric's values by step."""
        entries = self._client.get_metric_history(run.run_id, metric)
        return sorted((entry.step, entry.value) for entry in entries)

    def ledger(self, run: TrialRun, evaluator: str) -> bytes:
        """Return a cell's ledger as it was stored; DamagedError where it is not there so."""
        name = f"{LEDGERS}/{evaluator}.parquet"
        content = self.artifact(run.artifact_uri, name)
        if content is None:
            raise DamagedError(f"{run.artifact_uri}/{name} is missing")
        sha256 = hashlib.sha256(content).hexdigest()
        if run.ledgers.get(evaluator, sha256) != sha256:
            raise DamagedError(f"{run.artifact_uri}/{name} is damaged: its sha256 is another")
        return content

    def artifact(self, artifact_uri: str, name: str) -> bytes | None:
        """Return the content of an artifact of a run, None where there is none."""
        try:
            return fetch_artifact(self.uri, artifact_uri, name).read_bytes()
        except (MlflowException, OSError):
            folder, _, file = f"{artifact_uri}/{name}".rpartition("/")
            listed = partial(mlflow.artifacts.list_artifacts, folder, tracking_uri=self.uri)
            paths = [artifact.path for artifact in patiently(listed, say=logger.warning)]
            if any(path.rpartition("/")[2] == file for path in paths):
                raise
            return None

    def _store(self, artifact_uri: str, files: Mapping[str, bytes], place: str = "") -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self._client.log_folder(artifact_uri, folder, place)

    def seconds(self, run: TrialRun) -> float:
        """Return how long a trial trained and was judged, as its actors measured it."""
        judged = (run.metrics.get(f"{evaluator}/seconds", 0.0) for evaluator in run.cells)
        return run.metrics.get(SECONDS_SO_FAR, 0.0) + sum(judged)

    def log_evaluation(
        self,
        name: str,
        *,
        metrics: Mapping[str, float],
        ledgers: Iterable[Path],
        judged_by: Mapping[str, str],
    ) -> str:
        """Log the scores and ledgers of a checkpoint that is no trial's; return the run's id."""
        token = uuid.uuid4().hex
        tags = {"kind": "evaluation", "token": token}
        tags |= {JUDGED_TAG + name: value for name, value in judged_by.items()}
        run = self._create(f"tags.token = '{token}'", False, run_name=name, tags=tags)
        run_id = str(run.info.run_id)
        values = [Metric(k, value, run.info.start_time, 0) for k, value in metrics.items()]
        self._client.log_batch(run_id, metrics=values)
        files = {path.name: path.read_bytes() for path in ledgers}
        self._store(run.info.artifact_uri, files, LEDGERS)
        self._client.set_terminated(run_id, "FINISHED")
        return run_id

    def _create(self, query: str, shared: bool, *, run_name: str, tags: Mapping[str, str]) -> Run:
        """Return the run that `query` finds, where there may be one, or create it."""

        def made() -> Run | None:
            return next(iter(self._search(query)), None)

        run: Run = self._client.create_run(
            self.experiment_id, run_name=run_name, tags=dict(tags), made=made, shared=shared
        )
        return run

    def _tag(self, run: TrialRun, **tags: str) -> None:
        self._client.log_batch(run.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def _search(self, query: str, most: int | None = None) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], query, ViewType.ACTIVE_ONLY, most or PAGE, page_token=token
            )
            runs += page
            token = page.token
            if most or not token:
                return runs


def create_database(results: Path) -> None:
    """Make the MLflow database of a results folder, unless it is there.

    It is made aside, which takes seconds: whenever that is stopped, it is there whole or not at
    all.
    """
    if (results / DATABASE).exists():
        return
    aside = results / f"{ASIDE}{DATABASE}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    MlflowClient(database_uri(aside)).search_experiments(max_results=1)
    (aside / DATABASE).replace(results / DATABASE)
    aside.rmdir()


def _made_here() -> dict[str, str]:
    return {SCHEMA_TAG: str(SCHEMA), VERSION_TAG: version_of(PROJECT)}


def _check_schema(tags: Mapping[str, str], uri: str) -> None:
    """Raise ValueError where an experiment was made by a version that writes otherwise."""
    schema = tags.get(SCHEMA_TAG, "1")
    if schema == str(SCHEMA):
        return
    age = "a later" if schema.isdecimal() and int(schema) > SCHEMA else "an earlier"
    named = f" ({tags[VERSION_TAG]})" if tags.get(VERSION_TAG) else ""
    raise ValueError(
        f"the results in MLflow at {uri} were made by {age} version of this project{named}, whose "
        f"schema is {schema}, not {SCHEMA}: go on with that version, or give --results (or "
        "--mlflow) another place"
    )


def _study_query(name: str) -> str:
    return f"tags.kind = 'study' AND tags.study = '{name}'"


def _trial_run(run: Run) -> TrialRun:
    tags = run.data.tags
    ended = run.info.status == RunStatus.to_string(RunStatus.FINISHED)
    outcome = tags.get("outcome", "training")
    return TrialRun(
        run_id=run.info.run_id,
        digest=tags["digest"],
        # Killed between its last tag and its end: the run is not done.
        outcome=outcome if ended or outcome in ("failed", "blocked") else "training",
        reason=tags.get("reason", ""),
        artifact_uri=run.info.artifact_uri,
        start_time=run.info.start_time,
        end_time=run.info.end_time or 0,
        recipe=tags["recipe"],
        metrics=dict(run.data.metrics),
        cells=_tagged(tags, CELL_TAG),
        failed_cells=_tagged(tags, FAILED_TAG),
        ledgers=_tagged(tags, LEDGER_TAG),
        weights_sha256=tags.get(WEIGHTS_TAG, ""),
        studies=_tagged(tags, STUDY_TAG),
        trained=_tagged(tags, TRAINED_TAG),
        judged={name: json.loads(text) for name, text in _tagged(tags, JUDGED_TAG).items()},
        described=bool(run.inputs and run.inputs.dataset_inputs),
        images=_images(run),
    )


def _images(run: Run) -> dict[str, int]:
    inputs = run.inputs.dataset_inputs if run.inputs else []
    profile = inputs[0].dataset.profile if inputs else None
    return dict(json.loads(profile)) if profile else {}


def _in_order(tables: Iterable[str]) -> str:
    """Name tables as T1 T3 T10."""
    return " ".join(sorted(tables, key=lambda table: (len(table), table)))


def _tagged(tags: Mapping[str, str], start: str) -> dict[str, str]:
    return {k.removeprefix(start): v for k, v in tags.items() if k.startswith(start) and v}


def _describe_model(folder: Path, *, image_size: int, classes: int) -> None:
    """Write what MLflow needs beside the weights to load them: loader, signature, an example."""
    number, shape = np.dtype("float32"), (3, image_size, image_size)
    mlflow.pyfunc.save_model(
        folder,
        loader_module="trainables.store.packaged",
        pip_requirements=["robustness-grid"],
        signature=ModelSignature(
            Schema([TensorSpec(number, (-1, *shape))]), Schema([TensorSpec(number, (-1, classes))])
        ),
        input_example=np.full((1, *shape), 0.5, number),
    )


def fetch_artifact(tracking_uri: str, artifact_uri: str, name: str) -> Path:
    """Return a local path to one artifact of a run, fetched if it is elsewhere.

    A server that is away is waited for.
    """

    def fetch() -> str:
        return str(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{artifact_uri.rstrip('/')}/{name}", tracking_uri=tracking_uri
            )
        )

    return Path(patiently(fetch, say=logger.warning))


@dataclass(frozen=True)
class Credentials:
    """What an MLflow server asks of its clients, taken to other nodes.

    It travels as an argument, which Ray shows nowhere: a runtime environment is on the dashboard.
    """

    values: Mapping[str, str] = field(repr=False)

    @classmethod
    def of_environment(cls) -> Credentials:
        """Take them from MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN."""
        return cls({name: os.environ[name] for name in CREDENTIALS if name in os.environ})

    def use(self) -> None:
        """Have this process's MLflow clients send them."""
        os.environ.update(self.values)


def check_address(uri: str) -> None:
    """Ask an MLflow server whether it is there, of a version that will do, and lets this user in.

    ValueError says what answered instead. Any other tracking URI is let through.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        password = urlsplit(uri).password
    except ValueError as error:
        raise ValueError(f"MLflow at {uri} cannot be used: {error}") from None
    if password:
        raise ValueError(
            "an MLflow address is printed and logged: give its user and password as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        )
    try:
        health = requests.get(f"{uri.rstrip('/')}/health", timeout=5)
        answer = http_request(get_default_host_creds(uri), "/version", "GET", timeout=30)
    except (requests.RequestException, MlflowException) as error:
        raise ValueError(f"no MLflow server answers at {uri} ({type(error).__name__})") from None
    if health.text.strip() != "OK":
        raise ValueError(f"{uri} answers {health.status_code}, but not as an MLflow server does")
    if answer.status_code in (401, 403):
        raise ValueError(
            f"the MLflow server at {uri} lets in who gives MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, and refuses those given here"
        )
    version = answer.text.strip()
    if not re.match(r"\d+\.\d+", version) or version not in SERVERS:
        raise ValueError(f"the MLflow server at {uri} is of version {version[:20]}, not {SERVERS}")


def scores_as_metrics(scores: Sequence[Any]) -> dict[str, float]:
    """Return scores as the metrics they are logged under: name, name/low, name/high, name/n."""
    metrics: dict[str, float] = {}
    for score in scores:
        metrics |= {
            score.name: score.value,
            f"{score.name}/low": score.low,
            f"{score.name}/high": score.high,
            f"{score.name}/n": float(score.n),
        }
    return metrics
