"""The trial placed in one process: a Tune Trainable that resumes itself from its own files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray import tune

from trainables.checkpoint import load_newest_checkpoint, save_checkpoint, save_weights
from trainables.data import load_data
from trainables.loop import EpochReport, train
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import scale_named

CHECKPOINT_SECONDS = 5.0
WEIGHTS = "weights.safetensors"


@dataclass
class _Running:
    recipe: Recipe
    folder: Path
    classifier: Classifier
    reports: Iterator[EpochReport]
    history: list[dict[str, float]]
    outcome: str = "training"
    reason: str = ""
    unsent: list[dict[str, float]] = field(default_factory=list)
    saved_at: float = 0.0


class RecipeTrial(tune.Trainable):  # type: ignore[misc]
    """Train one recipe, an epoch a step, in `storage`/trials/<digest>.

    Tune's own checkpointing is off: a trial that is started again, by whatever run, finds its
    newest sound checkpoint by its digest. An actor serves many trials one after another, and
    builds everything anew for each. config["trial"]: recipe (JSON fields), storage, threads,
    device.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        # Tune does not retry what fails here: the work is done in the first step.
        self._trial_config: dict[str, Any] = config["trial"]
        self._running: _Running | None = None

    def step(self) -> dict[str, Any]:
        running = self._running
        if running is None:
            running = self._running = _open(self._trial_config)
        if running.outcome == "training":
            _advance(running, next(running.reports))
        return self._result(running)

    def _result(self, running: _Running) -> dict[str, Any]:
        done = running.outcome != "training"
        result = {
            "digest": running.recipe.digest(),
            "epoch": int(running.history[-1]["epoch"]),
            "epochs": running.unsent,
            "outcome": running.outcome,
            "reason": running.reason,
            "done": done,
        }
        if done:
            path = running.folder / WEIGHTS
            recipe_json = running.recipe.model_dump_json()
            result["weights"] = str(path)
            result["sha256"] = save_weights(path, running.classifier, recipe_json)
        running.unsent = []
        return result

    def cleanup(self) -> None:
        self._running = None


def _open(config: dict[str, Any]) -> _Running:
    torch.set_num_threads(config["threads"])
    recipe = Recipe.model_validate(config["recipe"])
    folder = Path(config["storage"]) / "trials" / recipe.digest()
    start = load_newest_checkpoint(folder)
    classifier = build_classifier(recipe)
    device = torch.device(config["device"])
    data = load_data(scale_named(recipe.scale))
    history = list(start["history"]) if start else []
    running = _Running(
        recipe=recipe,
        folder=folder,
        classifier=classifier,
        reports=train(recipe, classifier, data, device=device, start=start),
        history=history,
        unsent=list(history),
        saved_at=time.monotonic(),
    )
    if start and start["outcome"] != "training":
        running.outcome, running.reason = start["outcome"], start["reason"]
        classifier.load_state_dict(start["model"])
    return running


def _advance(running: _Running, report: EpochReport) -> None:
    entry = {"epoch": float(report.epoch), **report.metrics}
    running.history.append(entry)
    running.unsent.append(entry)
    running.outcome, running.reason = report.outcome, report.reason
    now = time.monotonic()
    if report.outcome == "training" and now - running.saved_at < CHECKPOINT_SECONDS:
        return
    running.saved_at = now
    extra = {"history": running.history, "outcome": report.outcome, "reason": report.reason}
    save_checkpoint(running.folder, report.epoch, report.state | extra)
