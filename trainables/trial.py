"""The trial placed in one process: a Tune Trainable that resumes itself from its own files."""

from __future__ import annotations

import json
import traceback
from typing import TYPE_CHECKING, Any

from ray import tune

from trainables.store.retries import OWN_FAULTS
from trainables.watchdog import counting_steps

if TYPE_CHECKING:
    from trainables.running import RunningTrial


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
            from trainables.running import next_result, open_trial

            if self._running is None:
                self._running = open_trial(self._trial_config)
            with counting_steps(self._trial_config["hung_after"]):
                return next_result(self._running)
        except OWN_FAULTS as error:
            return failed_result(self._trial_config["digest"], error)


def trial_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's settings. They travel as text: Tune copies a grid's dicts n times n."""
    settings: dict[str, Any] = json.loads(config["trial"])
    return settings | {"source": config["source"]}


def failed_result(digest: str, error: BaseException, trace: str = "") -> dict[str, Any]:
    """Return the report of a trial whose program is at fault."""
    return {
        "digest": digest,
        "epochs": [],
        "outcome": "failed",
        "reason": traceback.format_exception_only(error)[-1].strip(),
        "trace": trace or "".join(traceback.format_exception(error)),
        "done": True,
    }
