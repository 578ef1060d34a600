"""Ray itself: find the cluster or start one here, and count what fits."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml

from grid.address import LOCAL
from grid.plan import Plan
from trainables import ray_internals
from trainables.watchdog import HUNG_SECONDS

OBJECT_STORE_BYTES = 256 * 2**20
BOOTSTRAPPED = "~/ray_bootstrap_config.yaml"  # where `ray up` leaves the cluster file on the head
TYPE_LABEL = "ray.io/node-group"
HEAD_RESOURCE = "node:__internal_head__"
LOOK_SECONDS = 2.0
ROUNDING = 1e-6
STARTS_TRIED = 3


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The workers of one trial, the resources of each, and the seconds one may stand still.

    They must not change its result, beyond rounding.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    compile: bool = False
    hung_after: float = HUNG_SECONDS

    def slots(self, resources: dict[str, float]) -> int:
        """Return how many workers fit into a node's resources."""
        slots = math.floor(resources.get("CPU", 0) / self.cpus)
        if not self.gpus:
            return slots
        return min(slots, math.floor(resources.get("GPU", 0) / self.gpus + ROUNDING))

    def __str__(self) -> str:
        each = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
        return each if self.workers == 1 else f"{self.workers} workers of {each} each"


@dataclass(frozen=True)
class Placements:
    """The placement of each family's trials: the usual one, or a study's own for the family."""

    usual: Placement
    by_family: Mapping[str, Placement] = field(default_factory=dict)

    def of(self, family: str) -> Placement:
        return self.by_family.get(family, self.usual)

    def of_all(self, plan: Plan) -> list[Placement]:
        """Return the usual placement, then the others that a plan's trials have."""
        theirs = {self.of(trial.recipe.family): None for trial in plan}
        return list({self.usual: None} | theirs)


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start Ray on this machine; ValueError when refused."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # On the loopback a token of this run's own keeps other users out.
        ray_internals.listen_on_loopback()
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        _start_here(quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Ray cluster at {address} refuses this run: {cause} (its token, if it has one, "
            "must be that of ~/.ray/auth_token or RAY_AUTH_TOKEN here)"
        ) from None


def _start_here(quiet: dict[str, Any]) -> None:
    """Start Ray on this machine; it gives up after 30 seconds, which a busy machine may need."""
    cause = ""
    for _ in range(STARTS_TRIED):
        try:
            ray.init(
                address=LOCAL,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        except Exception as error:
            cause = str(error)
            ray.shutdown()
        else:
            return
    raise ValueError(f"Ray does not start on this machine, tried {STARTS_TRIED} times: {cause}")


class Room:
    """What trials may take of the cluster: of the nodes there, and of those it may still start.

    Of nodes that are there when it is made that is what they have free, of others all; less the
    GPUs that evaluators then hold of either: `held`, by the id of a node.
    """

    def __init__(self, held: Callable[[], Mapping[str, float]] = dict) -> None:
        self._held = held
        self._free = _with_gpus(ray_internals.free_resources(), held(), 1)
        self._cluster = cluster_file()
        self._nodes: list[dict[str, float]] = []
        self._looked_at = -math.inf

    def lanes(self, placement: Placement) -> int:
        """Return how many trials of a placement fit side by side; one is always let try."""
        return max(1, sum(placement.slots(node) for node in self._look()) // placement.workers)

    def holds(self, placements: Iterable[Placement]) -> bool:
        """Return whether trials fit side by side. A worker never spans nodes."""
        left = [dict(node) for node in self._look()]
        return all(_take(left, placement) for placement in placements)

    def check(self, placements: Iterable[Placement]) -> None:
        """Raise ValueError where not even one trial fits."""
        for placement in placements:
            if self.holds([placement]):
                continue
            there = [f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in self._nodes]
            raise ValueError(
                f"a trial needs {placement}, but Ray has free {'; '.join(there)}; "
                f"lower {'--workers, ' if placement.workers > 1 else ''}--cpus-per-trial or "
                "--gpus-per-trial"
            )

    @property
    def gpus(self) -> int:
        """The GPUs of the nodes there now, or where there is none of a node that may be started."""
        there = int(ray.cluster_resources().get("GPU", 0))
        return there or int(max(node.get("GPU", 0) for node in self._look()))

    def _look(self) -> list[dict[str, float]]:
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            alive = [node for node in ray.nodes() if node["Alive"]]
            there = {n["NodeID"]: self._free.get(n["NodeID"], n["Resources"]) for n in alive}
            there = _with_gpus(there, self._held(), -1)
            self._nodes = list(there.values()) + self._to_come(node_types(alive, self._cluster))
            self._looked_at = time.monotonic()
        return self._nodes

    def _to_come(self, present: Counter[str]) -> list[dict[str, float]]:
        """Return the resources of the nodes that the autoscaler has leave to start."""
        coming: list[dict[str, float]] = []
        head, left = self._cluster.get("head_node_type"), self._cluster.get("max_workers", 0)
        left -= present.total() - 1
        for name, kind in self._cluster.get("available_node_types", {}).items():
            if name != head:
                allowed = kind.get("max_workers", 0) - present[name]
                coming += [kind["resources"]] * min(allowed, left - len(coming))
        return coming


def _with_gpus(
    nodes: Mapping[str, dict[str, float]], held: Mapping[str, float], sign: int
) -> dict[str, dict[str, float]]:
    """Return nodes' resources with the GPUs that are held of each added, or taken off."""
    return {
        node: there | ({"GPU": there.get("GPU", 0) + sign * held[node]} if node in held else {})
        for node, there in nodes.items()
    }


def _take(left: list[dict[str, float]], placement: Placement) -> bool:
    """Take a trial's workers from what nodes have left; False where they do not fit."""
    wanted = placement.workers
    for node in left:
        taken = min(wanted, placement.slots(node))
        node["CPU"] = node.get("CPU", 0) - taken * placement.cpus
        node["GPU"] = node.get("GPU", 0) - taken * placement.gpus
        wanted -= taken
    return wanted == 0


def cluster_file() -> dict[str, Any]:
    """Return what `ray up` left of its cluster file on the head.

    Nothing where this is not the head, or on a Ray that this process has started: its nodes are
    not the autoscaler's.
    """
    path = Path(BOOTSTRAPPED).expanduser()
    if ray_internals.is_own_ray():
        return {}
    here = ray.util.get_node_ip_address()
    heads = [n["NodeManagerAddress"] for n in ray.nodes() if HEAD_RESOURCE in n["Resources"]]
    if here not in heads or not path.is_file():
        return {}
    return dict(yaml.safe_load(path.read_text()))


def node_types(nodes: Iterable[dict[str, Any]], cluster: dict[str, Any]) -> Counter[str]:
    """Count nodes by the type that the autoscaler started them as, by label or by resources."""
    kinds = cluster.get("available_node_types", {})
    found: Counter[str] = Counter()
    for node in nodes:
        alike = (name for name, kind in kinds.items() if _alike(node, kind))
        found[node["Labels"].get(TYPE_LABEL) or next(alike, "")] += 1
    return found


def _alike(node: dict[str, Any], kind: dict[str, Any]) -> bool:
    both = node["Resources"], kind["resources"]
    return all(both[0].get(name, 0) == both[1].get(name, 0) for name in ("CPU", "GPU"))
