"""The trial placed in one process: a Tune Trainable that resumes itself from its own files."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray import tune

from trainables.recipe import Recipe
from trainables.store.provenance import joined, provenance
from trainables.store.retries import OWN_FAULTS
from trainables.store.storage import WEIGHTS, NoRoomError, below
from trainables.watchdog import counting_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainables.networks import Classifier
    from trainables.train.loop import EpochReport
    from trainables.train.team import Team

CHECKPOINT_SECONDS = 5.0
FULL_SECONDS = 5.0  # between two looks whether a full disk has room again
SECONDS = "train/seconds"  # measured, so alone among the metrics not the same in every run
ENTRIES = {"model", "optimizer", "history", "outcome", "reason"}  # of every checkpoint


@dataclass
class RunningTrial:
    """A trial in a process that trains it, alone or as a worker of a team."""

    recipe: Recipe
    folder: str
    team: Team
    device: str = "cpu"
    outcome: str = "training"
    reason: str = ""
    classifier: Classifier | None = None
    reports: Iterator[EpochReport] | None = None
    unsent: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)  # that each epoch took
    trained: dict[str, str] = field(default_factory=dict)  # the provenance of its epochs
    notes: list[str] = field(default_factory=list)
    unkept: EpochReport | None = None
    paused: bool = False
    epoch: int = 0
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def leads(self) -> bool:
        return self.team.rank == 0


class RecipeTrial(tune.Trainable):  # type: ignore[misc]
    """Train one recipe, an epoch a step, in `storage`/trials/<digest>.

    Tune's own checkpointing is off: a trial that is started again, by whatever run, finds its
    newest whole checkpoint by its digest. An actor serves many trials one after another, and
    builds everything anew for each. config["trial"], as JSON: recipe, storage, threads, device,
    compile, hung_after (seconds without a step, after which the process ends).
    config["source"]: a DataSource. torch and timm are imported by the first step, so that the
    driver need not have them. What is the program's own fault fails the trial, and Tune does not
    try it again.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        # Tune does not retry what fails here: the work is done in the first step.
        self._trial_config = trial_config(config)
        self._running: RunningTrial | None = None

    def step(self) -> dict[str, Any]:
        try:
            if self._running is None:
                self._running = open_trial(self._trial_config)
            with counting_steps(self._trial_config["hung_after"]):
                return next_result(self._running)
        except OWN_FAULTS as error:
            return failed_result(self._trial_config["digest"], error)

    def cleanup(self) -> None:
        self._running = None


def trial_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a trial is told. It travels as text: Tune copies a grid's dicts n times n."""
    told: dict[str, Any] = json.loads(config["trial"])
    return told | {"source": config["source"]}


def weights_path(storage: str, recipe: Recipe) -> str:
    """Return where a trial's trained weights lie, once it has finished."""
    return below(storage, "trials", recipe.digest(), WEIGHTS)


def next_result(running: RunningTrial) -> dict[str, Any]:
    """Train a trial's next epoch, unless it is over, and return what the recorder is told.

    A trial that could not write what it has to keep tries that again instead.
    """
    if running.paused:
        time.sleep(FULL_SECONDS)
    elif running.outcome == "training":
        _advance(running)
    stored = _keep(running)
    outcome = "training" if running.paused else running.outcome
    result = {
        "digest": running.recipe.digest(),
        "epoch": running.epoch,
        "epochs": running.unsent,
        "notes": running.notes,
        "trained": running.trained,
        "outcome": outcome,
        "reason": running.reason,
        "done": outcome != "training",
    }
    running.unsent, running.notes = [], []
    return result | stored


def failed_result(digest: str, error: BaseException, trace: str = "") -> dict[str, Any]:
    """Return what the recorder is told of a trial whose program is at fault."""
    return {
        "digest": digest,
        "epochs": [],
        "outcome": "failed",
        "reason": traceback.format_exception_only(error)[-1].strip(),
        "trace": trace or "".join(traceback.format_exception(error)),
        "done": True,
    }


def open_trial(config: dict[str, Any], team: Team | None = None) -> RunningTrial:
    """Build a trial anew, as far as its newest whole checkpoint has it.

    Of a team only the first worker reads and writes the storage. config: as of `RecipeTrial`.
    """
    import torch

    from trainables.data.load import load_data
    from trainables.networks import build_classifier
    from trainables.scale import scale_named
    from trainables.store.checkpoint import load_newest_checkpoint
    from trainables.train.loop import train
    from trainables.train.team import ALONE

    team = team or ALONE
    torch.set_num_threads(config["threads"])
    recipe = Recipe.model_validate(config["recipe"])
    storage = config["storage"]
    digest = recipe.digest()
    folder = below(storage, "trials", digest)
    running = RunningTrial(recipe, folder, team, config["device"])
    teacher = _teacher(running, storage)
    if recipe.teacher and teacher is None:
        running.outcome, running.reason = "blocked", f"blocked by {recipe.teacher.describe()}"
        return running
    running.classifier = build_classifier(recipe)
    say = running.notes.append
    start = team.shared(load_newest_checkpoint(folder, digest, say=say) if running.leads else None)
    if start:
        if lacking := sorted(ENTRIES - start.keys()):
            raise ValueError(
                f"the newest checkpoint in {folder} lacks {', '.join(lacking)}: it is not of this "
                "version; move it away, and the trial goes on from the one before, or anew"
            )
        running.seconds = dict(start.get("seconds", {}))  # older checkpoints have none
        running.trained = dict(start.get("trained", {}))
        running.unsent = [_timed(running, metrics) for metrics in start["history"]]
        running.epoch = len(start["history"])
        running.outcome, running.reason = start["outcome"], start["reason"]
        running.classifier.load_state_dict(start["model"])
    running.reports = train(
        recipe,
        running.classifier,
        load_data(scale_named(recipe.scale), config["source"]),
        device=torch.device(config["device"]),
        teacher=teacher,
        start=start,
        compiled=config["compile"],
        team=team,
    )
    return running


def _teacher(running: RunningTrial, storage: str) -> Classifier | None:
    """Return a student's teacher with its trained weights; None without one, or without those."""
    from trainables.networks import build_classifier
    from trainables.store.checkpoint import fit_weights, stored_weights

    recipe = running.recipe.teacher
    if recipe is None:
        return None
    path = weights_path(storage, recipe)
    stored = stored_weights(path, recipe.digest()) if running.leads else None
    weights = running.team.shared(stored)
    if weights is None:
        return None
    teacher = build_classifier(recipe)
    fit_weights(weights, teacher, path)
    return teacher


def _advance(running: RunningTrial) -> None:
    assert running.reports is not None
    began = time.monotonic()
    report = next(running.reports)
    now = time.monotonic()
    running.epoch = report.epoch
    running.seconds[report.epoch] = now - began
    running.trained = joined(running.trained, provenance(running.device))
    running.unsent.append(_timed(running, report.metrics))
    running.outcome, running.reason = report.outcome, report.reason
    due = now - running.saved_at >= CHECKPOINT_SECONDS
    if report.outcome != "training" or due:
        running.saved_at, running.unkept = now, report


def _timed(running: RunningTrial, metrics: dict[str, float]) -> dict[str, float]:
    """Return an epoch's metrics with the seconds that it took, where they are known."""
    epoch = int(metrics["epoch"])
    return metrics | ({SECONDS: running.seconds[epoch]} if epoch in running.seconds else {})


def _keep(running: RunningTrial) -> dict[str, str]:
    """Write what is due, and return where weights lie; without room for it the trial is paused."""
    stored, problem = {}, ""
    if running.leads:
        try:
            _save_checkpoint(running)
            stored = _store_weights(running) if running.outcome == "finished" else {}
        except NoRoomError as error:
            problem = str(error)
    problem = running.team.shared(problem)
    if running.paused != bool(problem):
        running.paused = bool(problem)
        running.notes.append(f"paused: {problem}" if problem else "there is room again, it goes on")
    return stored


def _save_checkpoint(running: RunningTrial) -> None:
    from trainables.store.checkpoint import save_checkpoint

    if report := running.unkept:
        state = report.state | {
            "digest": running.recipe.digest(),
            "outcome": report.outcome,
            "reason": report.reason,
            "seconds": running.seconds,
            "trained": running.trained,
        }
        save_checkpoint(running.folder, report.epoch, state)
    running.unkept = None


def _store_weights(running: RunningTrial) -> dict[str, str]:
    from trainables.store.checkpoint import save_weights

    assert running.classifier is not None
    path = below(running.folder, WEIGHTS)
    sha256 = save_weights(path, running.classifier, running.recipe.model_dump_json())
    return {"weights": path, "sha256": sha256}
