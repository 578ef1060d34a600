"""Loading: a scale's data as images, labels and ids, once per process."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch.nn import functional as F

from trainables.data.base import Data, Split
from trainables.data.cifar import load_cifar10
from trainables.data.folders import load_folders
from trainables.data.listing import EMBEDDED, DataSource
from trainables.scale import Scale

HELD_OUT_DIGITS = 597


def load_data(scale: Scale, source: DataSource = EMBEDDED) -> Data:
    """Load a scale's data, once per process; ValueError when it has none here, or unfit."""
    if scale.name == "digits":
        return _digits(scale.image_size)
    if source.root is None:
        raise ValueError(
            f"scale {scale.name!r} has no embedded data, only 'digits' has: give --data DIR"
        )
    return _stored(_Named(scale), source)


class _Named:
    """A scale as a cache key: its name and image size say which images it has."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def __hash__(self) -> int:
        return hash((self.scale.name, self.scale.image_size))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and hash(self) == hash(other)


@cache
def _stored(named: _Named, source: DataSource) -> Data:
    load = load_cifar10 if named.scale.name == "cifar10" else load_folders
    return load(named.scale, source)


@cache
def _digits(image_size: int) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 16).float()[:, None]
    enlarged = F.interpolate(pixels, size=image_size, mode="bicubic", antialias=True)
    images = enlarged.clamp(0, 1).mul(255).round().byte().expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    train, held_out = train_test_split(
        np.arange(len(labels)),
        test_size=HELD_OUT_DIGITS,
        stratify=digits.target,
        random_state=0,
    )

    def split(index: np.ndarray) -> Split:
        order = torch.from_numpy(np.sort(index))
        ids = tuple(f"digits/{i:04d}" for i in order.tolist())
        return Split(images=images[order], labels=labels[order], ids=ids)

    names = tuple(str(name) for name in digits.target_names)
    return Data(name="digits", train=split(train), held_out=split(held_out), class_names=names)
