"""The order in which Tune trains a plan's trials, by its public Searcher."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher

from grid.cluster import Placement, Room
from trainables.store.retries import MAX_FAILURES, wait_after
from trainables.trial import trial_config


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
