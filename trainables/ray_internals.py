"""The private names of Ray that this project needs, each with its reason. Checked with Ray 2.60.0.

That is the one release of those allowed that is out; tests/test_ray_internals.py names each.
"""

from __future__ import annotations

import ray
from ray._private import ray_constants
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.tune.execution import class_cache
from ray.util.placement_group import PlacementGroup, remove_placement_group

from trainables.data.listing import DataSource


def listen_on_loopback() -> None:
    """Make a Ray that starts here listen on the loopback only, as it does on a Mac."""
    ray_constants.ENABLE_RAY_CLUSTER = False


def keep_credentials_here() -> None:
    """Keep Tune from writing AWS credentials into its actors' environment, which Ray logs."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def fed_here(source: DataSource, threads: int, gpus: float) -> DataSource:
    """Return data as a worker on this node, with so many threads and GPUs, reads them."""
    here = ray.get_runtime_context().get_node_id() if gpus else ""
    nodes = {node["NodeID"]: node["Resources"] for node in (ray.nodes() if gpus else ())}
    return source.fed(threads, gpus, nodes.get(here, {}))


def node_leaves() -> bool:
    """Tell whether this node is being drained: a spot instance that is about to be taken away."""
    return ray.is_initialized() and ray.get_runtime_context().get_node_id() in _draining()


def nodes_gone(leaving: bool) -> set[str]:
    """Return the ids of the nodes that have died, or also of those about to be taken away."""
    dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    return dead.union(_draining() if leaving else ())


def _draining() -> dict[str, int]:
    deadlines: dict[str, int] = state.get_draining_nodes()
    return deadlines


def lacked_room(error: Exception) -> bool:
    """Say whether a team failed because the cluster had no room for its workers."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


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
