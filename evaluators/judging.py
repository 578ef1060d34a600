"""Judge a classifier by evaluators, shard after shard, so that a run that ends early goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import Progress

from evaluators import base
from evaluators.base import Evaluator, cell_digest
from evaluators.ledger import Score, to_parquet
from evaluators.shards import ShardStore
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.store.results import provenance
from trainables.store.storage import write_atomically


@dataclass(frozen=True)
class Cells:
    """Evaluators on one classifier, the shards of each, and the folder that they lie in."""

    stores: dict[Evaluator, ShardStore]
    folder: Path

    @classmethod
    def of(cls, evaluators: Iterable[Evaluator], data: Data, folder: Path, subject: str) -> Cells:
        """Open the shards; `subject` is all that an answer follows from but for the question.

        ValueError where the folder cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"ledger folder {folder} cannot be made: {error.strerror}") from None
        return cls({e: _store(e, data, folder, subject) for e in evaluators}, folder)

    @property
    def is_whole(self) -> bool:
        """Say whether every image is judged."""
        return not any(store.missing() for store in self.stores.values())

    def judge(
        self, evaluator: Evaluator, classifier: Classifier, data: Data, device: torch.device
    ) -> None:
        """Judge the images that no shard holds yet, showing the time left."""
        store, console = self.stores[evaluator], Console(stderr=True)
        quiet = store.total <= evaluator.least_shard or not console.is_terminal
        with Progress(console=console, disable=quiet) as progress:
            bar = progress.add_task(evaluator.name, total=store.total, completed=store.judged)
            while store.waiting:
                shard, began = store.take(), time.monotonic()
                ledger = base.judge_images(evaluator, classifier, data, device=device, shard=shard)
                seconds, judged_by = time.monotonic() - began, provenance(str(device))
                store.add(shard, to_parquet(ledger, seconds=seconds, judged_by=judged_by))
                progress.advance(bar, len(shard))

    def scores(self) -> tuple[list[Score], list[pa.Table]]:
        """Return the scores and ledgers; scores of a part of the images say so in their names."""
        scores, ledgers = [], []
        for evaluator, store in self.stores.items():
            if store.judged:
                ledger, _ = store.merged()
                part = f" ({store.judged} of {store.total} images)" if store.missing() else ""
                named = evaluator.summarize(ledger)
                scores += [replace(score, name=score.name + part) for score in named]
                ledgers.append(ledger)
        return scores, ledgers

    def write_ledgers(self) -> None:
        """Write each evaluator's ledger, NAME.parquet, and remove the shards."""
        for evaluator, store in self.stores.items():
            ledger, seconds = store.merged()
            content = to_parquet(ledger, seconds=seconds, judged_by=store.judged_by())
            write_atomically(self.folder / f"{evaluator.name}.parquet", content)
        for store in self.stores.values():
            store.clear()


def _store(evaluator: Evaluator, data: Data, folder: Path, subject: str) -> ShardStore:
    """Open the shards of an evaluator's question about a subject."""
    key = f"{subject} {cell_digest(evaluator, data)}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    total, least, side = evaluator.total(data), evaluator.least_shard, data.data_set.image_size
    return ShardStore(folder / "shards" / digest, total, side=side, least=least)
