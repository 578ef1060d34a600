"""Judge a classifier by evaluators, shard after shard, so that a run that ends early goes on."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from functools import partial
from multiprocessing import active_children, current_process, get_context, parent_process
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import torch
from tqdm import tqdm

from evaluators import PGD_LENGTHS, class_named, evaluator_named
from evaluators.balls import BallAttack
from evaluators.base import Evaluator, cell_digest, judged_shard
from evaluators.health import red_flags, unmasked
from evaluators.intervals import notes_on_rest
from evaluators.ledger import LEDGER
from evaluators.scores import Scores
from evaluators.shards import ShardStore
from trainables.data.base import Data, Shard
from trainables.data.listing import GIBIBYTE
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.store.storage import write_atomically

PROCESS_BYTES = 2 * GIBIBYTE  # that an attack at 224 px may add to a process
Judge = Callable[[Shard], bytes]
Ledgers = Generator[tuple[Shard, bytes]]
_judge: Judge  # of a fork


class Cells:
    """Evaluators on one classifier, and the shards of each in a folder.

    `subject` is all that an answer follows from but for the question. Not in_parts: one shard a
    process, for whoever neither goes on nor watches. ValueError where the folder cannot be made.
    """

    def __init__(
        self,
        evaluators: Iterable[Evaluator],
        data: Data,
        folder: Path,
        subject: str,
        device: torch.device,
        *,
        in_parts: bool = True,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"ledger folder {folder} cannot be made: {error.strerror}") from None
        self.data, self.folder, self.device = data, folder, device
        self.processes = processes_for(device)
        self.stores: dict[Evaluator, ShardStore] = {}
        for evaluator in evaluators:
            key = f"{subject} {cell_digest(evaluator, data)}"
            total, least = evaluator.total(data), evaluator.least_shard
            self.stores[evaluator] = ShardStore(
                folder / "shards" / hashlib.sha256(key.encode()).hexdigest()[:12],
                total,
                side=data.data_set.image_size,
                least=least if in_parts else least * math.ceil(total / self.processes / least),
                processes=self.processes,
            )

    def judge(
        self, classifier: Classifier, *, progress: bool = True, batch_size: int = 200
    ) -> None:
        """Judge the images that no shard holds yet, on all cores, showing the time left."""
        watched = progress and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        for evaluator, store in self.stores.items():
            where = self.data, self.device
            judge = partial(judged_shard, evaluator, classifier, *where, batch_size=batch_size)
            alone = self.processes == 1 or store.total - store.judged <= evaluator.least_shard
            ledgers = _in_this_process if alone else _in_processes
            shown = watched and store.total > evaluator.least_shard
            counts = {"total": store.total, "initial": store.judged, "unit": " images"}
            bar = tqdm(desc=evaluator.name, disable=not shown, **counts)
            with bar, closing(ledgers(store, judge, self.processes)) as judged:
                for shard, content in judged:
                    store.add(shard, content)
                    bar.update(len(shard))

    def scores(self, name: str, notes: Sequence[str] = ()) -> Scores:
        """Return a model's scores; those of a part of the images say so in their names."""
        seconds: dict[str, float] = {}
        scores, ledgers = [], [LEDGER.empty_table()]
        for evaluator, store in ((e, s) for e, s in self.stores.items() if s.judged):
            ledger, taken = store.merged()
            part = f" ({store.judged} of {store.total} images)" if store.missing() else ""
            named = [replace(s, name=s.name + part) for s in evaluator.summarize(ledger)]
            scores += named
            seconds |= {score.name: taken for score in named}
            ledgers.append(ledger)
        whole = pa.concat_tables(ledgers)
        return Scores(
            scores=tuple(scores),
            seconds=seconds,
            ledger=whole,
            identities={e.name: e.identity(self.data) for e in self.stores},
            flags=tuple(red_flags(ledgers)),
            notes=(*notes, *self._remarks(), *notes_on_rest(whole), *unmasked(ledgers)),
            name=name,
            data=self.data.data_set.title,
        )

    def _remarks(self) -> list[str]:
        """Say by which radii attacks judge, and which scores are errors: others are accuracies."""
        remarks = []
        names: dict[str, list[str]] = {}
        for attack in (e for e in self.stores if isinstance(e, BallAttack) and e.takes_radii):
            names.setdefault(attack.radii_line(), []).append(attack.name)
        remarks += [f"{', '.join(attacks)}: {line}" for line, attacks in names.items()]
        errors = [c.name for e in self.stores for c in e.columns if c.error]
        if errors:
            remarks.append(f"{', '.join(errors)}: errors, lower is better")
        return remarks

    def write_ledgers(self) -> None:
        """Write each evaluator's ledger, NAME.parquet."""
        for evaluator, store in self.stores.items():
            write_atomically(self.folder / f"{evaluator.name}.parquet", store.whole())


def evaluators_named(
    names: Sequence[str], scale: Scale, radii: Iterable[Fraction]
) -> list[Evaluator]:
    """Set up evaluators; `pgd-10` and its like are pgd of these lengths alone.

    radii: of the attacks that take several; none: the scale's. ValueError where no evaluator takes
    them, or none seeks in the bfloat16 that the scale states.
    """
    radii = tuple(dict.fromkeys(radii))
    evaluators = []
    for name in dict.fromkeys(PGD_LENGTHS.get(n, (n,))[0] for n in names):
        settings: dict[str, Any] = {"radii": radii} if class_named(name).takes_radii else {}
        if name not in names:
            lengths = (PGD_LENGTHS[n] for n in {*names} & PGD_LENGTHS.keys())
            settings["steps"] = [steps for owner, steps in lengths if owner == name]
        evaluators.append(evaluator_named(name, scale, **settings))
    if radii and not any(evaluator.takes_radii for evaluator in evaluators):
        takers = "pgd, autoattack and plug-ins' attacks"
        raise ValueError(f"epsilon is a radius of {takers}: {', '.join(names)} takes none")
    attacks = (evaluator for evaluator in evaluators if isinstance(evaluator, BallAttack))
    if scale.attacks_in == "bf16" and not any(attack.is_bf16 for attack in attacks):
        raise ValueError(f"pgd and autoattack seek in bf16: {', '.join(names)} does not")
    return evaluators


def attacking(scale: Scale, images: int) -> Scale:
    """Return a scale whose attacks take so many images."""
    patch = replace(scale.patch, images=images)
    return replace(scale, attack_subset=images, autoattack_subset=images, patch=patch)


def processes_for(device: torch.device) -> int:
    """Return how many processes judge at a time: one for each of torch's threads, on a CPU.

    A process that has threads or is a daemon's may not be forked everywhere: on Linux alone, and
    not once it has used a GPU.
    """
    used_a_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    may_fork = sys.platform == "linux" and not current_process().daemon and not used_a_gpu
    if device.type != "cpu" or not may_fork:
        return 1
    fitting = int(psutil.virtual_memory().available) // PROCESS_BYTES
    return max(1, min(torch.get_num_threads(), fitting))


def _in_this_process(store: ShardStore, judge: Judge, processes: int) -> Ledgers:
    while store.waiting:
        shard = store.take()
        yield shard, judge(shard)


def _in_processes(store: ShardStore, judge: Judge, processes: int) -> Ledgers:
    """Yield shards as they are judged by forks of this process, on one thread each.

    Small layers gain nothing from a second thread. A fork need not pickle the model.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(processes, get_context("fork"), _begin, (judge,))
    under_way: dict[Future[bytes], Shard] = {}
    try:
        while store.waiting or under_way:
            while store.waiting and len(under_way) < processes:
                shard = store.take()
                under_way[pool.submit(_judged_here, shard)] = shard
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(done), done.result()
    except BaseException:  # their work is lost: they need not end it
        for child in set(active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown()


def _begin(judge: Judge) -> None:
    """Begin a fork: Ctrl-C is its parent's to answer, with whom it ends."""
    global _judge  # noqa: PLW0603
    _judge = judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _judged_here(shard: Shard) -> bytes:
    return _judge(shard)
