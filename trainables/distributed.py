"""The trial placed in many processes: a Tune function that has Ray Train run a team of workers."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from trainables.recipe import Recipe
from trainables.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.storage import below, folder_at
from trainables.trial import failed_result, trial_config

if TYPE_CHECKING:
    from trainables.team import Team

# Where the controller of a trial runs: on the node of the driver, which is not a spot instance.
# It takes none of what workers need, so that no trial can wait for another's workers.
CONTROLLER = {"node:__internal_head__": 0.001}
TRAIN_FOLDER = "train"
# Ray Train takes one report per look at its workers: by default every two seconds.
LOOK_SECONDS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
# How long a team waits for its workers, then to go on with fewer or, where it may not, to wait
# again: a node that died may take its successor minutes to come up.
START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ELASTIC_START_SECONDS, FIXED_START_SECONDS = "60", "300"
# Without its workers for so long a trial is given up in this run.
GIVEN_UP_SECONDS = 3600
SIOCGIFADDR = 0x8915


def train_together(config: dict[str, Any]) -> None:
    """Train one recipe with its config's number of workers; report each epoch to Tune.

    A worker or a node that dies has the team start again, from the trial's own checkpoint, unless
    that is the program's own fault; where the cluster cannot give as many for a while, with fewer,
    and with more when it can again. config["trial"]: as of `RecipeTrial`, and workers, min_workers,
    gpus (of a worker).
    """
    trial = trial_config(config)
    elastic = trial["min_workers"] < trial["workers"]
    wait = ELASTIC_START_SECONDS if elastic else FIXED_START_SECONDS
    for name, value in (LOOK_SECONDS | {START_SECONDS: wait}).items():
        os.environ.setdefault(name, value)
    from ray import tune
    from ray.train import ControllerError, WorkerGroupError

    from trainables.team import team_sizes

    recipe = Recipe.model_validate(trial["recipe"])
    sizes = team_sizes(recipe, trial["min_workers"], trial["workers"])
    kept = folder_at(below(trial["storage"], "trials", trial["digest"]))
    failures, furthest = 0, ""
    size = sizes[0]
    while True:
        try:
            larger = _train(trial | {"sizes": sizes}, size)
        except ControllerError:
            if size == sizes[-1]:
                raise
            most = min(size - 1, free_workers(trial))
            size = next((n for n in sizes if n <= most), sizes[-1])
        except WorkerGroupError as error:
            for cause in error.worker_failures.values():
                if isinstance(cause, OWN_FAULTS):
                    tune.report(failed_result(trial["digest"], cause, str(error)))
                    return
            newest = max((n for n in kept.names() if n.endswith(".pt")), default="")
            failures, furthest = 1 if newest > furthest else failures + 1, newest
            if failures > MAX_FAILURES:
                raise
            time.sleep(wait_after(failures))
        else:
            if larger is None:
                return
            size = larger


def _train(trial: dict[str, Any], size: int) -> int | None:
    """Train with a team until the trial is over, or for as long as there is no larger one.

    Returns the size of the larger team to go on with. Raises ControllerError where the team cannot
    start; the smallest one tries for long.
    """
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    last = size == trial["sizes"][-1]
    starts = int(GIVEN_UP_SECONDS / float(os.environ[START_SECONDS])) if last else 0
    result = TorchTrainer(
        _work,
        train_loop_config=trial,
        torch_config=_torch_config("nccl" if trial["gpus"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=size,
            use_gpu=bool(trial["gpus"]),
            resources_per_worker=_resources(trial),
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name=trial["digest"],
            storage_path=below(trial["storage"], TRAIN_FOLDER),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(
                controller_failure_limit=starts,
            ),
        ),
    ).fit()
    larger: int | None = result.return_value
    return larger


def _resources(trial: dict[str, Any]) -> dict[str, float]:
    return {"CPU": trial["threads"]} | ({"GPU": trial["gpus"]} if trial["gpus"] else {})


def free_workers(trial: dict[str, Any]) -> int:
    """Return how many workers of a trial fit into what the cluster's nodes have free now."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node().values()
    each = _resources(trial).items()
    return sum(min(int(node.get(name, 0) / share) for name, share in each) for node in free)


def _torch_config(backend: str) -> Any:
    """Return Ray Train's set-up of a process group, by the interfaces that the nodes share.

    gloo looks its own host's name up, and many a machine resolves that to its loopback.
    """
    from ray.train.torch.config import TorchConfig, _TorchBackend

    class OnNodeInterface(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
            worker_group.execute(_use_node_interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[OnNodeInterface]:
            return OnNodeInterface

    return Config(backend=backend)


def _use_node_interface() -> None:
    """Have gloo use the network interface of the address by which Ray knows this node."""
    import ray

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


def _work(trial: dict[str, Any]) -> int | None:
    """Train as one worker of the team; every worker reports, the first one's word is taken.

    Returns None when the trial is over, or the size of the larger team that there is room for.
    """
    from ray import train
    from ray.train.torch import get_device

    from trainables.team import Team
    from trainables.trial import next_result, open_trial
    from trainables.watchdog import counting_steps, start_watchdog

    start_watchdog(trial["hung_after"])

    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    device = get_device() if trial["gpus"] else "cpu"
    running = open_trial(trial | {"device": str(device)}, team)
    while True:
        larger = _larger(trial, team)
        # The larger team goes on from here.
        running.save_now = larger is not None
        with counting_steps():
            result = next_result(running)
        # Tune must not take the trial for over while its workers are being put away.
        over = result.pop("done")
        train.report(result | {"workers": (team.size, trial["workers"])})
        if over or larger:
            return None if over else larger


def _larger(trial: dict[str, Any], team: Team) -> int | None:
    """Return the size of the largest team there is room for, None where this one is."""
    if team.size == trial["sizes"][0]:
        return None
    room = team.shared(team.size + free_workers(trial) if team.rank == 0 else None)
    largest = max(n for n in trial["sizes"] if n <= room)
    return largest if largest > team.size else None
