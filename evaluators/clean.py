"""clean: is the image, as it is, classified as what it shows?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from evaluators.base import FORWARD_SHARD, Batch, Column, split_batches, verdicts
from evaluators.ledger import Score, survival_scores
from trainables.data.base import WHOLE, Data, Shard
from trainables.scale import Scale

if TYPE_CHECKING:
    from trainables.networks import Classifier


class Clean:
    """Top-1 accuracy on every held-out image."""

    name = "clean"
    columns = (Column("clean", "Clean"),)
    least_shard = FORWARD_SHARD

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def identity(self, source: Data) -> dict[str, Any]:
        return {"images": source.held_out.ids_hash()}

    def total(self, source: Data) -> int:
        return len(source.held_out)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return held_out

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        return split_batches(source.held_out, batch_size=batch_size, shard=shard)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        predicted = classifier(batch.images).argmax(dim=1)
        return verdicts(batch, self.name, predicted, judged_BCHW=batch.images)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        return survival_scores(ledger)
