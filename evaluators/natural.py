"""natural: ImageNet-A, or held-out images as another kind of classifier finds them hardest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evaluators import HARDEST_SHARE
from evaluators.base import Column
from evaluators.shifts import Shift
from trainables.data.base import Data, Split
from trainables.watchdog import beat

REFERENCE_IMAGES = 5000
REFERENCE_SIDE = 32
FOLDS = 5
AT_ONCE = 500  # images that are read and judged by the reference
MANY_CLASSES = 50  # beyond it a support vector machine's pairs of classes are too many


class Natural(Shift):
    """Top-1 accuracy on natural images that are hard by themselves.

    ImageNet-A: `natural` answers among its 200 classes (the study's figure), `natural-1000` among
    all. At scale cifar10: CIFAR-10.1. Without a stored set: the natural-adversarial counterpart.
    There `natural` answers among all classes, `natural-present` among the data's where the head
    has others.
    """

    name = "natural"
    columns = (
        Column("natural", "ImageNet-A", "Natural-adversarial", own_score="natural-1000"),
        Column("natural-1000", "ImageNet-A, among all 1,000", own_score="natural-1000"),
        Column("natural-present", "Natural, among classes present", own_score="natural-present"),
    )

    def identity(self, source: Data) -> dict[str, Any]:
        many = len(source.class_names) > MANY_CLASSES
        reference = ["kernel ridge regression"] * many + ["cross-fitted"] * (not len(source.train))
        how = {"reference": ", ".join(reference)} if reference else {}
        if tilt := self.scale.natural_tilt:
            how["turned"] = f"by -{tilt:g}, 0 or {tilt:g} degrees"
        return self.identity_of_set(source, "natural-adversarial", **how)

    def listed(self, source: Data) -> Split:
        """Return the held-out images where all are shown, turned or not, without turning them."""
        turned = self.scale.natural_tilt and not source.counterpart(self.name)
        return source.held_out if turned else self.images(source)

    def images(self, source: Data) -> Split:
        return self.stored(source) or hardest(source, tilt=self.scale.natural_tilt)


def hardest(source: Data, *, tilt: float = 0.0) -> Split:
    """Return the sixth of the held-out images with the least margin of their true class.

    With a `tilt`: every held-out image as it is, or turned by so many degrees to either side,
    whichever has the least margin. A few hundred images have too few natural failures to tell
    models apart; unusual poses make more (Alcorn et al. 2019; Engstrom et al. 2019).

    The reference is a support vector machine, beyond 50 classes a kernel ridge regression (both
    with an RBF kernel), on grey pixels, fitted on at most 5,000 images of the train split: neither
    CNN nor transformer, so it favours no family of the study. Without train images each fifth of
    the held-out ones is judged by a reference of the others. Pixels are the data's own, whatever
    preprocessing a model has: every model is shown the same images.
    """
    margins_TN = _margins_of_views(source.origin() if source.origin else source, tilt)
    if not tilt:
        hard = math.ceil(len(source.held_out) * HARDEST_SHARE)
        return source.held_out.at(np.sort(np.argsort(margins_TN[0], kind="stable")[:hard]))
    images_TNCHW = torch.stack([s.images[:] for s in _views(source.held_out, tilt)])
    turns_N = torch.from_numpy(margins_TN.argmin(axis=0))
    return replace(source.held_out, images=images_TNCHW[turns_N, torch.arange(len(turns_N))])


def _views(split: Split, tilt: float) -> list[Split]:
    """Return the images as they are, and turned by `tilt` degrees, if any, to either side."""
    if not tilt:
        return [split]
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    turn, bilinear = partial(v2.functional.rotate, split.images[:]), v2.InterpolationMode.BILINEAR
    turned = (turn(angle, bilinear) for angle in (tilt, -tilt))
    return [split, *(replace(split, images=images) for images in turned)]


@lru_cache(maxsize=4)
def _margins_of_views(source: Data, tilt: float) -> np.ndarray:
    """Return the margins of the held-out images as they are, and as they are turned."""
    views, classes = _views(source.held_out, tilt), len(source.class_names)
    if len(source.train):
        fitted = source.train.subset(REFERENCE_IMAGES, seed=0)
        return np.stack([_margins(fitted, split, classes) for split in views])
    return np.stack([_cross_fitted(split, classes) for split in views])


def _cross_fitted(held_out: Split, num_classes: int) -> np.ndarray:
    """Return each image's margin by a reference that was fitted on the other fifths of its class.

    It is infinite where no image of its class is among them. ValueError with too few images.
    """
    if (held_out.labels.bincount() > 1).sum() < 2:
        raise ValueError(
            "natural-adversarial images of held-out images alone need two images of each of two "
            "classes, or more: add images, or train images"
        )
    places = sorted(range(len(held_out)), key=lambda i: (int(held_out.labels[i]), held_out.ids[i]))
    folds_N = np.empty(len(held_out), dtype=np.int64)
    folds_N[places] = np.arange(len(held_out)) % FOLDS
    margins_N = np.full(len(held_out), np.inf)
    for fold in range(FOLDS):
        fitted = held_out.at(np.flatnonzero(folds_N != fold)).subset(REFERENCE_IMAGES, seed=0)
        is_known = np.isin(held_out.labels.numpy(), fitted.labels.numpy())
        judged = np.flatnonzero((folds_N == fold) & is_known)
        if len(judged):
            margins_N[judged] = _margins(fitted, held_out.at(judged), num_classes)
    return margins_N


def _margins(fitted: Split, judged: Split, num_classes: int) -> np.ndarray:
    """Return the margin of each judged image's true class by a reference fitted on others."""
    classes, scores_of = _fitted_reference(fitted, num_classes)
    pixels_ND, labels_N1 = _grey_pixels(judged), judged.labels.numpy()[:, None]
    margins = []
    for first in range(0, len(judged), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        scores_NK = scores_of(pixels_ND[part])
        if scores_NK.ndim == 1:  # of two classes scikit-learn returns the second one's score
            scores_NK = np.stack([-scores_NK, scores_NK], axis=1)
        true_NK = classes == labels_N1[part]
        rival_N = np.where(true_NK, -np.inf, scores_NK).max(axis=1)
        margins.append(np.where(true_NK, scores_NK, -np.inf).max(axis=1) - rival_N)
        beat()
    return np.concatenate(margins)


def _fitted_reference(
    train: Split, num_classes: int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Fit the reference; return its classes and the function from pixels_ND to their scores_NK."""
    from sklearn import kernel_ridge, svm

    pixels_ND, labels_N = _grey_pixels(train), train.labels.numpy()
    if num_classes <= MANY_CLASSES:
        machine = svm.SVC().fit(pixels_ND, labels_N)
        return machine.classes_, machine.decision_function
    pixels_ND = pixels_ND.astype(np.float64)
    # The kernel's width is the one that a support vector machine takes.
    ridge = kernel_ridge.KernelRidge(kernel="rbf", gamma=1 / (pixels_ND.shape[1] * pixels_ND.var()))
    return np.arange(num_classes), ridge.fit(pixels_ND, np.eye(num_classes)[labels_N]).predict


def _grey_pixels(split: Split) -> np.ndarray:
    """Return each image's grey pixels_ND in [0, 1], at most 32 a side."""
    parts = []
    for first in range(0, len(split), AT_ONCE):
        grey_BHW = split.images[first : first + AT_ONCE].float().mean(dim=1)
        if grey_BHW.shape[-1] > REFERENCE_SIDE:
            grey_BHW = F.adaptive_avg_pool2d(grey_BHW, REFERENCE_SIDE)
        parts.append(grey_BHW.flatten(1).div(255))
    return torch.cat(parts).numpy()
