"""A trial under way in this process, alone or as a worker of a team: it resumes from its files."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier, first_classifier
from trainables.recipe import Recipe
from trainables.scale import scale_of_recipe
from trainables.store import checkpoint
from trainables.store.results import SECONDS, WAITING, WAITS, joined, other_code, provenance
from trainables.store.retries import NodeLeavesError
from trainables.store.storage import WEIGHTS, NoRoomError, below, weights_path
from trainables.train.loop import EpochReport, train
from trainables.train.team import ALONE, Team
from trainables.weights import fit_weights

Weights = dict[str, Tensor]
CHECKPOINT_SECONDS = 5.0
# Between two checkpoints within an epoch: where one takes 5 s and a node of several is lost every
# 2.5 hours, the root of 2 * 5 * 9000 loses least (Young 1974).
MIDWAY_SECONDS = 300.0
LOOK_SECONDS = 5.0  # after one, in which it is not asked whether the node goes
FULL_SECONDS = 5.0  # between two looks whether a full disk has room again


@dataclass
class RunningTrial:
    """A trial in a process that trains it, alone or as a worker of a team."""

    recipe: Recipe
    folder: str
    team: Team
    node_leaves: Callable[[], bool]
    device: str = "cpu"
    stops_from: int = 0  # after this epoch each is saved, for the trial may be stopped; 0: never
    outcome: str = "training"
    reason: str = ""
    classifier: Classifier | None = None
    mean: dict[str, torch.Tensor] | None = None  # of the weights, where it is what is judged
    reports: Iterator[EpochReport] | None = None
    epoch: int = 0
    forward: int = 0  # forward batches done of the epoch after it
    seconds: dict[int, float] = field(default_factory=dict)  # that each epoch took, so far
    waiting: dict[int, float] = field(default_factory=dict)  # the share of it, where data are fed
    computed: dict[str, str] = field(default_factory=dict)  # what computes here, and how
    trained: dict[str, str] = field(default_factory=dict)  # the same of all its epochs
    unsent: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unsaved: EpochReport | None = None
    checkpoints: tuple[int, ...] = ()  # the epochs whose weights are judged, too
    along: dict[int, str] = field(default_factory=dict)  # where those lie, by epoch
    unlogged: EpochReport | None = None
    saved_at: float = field(default_factory=time.monotonic)
    paused: bool = False

    def is_due(self) -> bool:
        """Tell whether to save within an epoch: after a while, or before the node is gone."""
        unsaved = time.monotonic() - self.saved_at
        return unsaved >= MIDWAY_SECONDS or (unsaved >= LOOK_SECONDS and self.node_leaves())


def open_trial(
    config: dict[str, Any], team: Team = ALONE, node_leaves: Callable[[], bool] = lambda: False
) -> RunningTrial:
    """Build a trial anew, as far as its newest whole checkpoint has it.

    Of a team only the first worker reads and writes the storage. config: as of `RecipeTrial`.
    node_leaves: tells whether this node is about to be taken away.
    """
    if problem := other_code(config.get("code", "")):
        raise RuntimeError(f"node {platform.node()} {problem}")  # another node may have it
    torch.set_num_threads(config["threads"])
    recipe, storage = Recipe.model_validate(config["recipe"]), config["storage"]
    digest = recipe.digest()
    folder = below(storage, "trials", digest)
    running = RunningTrial(recipe, folder, team, node_leaves, config["device"])
    running.stops_from = config.get("stops_from", 0)
    is_fast = config.get("numerics") == "fast"
    running.computed = provenance(running.device) | ({"numerics": "fast"} if is_fast else {})
    running.checkpoints = tuple(config.get("checkpoints", ()))
    needed: dict[str, Weights] = {}
    for other in recipe.prerequisites:
        path = weights_path(storage, other.digest())
        stored = checkpoint.stored_weights(path, other.digest()) if team.rank == 0 else None
        weights = team.shared(stored)
        if weights is None:
            running.outcome, running.reason = "blocked", f"blocked by {other.describe()}"
            return running
        needed[other.digest()] = weights
    newest = None
    if team.rank == 0:
        newest = checkpoint.load_newest_checkpoint(folder, digest, say=running.notes.append)
    start = team.shared(newest)
    classifier = running.classifier = _begun(running, is_new=start is None)
    if start is None and (origin := recipe.warm_start):
        reset = {"reset_head": recipe.reset_head, "new_head": True}  # of other classes
        weights = needed[origin.digest()]
        running.notes += fit_weights(weights, classifier, origin.describe(), **reset)
    if not recipe.epochs:
        running.outcome, running.trained = "finished", running.computed
        return running
    teacher = None
    if recipe.teacher:
        teacher = build_classifier(recipe.teacher)
        fit_weights(needed[recipe.teacher.digest()], teacher, recipe.teacher.describe())
    if start:
        _take_up(running, classifier, start)
    running.reports = train(
        recipe,
        classifier,
        load_data(scale_of_recipe(recipe), config["source"]),
        device=torch.device(config["device"]),
        teacher=teacher,
        start=start,
        compiled=config["compile"],
        is_fast=is_fast,
        team=team,
        due=running.is_due,
    )
    return running


def _take_up(running: RunningTrial, classifier: Classifier, start: dict[str, Any]) -> None:
    """Give a trial and its classifier what its checkpoint has."""
    running.seconds, running.trained = start["seconds"], start["trained"]
    running.unsent = [_timed(running, metrics) for metrics in start["history"]]
    running.epoch = len(start["history"])
    running.outcome, running.reason = start["outcome"], start["reason"]
    classifier.load_state_dict(start["model"])
    running.mean = start.get("mean") if running.recipe.ema_evaluated else None
    running.along = checkpoint.weights_along(running.folder, running.checkpoints, running.epoch)


def _begun(running: RunningTrial, *, is_new: bool) -> Classifier:
    """Build a trial's classifier; a new one has its first weights, read by the first worker."""
    recipe, team = running.recipe, running.team
    if team.rank == 0 and is_new and recipe.init:
        classifier, notes = first_classifier(recipe)
        running.notes += notes
        team.shared(classifier.state_dict() if team.size > 1 else None)
        return classifier
    classifier = build_classifier(recipe)
    if is_new and recipe.init:
        classifier.load_state_dict(team.shared(None))
    return classifier


def next_result(running: RunningTrial) -> dict[str, Any]:
    """Train a trial to its next report, unless it is over, and return that for the recorder.

    A trial whose files had no room on the disk tries to write them again instead. NodeLeavesError
    once it has saved what it did on a node that is about to be taken away.
    """
    if running.paused:
        time.sleep(FULL_SECONDS)
    elif running.outcome == "training":
        _advance(running)
    stored = _save(running)
    going_on = running.outcome == "training" and not running.paused
    if going_on and running.team.any(running.node_leaves()):
        raise NodeLeavesError("its node is about to be taken away")
    outcome = "training" if running.paused else running.outcome
    result = {
        "digest": running.recipe.digest(),
        "epoch": running.epoch,
        "forward": running.forward,
        "epochs": running.unsent,
        "notes": running.notes,
        "trained": running.trained,
        "outcome": outcome,
        "reason": running.reason,
        "done": outcome != "training",
    }
    running.unsent, running.notes = [], []
    return result | stored | {"checkpoints": running.along}


def _advance(running: RunningTrial) -> None:
    assert running.reports is not None
    began = time.monotonic()
    report = next(running.reports)
    now = time.monotonic()
    running.epoch, running.forward = report.epoch, report.forward
    of_epoch = report.epoch + bool(report.forward)
    running.seconds[of_epoch] = running.seconds.get(of_epoch, 0.0) + now - began
    share, images = report.pace
    if share >= WAITS > max(running.waiting.values(), default=0.0):
        waits = f"waits for data {share:.0%} of the time: {images:,.0f} images/s"
        running.notes.append(f"{waits}; more --data-workers or packed shards")
    if share:
        running.waiting[of_epoch] = share
    running.trained = joined(running.trained, running.computed)
    running.outcome, running.reason = report.outcome, report.reason
    running.mean = report.state.get("mean") if running.recipe.ema_evaluated else None
    due = report.forward or 0 < running.stops_from <= report.epoch
    if due or report.outcome != "training" or now - running.saved_at >= CHECKPOINT_SECONDS:
        running.saved_at, running.unsaved = now, report
    if report.forward:
        return
    running.unsent.append(_timed(running, report.metrics))
    if report.epoch in running.checkpoints:
        running.unlogged = report


def _timed(running: RunningTrial, metrics: dict[str, float]) -> dict[str, float]:
    epoch = int(metrics["epoch"])
    waiting = {WAITING: running.waiting[epoch]} if epoch in running.waiting else {}
    return metrics | {SECONDS: running.seconds[epoch]} | waiting


def _save(running: RunningTrial) -> dict[str, str]:
    """Write what is due, and return where weights lie; without room for it the trial is paused."""
    stored, problem = {}, ""
    if running.team.rank == 0:
        try:
            stored = _write(running)
        except NoRoomError as error:
            problem = str(error)
    problem = running.team.shared(problem)
    if running.paused != bool(problem):
        running.paused = bool(problem)
        running.notes.append(f"paused: {problem}" if problem else "there is room again, it goes on")
    return stored


def _write(running: RunningTrial) -> dict[str, str]:
    if report := running.unlogged:
        path = below(running.folder, checkpoint.weights_of_epoch(report.epoch))
        checkpoint.save_weights(path, report.judged, running.recipe.model_dump_json())
        running.along[report.epoch], running.unlogged = path, None
    if report := running.unsaved:
        state = report.state | {
            "digest": running.recipe.digest(),
            "outcome": report.outcome,
            "reason": report.reason,
            "seconds": running.seconds,
            "trained": running.trained,
        }
        checkpoint.save_checkpoint(running.folder, report.epoch, state, forward=report.forward)
        running.unsaved = None
    if running.outcome != "finished":
        return {}
    assert running.classifier is not None
    if running.mean:
        running.classifier.load_state_dict(running.mean)
    path = below(running.folder, WEIGHTS)
    sha256 = checkpoint.save_weights(path, running.classifier, running.recipe.model_dump_json())
    return {"weights": path, "sha256": sha256}
