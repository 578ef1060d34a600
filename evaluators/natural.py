"""natural: ImageNet-A, or the held-out images that another kind of classifier finds hardest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from evaluators.base import Batch, split_batches, verdicts
from evaluators.ledger import Score, survival_scores
from evaluators.stored_cifar import load_cifar10_1
from trainables.data import WHOLE, Data, Shard, Split
from trainables.folders import ImageFolderByClass
from trainables.scale import Scale

if TYPE_CHECKING:
    from trainables.models import Classifier

IMAGENET_A_CLASSES = 200
HARDEST_SHARE = 1 / 6
REFERENCE_IMAGES = 5000
REFERENCE_SIDE = 32
READ_AT_ONCE = 500


class Natural:
    """Top-1 accuracy on natural images that are hard by themselves.

    ImageNet-A: `natural` answers among its 200 classes (the study's figure), `natural-1000` among
    all. At scale cifar10: CIFAR-10.1. Without a stored set: the natural-adversarial counterpart,
    `natural` alone.
    """

    name = "natural"

    def __init__(self, scale: Scale) -> None:
        self.size = scale.image_size

    def identity(self, source: Data) -> dict[str, Any]:
        if (newer := _cifar10_1(source)) is not None:
            return {"data": "CIFAR-10.1", "images": newer.ids_hash()}
        root = source.stored("imagenet-a")
        if root is not None:
            return {"data": "ImageNet-A", "images": self._folder(root, source).ids_hash()}
        return {
            "data": f"natural-adversarial ({source.name})",
            "images": hardest(source).ids_hash(),
        }

    def shards(self, source: Data) -> int:
        return 1

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        root, newer = source.stored("imagenet-a"), _cifar10_1(source)
        if root is None or newer is not None:
            split = newer or hardest(source)
            yield from split_batches(split, batch_size=batch_size, shard=shard)
            return
        folder = self._folder(root, source)
        present = folder.labels_present()
        if source.name == "imagenet" and len(present) != IMAGENET_A_CLASSES:
            raise ValueError(f"ImageNet-A has {IMAGENET_A_CLASSES} classes; {root}: {len(present)}")
        for split in folder.splits(batch_size=batch_size, shard=shard):
            for batch in split_batches(split, batch_size=batch_size):
                yield replace(batch, candidates=present)

    @torch.inference_mode()
    def judge(
        self, classifier: Classifier, batch: Batch, *, generator: torch.Generator
    ) -> pa.Table:
        logits_BK = classifier(batch.images)
        free = logits_BK.argmax(dim=1)
        if batch.candidates is None:
            return verdicts(batch, "natural", free)
        allowed = torch.tensor(batch.candidates, device=logits_BK.device)
        restricted = allowed[logits_BK[:, allowed].argmax(dim=1)]
        rows = [verdicts(batch, "natural", restricted), verdicts(batch, "natural-1000", free)]
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        return survival_scores(ledger)

    def _folder(self, root: Path, source: Data) -> ImageFolderByClass:
        return ImageFolderByClass(
            root=root,
            class_names=source.class_names,
            size=self.size,
            resize=round(self.size * 256 / 224),
            skip_damaged=source.skip_damaged,
        )


def _cifar10_1(source: Data) -> Split | None:
    root = source.stored("cifar10.1") if source.name == "cifar10" else None
    return load_cifar10_1(root) if root else None


@lru_cache(maxsize=4)
def hardest(source: Data) -> Split:
    """Return the sixth of the held-out images with the least margin of their true class.

    The reference is a support vector machine (RBF kernel) on grey pixels, fitted on at most 5,000
    images of the train split: neither CNN nor transformer, so it favours no family of the study.
    """
    from sklearn.svm import SVC

    train = source.train.subset(REFERENCE_IMAGES, seed=0)
    reference = SVC().fit(_grey_pixels(train), train.labels.numpy())
    scores = reference.decision_function(_grey_pixels(source.held_out))
    if scores.ndim == 1:
        scores = np.stack([-scores, scores], axis=1)
    true = reference.classes_ == source.held_out.labels.numpy()[:, None]
    rival = np.where(true, -np.inf, scores).max(axis=1)
    margin = np.where(true, scores, -np.inf).max(axis=1) - rival
    count = math.ceil(len(margin) * HARDEST_SHARE)
    return source.held_out.at(np.sort(np.argsort(margin, kind="stable")[:count]))


def _grey_pixels(split: Split) -> np.ndarray:
    """Return each image's grey pixels_ND in [0, 1], at most 32 a side."""
    parts = []
    for first in range(0, len(split), READ_AT_ONCE):
        grey_BHW = split.images[first : first + READ_AT_ONCE].float().mean(dim=1)
        if grey_BHW.shape[-1] > REFERENCE_SIDE:
            grey_BHW = F.adaptive_avg_pool2d(grey_BHW, REFERENCE_SIDE)
        parts.append(grey_BHW.flatten(1).div(255))
    return torch.cat(parts).numpy()
