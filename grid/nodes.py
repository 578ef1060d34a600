"""The nodes of a cluster: that they are there, and can read, write and reach what a run needs."""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grid.cluster import cluster_file, node_types
from trainables.store.storage import Folder

if TYPE_CHECKING:
    from trainables.store.tracking import Credentials

CHECK_SECONDS = 300
POLL_SECONDS = 1.0
SSH = 22
SSH_SECONDS = 3
FAILURES_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What every node has to have: `storage` (paths or URIs) to write, `data` to read.

    mlflow: a server to reach, where artifacts go through it. gpus: whether those that Ray counts
    must compute.
    """

    storage: Sequence[str]
    data: Sequence[Path] = ()
    mlflow: str | None = None
    gpus: bool = False


@dataclass(frozen=True)
class Probed:
    """What keeps a node from taking part, '' if nothing does, and the seconds each try took."""

    problem: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.problem or ", ".join(
            f"{k} ({v * 1000:.0f} ms)" for k, v in self.seconds.items()
        )


def missing_nodes() -> list[str]:
    """Say which nodes that the cluster file promises are not there; empty where all are."""
    cluster = cluster_file()
    alive = [node for node in ray.nodes() if node["Alive"]]
    if addresses := cluster.get("provider", {}).get("worker_ips"):
        answering = {node["NodeManagerAddress"] for node in alive}
        return [f"node {a}: {_why_silent(a)}" for a in addresses if a not in answering]
    missing, there = [], node_types(alive, cluster)
    for name, kind in cluster.get("available_node_types", {}).items():
        lacking = kind.get("min_workers", 0) - there[name]
        if lacking > 0 and name != cluster["head_node_type"]:
            missing.append(f"{lacking} of {kind['min_workers']} nodes of type {name}: {_why(name)}")
    return missing


def describe_nodes() -> str:
    """Say how many nodes there are, and what they have."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(name, 0) for node in alive) for name in ("CPU", "GPU"))
    return f"{len(alive)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"


def wait_for_nodes(seconds: float, say: Callable[[str], None]) -> list[str]:
    """Wait until all nodes of the cluster file are there; return what is missing by then."""
    deadline, said = time.monotonic() + seconds, False
    while (missing := missing_nodes()) and time.monotonic() < deadline:
        if not said:
            say(f"waiting up to {seconds:.0f} s for nodes: {'; '.join(missing)}")
        said = True
        time.sleep(POLL_SECONDS)
    return missing


def _why_silent(address: str) -> str:
    try:
        socket.create_connection((address, SSH), timeout=SSH_SECONDS).close()
    except OSError as error:
        return f"it does not answer on port {SSH} ({error.strerror or error})"
    return "it answers ssh, but Ray did not start there: `ray monitor CLUSTER.yaml` shows why"


def _why(name: str) -> str:
    """Say how far the autoscaler has come with the nodes of a type, by its own word."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    failed = [
        str(launch.details)
        for launch in status.failed_launches
        if launch.ray_node_type_name == name
    ]
    if failed:
        return "; ".join(dict.fromkeys(failed[-FAILURES_NAMED:]))
    for kind, nodes in (("asked for", status.pending_launches), ("starting", status.pending_nodes)):
        if any(node.ray_node_type_name == name for node in nodes):
            return kind
    return "not asked for: is the autoscaler running? `ray status` on the head shows"


def check_nodes(needs: Needs) -> dict[str, Probed]:
    """Try on every other node what this one can do, and return what was found by node.

    ValueError when this machine itself cannot write the storage.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    seen = {path: _seen(path) for path in needs.data}
    mark, credentials = f".check-{uuid.uuid4().hex}", _credentials(needs)
    with ExitStack() as marks:
        for where in needs.storage:
            marks.callback(_mark(where, mark).remove, mark)
        probe, asked = ray.remote(_probe), {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = probe.options(num_cpus=0, scheduling_strategy=there)
            own = replace(needs, gpus=needs.gpus and "GPU" in node["Resources"])
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            asked[name] = task.remote(own, seen, mark, credentials)
        return {name: _answer(reference) for name, reference in asked.items()}


def _mark(where: str, mark: str) -> Folder:
    try:
        folder = Folder(where)
        folder.write(mark, mark.encode())
    except OSError as error:
        raise ValueError(f"storage {where} cannot be written: {error}") from None
    return folder


def _answer(reference: Any) -> Probed:
    try:
        answer: Probed = ray.get(reference, timeout=CHECK_SECONDS)
    except ray.exceptions.RayError as error:
        return Probed(problem=f"does not run tasks: {str(error).splitlines()[0]}")
    return answer


def _credentials(needs: Needs) -> Credentials | None:
    """Return what MLflow is told on other nodes, which need not import it if they do not ask it."""
    if needs.mlflow is None:
        return None
    from trainables.store.tracking import Credentials

    return Credentials.of_environment()


def _probe(
    needs: Needs, seen: Mapping[Path, str], mark: str, credentials: Credentials | None
) -> Probed:
    """Try what a run needs, on the node that this runs on."""
    probed = Probed()
    looks: list[tuple[str, Callable[[], None]]]
    looks = [(f"writes {where}", partial(_try_storage, where, mark)) for where in needs.storage]
    looks += [(f"reads {path}", partial(_try_data, path, what)) for path, what in seen.items()]
    if needs.mlflow and credentials:
        reach = partial(_try_mlflow, needs.mlflow, credentials)
        looks.append((f"reaches {needs.mlflow}", reach))
    if needs.gpus:
        looks.append(("computes on its GPUs", _try_gpus))
    for what, look in looks:
        began = time.monotonic()
        try:
            look()
        except (OSError, ValueError) as error:
            return replace(probed, problem=str(error))
        probed.seconds[what] = time.monotonic() - began
    return probed


def _try_storage(where: str, mark: str) -> None:
    folder, own = Folder(where), f"{mark}-{uuid.uuid4().hex}"
    if mark not in folder.names():
        raise ValueError(f"does not see {where}: it must be storage that all nodes share")
    try:
        folder.write(own, b"")
        folder.remove(own)
    except OSError as error:
        raise ValueError(f"cannot write to {where}: {error}") from None


def _try_data(path: Path, expected: str) -> None:
    if (found := _seen(path)) != expected:
        raise ValueError(f"sees {found} at {path}, where the driver's node sees {expected}")


def _try_mlflow(uri: str, credentials: Credentials) -> None:
    from trainables.store.tracking import check_address

    credentials.use()
    check_address(uri)


def _try_gpus() -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("has GPUs by Ray's count, and torch finds none: look at its driver")


def _seen(path: Path) -> str:
    """Say what a node sees of a data folder, from two levels of names."""
    if not path.is_dir():
        return "no such folder"
    try:
        below = sorted(path.iterdir())
        names = below + [name for p in below if p.is_dir() for name in sorted(p.iterdir())]
    except OSError as error:
        return f"no leave to read it ({error.strerror})"
    listed = "\n".join(str(name.relative_to(path)) for name in names)
    digest = hashlib.sha256(listed.encode()).hexdigest()[:6]
    return f"{len(names)} entries ({digest})"
