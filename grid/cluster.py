"""Ray itself: find the cluster or start one here, count what fits, see that every node is well."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainables.storage import folder_at

OBJECT_STORE_BYTES = 256 * 2**20
LOCAL = "local"
STARTED_HERE = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where `ray start` writes it
CONNECT_SECONDS = 5
CHECK_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The workers of one trial and the resources of each.

    They must not change its result, beyond rounding.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    compile: bool = False

    def slots(self, resources: dict[str, float]) -> int:
        """Return how many workers fit into a node's resources."""
        slots = math.floor(resources.get("CPU", 0) / self.cpus)
        return min(slots, math.floor(resources.get("GPU", 0) / self.gpus)) if self.gpus else slots

    def __str__(self) -> str:
        each = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
        return each if self.workers == 1 else f"{self.workers} workers of {each} each"


def found_address(asked: str | None) -> str | None:
    """Return the address of the cluster to use, or None to start Ray on this machine alone.

    That is the one asked for, RAY_ADDRESS, or the one that `ray start` joined here. ValueError
    when what was asked for does not answer.
    """
    address = asked or os.environ.get("RAY_ADDRESS")
    if address == LOCAL:
        return None
    if address in (None, "auto"):
        # Whoever else may write in /tmp could name a cluster of theirs, which runs what it likes.
        own = STARTED_HERE.exists() and STARTED_HERE.stat().st_uid in (0, os.getuid())
        started = STARTED_HERE.read_text().strip() if own else ""
        if _answers(started):
            return started
        if address is None:
            return None
        raise ValueError(
            "no Ray cluster was started on this machine; run `ray start`, or --address"
        )
    assert address is not None
    if not _answers(address):
        raise ValueError(
            f"no Ray cluster answers at {address}; it wants HOST:PORT, as 10.0.0.5:6379"
        )
    return address


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return False
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine; ValueError when refused."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # On one machine as on a Mac: Ray listens on the loopback alone, where a token of this
        # run's own keeps other users out.
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        try:
            ray.init(
                address=LOCAL,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        except Exception as error:  # what Ray raises when it does not come up has no type
            raise ValueError(f"Ray does not start on this machine: {error}") from error
        return
    try:
        ray.init(address=address, **quiet)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Ray cluster at {address} refuses this run: {cause} (its token, if it has one, "
            "must be that of ~/.ray/auth_token or RAY_AUTH_TOKEN here)"
        ) from None


def trials_at_once(placement: Placement) -> int:
    """Return how many trials fit into what is free; ValueError if not even one.

    A worker never spans nodes, so each node is counted for itself.
    """
    free = available_resources_per_node()
    lanes = sum(placement.slots(node) for node in free.values()) // placement.workers
    if lanes < 1:
        there = [
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in free.values()
        ]
        raise ValueError(
            f"a trial needs {placement}, but Ray has free {'; '.join(there)}; "
            f"lower {'--workers, ' if placement.workers > 1 else ''}--cpus-per-trial or "
            "--gpus-per-trial"
        )
    return lanes


def check_nodes(where: str) -> list[str]:
    """Say what is wrong with which other node: each must read and write where this one does.

    where: a path or URI. Empty when all is well; ValueError when this machine cannot write there.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    folder, mark = folder_at(where), f".check-{uuid.uuid4().hex}"
    try:
        folder.write(mark, mark.encode())
    except OSError as error:
        raise ValueError(f"storage {where} cannot be written: {error}") from None
    probe = ray.remote(_probe)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = probe.options(num_cpus=0, scheduling_strategy=there)
        asked[node["NodeManagerAddress"]] = options.remote(where, mark)
    try:
        found = {name: _answer(reference) for name, reference in asked.items()}
    finally:
        folder.remove(mark)
    return [f"node {name}: {problem}" for name, problem in found.items() if problem]


def _answer(reference: Any) -> str:
    try:
        return str(ray.get(reference, timeout=CHECK_SECONDS))
    except ray.exceptions.RayError as error:
        return f"does not run tasks: {str(error).splitlines()[0]}"


def _probe(where: str, mark: str) -> str:
    """Return what keeps this node from using a folder, '' if nothing does."""
    folder, own = folder_at(where), f"{mark}-{uuid.uuid4().hex}"
    try:
        if mark not in folder.names():
            return f"does not see {where}: it must be storage that all nodes share"
        folder.write(own, b"")
        folder.remove(own)
    except OSError as error:
        return f"cannot write to {where}: {error}"
    return ""
