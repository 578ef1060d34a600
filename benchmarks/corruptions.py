"""The fifteen corruptions against the package imagecorruptions-imaug, at 224 px.

Both sides corrupt the same eight pieces of scikit-learn's two photographs, one thread each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import cv2
import imagecorruptions
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from benchmarks.measure import Figure, in_turns, require
from evaluators import SEVERITIES
from evaluators.corruption_kinds import KINDS, corrupt

SIDE = 224
ALIKE = ("brightness", "contrast")  # neither draws nor compresses, so they can be held together


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
    pixels = photographs()[: 1 if quick else None]
    images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    ids = [f"photograph/{i}" for i in range(len(pixels))]
    kinds = ALIKE if quick else KINDS

    def ours(*kinds: str) -> list[torch.Tensor]:
        return [
            corrupt(images_BCHW, ids, kind=kind, severity=severity)
            for kind in kinds
            for severity in SEVERITIES
        ]

    def theirs(*kinds: str) -> list[np.ndarray]:
        return [
            np.stack(
                [imagecorruptions.corrupt(x, corruption_name=kind, severity=s) for x in pixels]
            )
            for kind in kinds
            for s in SEVERITIES
        ]

    furthest = max(
        float((255 * found.permute(0, 2, 3, 1) - torch.from_numpy(expected)).abs().max())
        for found, expected in zip(ours(*ALIKE), theirs(*ALIKE), strict=True)
    )
    told = f"{' and '.join(ALIKE)} differ by at most {furthest:.1f}/255"
    require(furthest <= 2, told)
    pairs = in_turns(
        lambda: ours(*kinds),
        lambda: theirs(*kinds),
        repeats=1 if quick else 5,
        clock=time.process_time,
    )
    yield Figure(
        name=f"{len(kinds)} corruptions at 5 severities, imagecorruptions-imaug / ours",
        values=tuple(theirs_s / ours_s for ours_s, theirs_s in pairs),
        target=3,
        same=told,
    )
