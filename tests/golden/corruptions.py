"""Writes corruptions.json: by how much the package imagecorruptions changes six photographs.

`python -m tests.golden.corruptions`, about three minutes. Mean change is the mean absolute
difference of corrupted and clean 8-bit values, over six photographs and several draws of each.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import imagecorruptions
import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from trainables.data.registry import KINDS, SEVERITIES

FILE = Path(__file__).with_suffix(".json")
SIDE = 224
# The draws of each photograph: so many that the standard error is below 1 %.
DRAWS = dict.fromkeys((*KINDS[:3], "glass_blur"), 2) | {
    "motion_blur": 30,
    "snow": 4,
    "frost": 400,
    "fog": 80,
    "elastic_transform": 10,
}


@cache
def photographs() -> np.ndarray:
    """Return six photographs (6, 224, 224, 3), resized to 256 px and cropped."""
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(SIDE)])
    images = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee()]
    images.append(data.rocket())
    return np.stack([np.asarray(crop(Image.fromarray(image))) for image in images])


def mean_changes(corrupt: Callable[[np.ndarray, int], np.ndarray], draws: int) -> np.ndarray:
    """Return the photographs' mean change for each draw; corrupt(pixels, draw) returns 8 bits."""
    clean = photographs().astype(np.int16)
    return np.array([np.abs(corrupt(photographs(), i) - clean).mean() for i in range(draws)])


def reference_changes(kind: str, severity: int) -> np.ndarray:
    """Return the mean change of each draw by the package."""
    takes_seed = kind in ("impulse_noise", "glass_blur")  # these two ignore numpy's seed
    corrupt_one = imagecorruptions.corruption_dict[kind]

    def corrupt(pixels: np.ndarray, draw: int) -> np.ndarray:
        np.random.seed(len(SEVERITIES) * draw + severity)
        corrupted = []
        for i, image in enumerate(pixels):
            seed = {"seed": len(pixels) * draw + i} if takes_seed else {}
            corrupted.append(np.uint8(corrupt_one(Image.fromarray(image), severity, **seed)))
        return np.stack(corrupted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mean_changes(corrupt, DRAWS.get(kind, 1))


def row(changes: np.ndarray) -> dict[str, float]:
    error = changes.std(ddof=1) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    n = len(changes) * len(photographs())
    return {"value": round(changes.mean(), 4), "standard_error": round(error, 4), "n": n}


def main() -> None:
    packages = ("imagecorruptions-imaug", "numpy", "opencv-python", "pillow")
    packages += ("scikit-image", "scikit-learn", "scipy", "torchvision")
    golden = {
        "unit": "1/255, mean absolute difference",
        "side": SIDE,
        "versions": {name: version(name) for name in packages},
        "mean_change": {
            kind: [row(reference_changes(kind, severity)) for severity in SEVERITIES]
            for kind in KINDS
        },
    }
    FILE.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
