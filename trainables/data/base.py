"""Data sets: images in memory or in files, labels, and the ids that verdicts are kept by."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables.data.images import ImageFiles, ResizedImages
from trainables.data.listing import choose, places_in_head, plain
from trainables.data.registry import STORED_SETS, DataSet, StoredSet
from trainables.recipe import nearest

Images = Tensor | ImageFiles | ResizedImages


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
        return np.sort(self._in_random_order(ids))

    def blocks(self, ids: Sequence[str], size: int) -> Iterator[np.ndarray]:
        """Yield the ascending places of the shard's images, `size` at a time.

        The list falls into the same blocks in every shard; a shard must be made of whole ones.
        """
        if self.first % size or (self.end % size and self.end < len(ids)):
            raise ValueError(f"{self} is not made of whole blocks of {size} images")
        order = self._in_random_order(ids)
        for first in range(0, len(order), size):
            yield np.sort(order[first : first + size])

    def _in_random_order(self, ids: Sequence[str]) -> np.ndarray:
        hashes = [hashlib.sha256(image_id.encode()).digest() for image_id in ids]
        order = sorted(range(len(ids)), key=hashes.__getitem__)
        return np.array(order[self.first : self.end], dtype=np.int64)


WHOLE = Shard()


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images of one part of a data set: uint8 (N, C, H, W), labels int64 (N,), one id each.

    A user's own may be float32 in [0, 1]. Images in files are decoded when they are indexed, by a
    slice or a tensor of places; those in memory that a model sees at another size are resized then.
    """

    images: Images
    labels: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, count: int, *, seed: int) -> Split:
        """Return `count` images drawn by `seed`, in their old order; all when there are fewer."""
        if count >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def chosen(self, count: int) -> Split:
        """Return `count` of the images, by class as in all; 0: all."""
        if count in (0, len(self)):
            return self
        return self.at(np.array(choose(self.ids, self.labels.tolist(), count)))

    def at(self, places: np.ndarray) -> Split:
        """Return the images at some places, in that order."""
        index = torch.from_numpy(places)
        images = self.images
        return Split(
            images=images[index] if isinstance(images, Tensor) else images.at(places),
            labels=self.labels[index],
            ids=tuple(self.ids[i] for i in places),
        )

    def parts(self, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Split]:
        """Yield the images of a shard, decoded, in order, at most `batch_size` at a time."""
        places = shard.of(self.ids)
        for first in range(0, len(places), batch_size):
            part = self.at(places[first : first + batch_size])
            yield replace(part, images=part.images[:])

    def ids_hash(self) -> str:
        """Return 12 hex digits that name this list of images."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set as loaded: its entry, the images trained on and those held out, its classes.

    `roots`: where stored sets lie, by name; `workers`: processes that decode and augment for a
    training; `cache`: a folder for what is made of it, None to keep that in memory; `origin`: loads
    the data without the preprocessing of a model, None where there is none; `corrupted`: held-out
    images of which corruptions are generated, 0 for the evaluator's own number. Only the same
    object is equal, so that it can key a cache.
    """

    data_set: DataSet
    train: Split
    held_out: Split
    class_names: tuple[str, ...]
    roots: Mapping[str, Path] = field(default_factory=dict)
    workers: int = 0
    cache: Path | None = None
    origin: Callable[[], Data] | None = None
    corrupted: int = 0

    @property
    def name(self) -> str:
        return self.data_set.name

    def columns_of_head(self, outputs: int) -> tuple[int, ...] | None:
        """Return a head's outputs as the data count them: its own classes in order, then the rest.

        None where the head is the data's own. Another one is matched by the classes' names, which
        are WordNet ids or names of ImageNet's classes, as timm lists those of a head of that width,
        or else the outputs' indices. ValueError names a class that the head lacks or that has
        another name there.
        """
        names = self.class_names
        if outputs == len(names):
            return None
        places = places_in_head(outputs)  # imports timm
        columns = [places.get(plain(name), outputs) for name in names]
        times = Counter(columns) + Counter({outputs: 1})
        if wrong := [n for n, c in zip(names, columns, strict=True) if times[c] > 1]:
            raise ValueError(
                f"the model answers among {outputs} classes, and the data have {len(names)}; "
                f"{len(wrong)} of these are unknown there or named twice, the first {wrong[0]!r}: "
                "name classes by WordNet id, by ImageNet's names or by the index of their output"
                f"{nearest(wrong[0], places)}"
            )
        return (*columns, *sorted({*range(outputs)} - {*columns}))

    def counterpart(self, evaluator: str) -> tuple[StoredSet, Path] | None:
        """Return the stored set that an evaluator reads and where it lies; None: generate it."""
        name = self.data_set.counterpart(evaluator)
        return (STORED_SETS[name], self.roots[name]) if name in self.roots else None


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], channels last in memory; floats are that."""
    last = images.to(memory_format=torch.channels_last)
    return last if images.is_floating_point() else last.float().div_(255)
