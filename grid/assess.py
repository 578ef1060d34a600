"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evaluators import EVALUATORS, evaluator_named
from evaluators.base import judged_shard
from evaluators.shards import ShardStore
from evaluators.transfer import received
from grid.lending import EVALUATOR_GPUS, Home
from trainables.data.base import Shard
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.ray_internals import fed_here, nodes_gone
from trainables.recipe import Preprocessing
from trainables.scale import Scale
from trainables.store.checkpoint import classifier_of
from trainables.store.results import other_code
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, patiently, wait_after
from trainables.store.storage import WEIGHTS
from trainables.store.tracking import client_settings, fetch_content, fetched, whole_ledger
from trainables.watchdog import HUNG_SECONDS, beat, counting_steps

if TYPE_CHECKING:
    from trainables.layers import Classifier

AT = ".epoch-"  # before the epoch in a cell's name
LOOK_SECONDS = 5.0
# How many evaluators may be where, by those that are there and by how many there is work for.
Places = Callable[[Counter[Home], int], Counter[Home]]
EXPENSE = {name: rank for rank, name in enumerate(EVALUATORS)}


@dataclass(frozen=True)
class Cell:
    """One evaluator on one trial's weights; `question` is the digest of what is asked.

    geometry: how images are brought to the model's size, where that is not the scale's way. epoch:
    after which the trial had the weights, 0: the last. images: how many are drawn, 0: the scale's
    number. sources: the trials whose adversarial images are judged, each with the place of its
    artifacts and the sha256 of its ledger.
    """

    trial: str
    artifact_uri: str
    evaluator: str
    question: str
    geometry: Preprocessing = field(default_factory=Preprocessing)
    epoch: int = 0
    images: int = 0
    sources: tuple[tuple[str, str, str], ...] = ()

    @property
    def name(self) -> str:
        """What MLflow calls it among its trial's: 'clean', or after an epoch 'clean.epoch-10'."""
        if self.sources:
            return received(digest for digest, *_ in self.sources)
        return cell_name(self.evaluator, self.epoch)


def cell_name(evaluator: str, epoch: int) -> str:
    """Return what MLflow calls a cell; epoch 0: of the last weights."""
    return f"{evaluator}{AT}{epoch}" if epoch else evaluator


class EvaluatorActor:
    """One long-lived process of the pool: it reads a trial's weights from MLflow and judges them.

    It holds the model it judged last. Each forward pass counts as a step; without one for
    `hung_after` seconds the process ends.
    """

    def __init__(
        self,
        tracking_uri: str,
        scale: Scale,
        source: DataSource,
        *,
        threads: int,
        gpus: float,
        hung_after: float,
        settings: Mapping[str, str],
        code: str,
    ) -> None:
        if problem := other_code(code):
            raise RuntimeError(f"node {platform.node()} {problem}")
        os.environ |= settings
        torch.set_num_threads(threads)
        self._tracking_uri, self._scale = tracking_uri, scale
        self._source = fed_here(source, threads, gpus)
        self._device, self._hung_after = torch.device("cuda" if gpus else "cpu"), hung_after
        self._load = lru_cache(1)(self._load)  # type: ignore[method-assign]

    def home(self) -> Home:
        """Return the node and the GPU that this process is on."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids()["GPU"]
        return context.get_node_id(), gpus[0] if gpus else ""

    def judge(self, cell: Cell, shard: Shard) -> bytes:
        """Return the ledger of one shard of a cell as Parquet, with the seconds it took."""
        classifier = self._load(cell.artifact_uri, cell.trial)
        scale = self._scale.preprocessed(cell.geometry)
        data = load_data(scale, self._source)
        settings: dict[str, Any] = {}
        if cell.sources:
            places = {digest: rest for digest, *rest in cell.sources}
            settings["sources"] = {digest: sha256 for digest, (_, sha256) in places.items()}
            settings["read"] = lambda digest: self._source_ledger(cell.evaluator, *places[digest])
        question = evaluator_named(cell.evaluator, scale, images=cell.images, **settings)
        with counting_steps(self._hung_after):
            return judged_shard(question, classifier, data, self._device, shard)

    def _source_ledger(self, evaluator: str, artifact_uri: str, sha256: str) -> bytes:
        """Return the ledger with a source's adversarial images; DamagedError."""
        read = partial(fetch_content, self._tracking_uri, artifact_uri)
        return whole_ledger(read, artifact_uri, evaluator, sha256)

    def _load(self, artifact_uri: str, digest: str) -> Classifier:
        with fetched(self._tracking_uri, artifact_uri, WEIGHTS) as path:
            classifier = classifier_of(path, digest)
        classifier.register_forward_pre_hook(lambda *_: beat())
        return classifier


class EvaluatorPool:
    """Long-lived actors, one shard of a cell at a time each, the cheapest evaluators first.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. On GPUs each holds a quarter of one. `places` is asked every few seconds
    how many may be where: others start, or leave after their shard. An actor that dies, or whose
    device failed, is replaced, and its shard is judged again after a wait, a few times, or without
    limit where its node went. Finished shards lie in `folder` until their cell is: a run that was
    stopped judges the other images, in shards of whatever size takes about 30 s. `say` is told of
    retries, and of a full disk.
    """

    def __init__(
        self,
        places: Places,
        tracking_uri: str,
        scale: Scale,
        source: DataSource,
        folder: Path,
        *,
        threads: int,
        on_gpus: bool,
        hung_after: float = HUNG_SECONDS,
        code: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        actor = ray.remote(num_cpus=0, num_gpus=EVALUATOR_GPUS if on_gpus else 0)(EvaluatorActor)
        settings = {
            "threads": threads,
            "gpus": EVALUATOR_GPUS if on_gpus else 0.0,
            "hung_after": hung_after,
            "settings": client_settings(),
            "code": code,
        }
        self._new_actor: Callable[..., Any] = lambda **options: actor.options(**options).remote(
            tracking_uri, scale, source, **settings
        )
        self._places, self._folder, self._say = places, folder, say
        self._scale, self._looked_at = scale, time.monotonic()
        self._homes: dict[Any, Home] = {}  # by actor
        self._starting: dict[Any, Any] = {}  # actors, by the reference to their home
        self._failed_starts = 0  # in a row
        self._leaving: set[Any] = set()  # after their shard
        self._idle: list[Any] = []
        # When they began, what they judge and the actor, by reference.
        self._under_way: dict[Any, tuple[float, Cell, Shard, Any]] = {}
        self._stores: dict[Cell, ShardStore] = {}  # of cells that are not settled
        # The nodes where a shard failed, by its first image.
        self._failures: defaultdict[tuple[Cell, int], list[str]] = defaultdict(list)
        self._resting: list[tuple[float, Cell, Shard]] = []  # failed shards, and until when
        self._whole: list[Cell] = []
        # Of each evaluator: the images judged, and the seconds of all of them.
        self._judged: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._resize()

    def __len__(self) -> int:
        return len(self._stores)

    def submit(self, cell: Cell, total: int, *, least: int = 1) -> None:
        """Ask for those of a cell's `total` images that are not judged yet; they wait their turn.

        least: the fewest images that are worth a shard.
        """
        place = [cell.trial, cell.question, *([str(cell.epoch)] if cell.epoch else [])]
        folder = self._folder / "-".join(place)
        side = self._scale.preprocessed(cell.geometry).image_size
        self._stores[cell] = store = ShardStore(folder, total, side=side, least=least)
        if not store.waiting:
            self._whole.append(cell)
        self._hand_out()

    def poll(self, timeout: float) -> list[tuple[Cell, bytes, str]]:
        """Return the cells judged by now, waiting up to `timeout` seconds for a shard.

        With each comes its ledger as Parquet, to `settle` once it is stored, or why it has none.
        ConnectionError where no node of Ray is left: all that waits would wait for ever.
        """
        failed, now = [], time.monotonic()
        if now - self._looked_at > LOOK_SECONDS:
            if not any(node["Alive"] for node in ray.nodes()):
                raise ConnectionError("Ray's last node has died")
            self._resize()
        for entry in [entry for entry in self._resting if entry[0] <= now]:
            self._resting.remove(entry)
            self._stores[entry[1]].waiting.append(entry[2])
        self._hand_out()
        if references := [*self._under_way, *self._starting]:
            ready, _ = ray.wait(references, timeout=0 if self._whole else timeout)
            failed = [failure for reference in ready if (failure := self._collect(reference))]
            self._hand_out()
        elif self._stores:
            time.sleep(timeout)
        whole, self._whole = self._whole, []
        return failed + [(cell, self._stores[cell].whole(), "") for cell in whole]

    def settle(self, cell: Cell) -> None:
        """Forget a judged cell, now that its ledger is stored elsewhere."""
        self._stores.pop(cell).clear()

    def seconds(
        self, coming: Counter[str], costs: Mapping[str, float], pace: float
    ) -> tuple[float, float]:
        """Return the seconds of all actors together that judging took, and about those left.

        Left are the images asked for and those `coming`, by evaluator. Of an evaluator without a
        timed shard the cost of an image counts, at the trainings' `pace`: cheap evaluators, which
        are judged first, take seconds that are not their images'. At 0, at that of the others.
        """
        images = Counter(coming)
        for cell, store in self._stores.items():
            images[cell.evaluator] += store.total - store.judged
        spent, now = sum(self._seconds.values()), time.monotonic()
        cost = sum(costs.get(name, 0.0) * count for name, count in self._judged.items())
        pace = pace or (spent / cost if cost else 0.0)
        each = {name: costs.get(name, 0.0) * pace for name in images}
        each |= {name: self._seconds[name] / count for name, count in self._judged.items()}
        left = sum(count * each[name] for name, count in (+images).items())
        for began, cell, shard, _ in self._under_way.values():
            so_far, whole = now - began, len(shard) * each.get(cell.evaluator, 0.0)
            spent += so_far
            left += max(whole - so_far, so_far / 3) - whole  # one that is late takes a third more
        return spent, left

    def _collect(self, reference: Any) -> tuple[Cell, bytes, str] | None:
        """Store a shard; return its cell where that has failed for good."""
        if actor := self._starting.pop(reference, None):
            self._started(actor, reference)
            return None
        _, cell, shard, actor = self._under_way.pop(reference)
        error: Exception | None = None
        try:
            content = ray.get(reference)
        except RayError as raised:
            error = raised
            if isinstance(raised, RayTaskError):
                error = raised.cause or raised
        node = self._homes[actor][0]
        self._free(actor, error)
        store = self._stores.get(cell)
        if store is None:
            return None
        if error:
            return self._failed(cell, shard, error, node)
        self._seconds[cell.evaluator] += patiently(lambda: store.add(shard, content), say=self._say)
        self._judged[cell.evaluator] += len(shard)
        if store.judged == store.total:
            self._whole.append(cell)
        return None

    def _resize(self) -> None:
        """Have as many actors everywhere as may be there; those without a shard leave first."""
        self._looked_at = time.monotonic()
        starting, busy = set(self._starting.values()), {a for *_, a in self._under_way.values()}
        there = Counter(home for actor, home in self._homes.items() if actor not in starting)
        shards = sum(store.shards for store in self._stores.values()) + len(busy)
        allowed, of_node = self._places(there, shards), Counter[str]()
        for (node, _), count in allowed.items():
            of_node[node] += count
        self._leaving.clear()
        for actor in sorted(self._homes, key=lambda a: (a in starting, a not in busy)):
            home = self._homes[actor]
            if of_node[home[0]] > 0 and (actor in starting or allowed[home] > 0):
                of_node[home[0]] -= 1
                allowed[home] -= 1
            elif actor in busy:
                self._leaving.add(actor)
            else:
                self._end(actor)
        for node in of_node.elements():
            there_only = NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT"
            actor = self._new_actor(scheduling_strategy=there_only)
            self._homes[actor] = node, ""
            self._starting[actor.home.remote()] = actor

    def _started(self, actor: Any, home: Any) -> None:
        """Have an actor judge, now that it is there; ValueError where none can start."""
        try:
            self._homes[actor] = ray.get(home)
        except RayError as error:
            self._failed_starts += self._homes[actor][0] not in nodes_gone(True)
            self._end(actor)
            if self._failed_starts > MAX_FAILURES:
                raise ValueError(f"evaluators do not start: {error}") from None
        else:
            self._failed_starts = 0
            self._idle.append(actor)

    def _end(self, actor: Any) -> None:
        """End an actor that has no shard."""
        ray.kill(actor)
        del self._homes[actor]
        self._idle = [other for other in self._idle if other != actor]
        self._starting = {ref: other for ref, other in self._starting.items() if other != actor}

    def _free(self, actor: Any, error: Exception | None) -> None:
        """Return an actor to the pool, or end it where it is to leave or has lost its device.

        After an error of CUDA all that follows fails. torch raises it as RuntimeError, of which
        the others are kinds.
        """
        others = (torch.OutOfMemoryError, *OWN_FAULTS)
        lost_device = isinstance(error, RuntimeError) and not isinstance(error, others)
        if lost_device or isinstance(error, RayError):
            self._end(actor)
            self._looked_at = -math.inf
        elif actor in self._leaving:
            self._end(actor)
        else:
            self._idle.append(actor)

    def _failed(
        self, cell: Cell, shard: Shard, cause: Exception, node: str
    ) -> tuple[Cell, bytes, str] | None:
        """Judge a shard again after a wait; return its cell when it has failed for good.

        What is lost with its node is no failure. A node counts as dead some seconds after its
        processes: it is asked again each time.
        """
        self._failures[cell, shard.first].append(node)
        gone = nodes_gone(True)
        failures = sum(node not in gone for node in self._failures[cell, shard.first])
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        if isinstance(cause, OWN_FAULTS) or failures > MAX_FAILURES:
            del self._stores[cell]
            self._resting = [entry for entry in self._resting if entry[1] != cell]
            return cell, b"", reason
        reason = "its process died" if isinstance(cause, RayError) else reason
        self._say(f"{cell.evaluator} of {cell.trial} is judged again: {reason}")
        self._resting.append((time.monotonic() + wait_after(max(1, failures)), cell, shard))
        return None

    def _hand_out(self) -> None:
        """Have idle actors judge the shards that wait, those of the cheapest evaluators first."""
        while self._idle and (waiting := [c for c, store in self._stores.items() if store.waiting]):
            cell = min(waiting, key=lambda cell: EXPENSE[cell.evaluator])
            shard, actor = self._stores[cell].take(), self._idle.pop()
            began = time.monotonic()
            self._under_way[actor.judge.remote(cell, shard)] = (began, cell, shard, actor)
