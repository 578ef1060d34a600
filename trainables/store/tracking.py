"""Everything that is written to MLflow and read back from it; only this module imports mlflow."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from trainables.store.results import (
    DATABASE,
    PROJECT,
    SCHEMA_TAG,
    database_uri,
    provenance,
    version_of,
)
from trainables.store.retries import patiently
from trainables.store.storage import ASIDE, RECIPE, WEIGHTS, DamagedError

logger = logging.getLogger(__name__)
STOPPED = "stopped early"  # the outcome of a trial that a scheduler ended
# Tags of a trial's run. A cell's is a document: question, identity, sha256, judged_by.
CELL_TAG = "cell."
FAILED_TAG = "failed."
STUDY_TAG = "study."
CLAIMS_TAG = f"{PROJECT}.claims"  # of an experiment: the id of its run
ALIVE_TAG = "alive."  # of the run of claims, and a command: another value at each renewal
OPENING_SECONDS = 0.5  # in which another command may make the run that both want
RENEW_SECONDS = 30.0
SILENT_RENEWALS = 10  # after which a command that shows the same value is dead
CHECKPOINT_TAG = "checkpoint."  # and the epoch: the id of its logged model
WEIGHTS_TAG = "weights_sha256"
TRAINED_TAG = "trained"
# Why a cell's answer, whose scores may be there yet, counts no more.
DAMAGED_LEDGER = "damaged ledger: judged again by the next run"
OTHER_WEIGHTS = "other weights: judged again by the next run"
SCHEMA = 5  # of runs, tags and artifacts as written here
PAGE = 250  # runs read at once, which bounds the memory they take
LONGEST_TAG = 5000
SECONDS_SO_FAR = "train/so_far/seconds"
# What MLflow's clients on other nodes need of the driver's environment.
SETTINGS = ("MLFLOW_TRACKING_", "MLFLOW_HTTP_")
# Not documented by MLflow, checked with 3.17: the tag under which the UI stores a view that a link
# opens, the kind of an experiment that opens on runs, the kind of runs that are not folded below
# their parent, and the models that a run's page and the table of runs name, at a path that is not
# empty.
VIEW_TAG = "mlflow.sharedViewState."
KIND = {"mlflow.experimentKind": "custom_model_development"}
UNFOLDED = {"mlflow.runType": "evaluation"}
MODELS_TAG = "mlflow.log-model.history"
NOTE_TAG = "mlflow.note.content"  # the UI shows an experiment's above its runs
SUMMARY = "summary.md"  # of a report: the note
COMMAND_TAG = "command"
ALONG = "checkpoint/"  # begins the name of a metric of weights along the way
CLASSES_FILE = "classes.json"
LEDGERS = "ledgers"  # the folder of a run's artifacts
LOCAL_UI = "http://127.0.0.1:5000"  # of `mlflow ui` on the database of a results folder
P = ParamSpec("P")
Answer = TypeVar("Answer")


@dataclass
class TrialRun:
    """What MLflow knows of a trial.

    `cells` maps an evaluator to the digest of its question, `failed_cells` to why it has no answer,
    `ledgers` to the sha256 of its answer, `seconds` to how long that took, `studies` a study's name
    to the tables that it serves there; `metrics` hold of each score its value alone; `trained` is
    the provenance of its weights, `judged` that of each evaluator's verdicts. `live`: a run may be
    training it; None where that is not known. `images` counts those of the data set's splits,
    "train" and "held_out", where that was noted. `checkpoints`: the logged models of weights along
    the way, by epoch.
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
    seconds: dict[str, float] = field(default_factory=dict)
    weights_sha256: str = ""
    studies: dict[str, str] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    judged: dict[str, dict[str, str]] = field(default_factory=dict)
    live: bool | None = True
    images: dict[str, int] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)
    unsent_metrics: list[Metric] = field(default_factory=list)
    unsent_tags: list[RunTag] = field(default_factory=list)

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
    """The one writer: a parent run per study, a child run per trial, looked up by digest.

    uri: an MLflow tracking URI. artifacts: their folder, which no other command uses, or None to
    leave it to the server. owner: of leases; the same for a command and its repetition, and for
    no two at once.
    Opening makes the database and the experiment; ValueError when they cannot be had. From then
    on a server that is away is waited for, and `say` gets the reason. `live`: whether a run is
    writing there now, None where nobody knows.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        artifacts: Path | None,
        owner: str = "",
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.uri, self._say, self._stop = uri, say, threading.Event()
        self._experiment, self.is_alone = experiment, artifacts is not None
        self.live: bool | None = True
        self._owner = owner or uuid.uuid4().hex
        self._held: dict[str, int] = {}  # this command's turns, by key
        self._leases: dict[str, str] = {}  # owners, by key and turn, as last read
        self._signs: dict[str, str] = {}  # of life, by owner
        self._heard: dict[str, str] = {}  # the same, at the last renewal
        self._silent = Counter[str]()  # renewals in a row at which an owner had the same sign
        try:
            self._client = MlflowClient(uri)
            there = self._client.get_experiment_by_name(experiment)
            if there is None:
                there = self._new_experiment(experiment, artifacts)
        except Exception as error:  # a scheme, a driver or a disk: each raises its own kind
            raise ValueError(_refusal(uri, error)) from None
        self.experiment_id: str = there.experiment_id
        self.artifacts: str = there.artifact_location
        if (schema := there.tags.get(SCHEMA_TAG)) != str(SCHEMA):
            raise ValueError(
                f"the results in MLflow at {uri} are of schema {schema}, and this version of the "
                f"project ({version_of(PROJECT)}) writes schema {SCHEMA}: continue with the "
                f"version that made them ({there.tags.get(PROJECT, 'unknown')}), or give "
                "--results (or --mlflow) another place"
            )

    def _new_experiment(self, name: str, artifacts: Path | None) -> Experiment:
        """Return an experiment that was not there, made here or by a command that was quicker."""
        place = artifacts.as_uri() if artifacts else None
        tags = KIND | {SCHEMA_TAG: str(SCHEMA), PROJECT: version_of(PROJECT)}
        try:
            self._client.create_experiment(name, place, tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._client.get_experiment_by_name(name)

    def open_study(
        self,
        name: str,
        description: str,
        scores: Sequence[str] = (),
        classes: Sequence[str] = (),
        command: str = "",
    ) -> str:
        """Return the id of a study's parent run, marked as running.

        `scores` are the columns of the view in which the UI compares the study's trials,
        `classes` the names of the data's classes, by label, `command` what runs the study.
        """
        tags = {"kind": "study", "study": name, NOTE_TAG: description}
        run = self._opened(f"study {name}", _study_query(name), f"study: {name}", tags)
        run_id = str(run.info.run_id)
        self._call(self._client.update_run, run_id, status="RUNNING")
        self._call(self._client.set_tag, run_id, COMMAND_TAG, command[:LONGEST_TAG])
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
        self._call(
            self._client.set_experiment_tag, self.experiment_id, VIEW_TAG + name, json.dumps(view)
        )
        if classes:
            content = json.dumps(list(classes)).encode()
            self._store(run.info.artifact_uri, {CLASSES_FILE: content})
        return run_id

    def classes(self, study: str) -> list[str]:
        """Return the names of a study's classes, by label; empty where none were stored."""
        runs = self._search(_study_query(study))
        content = self.artifact(runs[0].info.artifact_uri, CLASSES_FILE) if runs else None
        return list(json.loads(content)) if content else []

    def command(self, study: str) -> str:
        """Return the command that last ran a study; '' where that is not known."""
        runs = self._search(_study_query(study))
        return str(runs[0].data.tags.get(COMMAND_TAG, "")) if runs else ""

    def give_up(self) -> None:
        """Wait for no server any more."""
        self._stop.set()

    def close_study(self, run_id: str, report: Path, *, complete: bool) -> None:
        """Store the folder of a report with the parent run, its summary as a note, and end it."""
        artifact_uri = self._call(self._client.get_run, run_id).info.artifact_uri
        self._log_folder(artifact_uri, report, "report")
        if (summary := report / SUMMARY).exists():
            note = summary.read_text()[:LONGEST_TAG]
            self._call(self._client.set_experiment_tag, self.experiment_id, NOTE_TAG, note)
        self._call(self._client.set_terminated, run_id, "FINISHED" if complete else "FAILED")

    def page(self, *, run_id: str = "", study: str = "") -> str:
        """Return where the MLflow UI shows a run, or compares a study's."""
        address = self.uri.rstrip("/") if self.uri.startswith("http") else LOCAL_UI
        path = run_id and f"/{run_id}"
        view = study and f"?viewStateShareKey={study}&workflowType=machine_learning"
        return f"{address}/#/experiments/{self.experiment_id}/runs{path}{view}"

    def trials(self, digest: str = "") -> dict[str, TrialRun]:
        """Return every trial of the experiment by digest, or one alone."""
        alone = f" AND tags.digest = '{digest}'" if digest else ""
        runs = [_trial_run(run) for run in self._search(f"tags.kind = 'trial'{alone}")]
        return {run.digest: replace(run, live=self.live) for run in runs}

    def lease(self, key: str) -> tuple[str, bool]:
        """Take a trial for this command; return who else has it, or '', and whether one ever had.

        A lease is held until its command is over or has died: then the next turn is claimed.
        """
        if self.is_alone or key in self._held:
            return "", False
        if not self._leases:
            self.renew()
        while True:
            turn = next(n for n in count() if f"{key}.{n}" not in self._leases)
            last = self._leases.get(f"{key}.{turn - 1}", self._owner)
            if last != self._owner and self._lives(last):
                return last, True
            self._call(partial(self._claim, f"{key}.{turn}"))
            if self._leases[f"{key}.{turn}"] == self._owner:
                self._held[key] = turn
                return "", last != self._owner

    def _claim(self, turn: str) -> None:
        """Name this command as the owner of a turn, unless another was quicker."""
        try:
            self._client.log_param(self._claims, turn, self._owner)
            self._leases[turn] = self._owner
        except MlflowException:
            self._look()
            if turn not in self._leases:  # it is refused for another reason
                raise

    def renew(self, *, over: bool = False) -> set[str]:
        """Show that this command is alive, or over, and look whether those it waits for are.

        Return the keys that others took because it was silent.
        """
        if self.is_alone or (over and not self._held):
            return set()
        sign = "" if over else uuid.uuid4().hex
        name = ALIVE_TAG + _short(self._owner)
        self._call(lambda: self._client.set_tag(self._claims, name, sign))
        self._look()
        if not over:  # which comes right behind a look
            alike = self._signs.items() & self._heard.items()
            self._silent = Counter({name: self._silent[name] + 1 for name, _ in alike})
            self._heard = self._signs
        lost = {key for key, turn in self._held.items() if f"{key}.{turn + 1}" in self._leases}
        self._held = {key: turn for key, turn in self._held.items() if key not in lost}
        return lost

    def shared(self, name: str, content: bytes = b"") -> bytes | None:
        """Return a file that a server's commands share, if it is there; content: to put in it."""
        if not content and not self._call(self._client.get_experiment_by_name, self._claims_name):
            return None
        place = self._call(lambda: self._client.get_run(self._claims)).info.artifact_uri
        if content:
            self._store(place, {name: content})
        return content or self.artifact(place, name)

    def _look(self) -> None:
        data = self._call(lambda: self._client.get_run(self._claims)).data
        self._leases, self._signs = dict(data.params), _tagged(data.tags, ALIVE_TAG)

    def _lives(self, owner: str) -> bool:
        return _short(owner) in self._signs and self._silent[_short(owner)] < SILENT_RENEWALS

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
        trained: bool = True,
    ) -> TrialRun:
        """Open a trial's run, new or not, with its parameters and its data set.

        trained: by the data set's images; otherwise it is only judged by them.
        """
        tags = {
            "kind": "trial",
            "digest": digest,
            "recipe": recipe_json,
            "outcome": "training",
            "mlflow.parentRunId": parent,
            STUDY_TAG + study: _served(tables),
            **UNFOLDED,
        }
        # A database looks through the tag's values of all runs: only trials have this one.
        opened = self._opened(digest, f"tags.digest = '{digest}'", name, tags)
        run = _trial_run(opened)
        if not opened.data.params:
            entries = [Param(k, str(v)) for k, v in params.items()]
            self._call(self._client.log_batch, run.run_id, params=entries)
        # Does nothing where it is there.
        context = InputTag("mlflow.data.context", "training" if trained else "evaluation")
        source = DatasetInput(Dataset(**dataset), [context])
        self._call(self._client.log_inputs, run.run_id, datasets=[source])
        run.images = dict(json.loads(dataset.get("profile", "{}")))
        self.enrol(run, study, tables)
        if run.outcome != "training":
            self.continue_trial(run)
        return run

    def enrol(self, run: TrialRun, study: str, tables: str) -> None:
        """Note that a trial serves these tables of a study, beside those that it serves already."""
        noted = _served(f"{run.studies.get(study, '')} {tables}")
        if noted != run.studies.get(study):
            self._tag(run, {STUDY_TAG + study: noted})
            run.studies[study] = noted

    def continue_trial(self, run: TrialRun) -> None:
        """Mark a trial's run as running again."""
        self._call(self._client.update_run, run.run_id, status="RUNNING")
        self._tag(run, {"outcome": "training", "reason": ""})
        run.outcome, run.reason = "training", ""

    def log_epochs(
        self, run: TrialRun, epochs: Iterable[Mapping[str, float]], *, later: bool = False
    ) -> None:
        """Log each epoch's metrics at step = epoch; epochs already there are passed over.

        later: with what is logged next. MLflow takes 1,000 at a time: an epoch's own number is its
        last, so that one which was cut in two by a kill is logged again.
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
        self._log(run, metrics=metrics, later=later)
        for entry in new:
            run.metrics |= entry

    def tag_trained(self, run: TrialRun, trained: Mapping[str, str]) -> None:
        """Note the provenance of a trial's weights, where that is news, with what comes next."""
        if trained and trained != run.trained:
            self._tag(run, {TRAINED_TAG: json.dumps(dict(trained))}, later=True)
            run.trained = dict(trained)

    def store_weights(
        self, run: TrialRun, content: bytes, sha256: str, *, image_size: int, classes: int
    ) -> None:
        """Store a trial's weights file and its recipe: a model that MLflow can load.

        The end of the trial notes their sha256.
        """
        weights = {RECIPE: run.recipe.encode(), WEIGHTS: content}
        self._store(run.artifact_uri, _model_files(image_size, classes) | weights)
        shown = {"run_id": run.run_id, "artifact_path": ".", "flavors": {"python_function": {}}}
        self._tag(run, {WEIGHTS_TAG: sha256, MODELS_TAG: json.dumps([shown])}, later=True)
        run.weights_sha256 = sha256

    def log_checkpoint(
        self, run: TrialRun, epoch: int, content: bytes, *, image_size: int, classes: int
    ) -> None:
        """Log a trial's weights after an epoch as a model of MLflow's at this step."""
        logged = self._call(
            self._client.create_logged_model,
            self.experiment_id,
            name=f"{run.digest}-epoch-{epoch}",
            source_run_id=run.run_id,
        )
        weights = {RECIPE: run.recipe.encode(), WEIGHTS: content}
        self._store(logged.artifact_location, _model_files(image_size, classes) | weights)
        self._call(self._client.finalize_logged_model, logged.model_id, "READY")
        output = [LoggedModelOutput(logged.model_id, epoch)]
        self._call(self._client.log_outputs, run.run_id, models=output)
        self._tag(run, {f"{CHECKPOINT_TAG}{epoch}": logged.model_id})
        run.checkpoints[epoch] = logged.model_id

    def place_of(self, run: TrialRun, epoch: int) -> str:
        """Return the artifact URI of a trial's weights after an epoch, 0: the last."""
        if not epoch:
            return run.artifact_uri
        logged = self._call(self._client.get_logged_model, run.checkpoints[epoch])
        return str(logged.artifact_location)

    def end_trial(self, run: TrialRun, *, outcome: str, reason: str, trace: str = "") -> None:
        """End a trial's run with its outcome; failed and blocked ones are tried again.

        trace: the traceback to store with it, if any.
        """
        if trace:
            self._store(run.artifact_uri, {"error.txt": trace.encode()})
        self._tag(run, {"outcome": outcome, "reason": reason})
        status = "FINISHED" if outcome in ("finished", "collapsed", STOPPED) else "FAILED"
        self._call(self._client.set_terminated, run.run_id, status)
        run.outcome, run.reason = outcome, reason

    def record_cell(
        self,
        run: TrialRun,
        *,
        evaluator: str,
        cell: str,
        identity: str,
        ledger: bytes,
        metrics: Mapping[str, float],
        seconds: float = 0.0,
        judged_by: Mapping[str, str] | None = None,
        epoch: int = 0,
    ) -> None:
        """Store a cell's ledger, then the values of its scores and the tag that marks it done.

        cell: the digest of the question, whose `identity` is JSON. seconds: that its verdicts took.
        epoch: of the weights that were judged; those along the way have metrics of their own, by
        step.
        """
        sha256 = hashlib.sha256(ledger).hexdigest()
        # Commands that judge a cell at once do not write over each other's.
        stem = evaluator if self.is_alone else f"{evaluator}.{sha256[:12]}"
        self._store(run.artifact_uri, {f"{stem}.parquet": ledger}, LEDGERS)
        document = {
            "question": cell,
            "identity": json.loads(identity),
            "sha256": sha256,
            "seconds": seconds,
            "judged_by": dict(judged_by or {}),
        }
        tags = [RunTag(CELL_TAG + evaluator, json.dumps(document))]
        if run.failed_cells.pop(evaluator, ""):
            tags.append(RunTag(FAILED_TAG + evaluator, ""))
        if epoch:
            metrics = {f"{ALONG}{key}": value for key, value in metrics.items()}
        model = {"model_id": run.checkpoints[epoch]} if epoch else {}
        values = [Metric(key, v, run.start_time, epoch, **model) for key, v in metrics.items()]
        self._log(run, metrics=values, tags=tags)
        run.metrics |= metrics
        run.cells[evaluator], run.ledgers[evaluator] = cell, sha256
        run.seconds[evaluator], run.judged[evaluator] = seconds, document["judged_by"]

    def fail_cell(self, run: TrialRun, evaluator: str, reason: str) -> None:
        """Note why a cell has no answer; the next run of the command judges it."""
        self._tag(run, {FAILED_TAG + evaluator: reason})
        run.failed_cells[evaluator] = reason

    def forget_cell(self, run: TrialRun, evaluator: str, reason: str) -> None:
        """Note that a cell's answer is lost, and why; the next run judges it again.

        One that another command has stored meanwhile takes its place instead.
        """
        stored = _trial_run(self._call(self._client.get_run, run.run_id))
        if stored.ledgers.get(evaluator) != run.ledgers.get(evaluator):
            run.cells, run.ledgers, run.seconds = stored.cells, stored.ledgers, stored.seconds
            run.failed_cells, run.judged = stored.failed_cells, stored.judged
            return
        self._tag(run, {FAILED_TAG + evaluator: reason, CELL_TAG + evaluator: ""})
        run.failed_cells[evaluator] = reason
        run.cells.pop(evaluator, None)

    def history(self, run: TrialRun, metric: str) -> list[tuple[int, float]]:
        """Return a metric's values by step."""
        entries = self._call(self._client.get_metric_history, run.run_id, metric)
        return sorted((entry.step, entry.value) for entry in entries)

    def ledger(self, run: TrialRun, evaluator: str) -> bytes:
        """Return a cell's ledger; DamagedError where it is missing or not as it was stored."""
        read, sha256 = partial(self.artifact, run.artifact_uri), run.ledgers.get(evaluator, "")
        return whole_ledger(read, run.artifact_uri, evaluator, sha256, is_alone=self.is_alone)

    def artifact(self, artifact_uri: str, name: str) -> bytes | None:
        """Return the content of an artifact of a run, None where there is none."""
        return fetch_content(self.uri, artifact_uri, name, say=self._say)

    def seconds(self, run: TrialRun) -> float:
        """Return how long a trial trained and was judged, as its actors measured it."""
        judged = sum(run.seconds[evaluator] for evaluator in run.cells)
        return run.metrics.get(SECONDS_SO_FAR, 0.0) + judged

    def _call(self, method: Callable[P, Answer], *args: P.args, **named: P.kwargs) -> Answer:
        """Call the client; what is called again must do no harm the second time."""
        return patiently(lambda: method(*args, **named), say=self._say, stop=self._stop)

    def _opened(self, key: str, query: str, run_name: str, tags: Mapping[str, str]) -> Run:
        """Return the one run that matches `query`, made by the command that has the key's lease."""

        def opened() -> Run:
            place, began = self.experiment_id, time.monotonic()
            look = partial(self._client.search_runs, [place], query, max_results=1)
            while True:
                is_ours = self.is_alone or key in self._held  # before it looks
                if page := look():
                    return page[0]
                if is_ours:
                    every = {**_source(), **tags}
                    return self._client.create_run(place, run_name=run_name, tags=every)
                if self.lease(key)[0]:
                    self._stop.wait(OPENING_SECONDS)
                if time.monotonic() - began > RENEW_SECONDS:
                    began = time.monotonic()
                    self.renew()

        return self._call(opened)

    @property
    def _claims_name(self) -> str:
        return f"{self._experiment} claims"

    @cached_property
    def _claims(self) -> str:
        """The id of the run whose parameters name the owners of leases: MLflow changes none.

        An experiment's name is unique: this one gets it when its run is there.
        """
        name = self._claims_name
        if (there := self._client.get_experiment_by_name(name)) is None:
            new = self._client.create_experiment(f"{name} {uuid.uuid4().hex}")
            run = self._client.create_run(new, run_name="who has which trial")
            self._client.set_experiment_tag(new, CLAIMS_TAG, run.info.run_id)
            try:
                self._client.rename_experiment(new, name)
            except MlflowException:
                if (there := self._client.get_experiment_by_name(name)) is None:
                    raise
                if there.experiment_id != new:
                    self._client.delete_experiment(new)
            there = self._client.get_experiment_by_name(name)
        if there.lifecycle_stage == "deleted":  # by a user
            self._client.restore_experiment(there.experiment_id)
        return str(there.tags[CLAIMS_TAG])

    def _tag(self, run: TrialRun, tags: Mapping[str, str], *, later: bool = False) -> None:
        self._log(run, tags=[RunTag(k, v[:LONGEST_TAG]) for k, v in tags.items()], later=later)

    def _log(
        self,
        run: TrialRun,
        *,
        metrics: Sequence[Metric] = (),
        tags: Sequence[RunTag] = (),
        later: bool = False,
    ) -> None:
        """Log entries to a run in one call with those before that were for later."""
        run.unsent_metrics += metrics
        run.unsent_tags += tags
        if not later:
            unsent = {"metrics": run.unsent_metrics, "tags": run.unsent_tags}
            self._call(self._client.log_batch, run.run_id, **unsent)
            run.unsent_metrics, run.unsent_tags = [], []

    def _store(self, artifact_uri: str, files: Mapping[str, bytes], place: str = "") -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self._log_folder(artifact_uri, Path(folder), place)

    def _log_folder(self, artifact_uri: str, folder: Path, place: str = "") -> None:
        """Store a local folder's files at a place below an artifact URI.

        The client's `log_artifacts` goes by a run's id, which a copied results folder shares.
        """
        store = get_artifact_repository(artifact_uri, tracking_uri=self.uri)
        self._call(store.log_artifacts, str(folder), place or None)

    def _search(self, query: str) -> list[Run]:
        search = partial(self._client.search_runs, [self.experiment_id], query, max_results=PAGE)
        page = self._call(search)
        runs = [*page]
        while page.token:
            page = self._call(search, page_token=page.token)
            runs += page
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


def _source() -> dict[str, str]:
    """Return the tags by which the UI says which command and commit a run is of."""
    commit = provenance("cpu").get("commit", "").partition("+")[0]
    tags = {"source.name": Path(sys.argv[0]).name, "source.type": "LOCAL"}
    return {f"mlflow.{k}": v for k, v in {**tags, "source.git.commit": commit}.items() if v}


def _short(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def _study_query(name: str) -> str:
    return f"tags.kind = 'study' AND tags.study = '{name}'"


def _served(tables: str) -> str:
    """Return the names of tables in their order, each once: 'T1 T3 T10'."""
    return " ".join(sorted({*tables.split()}, key=lambda table: (len(table), table)))


def _trial_run(run: Run) -> TrialRun:
    tags = run.data.tags
    outcome = tags.get("outcome", "training")
    cells = {name: json.loads(text) for name, text in _tagged(tags, CELL_TAG).items()}
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return TrialRun(
        run_id=run.info.run_id,
        digest=tags["digest"],
        # Killed between its last tag and its end: the run is not done.
        outcome=outcome
        if run.info.status == "FINISHED" or outcome in ("failed", "blocked")
        else "training",
        reason=tags.get("reason", ""),
        artifact_uri=run.info.artifact_uri,
        start_time=run.info.start_time,
        end_time=run.info.end_time or 0,
        recipe=tags["recipe"],
        metrics=dict(run.data.metrics),
        cells={name: cell["question"] for name, cell in cells.items()},
        failed_cells=_tagged(tags, FAILED_TAG),
        ledgers={name: cell["sha256"] for name, cell in cells.items()},
        seconds={name: cell["seconds"] for name, cell in cells.items()},
        weights_sha256=tags.get(WEIGHTS_TAG, ""),
        studies=_tagged(tags, STUDY_TAG),
        trained=json.loads(tags.get(TRAINED_TAG, "{}")),
        judged={name: cell["judged_by"] for name, cell in cells.items()},
        images=json.loads((inputs and inputs[0].dataset.profile) or "{}"),
        checkpoints={int(k): v for k, v in _tagged(tags, CHECKPOINT_TAG).items()},
    )


def _tagged(tags: Mapping[str, str], start: str) -> dict[str, str]:
    return {k.removeprefix(start): v for k, v in tags.items() if k.startswith(start) and v}


@cache
def _model_files(image_size: int, classes: int) -> dict[str, bytes]:
    """Return what MLflow needs beside weights and recipe, by name of file; made once."""
    number, shape = np.dtype("float32"), (3, image_size, image_size)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "model")
        mlflow.pyfunc.save_model(
            model,
            loader_module="trainables.store.checkpoint",
            pip_requirements=["robustness-grid"],
            signature=ModelSignature(
                Schema([TensorSpec(number, (-1, *shape))]),
                Schema([TensorSpec(number, (-1, classes))]),
            ),
            input_example=np.full((1, *shape), 0.5, number),
        )
        return {path.name: path.read_bytes() for path in model.iterdir()}


@contextmanager
def fetched(
    tracking_uri: str, artifact_uri: str, name: str, *, say: Callable[[str], None] = logger.warning
) -> Iterator[Path]:
    """Give a local path to one artifact of a run: its own, or a copy's while the context is open.

    A server that is away is waited for.
    """
    is_here = urlsplit(artifact_uri).scheme in ("", "file")
    with tempfile.TemporaryDirectory() as folder:
        download = partial(
            mlflow.artifacts.download_artifacts,
            artifact_uri=f"{artifact_uri.rstrip('/')}/{name}",
            dst_path=None if is_here else folder,
            tracking_uri=tracking_uri,
        )
        yield Path(patiently(download, say=say))


def fetch_content(
    tracking_uri: str, artifact_uri: str, name: str, *, say: Callable[[str], None] = logger.warning
) -> bytes | None:
    """Return the content of an artifact of a run, None where there is none."""
    try:
        with fetched(tracking_uri, artifact_uri, name, say=say) as path:
            return path.read_bytes()
    except (MlflowException, OSError):
        store = get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)
        look = partial(store.list_artifacts, name.rpartition("/")[0] or None)
        if any(artifact.path == name for artifact in patiently(look, say=say)):
            raise
        return None


def whole_ledger(
    read: Callable[[str], bytes | None],
    place: str,
    evaluator: str,
    sha256: str,
    *,
    is_alone: bool = True,
) -> bytes:
    """Return a cell's ledger among a run's artifacts at a place, which `read` returns by name.

    DamagedError where it is missing or not as it was stored.
    """
    # A study that was pulled, or that is older than a server's names, has the other's.
    stems = [evaluator, f"{evaluator}.{sha256[:12]}"][:: 1 if is_alone else -1]
    is_there = False
    for stem in stems:
        content = read(f"{LEDGERS}/{stem}.parquet")
        if content is not None and hashlib.sha256(content).hexdigest() == sha256:
            return content
        is_there |= content is not None
    fault = "is damaged: its sha256 is another" if is_there else "is missing"
    raise DamagedError(f"{place}/{LEDGERS}/{evaluator}.parquet {fault}")


def client_settings() -> dict[str, str]:
    """Return the variables by which MLflow's clients log in and wait, for other nodes.

    Pass them as an argument: Ray shows runtime environments on its dashboard, arguments nowhere.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}


def check_address(uri: str) -> None:
    """Raise ValueError where no MLflow server answers this user at an URL."""
    if uri.startswith("http"):
        try:
            MlflowClient(uri).search_experiments(max_results=1)
        except Exception as error:
            raise ValueError(_refusal(uri, error)) from None


def _refusal(uri: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ModuleNotFoundError) or "Can't load plugin" in reason:
        reason += ": pip install 'robustness-grid[cluster]' brings that of postgresql+psycopg://"
    if "error code 401" in reason:
        reason += ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return f"MLflow at {uri} cannot be used: {reason}"
