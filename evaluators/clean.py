"""clean: is the image, as it is, classified as what it shows?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from evaluators.base import Batch, Column, Evaluator, verdicts

if TYPE_CHECKING:
    from trainables.networks import Classifier


class Clean(Evaluator):
    """Top-1 accuracy on every held-out image."""

    name = "clean"
    columns = (Column("clean", "Clean"),)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        predicted = classifier(batch.images).argmax(dim=1)
        return verdicts(batch, self.name, predicted, judged_BCHW=batch.images)
