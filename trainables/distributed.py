"""The trial placed in many processes: a Tune function that has Ray Train run a team of workers."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
import traceback
from typing import TYPE_CHECKING, Any

from trainables.recipe import Recipe
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, wait_after
from trainables.store.storage import Folder, below
from trainables.trial import failed_result, trial_config

if TYPE_CHECKING:
    from ray.train import ControllerError

    from trainables.train.team import Team

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

    A worker, a node or Train's controller that dies has the team start again, from the trial's own
    checkpoint, unless that is the program's own fault; where the cluster cannot give as many for a
    while, with fewer, and with more when it can again. A team that finds no room waits for as long
    as other trials hold some. What is tried in vain is reported, not raised: Tune tries again only
    where this process has died. config["trial"]: as of `RecipeTrial`, and workers, min_workers,
    gpus (of a worker).
    """
    trial = trial_config(config)
    try:
        _train_to_the_end(trial)
    except Exception as error:
        from ray import tune

        tune.report(_given_up(trial["digest"], error))


def _train_to_the_end(trial: dict[str, Any]) -> None:
    """Train with one team after another until the trial is over; raise what is tried in vain."""
    elastic = trial["min_workers"] < trial["workers"]
    wait = ELASTIC_START_SECONDS if elastic else FIXED_START_SECONDS
    for name, value in (LOOK_SECONDS | {START_SECONDS: wait}).items():
        os.environ.setdefault(name, value)
    from ray.exceptions import RayError, RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    from trainables.train.team import team_sizes

    recipe = Recipe.model_validate(trial["recipe"])
    sizes = team_sizes(recipe, trial["min_workers"], trial["workers"])
    kept = Folder(below(trial["storage"], "trials", trial["digest"]))
    failures, furthest = 0, ""
    size = sizes[0]
    while True:
        release_orphans()
        try:
            larger = _train(trial | {"sizes": sizes}, size)
        except ControllerError as error:
            if size == sizes[-1]:
                if not (_found_no_room(error) and others_train()):
                    raise
                continue
            most = min(size - 1, free_workers(trial))
            size = next((n for n in sizes if n <= most), sizes[-1])
        except RayTaskError:
            raise  # of the controller's code, not its death
        except (RayError, WorkerGroupError) as error:
            if any(isinstance(cause, OWN_FAULTS) for cause in _causes(error)):
                raise
            newest = max((n for n in kept.names() if n.endswith(".pt")), default="")
            failures, furthest = 1 if newest > furthest else failures + 1, newest
            if failures > MAX_FAILURES:
                raise
            time.sleep(wait_after(failures))
        else:
            if larger is None:
                return
            size = larger


def _causes(error: Exception) -> list[Exception]:
    """Return what the workers or the controller of a team have raised, or the error itself."""
    controller = getattr(error, "controller_failure", error)
    return list(getattr(error, "worker_failures", {}).values()) or [controller]


def _given_up(digest: str, error: Exception) -> dict[str, Any]:
    """Return what the recorder is told of a trial that was tried in vain."""
    causes = _causes(error)
    cause = next((c for c in causes if isinstance(c, OWN_FAULTS)), causes[0])
    told = failed_result(digest, cause, "".join(traceback.format_exception(error)))
    return told | {"reason": told["reason"].splitlines()[0]}


def _found_no_room(error: ControllerError) -> bool:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def release_orphans() -> None:
    """Give back what teams hold whose controller has died.

    Ray itself does so when the run ends, and Train's own cleaner only beside a dashboard.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    groups = state._connect_and_get_accessor().get_placement_group_table()
    for group in map(PlacementGroupTableData.FromString, groups):
        by_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        orphaned = by_an_actor and group.creator_actor_dead and group.creator_job_id.hex() == job
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def others_train() -> bool:
    """Tell whether any team has its workers now; that of a trial that waits for its own has not."""
    from ray.util import placement_group_table

    groups = placement_group_table().values()
    held = [group["bundles"].values() for group in groups if group["state"] == "CREATED"]
    return any("CPU" in bundle for bundles in held for bundle in bundles)


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

    from trainables.train.team import Team
    from trainables.trial import next_result, open_trial
    from trainables.watchdog import counting_steps

    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    device = get_device() if trial["gpus"] else "cpu"
    running = open_trial(trial | {"device": str(device)}, team)
    while True:
        larger = _larger(trial, team)
        # The larger team goes on from here.
        running.save_now = larger is not None
        with counting_steps(trial["hung_after"]):
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
