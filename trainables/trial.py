"""The trial placed in one process: a Tune Trainable that resumes itself from its own files."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray import tune

from trainables.recipe import Recipe
from trainables.storage import below

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainables.loop import EpochReport
    from trainables.models import Classifier
    from trainables.team import Team

CHECKPOINT_SECONDS = 5.0
SECONDS = "train/seconds"  # measured, so alone among the metrics not the same in every run
WEIGHTS = "weights.safetensors"


@dataclass
class RunningTrial:
    """A trial in a process that trains it, alone or as a worker of a team."""

    recipe: Recipe
    folder: str
    outcome: str = "training"
    reason: str = ""
    classifier: Classifier | None = None
    reports: Iterator[EpochReport] | None = None
    unsent: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    leads: bool = True
    save_now: bool = False


class RecipeTrial(tune.Trainable):  # type: ignore[misc]
    """Train one recipe, an epoch a step, in `storage`/trials/<digest>.

    Tune's own checkpointing is off: a trial that is started again, by whatever run, finds its
    newest sound checkpoint by its digest. An actor serves many trials one after another, and
    builds everything anew for each. config["trial"]: recipe (JSON fields), storage, threads,
    device, source (a DataSource), compile. torch and timm are imported by the first step, so that
    the driver need not have them.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        # Tune does not retry what fails here: the work is done in the first step.
        self._trial_config: dict[str, Any] = config["trial"]
        self._running: RunningTrial | None = None

    def step(self) -> dict[str, Any]:
        if self._running is None:
            self._running = open_trial(self._trial_config)
        return next_result(self._running)

    def cleanup(self) -> None:
        self._running = None


def weights_path(storage: str, recipe: Recipe) -> str:
    """Return where a trial's trained weights lie, once it has finished."""
    return below(storage, "trials", recipe.digest(), WEIGHTS)


def next_result(running: RunningTrial) -> dict[str, Any]:
    """Train a trial's next epoch, unless it is over, and return what the recorder is told."""
    if running.outcome == "training":
        _advance(running)
    result = {
        "digest": running.recipe.digest(),
        "epoch": running.epoch,
        "epochs": running.unsent,
        "outcome": running.outcome,
        "reason": running.reason,
        "done": running.outcome != "training",
    }
    running.unsent = []
    stored = running.outcome == "finished" and running.leads
    return result | (_store_weights(running) if stored else {})


def open_trial(config: dict[str, Any], team: Team | None = None) -> RunningTrial:
    """Build a trial anew, as far as its newest sound checkpoint has it.

    Of a team only the first worker reads and writes the storage. config: as of `RecipeTrial`.
    """
    import torch

    from trainables.checkpoint import fit_weights, load_newest_checkpoint, stored_weights
    from trainables.data import load_data
    from trainables.loop import train
    from trainables.models import build_classifier
    from trainables.scale import scale_named
    from trainables.team import ALONE

    team = team or ALONE
    torch.set_num_threads(config["threads"])
    recipe = Recipe.model_validate(config["recipe"])
    storage = config["storage"]
    folder = below(storage, "trials", recipe.digest())
    running = RunningTrial(recipe, folder, leads=team.rank == 0)
    teacher = None
    if recipe.teacher:
        taught_by = weights_path(storage, recipe.teacher)
        weights = team.shared(stored_weights(taught_by) if running.leads else None)
        if weights is None:
            running.outcome, running.reason = "blocked", f"blocked by {recipe.teacher.describe()}"
            return running
        teacher = build_classifier(recipe.teacher)
        fit_weights(weights, teacher, taught_by)
    running.classifier = build_classifier(recipe)
    start = team.shared(load_newest_checkpoint(running.folder) if running.leads else None)
    if start:
        running.unsent, running.epoch = list(start["history"]), len(start["history"])
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


def _advance(running: RunningTrial) -> None:
    from trainables.checkpoint import save_checkpoint

    assert running.reports is not None
    began = time.monotonic()
    report = next(running.reports)
    now = time.monotonic()
    running.epoch = report.epoch
    running.unsent.append(report.metrics | {SECONDS: now - began})
    running.outcome, running.reason = report.outcome, report.reason
    recent = now - running.saved_at < CHECKPOINT_SECONDS and not running.save_now
    early = report.outcome == "training" and recent
    if early or not running.leads:
        return
    running.saved_at = now
    state = report.state | {"outcome": report.outcome, "reason": report.reason}
    save_checkpoint(running.folder, report.epoch, state, sound=report.sound)


def _store_weights(running: RunningTrial) -> dict[str, str]:
    from trainables.checkpoint import save_weights

    assert running.classifier is not None
    path = below(running.folder, WEIGHTS)
    sha256 = save_weights(path, running.classifier, running.recipe.model_dump_json())
    return {"weights": path, "sha256": sha256}
