"""A trial under way in this process, alone or as a worker of a team: it resumes from its files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainables.data.load import load_data
from trainables.networks import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import scale_named
from trainables.store.checkpoint import (
    fit_weights,
    load_newest_checkpoint,
    save_checkpoint,
    save_weights,
    stored_weights,
)
from trainables.store.provenance import joined, provenance
from trainables.store.storage import WEIGHTS, NoRoomError, below, weights_path
from trainables.train.loop import EpochReport, train
from trainables.train.team import ALONE, Team

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


def open_trial(config: dict[str, Any], team: Team | None = None) -> RunningTrial:
    """Build a trial anew, as far as its newest whole checkpoint has it.

    Of a team only the first worker reads and writes the storage. config: as of `RecipeTrial`.
    """
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
    recipe = running.recipe.teacher
    if recipe is None:
        return None
    path = weights_path(storage, recipe.digest())
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
    assert running.classifier is not None
    path = below(running.folder, WEIGHTS)
    sha256 = save_weights(path, running.classifier, running.recipe.model_dump_json())
    return {"weights": path, "sha256": sha256}
