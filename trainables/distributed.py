"""The trial placed in many processes: a Tune function that has Ray Train run a team of workers."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
import traceback
from typing import Any

import ray
from ray import train, tune
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util import placement_group_table

from trainables.ray_internals import lacked_room, release_orphans, torch_config
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.store.storage import Folder, below
from trainables.trial import failed_result, trial_config
from trainables.watchdog import counting_steps

# Where the controller of a trial runs: on the node of the driver, which is not a spot instance.
# It takes none of what workers need, so that no trial can wait for another's workers.
CONTROLLER = {"node:__internal_head__": 0.001}
TRAIN_FOLDER = "train"
# A team waits for its workers, and again: a node that died may take its successor minutes to come
# up. Without its workers for an hour a trial is given up in this run.
START_SECONDS, GIVEN_UP_SECONDS = 300, 3600
TRAIN_SETTINGS = {
    # Ray Train takes one report per look at its workers: by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
}
SIOCGIFADDR = 0x8915


def train_together(config: dict[str, Any]) -> None:
    """Train one recipe with its config's number of workers; report each epoch to Tune.

    A worker, a node or Train's controller that dies has the team start again, from the trial's own
    checkpoint, unless that is the program's own fault. A team that finds no room waits for as long
    as other trials hold some. A failure that retries do not mend is reported, not raised: Tune
    tries again only where this process has died. config["trial"]: as of `RecipeTrial`, and
    workers, gpus (of a worker).
    """
    trial = trial_config(config)
    try:
        _train_to_the_end(trial)
    except Exception as error:
        tune.report(_given_up(trial["digest"], error))


def _train_to_the_end(trial: dict[str, Any]) -> None:
    """Train with one team after another until the trial is over; raise what retries do not mend."""
    for name, value in TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = Folder(below(trial["storage"], "trials", trial["digest"]))
    failures, furthest = 0, ""
    while True:
        release_orphans()
        try:
            return _train(trial)
        except ControllerError as error:
            if not (lacked_room(error) and others_train()):
                raise
        except RayTaskError:
            raise  # of the controller's code, not its death
        except (RayError, WorkerGroupError) as error:
            if any(isinstance(cause, OWN_FAULTS) for cause in _causes(error)):
                raise
            newest = max((n for n in folder.names() if n.endswith(".pt")), default="")
            failures, furthest = 1 if newest > furthest else failures + 1, newest
            if failures > MAX_FAILURES:
                raise
            time.sleep(wait_after(failures))


def _causes(error: Exception) -> list[Exception]:
    """Return what the workers or the controller of a team have raised, or the error itself."""
    controller = getattr(error, "controller_failure", error)
    return list(getattr(error, "worker_failures", {}).values()) or [controller]


def _given_up(digest: str, error: Exception) -> dict[str, Any]:
    """Return what the recorder is told of a trial that failed for good."""
    causes = _causes(error)
    cause = next((c for c in causes if isinstance(c, OWN_FAULTS)), causes[0])
    result = failed_result(digest, cause, "".join(traceback.format_exception(error)))
    return result | {"reason": result["reason"].splitlines()[0]}


def others_train() -> bool:
    """Tell whether any team has its workers now; that of a trial that waits for its own has not."""
    groups = placement_group_table().values()
    held = [group["bundles"].values() for group in groups if group["state"] == "CREATED"]
    return any("CPU" in bundle for bundles in held for bundle in bundles)


def _train(trial: dict[str, Any]) -> None:
    """Train with a team until the trial is over; ControllerError where the team cannot start."""
    from ray.train.torch import TorchTrainer

    gpus = {"GPU": trial["gpus"]} if trial["gpus"] else {}
    TorchTrainer(
        _work,
        train_loop_config=trial,
        torch_config=torch_config("nccl" if gpus else "gloo", _use_node_interface),
        scaling_config=train.ScalingConfig(
            num_workers=trial["workers"],
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": trial["threads"]} | gpus,
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name=trial["digest"],
            storage_path=below(trial["storage"], TRAIN_FOLDER),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(
                controller_failure_limit=GIVEN_UP_SECONDS // START_SECONDS
            ),
        ),
    ).fit()


def _use_node_interface() -> None:
    """Have gloo use the network interface of the address by which Ray knows this node.

    gloo looks its own host's name up, and many a machine resolves that to its loopback.
    """
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str:
    """Return the name of the network interface with an IPv4 address, '' where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def _work(trial: dict[str, Any]) -> None:
    """Train as one worker of the team; every worker reports, the first one's word is taken."""
    from ray.train.torch import get_device

    from trainables.running import next_result, open_trial
    from trainables.train.team import Team

    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    device = get_device() if trial["gpus"] else "cpu"
    running = open_trial(trial | {"device": str(device)}, team)
    over = False
    while not over:
        with counting_steps(trial["hung_after"]):
            result = next_result(running)
        # Tune must not take the trial for over while its workers are being put away.
        over = result.pop("done")
        train.report(result)
