"""The private names of Ray that this project needs, each with its reason. Checked with Ray 2.60."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray._private import ray_constants, worker
from ray._private.state import available_resources_per_node, state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.tune.execution import class_cache
from ray.util.placement_group import PlacementGroup, remove_placement_group

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import ControllerError


def listen_on_loopback() -> None:
    """Have a Ray that is started here listen on the loopback alone, as it does on a Mac."""
    ray_constants.ENABLE_RAY_CLUSTER = False


def is_own_ray() -> bool:
    """Say whether this process started the Ray that it uses."""
    return bool(worker._global_node.is_head())


def free_resources() -> dict[str, dict[str, float]]:
    """Return what each node has free now, by its id; the public call sums over nodes."""
    return dict(available_resources_per_node())


def nodes_of_actors(handles: Sequence[ActorHandle[Any]]) -> dict[str, str]:
    """Return the nodes of the actors that are alive, by the actors' ids; it needs no dashboard."""
    known = {
        handle._actor_id.hex(): state.actor_table(handle._actor_id.hex()) for handle in handles
    }
    return {
        actor: entry["Address"]["NodeID"]
        for actor, entry in known.items()
        if entry.get("State") == "ALIVE"
    }


def keep_credentials_here() -> None:
    """Keep Tune from writing AWS credentials into its actors' environment, which Ray logs."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def lacked_room(error: ControllerError) -> bool:
    """Say whether a team failed because the cluster had no room for its workers."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def release_orphans() -> None:
    """Give back what teams hold whose controller has died.

    Ray itself does so when the run ends, and Train's own cleaner only beside a dashboard.
    """
    job = ray.get_runtime_context().get_job_id()
    groups = state._connect_and_get_accessor().get_placement_group_table()
    for group in map(PlacementGroupTableData.FromString, groups):
        by_an_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        orphaned = by_an_actor and group.creator_actor_dead and group.creator_job_id.hex() == job
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def torch_config(backend: str, prepare: Any) -> Any:
    """Return Ray Train's set-up of a process group, before which every worker calls `prepare`."""
    from ray.train.torch.config import TorchConfig, _TorchBackend

    class PreparedBackend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
            worker_group.execute(prepare)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[PreparedBackend]:
            return PreparedBackend

    return Config(backend=backend)
