"""natural: ImageNet-A, or the held-out images that another kind of classifier finds hardest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import functional as F

from evaluators.base import Batch, Column, Evaluator, split_batches, verdicts
from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.data.load import stored_split
from trainables.data.registry import STORED_SETS
from trainables.scale import Scale
from trainables.watchdog import beat

if TYPE_CHECKING:
    from trainables.networks import Classifier

HARDEST_SHARE = 1 / 6
REFERENCE_IMAGES = 5000
REFERENCE_SIDE = 32
READ_AT_ONCE = 500
MANY_CLASSES = 50  # beyond it a support vector machine's pairs of classes are too many
SCORES_BYTES = 256_000_000  # of what the reference holds at once while it judges
ENTRY_BYTES = 17  # a float64, its negative or square, and a flag


class Natural(Evaluator):
    """Top-1 accuracy on natural images that are hard by themselves.

    ImageNet-A: `natural` answers among its 200 classes (the study's figure), `natural-1000` among
    all. At scale cifar10: CIFAR-10.1. Without a stored set: the natural-adversarial counterpart,
    `natural` alone.
    """

    name = "natural"
    columns = (
        Column("natural", "ImageNet-A", "Natural-adversarial", own_score="natural-1000"),
        Column("natural-1000", "ImageNet-A, among all 1,000", own_score="natural-1000"),
    )

    def __init__(self, scale: Scale) -> None:
        self.data_set = scale.data_set

    def identity(self, source: Data) -> dict[str, Any]:
        images = super().identity(source)
        if located := source.counterpart("natural"):
            return {"data": located[0].title, **images}
        counterpart = {"data": f"natural-adversarial ({source.name})", **images}
        if len(source.class_names) > MANY_CLASSES:
            counterpart["reference"] = "kernel ridge regression"
        return counterpart

    def images(self, source: Data) -> Split:
        located = source.counterpart("natural")
        return stored_split(*located, source) if located else hardest(source)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        if self.data_set.generated:
            return math.ceil(held_out * HARDEST_SHARE)
        return STORED_SETS[self.data_set.counterpart("natural")].images

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        split, located = self.images(source), source.counterpart("natural")
        # A set of some of the classes is answered among these, as the study did.
        some = located is not None and not located[0].complete
        present = tuple(sorted(set(split.labels.tolist()))) if some else None
        for batch in split_batches(split, batch_size=batch_size, shard=shard):
            yield replace(batch, candidates=present)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        logits_BK = classifier(batch.images)
        free = logits_BK.argmax(dim=1)
        if batch.candidates is None:
            return verdicts(batch, "natural", free)
        allowed = torch.tensor(batch.candidates, device=logits_BK.device)
        restricted = allowed[logits_BK[:, allowed].argmax(dim=1)]
        rows = [verdicts(batch, "natural", restricted), verdicts(batch, "natural-1000", free)]
        return pa.concat_tables(rows)


@lru_cache(maxsize=4)
def hardest(source: Data) -> Split:
    """Return the sixth of the held-out images with the least margin of their true class.

    The reference is a support vector machine, beyond 50 classes a kernel ridge regression (both
    with an RBF kernel), on grey pixels, fitted on at most 5,000 images of the train split: neither
    CNN nor transformer, so it favours no family of the study.
    """
    train, held_out = source.train.subset(REFERENCE_IMAGES, seed=0), source.held_out
    count = len(source.class_names)
    reference = _vector_machine(train) if count <= MANY_CLASSES else _kernel_ridge(train, count)
    pixels_ND, labels_N = _grey_pixels(held_out), held_out.labels.numpy()
    rows = max(1, SCORES_BYTES // (ENTRY_BYTES * reference.columns))
    margins = []
    for first in range(0, len(held_out), rows):
        part = slice(first, first + rows)
        margins.append(reference.margins(pixels_ND[part], labels_N[part]))
        beat()
    hard = math.ceil(len(held_out) * HARDEST_SHARE)
    return held_out.at(np.sort(np.argsort(np.concatenate(margins), kind="stable")[:hard]))


@dataclass(frozen=True)
class _Reference:
    """A fitted classifier: the scores_NK of its classes, for which it holds N x `columns`."""

    score: Callable[[np.ndarray], np.ndarray]
    classes: np.ndarray
    columns: int

    def margins(self, pixels_ND: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        """Return by how much the score of each image's true class exceeds the best other."""
        scores = self.score(pixels_ND)
        if scores.ndim == 1:
            scores = np.stack([-scores, scores], axis=1)
        true = self.classes == labels_N[:, None]
        rival = np.where(true, -np.inf, scores).max(axis=1)
        margins: np.ndarray = np.where(true, scores, -np.inf).max(axis=1) - rival
        return margins


def _vector_machine(train: Split) -> _Reference:
    from sklearn.svm import SVC

    fitted = SVC().fit(_grey_pixels(train), train.labels.numpy())
    return _Reference(fitted.decision_function, fitted.classes_, math.comb(len(fitted.classes_), 2))


def _kernel_ridge(train: Split, num_classes: int) -> _Reference:
    """Fit the classes' indicators, with the kernel's width that a support vector machine takes."""
    from sklearn.kernel_ridge import KernelRidge

    pixels_ND = _grey_pixels(train).astype(np.float64)
    classes = np.arange(num_classes)
    gamma = 1 / max(pixels_ND.shape[1] * pixels_ND.var(), 1e-12)
    fitted = KernelRidge(kernel="rbf", gamma=gamma).fit(
        pixels_ND, np.equal(classes, train.labels.numpy()[:, None]).astype(np.float64)
    )
    return _Reference(fitted.predict, classes, len(train) + num_classes)


def _grey_pixels(split: Split) -> np.ndarray:
    """Return each image's grey pixels_ND in [0, 1], at most 32 a side."""
    parts = []
    for first in range(0, len(split), READ_AT_ONCE):
        grey_BHW = split.images[first : first + READ_AT_ONCE].float().mean(dim=1)
        if grey_BHW.shape[-1] > REFERENCE_SIDE:
            grey_BHW = F.adaptive_avg_pool2d(grey_BHW, REFERENCE_SIDE)
        parts.append(grey_BHW.flatten(1).div(255))
    return torch.cat(parts).numpy()
