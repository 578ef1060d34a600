"""Time the fifteen corruptions against the package imagecorruptions-imaug, at 224 px.

    python benchmarks/corruptions.py

Both sides corrupt the same eight pieces of scikit-learn's two photographs, one thread each, in
interleaved repeats; the median repeat counts. Each prints milliseconds per image.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import cv2
import imagecorruptions
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from evaluators.corruption_kinds import KINDS, SEVERITIES, corrupt

REPEATS = 5
SIDE = 224


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


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print milliseconds per image and the ratio, per kind and in all."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    pixels = photographs()
    images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    ids = [f"photograph/{i}" for i in range(len(pixels))]
    totals = np.zeros(2)
    print(f"{'ms per image':18s} {'ours':>7s} {'theirs':>7s}")
    for kind in KINDS:

        def ours(kind: str = kind) -> None:
            for severity in SEVERITIES:
                corrupt(images_BCHW, ids, kind=kind, severity=severity)

        def theirs(kind: str = kind) -> None:
            for severity in SEVERITIES:
                for image in pixels:
                    imagecorruptions.corrupt(image, corruption_name=kind, severity=severity)

        ours(), theirs()
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(REPEATS)]
        per_image = [1e3 * statistics.median(p) / len(ids) / 5 for p in zip(*pairs, strict=True)]
        totals += per_image
        print(row(kind, *per_image))
    print(row("all fifteen", *totals))


def row(name: str, ours: float, theirs: float) -> str:
    """Write both sides' milliseconds and their ratio."""
    return f"{name:18s} {ours:7.2f} {theirs:7.2f}  x{theirs / ours:.1f}"


if __name__ == "__main__":
    main()
