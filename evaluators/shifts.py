"""Published sets that nothing stands in for: an evaluator of each that the registry has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from evaluators import set_images
from evaluators.base import (
    Batch,
    Column,
    Evaluator,
    answers,
    answers_among,
    split_batches,
    verdicts,
)
from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.data.registry import STORED_SETS

if TYPE_CHECKING:
    from trainables.layers import Classifier


class Shift(Evaluator):
    """Top-1 accuracy on a published set.

    A set of some of the classes is answered among these, as its authors do, and as NAME-1000 among
    all. Sources: hendrycks/natural-adv-examples, and hendrycks/imagenet-r @3131cac, eval.py.
    """

    def images(self, source: Data) -> Split:
        if split := self.stored(source):
            return split
        remedy = f"--stored {self.name}=DIR reads it, at scales that have it"
        raise ValueError(f"{self.name} needs {STORED_SETS[self.name].title}: {remedy}")

    def identity(self, source: Data) -> dict[str, Any]:
        return self.identity_of_set(source, self.name)

    def asked_about(self, held_out: int) -> int:
        return set_images(self.name, self.scale, held_out)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        split, located = self.images(source), source.counterpart(self.name)
        some = located is not None and not located[0].complete
        present = tuple(sorted(set(split.labels.tolist()))) if some else None
        for batch in split_batches(split, batch_size=batch_size, shard=shard):
            yield replace(batch, candidates=present, question=f"{self.name}-1000" if some else "")

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        logits_BK = classifier(batch.images)
        if not batch.question:
            return answers(batch, self.name, logits_BK)
        free = verdicts(batch, batch.question, logits_BK.argmax(dim=1), logits_BK=logits_BK)
        return pa.concat_tables([answers_among(batch, self.name, logits_BK), free])


def __getattr__(name: str) -> type[Shift]:
    """Return the evaluator of a stored set, by the set's name."""
    if name not in STORED_SETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stored = STORED_SETS[name]
    free = Column(f"{name}-1000", f"{stored.title}, among all 1,000")
    columns = (Column(name, stored.title), *([] if stored.complete else [free]))
    return type(name, (Shift,), {"name": name, "columns": columns})
