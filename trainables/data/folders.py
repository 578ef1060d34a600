"""Stored images by class: root/<class>/<image>, labelled by the class's name.

A data set's own train and held-out images, and the out-of-distribution sets beside them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.data.images import (
    UNREADABLE,
    ImageFiles,
    as_tensor,
    in_threads,
    keep_originals,
    keep_validated,
    read_rgb,
    unreadable,
    validated,
)
from trainables.data.listing import (
    DataSource,
    ImageList,
    differing_classes,
    list_by_class,
    list_splits,
)
from trainables.scale import Scale

logger = logging.getLogger(__name__)


def load_folders(scale: Scale, source: DataSource) -> Data:
    """Load the splits below the source's root; ValueError when they do not fit the scale.

    What fits the source's memory is decoded once, the train images first.
    """
    train, held_out = list_splits(source)
    check_classes(scale, train)
    originals, seen = (
        ImageFiles(part.root, part.paths, size=scale.image_size, workers=source.workers)
        for part in (train, held_out)
    )
    kept: Tensor | None = None
    if source.cache:
        budget = source.memory_bytes
        decoded = keep_originals(originals, source.cache, budget) if len(train) else None
        if decoded:
            budget -= int(decoded.ends[-1])
            originals = originals.out_of(decoded)
        kept = keep_validated(seen, source.cache, budget)
    return Data(
        name=scale.name,
        train=_split(train, originals),
        held_out=_split(held_out, seen if kept is None else kept),
        class_names=train.class_names,
        roots=source.folders,
        skip_damaged=source.skip_damaged,
        workers=source.workers,
        cache=source.cache,
    )


def check_classes(scale: Scale, listed: ImageList) -> None:
    """Raise ValueError unless there are as many classes as the scale has; ImageNet has its own."""
    remedy = f"--scale folder --image-size {scale.image_size} takes any classes"
    if scale.name == "imagenet":
        # Imports that other scales need not pay.
        from timm.data import ImageNetInfo

        known = ImageNetInfo().label_names()
        if differing := differing_classes(listed.class_names, known):
            raise ValueError(f"{listed.root} is not ImageNet: it {differing}; {remedy}")
    elif len(listed.class_names) != scale.num_classes:
        raise ValueError(
            f"{listed.root} has {len(listed.class_names)} classes, and scale {scale.name!r} has "
            f"{scale.num_classes}: {remedy}"
        )


def _split(listed: ImageList, images: Tensor | ImageFiles) -> Split:
    labels = torch.tensor(listed.labels, dtype=torch.int64)
    return Split(images=images, labels=labels, ids=listed.paths)


@dataclass(kw_only=True)
class ImageFolderByClass:
    """The images below root/<class>/, `size` px square, labelled by name, never by folder order.

    `resize`: bring the shorter side to it and cut out the middle; None: images must be
    of the right size as stored. `complete`: every class must be there. An image that cannot be
    read is a ValueError, or with `skip_damaged` passed over and listed in `damaged`. `workers`:
    threads that may decode even where torch has fewer.
    """

    root: Path
    class_names: tuple[str, ...]
    size: int
    resize: int | None = None
    complete: bool = False
    skip_damaged: bool = False
    workers: int = 0
    damaged: list[Path] = field(default_factory=list, init=False)

    def files(self) -> ImageList:
        """List every image with its label, in the order of the labels; raises as list_by_class."""
        return list_by_class(self.root, self.class_names, complete=self.complete)

    def ids_hash(self) -> str:
        """Return 12 hex digits that name this list of images."""
        ids = "\n".join(map(_id, self.files().paths))
        return hashlib.sha256(ids.encode()).hexdigest()[:12]

    def splits(self, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Split]:
        """Yield the images, or a shard of them, decoded, `batch_size` files at a time."""
        listed = self.files()
        places = shard.of([_id(path) for path in listed.paths]).tolist()
        for first in range(0, len(places), batch_size):
            part = places[first : first + batch_size]
            paths = [listed.paths[place] for place in part]
            of_part = [listed.labels[place] for place in part]
            read = zip(self._read_all(paths), paths, of_part, strict=True)
            kept = [(image, label, _id(path)) for image, path, label in read if image is not None]
            if kept:
                images, labels, ids = zip(*kept, strict=True)
                yield Split(images=torch.stack(images), labels=torch.tensor(labels), ids=ids)
        if self.damaged:
            logger.warning("%d of %d images are damaged: skipped", len(self.damaged), len(places))

    def _read_all(self, below: list[str]) -> list[Tensor | None]:
        paths = [self.root / path for path in below]
        read: list[Tensor | None] = [None] * len(paths)

        def fill(place: int) -> None:
            read[place] = self._read(paths[place])

        in_threads(fill, range(len(paths)), workers=self.workers)
        self.damaged += [p for p, image in zip(paths, read, strict=True) if image is None]
        return read

    def _read(self, path: Path) -> Tensor | None:
        try:
            image = read_rgb(path)
        except UNREADABLE as error:
            if not self.skip_damaged:
                raise unreadable(path, error) from error
            return None
        if self.resize is not None:
            image = validated(image, resize=self.resize, size=self.size)
        elif image.size != (self.size, self.size):
            raise ValueError(
                f"{path} is {image.width} x {image.height} px, not {self.size} x {self.size}"
            )
        return as_tensor(image)


def _id(path: str) -> str:
    return path.rpartition(".")[0]
