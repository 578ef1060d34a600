"""cue-conflict: the shape bias on the stimuli that were made for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor

from evaluators.base import Batch, Column, split_batches, verdicts
from evaluators.stylized import TEXTURE, Stylized
from trainables.data.base import WHOLE, Data, Shard
from trainables.data.load import stored_split
from trainables.data.registry import SIXTEEN_CLASSES, STORED_SETS

if TYPE_CHECKING:
    from trainables.layers import Classifier

SIXTEEN = "cue-conflict-16"
BIAS = f"{SIXTEEN}/shape-bias"
IMAGENET_CLASSES = 1000


class CueConflict(Stylized):
    """The shape bias: the share of shape among the answers by shape or texture.

    `cue-conflict-16`, the accuracy by shape, and its shape bias are of the 1,280 stimuli of Geirhos
    et al. (ICLR 2019), as their authors compute them: a category's probability is the average over
    its classes of ImageNet, and the bias leaves out images whose shape and texture agree. They need
    a head of ImageNet's 1,000 classes. Without the stimuli: the cue conflict of `stylized`. Source:
    README.md and code/probabilities_to_decision.py of rgeirhos/texture-vs-shape.
    """

    name = "cue-conflict"
    columns = (
        Column(SIXTEEN, "Cue conflict, 16 classes", "Cue conflict", "cue-conflict", SIXTEEN),
        Column(BIAS, "Shape bias", "Shape bias", "cue-conflict/shape-bias", SIXTEEN),
    )

    def cost(self, held_out: int, *, withstanding: float) -> float:
        name = self.scale.data_set.counterpart(self.name)
        is_stored = name and not self.scale.data_set.generated
        return STORED_SETS[name].images if is_stored else held_out

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        located = source.counterpart(self.name)
        if located is None:
            yield from super().batches(source, batch_size=batch_size, shard=shard)
            return
        split = stored_split(*located, source)
        for batch in split_batches(split, batch_size=batch_size, shard=shard):
            yield replace(batch, question=SIXTEEN, stage=tuple(map(_conflict, batch.ids)))

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        if batch.question != SIXTEEN:
            return super().judge(classifier, batch)
        logits_BK = classifier(batch.images)
        if logits_BK.shape[1] != IMAGENET_CLASSES:
            raise ValueError(
                f"the stimuli of {self.name} need a model of ImageNet's {IMAGENET_CLASSES} classes,"
                f" and this one answers among {logits_BK.shape[1]}"
            )
        if classifier.columns is not None:
            logits_BK = logits_BK[:, classifier.columns.argsort()]
        probabilities_BC = logits_BK.float().softmax(dim=1) @ _averages().to(logits_BK.device)
        predicted_B = probabilities_BC.argmax(dim=1)
        return verdicts(batch, SIXTEEN, predicted_B, stage=batch.stage)


def _conflict(image_id: str) -> str | None:
    """Return the remark on a stimulus, such as cat/cat7-elephant1; None where its cues agree."""
    cues = re.search(r"/(?:.*_)?([a-z]+)\d+-([a-z]+)\d+$", image_id)
    if not cues or cues[2] not in SIXTEEN_CLASSES:
        raise ValueError(f"stimulus {image_id} does not name shape and texture: cat/cat7-elephant1")
    return None if cues[1] == cues[2] else f"{TEXTURE}{list(SIXTEEN_CLASSES).index(cues[2])}"


@cache
def _averages() -> Tensor:
    """Return what averages ImageNet's classes to the categories: (1000, 16)."""
    averages_KC = torch.zeros(IMAGENET_CLASSES, len(SIXTEEN_CLASSES))
    for category, ranges in enumerate(SIXTEEN_CLASSES.values()):
        for first, _, last in (part.partition("-") for part in ranges.split()):
            averages_KC[int(first) : int(last or first) + 1, category] = 1
    return averages_KC / averages_KC.sum(dim=0)
