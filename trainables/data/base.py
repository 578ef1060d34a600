"""Data sets: images in memory or in files, labels, and the ids that verdicts are kept by."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables.data.images import ImageFiles


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images of one part of a data set: uint8 (N, 3, H, W), labels int64 (N,), one id each.

    Images in files are decoded when they are indexed, by a slice or a tensor of places.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, count: int, *, seed: int) -> Split:
        """Return `count` images drawn by `seed`, in their old order; all when there are fewer."""
        if count >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def at(self, places: np.ndarray) -> Split:
        """Return the images at some places, in that order."""
        index = torch.from_numpy(places)
        images = self.images
        return Split(
            images=images[index] if isinstance(images, Tensor) else images.at(places),
            labels=self.labels[index],
            ids=tuple(self.ids[i] for i in places),
        )

    def ids_hash(self) -> str:
        """Return 12 hex digits that name this list of images."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:12]


@dataclass(frozen=True, order=True)
class Shard:
    """The images from `first` up to `end`, without it, of a list in random order.

    The order follows from the images' ids alone: every shard is a random sample of the list.
    """

    first: int = 0
    end: int = sys.maxsize

    def __len__(self) -> int:
        return self.end - self.first

    def of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the ascending places in the list, whose ids are given, of the shard's images."""
        if self.first == 0 and self.end >= len(ids):
            return np.arange(len(ids))
        hashes = [hashlib.sha256(image_id.encode()).digest() for image_id in ids]
        order = sorted(range(len(ids)), key=hashes.__getitem__)
        return np.sort(np.array(order[self.first : self.end], dtype=np.int64))


WHOLE = Shard()


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set: what is trained on, what is held out, and the classes by label.

    `roots`: where stored sets lie (`source.STORED_SETS`), if they do; `skip_damaged`: pass over
    their unreadable images; `workers`: processes that decode and augment for a training; `cache`:
    a folder for what is made of it, None to keep that in memory. Equal is only the same object,
    which so can key a cache.
    """

    name: str
    train: Split
    held_out: Split
    class_names: tuple[str, ...]
    roots: Mapping[str, Path] = field(default_factory=dict)
    skip_damaged: bool = False
    workers: int = 0
    cache: Path | None = None

    def stored(self, name: str) -> Path | None:
        """Return where a stored set lies, None where a counterpart is to be generated.

        ValueError on ImageNet without the set: no counterpart may stand for it.
        """
        if name not in self.roots and self.name == "imagenet":
            raise ValueError(f"on ImageNet this needs the stored set: give --{name} DIR")
        return self.roots.get(name)


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], channels last in memory."""
    return images.to(memory_format=torch.channels_last).float().div_(255)
