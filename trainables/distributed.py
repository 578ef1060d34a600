"""The trial placed in many processes: a Tune function that has Ray Train run a team of workers."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from typing import Any

from trainables.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.storage import below, folder_at
from trainables.trial import trial_config

# Where the controller of a trial runs: on the node of the driver, which is not a spot instance.
# It takes none of what workers need, so that no trial can wait for another's workers.
CONTROLLER = {"node:__internal_head__": 0.001}
TRAIN_FOLDER = "train"
ENVIRONMENT = {
    # Ray Train takes one report per look at its workers: by default every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A node that died may take its successor minutes to come up.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
# After an hour without its workers a trial is given up in this run.
STARTS_TRIED = 12
SIOCGIFADDR = 0x8915


def train_together(config: dict[str, Any]) -> None:
    """Train one recipe with its config's number of workers; report each epoch to Tune.

    A worker or a node that dies has the team start again, from the trial's own checkpoint, unless
    that is the program's own fault. config["trial"]: as of `RecipeTrial`, and workers, gpus (of a
    worker).
    """
    from ray import tune
    from ray.train import WorkerGroupError

    from trainables.trial import failed_result

    trial = trial_config(config)
    kept = folder_at(below(trial["storage"], "trials", trial["digest"]))
    failures, furthest = 0, ""
    while True:
        try:
            _train_as_team(trial)
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
            return


def _train_as_team(trial: dict[str, Any]) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = {"CPU": trial["threads"]} | ({"GPU": trial["gpus"]} if trial["gpus"] else {})
    TorchTrainer(
        _work,
        train_loop_config=trial,
        torch_config=_torch_config("nccl" if trial["gpus"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=trial["workers"],
            use_gpu=bool(trial["gpus"]),
            resources_per_worker=resources,
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name=trial["digest"],
            storage_path=below(trial["storage"], TRAIN_FOLDER),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(
                controller_failure_limit=STARTS_TRIED,
            ),
        ),
    ).fit()


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


def _work(trial: dict[str, Any]) -> None:
    """Train as one worker of the team; every worker reports, the first one's word is taken."""
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
        with counting_steps():
            result = next_result(running)
        # Tune must not take the trial for over while its workers are being put away.
        over = result.pop("done")
        train.report(result)
        if over:
            return
