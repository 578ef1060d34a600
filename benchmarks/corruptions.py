"""The fifteen corruptions against the package imagecorruptions-imaug, at 224 px.

Both sides corrupt the same eight pieces of scikit-learn's two photographs, one thread each. Kinds
without a draw must give the same pixels, the others images as far from the clean ones.

Then ten small models, each trained for some epochs on the digits, are judged on 100 corrupted
digits as they are generated, with and without a stored quality, and on files of them, saved as
ImageNet-C's were (hendrycks/robustness @8190fe3, make_imagenet_c.py: quality 85, optimize).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import imagecorruptions
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional

from benchmarks.measure import Figure, in_turns, require
from evaluators import GENERATED_IMAGES
from evaluators.base import judge_images
from evaluators.corruption_kinds import corrupt
from evaluators.corruptions import Corruptions
from trainables.data.base import Data, to_unit
from trainables.data.load import load_data
from trainables.data.registry import KINDS, SEVERITIES
from trainables.layers import Classifier
from trainables.scale import DIGITS

SIDE = 224
QUALITY = 85  # of ImageNet-C's files
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
    yield from stored_likewise(quick=quick)


def stored_likewise(*, quick: bool) -> Iterator[Figure]:
    """Yield by how many points ten models' accuracy on generated images is off that on files."""
    data, at_85 = load_data(DIGITS), replace(DIGITS, stored_jpeg=QUALITY)
    models = [trained(data, seed, epochs=1 if quick else 8) for seed in range(2 if quick else 10)]
    with TemporaryDirectory() as folder:
        entry = replace(data.data_set, classes=data.class_names, counterparts=("imagenet-c",))
        save_as_stored(data, Path(folder))
        stored = replace(data, data_set=entry, roots={"imagenet-c": Path(folder)})
        sides = ((DIGITS, data), (at_85, data), (DIGITS, stored))
        errors = [[error(Corruptions(s), model, d) for model in models] for s, d in sides]
    plain, at_quality, files = (np.array(side) * 100 for side in errors)
    span = f"{len(models)} models err on {files.min():.1f} to {files.max():.1f} % of files, n = 100"
    for name, side in ((f"at quality {QUALITY}", at_quality), ("as they are", plain)):
        yield Figure(
            name=f"accuracy on generated corruptions {name}, off that on stored files, at most",
            values=(float(np.abs(side - files).max()),),
            target=0.5,
            better="less",
            unit=" points",
            same=span,
        )


def trained(data: Data, seed: int, *, epochs: int) -> Classifier:
    """Return a small convolutional network, of a width and depth by its seed, trained on digits."""
    torch.manual_seed(seed)
    width, layers = 8 + 4 * (seed % 5), [nn.Conv2d(3, 8 + 4 * (seed % 5), 3, 2, 1), nn.ReLU()]
    for _ in range(1 + seed // 5):
        layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10)
    )
    model = Classifier(network, data.data_set.mean, data.data_set.std)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    images, labels = to_unit(data.train.images[:]), data.train.labels
    for _ in range(epochs):
        for places in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[places]), labels[places]).backward()
            optimizer.step()
    return model


def save_as_stored(data: Data, root: Path) -> None:
    """Write the corrupted images that the evaluator generates into ImageNet-C's folders."""
    split = data.held_out.subset(GENERATED_IMAGES, seed=0)
    images = to_unit(split.images[:])
    for kind, severity in product(KINDS, SEVERITIES):
        corrupted = corrupt(images, split.ids, kind=kind, severity=severity)
        pixels_BHWC = (corrupted * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for pixels, label, image_id in zip(
            pixels_BHWC, split.labels.tolist(), split.ids, strict=True
        ):
            folder = root / kind / str(severity) / data.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{image_id.rpartition('/')[2]}.JPEG"
            Image.fromarray(pixels).save(file, quality=QUALITY, optimize=True)


def error(evaluator: Corruptions, model: Classifier, source: Data) -> float:
    """Return a model's error over the fifteen kinds."""
    ledger = judge_images(evaluator, model, source, device=torch.device("cpu"))
    return evaluator.summarize(ledger)[0].value


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
