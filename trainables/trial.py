"""The trial as Tune runs it, in one process or by a team; it resumes itself from its own files."""

from __future__ import annotations

import json
import os
import traceback
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.util import placement_group_table

from trainables.ray_internals import fed_here, lacked_room, node_leaves, release_orphans
from trainables.store.retries import OWN_FAULTS, NodeLeavesError
from trainables.watchdog import counting_steps

if TYPE_CHECKING:
    from trainables.running import RunningTrial

# Where the controller of a trial runs: on the node of the driver, which is not a spot instance.
# It takes none of what workers need, so that no trial can wait for another's workers.
CONTROLLER = {"node:__internal_head__": 0.001}
# A team waits for its workers, and again without limit: spot nodes may be away for hours. Every
# hour it begins anew, which gives back what dead teams hold.
START_SECONDS, ANEW_SECONDS = 300, 3600
TRAIN_SETTINGS = {
    # Ray Train takes one report per look at its workers: by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
}


class RecipeTrial(tune.Trainable):  # type: ignore[misc]
    """Train one recipe, an epoch a step, in `storage`/trials/<digest>.

    Tune's own checkpointing is off: a trial that is started again, by whatever run, finds its
    newest whole checkpoint by its digest. An actor serves many trials one after another, and
    builds everything anew for each. config["trial"], as JSON: recipe, storage, threads, device,
    compile, numerics ("exact" or "fast"), hung_after (seconds without a step, after which the
    process ends). config["source"]: a DataSource. torch and timm are imported by the first step, so
    that the driver need not have them. What is the program's own fault fails the trial, and Tune
    does not try it again.
    """

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def setup(self, config: dict[str, Any]) -> None:
        # Tune does not retry what fails here: the work is done in the first step.
        self._trial_config = trial_config(config)
        self._running: RunningTrial | None = None

    def step(self) -> dict[str, Any]:
        try:
            from trainables.running import next_result, open_trial

            if self._running is None:
                trial = self._trial_config
                fed = fed_here(trial["source"], trial["threads"], trial.get("gpus", 0.0))
                self._running = open_trial(trial | {"source": fed}, node_leaves=node_leaves)
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


def train_together(config: dict[str, Any]) -> None:
    """Train one recipe with its config's number of workers; report each epoch to Tune.

    A death, of a worker, a node or Train's controller, is raised: Tune tries the trial again, from
    its own checkpoint. The program's own fault is reported. A team that left a node, or has no
    room, begins anew. config["trial"]: as of `RecipeTrial`, workers,
    gpus (a worker's share) and kind (of the GPU, as resources of Ray).
    """
    trial = trial_config(config)
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    from trainables.distributed import train_team

    while True:
        release_orphans()
        try:
            train_team(trial, starts=ANEW_SECONDS // START_SECONDS)
            return
        except Exception as error:
            workers = getattr(error, "worker_failures", {}).values()
            faults = [cause for cause in (error, *workers) if isinstance(cause, OWN_FAULTS)]
            if faults:
                trace = "".join(traceback.format_exception(error))
                tune.report(failed_result(trial["digest"], faults[0], trace))
                return
            left = any(isinstance(cause, NodeLeavesError) for cause in workers)
            if not (left or lacked_room(error)):
                raise


def teams_placed() -> int:
    """Return how many teams have their workers now; one that waits for them has not."""
    groups = placement_group_table().values()
    held = [group["bundles"].values() for group in groups if group["state"] == "CREATED"]
    return sum(any("CPU" in bundle for bundle in bundles) for bundles in held)
