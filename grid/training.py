"""Tune trains a plan's trials: their order, their retries and the reuse of actors."""

from __future__ import annotations

import bisect
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from grid.cluster import Placement, Placements, Room
from grid.plan import Trial as PlannedTrial
from grid.record import Recorder
from trainables.data.listing import DataSource
from trainables.ray_internals import keep_credentials_here
from trainables.store.retries import MAX_FAILURES, wait_after
from trainables.trial import RecipeTrial, trial_config

TUNE_FOLDER = "tune"


def train_missing(
    recorder: Recorder,
    placements: Placements,
    source: DataSource,
    *,
    storage: str,
    results: Path,
    room: Room,
) -> None:
    """Train a plan's missing trials with Tune, in its order, as many at once as there is room for.

    They share actors; where some have several workers, each trial has processes of its own.
    """
    todo = recorder.trials_to_train()
    if not todo:
        return
    shutil.rmtree(results / TUNE_FOLDER, ignore_errors=True)
    keep_credentials_here()
    # Its last word lists trials that failed, those that were tried again too; the recorder does.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    placed = {trial.digest: placements.of(trial.recipe.family) for trial in todo}
    configs = {
        trial.digest: {
            "trial": json.dumps(_trial_settings(trial, placed[trial.digest], storage)),
            "source": source,
        }
        for trial in todo
    }
    alone = all(placement.workers == 1 for placement in placed.values())
    order = PlanOrder(configs, placed, room)
    tune.Tuner(
        tune.with_resources(RecipeTrial, _resources) if alone else _team_trainable(),
        tune_config=tune.TuneConfig(
            search_alg=order,
            num_samples=-1,
            reuse_actors=alone,
            trial_name_creator=_digest_of,
            trial_dirname_creator=_digest_of,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(results.resolve()),
            # Trials keep their own checkpoints, by digest.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Events(recorder, order)],
            verbose=0,
        ),
    ).fit()


class PlanOrder(Searcher):  # type: ignore[misc]
    """Suggest trials in the plan's order, as many as fit; a student once its teacher has ended.

    They fit if the nodes that are there hold them side by side, or those that an autoscaler may
    start. A trial whose process has died is suggested again after a wait, up to MAX_FAILURES times
    in a row; a new epoch makes good its earlier failures. configs, by digest and in the plan's
    order: what Tune hands to each trial.
    """

    def __init__(
        self, configs: Mapping[str, dict[str, Any]], placements: Mapping[str, Placement], room: Room
    ) -> None:
        super().__init__()
        self._configs, self._placements, self._room = configs, placements, room
        self._teachers = {d: trial_config(config)["teacher"] for d, config in configs.items()}
        self._places = {digest: place for place, digest in enumerate(configs)}
        self._waiting = list(configs)
        self._under_way: dict[str, str] = {}  # digests, by Tune's id of a try
        self._failures: Counter[str] = Counter()
        self._furthest: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self._waiting and not self._under_way:
            return str(Searcher.FINISHED)
        digest = next(filter(self._is_ready, self._waiting), None)
        if digest is None or not self._fits(digest):
            return None
        self._waiting.remove(digest)
        self._under_way[trial_id] = digest
        return self._configs[digest]

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        digest = self._under_way[trial_id]
        if result.get("epoch", 0) > self._furthest[digest]:
            self._furthest[digest] = result["epoch"]
            self._failures[digest] = 0

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        digest = self._under_way.pop(trial_id)
        if not error:
            return
        self._failures[digest] += 1
        if self._failures[digest] <= MAX_FAILURES:
            self._not_before[digest] = time.monotonic() + wait_after(self._failures[digest])
            bisect.insort(self._waiting, digest, key=self._places.__getitem__)

    def will_retry(self, digest: str) -> bool:
        """Say whether a trial that has just failed is tried again."""
        return digest in self._waiting

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a run that is started again finds in MLflow what is done."""

    def _is_ready(self, digest: str) -> bool:
        teacher = self._teachers[digest]
        taught = teacher not in self._waiting and teacher not in self._under_way.values()
        return taught and time.monotonic() >= self._not_before.get(digest, 0.0)

    def _fits(self, digest: str) -> bool:
        beside = [self._placements[other] for other in self._under_way.values()]
        return not beside or self._room.holds([*beside, self._placements[digest]])


class _Events(tune.Callback):  # type: ignore[misc]
    """Hand Tune's events to the recorder; nothing here may block or raise."""

    def __init__(self, recorder: Recorder, order: PlanOrder) -> None:
        self._recorder: Recorder | None = recorder
        self._order = order

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
        if not self._recorder:
            return
        digest = _digest_of(trial)
        if self._order.will_retry(digest):
            self._recorder.retried(digest, _last_line(trial))
        else:
            self._recorder.failed(digest, _last_line(trial), _trace(trial))


def _digest_of(trial: Trial) -> str:
    return str(trial_config(trial.config)["digest"])


def _trace(trial: Trial) -> str:
    # The file on this machine: Tune's own answer is read from the storage, where it may lack yet.
    path = Path(trial.error_file or "")
    return path.read_text() if path.is_file() else ""


def _last_line(trial: Trial) -> str:
    lines = [line.strip() for line in _trace(trial).splitlines()]
    return next((line for line in reversed(lines) if line), "unknown error")


def _trial_settings(trial: PlannedTrial, placement: Placement, storage: str) -> dict[str, Any]:
    """Return what `RecipeTrial` and `train_together` are told of a trial."""
    teacher = trial.recipe.teacher
    return {
        "digest": trial.digest,
        "teacher": teacher.digest() if teacher else None,
        "recipe": trial.recipe.model_dump(mode="json"),
        "storage": storage,
        "threads": placement.cpus,
        "workers": placement.workers,
        "gpus": placement.gpus,
        "hung_after": placement.hung_after,
        "device": "cuda" if placement.gpus else "cpu",
        "compile": placement.compile,
    }


def _team_trainable() -> Any:
    # Ray Train takes a second to import.
    from trainables.distributed import CONTROLLER, train_together

    return tune.with_resources(train_together, CONTROLLER)


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    trial = trial_config(config)
    return tune.PlacementGroupFactory([{"CPU": trial["threads"], "GPU": trial["gpus"]}])
