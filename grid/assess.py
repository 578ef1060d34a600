"""The pool of evaluator actors: cells go in as trials finish, ledgers come out as they are done."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from evaluators import EVALUATORS, evaluator_named
from evaluators.base import judged_shard
from evaluators.shards import ShardStore
from trainables.data.base import Shard
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.ray_internals import fed_here
from trainables.recipe import Preprocessing
from trainables.scale import Scale
from trainables.store.checkpoint import classifier_of
from trainables.store.retries import MAX_FAILURES, OWN_FAULTS, patiently, wait_after
from trainables.store.storage import WEIGHTS
from trainables.store.tracking import client_settings, fetch_artifact
from trainables.watchdog import HUNG_SECONDS, beat, counting_steps

if TYPE_CHECKING:
    from trainables.layers import Classifier

AT = ".epoch-"  # before the epoch in a cell's name
PLACED_SECONDS = 1800
LOOK_SECONDS = 5.0
EXPENSE = {name: rank for rank, name in enumerate(EVALUATORS)}


@dataclass(frozen=True)
class Cell:
    """One evaluator on one trial's weights; `question` is the digest of what is asked.

    geometry: how images are brought to the model's size, where that is not the scale's way. epoch:
    after which the trial had the weights, 0: the last. images: how many are drawn, 0: the scale's
    number.
    """

    trial: str
    artifact_uri: str
    evaluator: str
    question: str
    geometry: Preprocessing = field(default_factory=Preprocessing)
    epoch: int = 0
    images: int = 0

    @property
    def name(self) -> str:
        """What MLflow calls it among its trial's: 'clean', or after an epoch 'clean.epoch-10'."""
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
    ) -> None:
        os.environ |= settings
        torch.set_num_threads(threads)
        self._tracking_uri, self._scale = tracking_uri, scale
        self._source = fed_here(source, threads, gpus)
        self._device, self._hung_after = torch.device("cuda" if gpus else "cpu"), hung_after
        self._load = lru_cache(1)(self._load)  # type: ignore[method-assign]

    def judge(self, cell: Cell, shard: Shard) -> bytes:
        """Return the ledger of one shard of a cell as Parquet, with the seconds it took."""
        classifier = self._load(cell.artifact_uri, cell.trial)
        scale = self._scale.preprocessed(cell.geometry)
        data = load_data(scale, self._source)
        question = evaluator_named(cell.evaluator, scale, images=cell.images)
        with counting_steps(self._hung_after):
            return judged_shard(question, classifier, data, self._device, shard)

    def _load(self, artifact_uri: str, digest: str) -> Classifier:
        path = fetch_artifact(self._tracking_uri, artifact_uri, WEIGHTS)
        classifier = classifier_of(path, digest)
        classifier.register_forward_pre_hook(lambda *_: beat())
        return classifier


class EvaluatorPool:
    """Long-lived actors, one shard of a cell at a time each, the cheapest evaluators first.

    They reserve no CPU: on a machine without GPUs they share the cores with training, so neither
    waits for the other. On GPUs each holds its share of one for as long as it lives. An actor that
    dies is restarted by Ray, and its shard is judged again after a wait, a few times; so is one
    that ran out of memory. One whose device failed is ended, for a new one. Finished shards lie in
    `folder` until their cell is: a run that was stopped judges the other images, in shards of
    whatever size takes about 30 s. `say` is told of retries, and of a full disk.
    """

    def __init__(
        self,
        size: int,
        tracking_uri: str,
        scale: Scale,
        source: DataSource,
        folder: Path,
        *,
        threads: int,
        gpus: float,
        hung_after: float = HUNG_SECONDS,
        say: Callable[[str], None] = print,
    ) -> None:
        # Ray's own retries of a task are used up while an actor restarts: the pool tries again.
        options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1}
        settings = {
            "threads": threads,
            "gpus": gpus,
            "hung_after": hung_after,
            "settings": client_settings(),
        }
        actor = ray.remote(**options)(EvaluatorActor)
        self._new_actor: Callable[[], Any] = partial(
            actor.remote, tracking_uri, scale, source, **settings
        )
        self._size, self._gpus, self._folder, self._say = 0, gpus, folder, say
        self._scale, self._looked_at = scale, time.monotonic()
        self._idle: list[Any] = []
        self._under_way: dict[Any, tuple[Cell, Shard, Any]] = {}
        self._restarting: dict[Any, Any] = {}
        self._stores: dict[Cell, ShardStore] = {}  # of cells that are not settled
        self._failures: Counter[tuple[Cell, int]] = Counter()  # by a shard's first image
        self._resting: list[tuple[float, Cell, Shard]] = []  # failed shards, and until when
        self._whole: list[Cell] = []
        # Of each evaluator: the images judged, and the seconds of all of them.
        self._judged: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.grow(size)

    def __len__(self) -> int:
        return len(self._stores)

    def grow(self, size: int) -> None:
        """Start actors until there are so many."""
        self._idle += [self._new_actor() for _ in range(size - self._size)]
        self._size = max(size, self._size)

    def gpus_by_node(self) -> dict[str, float]:
        """Wait until every actor holds its share of a GPU; return the shares held, by node's id.

        ValueError where none come for long. To be asked while all are idle.
        """
        homes = [actor.__ray_call__.remote(_node_id) for actor in self._idle]
        try:
            nodes = Counter(ray.get(homes, timeout=PLACED_SECONDS))
        except GetTimeoutError:
            raise ValueError(
                f"{len(homes)} evaluators have waited {PLACED_SECONDS / 60:.0f} min for their "
                "share of a GPU: `ray status` shows which nodes are missing"
            ) from None
        return {node: count * self._gpus for node, count in nodes.items()}

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
        for entry in [entry for entry in self._resting if entry[0] <= now]:
            self._resting.remove(entry)
            self._stores[entry[1]].waiting.append(entry[2])
        self._hand_out()
        if now - self._looked_at > LOOK_SECONDS:
            self._looked_at = now
            if not any(node["Alive"] for node in ray.nodes()):
                raise ConnectionError("Ray's last node has died")
        if references := [*self._under_way, *self._restarting]:
            ready, _ = ray.wait(references, timeout=0 if self._whole else timeout)
            failed = [failure for reference in ready if (failure := self._collect(reference))]
            self._hand_out()
        elif self._resting:
            time.sleep(timeout)
        whole, self._whole = self._whole, []
        return failed + [(cell, self._stores[cell].whole(), "") for cell in whole]

    def settle(self, cell: Cell) -> None:
        """Forget a judged cell, now that its ledger is stored elsewhere."""
        self._stores.pop(cell).clear()

    def seconds_left(self, coming: Counter[str]) -> float | None:
        """Estimate the time for all images asked for, and for those `coming`, by evaluator.

        None until a shard of each evaluator has been timed.
        """
        images = Counter(coming)
        for cell, store in self._stores.items():
            images[cell.evaluator] += store.total - store.judged
        images = +images
        if any(name not in self._judged for name in images):
            return None
        each = {name: self._seconds[name] / self._judged[name] for name in images}
        return sum(count * each[name] for name, count in images.items()) / self._size

    def _collect(self, reference: Any) -> tuple[Cell, bytes, str] | None:
        """Store a shard; return its cell where that has failed for good."""
        if actor := self._restarting.pop(reference, None):
            self._idle.append(actor)
            return None
        cell, shard, actor = self._under_way.pop(reference)
        error: Exception | None = None
        try:
            content = ray.get(reference)
        except RayError as raised:
            error = raised
            if isinstance(raised, RayTaskError):
                error = raised.cause or raised
        self._free(actor, error)
        store = self._stores.get(cell)
        if store is None:
            return None
        if error:
            return self._failed(cell, shard, error)
        self._seconds[cell.evaluator] += patiently(lambda: store.add(shard, content), say=self._say)
        self._judged[cell.evaluator] += len(shard)
        if store.judged == store.total:
            self._whole.append(cell)
        return None

    def _free(self, actor: Any, error: Exception | None) -> None:
        """Return an actor to the pool, after a restart where it died or has lost its device.

        After an error of CUDA all that follows fails. torch raises it as RuntimeError, of which
        the others are kinds.
        """
        others = (torch.OutOfMemoryError, *OWN_FAULTS)
        lost_device = isinstance(error, RuntimeError) and not isinstance(error, others)
        if lost_device:
            actor.__ray_call__.remote(lambda _: os._exit(1))
        if lost_device or isinstance(error, RayError):
            ready = actor.__ray_ready__.options(max_task_retries=-1).remote()
            self._restarting[ready] = actor
        else:
            self._idle.append(actor)

    def _failed(self, cell: Cell, shard: Shard, cause: Exception) -> tuple[Cell, bytes, str] | None:
        """Judge a shard again after a wait; return its cell when it has failed for good."""
        self._failures[cell, shard.first] += 1
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        if isinstance(cause, OWN_FAULTS) or self._failures[cell, shard.first] > MAX_FAILURES:
            del self._stores[cell]
            self._resting = [entry for entry in self._resting if entry[1] != cell]
            return cell, b"", reason
        reason = "its process died" if isinstance(cause, RayError) else reason
        self._say(f"{cell.evaluator} of {cell.trial} is judged again: {reason}")
        wait = wait_after(self._failures[cell, shard.first])
        self._resting.append((time.monotonic() + wait, cell, shard))
        return None

    def _hand_out(self) -> None:
        """Have idle actors judge the shards that wait, those of the cheapest evaluators first."""
        while self._idle and (waiting := [c for c, store in self._stores.items() if store.waiting]):
            cell = min(waiting, key=lambda cell: EXPENSE[cell.evaluator])
            shard, actor = self._stores[cell].take(), self._idle.pop()
            self._under_way[actor.judge.remote(cell, shard)] = (cell, shard, actor)


def _node_id(_: object) -> str:
    return str(ray.get_runtime_context().get_node_id())
