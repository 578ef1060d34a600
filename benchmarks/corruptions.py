"""The fifteen corruptions against the package imagecorruptions-imaug, at 224 px.

Both sides corrupt the same eight pieces of scikit-learn's two photographs, one thread each. Kinds
without a draw must give the same pixels, the others images as far from the clean ones.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence

import cv2
import imagecorruptions
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from benchmarks.measure import Figure, in_turns, require
from evaluators.corruption_kinds import corrupt
from trainables.data.registry import KINDS, SEVERITIES

SIDE = 224
DRAWN = (*KINDS[:3], "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform")
FURTHEST = 2 / 255  # of a pixel, and half of it in the mean
# Of the mean distance from the clean images, for one draw of each image: those of frost differ by
# a third. The means of many draws are compared in tests/test_corruptions.py.
STRENGTH = 0.35


def photographs() -> np.ndarray:
    """Return eight pieces (8, 224, 224, 3) of two photographs."""
    corners = [(0, 0), (100, 200), (150, 30), (200, 400)]
    return np.stack(
        [
            image[top : top + SIDE, left : left + SIDE]
            for image in load_sample_images().images
            for top, left in corners
        ]
    )


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the CPU times of all kinds and severities together."""
    warnings.simplefilter("ignore")
    cv2.setNumThreads(1)
    np.random.seed(0)
    pixels = photographs()[:: 2 if quick else 1]
    images_BCHW = as_images(pixels)
    ids = [f"photograph/{i}" for i in range(len(pixels))]
    severities = (3,) if quick else SEVERITIES

    def ours() -> list[torch.Tensor]:
        return [corrupt(images_BCHW, ids, kind=kind, severity=s) for kind, s in asked]

    def theirs() -> list[np.ndarray]:
        return [
            np.stack(
                [imagecorruptions.corrupt(x, corruption_name=kind, severity=s) for x in pixels]
            )
            for kind, s in asked
        ]

    asked = [(kind, severity) for kind in KINDS for severity in severities]
    told = require_alike(images_BCHW, asked, ours(), [as_images(found) for found in theirs()])
    pairs = in_turns(ours, theirs, repeats=1 if quick else 5, clock=time.process_time)
    yield Figure(
        name=f"{len(KINDS)} corruptions at {len(severities)} severities, "
        "imagecorruptions-imaug / ours",
        values=tuple(theirs_s / ours_s for ours_s, theirs_s in pairs),
        target=3,
        same=told,
    )


def as_images(pixels_BHWC: np.ndarray) -> torch.Tensor:
    """Return pixels as the images (B, 3, H, W) in [0, 1] that this project corrupts."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255


def require_alike(
    clean: torch.Tensor,
    asked: Sequence[tuple[str, int]],
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
) -> str:
    """See that both sides corrupted alike, kind by kind; return by how much they differ at most."""
    furthest = weakest = 0.0
    for (kind, severity), here, there in zip(asked, ours, theirs, strict=True):
        if kind in DRAWN:
            strength = float((here - clean).abs().mean() / (there - clean).abs().mean())
            require(abs(strength - 1) <= STRENGTH, f"{kind}-{severity}, {strength:.2f} as strong")
            weakest = max(weakest, abs(strength - 1))
            continue
        difference = (here - there).abs()
        largest, mean = float(difference.max()), float(difference.mean())
        told = f"{kind}-{severity}, by up to {255 * largest:.1f}/255, {255 * mean:.1f} in the mean"
        require(largest <= FURTHEST and mean <= FURTHEST / 2, told)
        furthest = max(furthest, largest)
    return (
        f"kinds without draws differ by at most {255 * furthest:.1f}/255, those with are within "
        f"{weakest:.0%} as strong"
    )
