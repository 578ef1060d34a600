"""The cluster: join or start Ray, count what fits, and try what a run needs on every node."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grid.lending import Bundle
from grid.options import LOCAL
from trainables.data.listing import DataSource
from trainables.ray_internals import listen_on_loopback
from trainables.store.results import code_version, other_code
from trainables.store.storage import Folder
from trainables.store.tracking import check_address, client_settings
from trainables.watchdog import HUNG_SECONDS

OBJECT_STORE_BYTES = 256 * 2**20
CLUSTER_FILE = "~/ray_bootstrap_config.yaml"  # where `ray up` leaves it on the head
ACCELERATOR = "accelerator_type:"  # of a resource's name
ROUNDING = 1e-6
STARTS_TRIED = 3  # Ray gives up after 30 seconds, which a busy machine may need
CHECK_SECONDS = 300
POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The workers of one trial, the resources of each, and the seconds one may stand still.

    They must not change its result, beyond rounding.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    compile: bool = False
    kind: str = ""  # of GPU, as Ray's resource names it; "": any
    numerics: str = ""  # exact or fast; "": fast on GPUs, else exact
    hung_after: float = HUNG_SECONDS

    def lanes(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Return how many trials fit side by side into nodes' resources."""
        return sum(map(self._slots, nodes)) // self.workers

    def _slots(self, node: Mapping[str, float]) -> int:
        if self.kind and self.kind not in node:
            return 0
        slots = math.floor(node.get("CPU", 0) / self.cpus)
        if not self.gpus:
            return slots
        free, size = node.get("GPU", 0.0) + ROUNDING, self.gpus - ROUNDING
        # A share lies on one GPU: what several leave over adds up to none.
        whole, rest = divmod(free, 1) if self.gpus < 1 else (0, free)
        return min(slots, int(whole * (1 // size) + rest // size))

    @property
    def is_fast(self) -> bool:
        return self.numerics == "fast" or (not self.numerics and self.gpus > 0)

    def __str__(self) -> str:
        of_kind = f" of {self.kind.removeprefix(ACCELERATOR)}" if self.kind else ""
        each = f"{self.cpus} CPUs and {self.gpus:g} GPUs{of_kind}"
        return each if self.workers == 1 else f"{self.workers} workers of {each} each"


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine; ValueError when refused."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # On the loopback a token of this run's own keeps other users out.
        listen_on_loopback()
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    cause = ""
    for _ in range(STARTS_TRIED if address is None else 1):
        try:
            ray.init(address=address or LOCAL, **options)
        except Exception as error:
            cause = str(error).strip().partition("\n")[0]
            ray.shutdown()
        else:
            return
    if address is None:
        raise ValueError(f"Ray does not start on this machine, tried {STARTS_TRIED} times: {cause}")
    raise ValueError(
        f"the Ray cluster at {address} refuses this run: {cause} (its token, if it has one, "
        "must be that of ~/.ray/auth_token or RAY_AUTH_TOKEN here)"
    )


def nodes_there() -> dict[str, dict[str, float]]:
    """Return the resources of the nodes there now, by node's id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def workers_on_gpus() -> tuple[list[tuple[str, Bundle]], list[list[Bundle]]]:
    """Return the workers that hold GPUs, each with its node, and by trial those that wait."""
    placed, waiting = [], []
    for group in placement_group_table().values():
        nodes, lacking = group["bundles_to_node_id"], []
        for index, bundle in group["bundles"].items():
            if group["state"] == "REMOVED" or not bundle.get("GPU"):
                continue
            if node := nodes.get(index):
                placed.append((node, bundle))
            else:
                lacking.append(bundle)
        waiting += [lacking] if lacking else []
    return placed, waiting


def gpu_kinds() -> dict[str, str]:
    """Return each kind of GPU that is there, as Ray's resource names it, with a node's id."""
    return {
        next((name for name in resources if name.startswith(ACCELERATOR)), ""): node
        for node, resources in nodes_there().items()
        if resources.get("GPU")
    }


def check_room(placements: Iterable[Placement], *, joined: bool) -> None:
    """Raise ValueError where not even one trial fits the nodes there, or those to be started.

    joined: the cluster is not this run's own, so its autoscaler may start nodes.
    """
    kinds = _cluster_file().get("available_node_types", {}).values() if joined else ()
    startable = [kind["resources"] for kind in kinds for _ in range(kind.get("max_workers", 0))]
    there = nodes_there().values()
    for placement in placements:
        if placement.lanes(there) or placement.lanes(startable):
            continue
        has = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in there)
        raise ValueError(
            f"a trial needs {placement}, but Ray has {has}; "
            f"lower {'--workers, ' if placement.workers > 1 else ''}--cpus-per-worker or "
            "--gpus-per-worker"
        )


def _cluster_file() -> dict[str, Any]:
    """Return the cluster file that `ray up` left on this machine; nothing unless it is a head."""
    path = Path(CLUSTER_FILE).expanduser()
    return dict(yaml.safe_load(path.read_text())) if path.is_file() else {}


def wait_for_nodes(seconds: float) -> tuple[bool, str]:
    """Wait for all nodes of the cluster file; say whether they are there, and which are missing."""
    deadline = time.monotonic() + seconds
    while (missing := _missing_nodes()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    nodes = nodes_there().values()
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return not missing, missing or f"{len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"


def _missing_nodes() -> str:
    cluster = _cluster_file()
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if silent := {*cluster.get("provider", {}).get("worker_ips", ())}.difference(alive):
        return f"no Ray on {', '.join(sorted(silent))}: `ray monitor CLUSTER.yaml` shows why"
    kinds = cluster.get("available_node_types", {}).values()
    promised = 1 + sum(kind.get("min_workers", 0) for kind in kinds)
    if len(alive) < promised:
        return f"{len(alive)} of {promised} nodes are there: `ray status` on the head shows why"
    return ""


def on_others(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run a function on every other node; return references to its answers, by node."""
    here, answers = ray.get_runtime_context().get_node_id(), {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, scheduling_strategy=there)(function)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            answers[name] = remote.remote(*arguments)
    return answers


def stage_everywhere(source: DataSource) -> None:
    """Have every other node bring the data to its own disk; ValueError names one that cannot."""
    for node, reference in on_others(DataSource.stage, source).items() if source.origin else ():
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            raise ValueError(f"node {node}: {getattr(error, 'cause', error)}") from None


def check_nodes(
    storage: Sequence[str], data: Sequence[Path] = (), mlflow: str = ""
) -> dict[str, str]:
    """Try on every other node what a run needs; return each node's problem, '' where there is none.

    storage: paths or URIs to write. data: folders to read. mlflow: a server to reach. ValueError
    when this machine itself cannot write the storage.
    """
    names, mark = {path: _names(path) for path in data}, f".check-{uuid.uuid4().hex}"
    with ExitStack() as marks:
        for place in storage:
            folder = Folder(place)
            try:
                folder.write(mark, b"")
            except OSError as error:
                raise ValueError(f"storage {place} cannot be written: {error}") from None
            marks.callback(folder.remove, mark)
        needs = (code_version(), storage, names, mlflow, mark, client_settings())
        answers = on_others(_probe, *needs)
        return {name: _answer(reference) for name, reference in answers.items()}


def _answer(reference: Any) -> str:
    try:
        return str(ray.get(reference, timeout=CHECK_SECONDS))
    except ray.exceptions.RayError as error:
        return f"does not run tasks: {str(error).splitlines()[0]}"


def _probe(
    version: str,
    storage: Sequence[str],
    names: Mapping[Path, list[str]],
    mlflow: str,
    mark: str,
    settings: Mapping[str, str],
) -> str:
    """Try what a run needs, on the node that this runs on; return the problem."""
    if problem := other_code(version):
        return problem
    try:
        for place in storage:
            folder, written = Folder(place), f"{mark}-{uuid.uuid4().hex}"
            if mark not in folder.names():
                return f"does not see {place}: it must be storage that all nodes share"
            try:
                folder.write(written, b"")
                folder.remove(written)
            except OSError as error:
                return f"cannot write to {place}: {error}"
        for path, expected in names.items():
            if (there := _names(path)) != expected:
                return (
                    f"sees {len(there)} entries at {path}, where the driver's node sees "
                    f"{len(expected)} or others"
                )
        os.environ |= settings
        check_address(mlflow)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
