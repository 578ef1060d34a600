"""Out-of-distribution sets read as they were published: class folders, or arrays in .npy files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainables.data.base import Data, Split
from trainables.data.images import ImageFiles
from trainables.data.listing import check_published, list_by_class
from trainables.data.registry import EXTRA_KINDS, KINDS, SEVERITIES, StoredSet


def stored_split(stored: StoredSet, root: Path, data: Data, *, native: bool | None = None) -> Split:
    """Return a stored set's images, their ids the classes and files' names without ending.

    Not `native`: they are resized and cut as held-out images are.
    """
    if stored.arrays:
        images, labels = (root / name for name in stored.arrays)
        pixels = stored_images(images, data.data_set.image_size)
        return _as_split(stored, pixels, stored_labels(labels, len(pixels), len(data.class_names)))
    native = stored.native if native is None else native
    return _by_class(stored, root / stored.folder, data, native=native)


def _by_class(stored: StoredSet, folder: Path, data: Data, *, native: bool) -> Split:
    listed = list_by_class(folder, data.class_names, complete=stored.complete)
    check_published(stored, listed, data.data_set)
    images = ImageFiles(
        listed.root,
        listed.paths,
        size=data.data_set.image_size,
        native=native,
        workers=data.workers,
    )
    ids = tuple(path.rpartition(".")[0] for path in listed.paths)
    return Split(images=images, labels=torch.tensor(listed.labels), ids=ids)


@dataclass(frozen=True)
class CorruptedSet:
    """A stored set of corruptions: the same images by kind and severity."""

    stored: StoredSet
    root: Path
    data: Data
    kinds: tuple[str, ...]

    @classmethod
    def open(cls, stored: StoredSet, root: Path, data: Data) -> CorruptedSet:
        """Open the set; ValueError names what is missing, and arrays that do not fit together."""
        corrupted = cls(stored, root, data, stored_kinds(stored, root))
        if stored.arrays:
            corrupted._check_arrays()
        return corrupted

    def ids_hash(self) -> str:
        """Return 12 hex digits of the images' names; of arrays, which have none, of the labels."""
        if not self.stored.arrays:
            return self.split(self.kinds[0], SEVERITIES[0]).ids_hash()
        return hashlib.sha256(self._labels().numpy().tobytes()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.split(self.kinds[0], SEVERITIES[0]))

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield each kind and severity as 'kind-severity' with its images."""
        for kind, severity in product(self.kinds, SEVERITIES):
            yield f"{kind}-{severity}", self.split(kind, severity)

    def split(self, kind: str, severity: int) -> Split:
        """Return the images of one kind and severity."""
        if not self.stored.arrays:
            folder = self.root / kind / str(severity)
            return _by_class(self.stored, folder, self.data, native=self.stored.native)
        pixels, labels = self._pixels(kind), self._labels()
        count = len(pixels) // len(SEVERITIES)
        part = slice((severity - 1) * count, severity * count)
        return _as_split(self.stored, pixels[part], labels[part])

    def _pixels(self, kind: str) -> np.ndarray:
        return stored_images(self.root / f"{kind}.npy", self.data.data_set.image_size)

    def _labels(self) -> Tensor:
        count = len(self._pixels(self.kinds[0]))
        return stored_labels(self.root / self.stored.arrays[0], count, len(self.data.class_names))

    def _check_arrays(self) -> None:
        counts = {kind: len(self._pixels(kind)) for kind in self.kinds}
        first, count = next(iter(counts.items()))
        if count % len(SEVERITIES):
            raise ValueError(
                f"{self.root} has {count} images of a kind, not {len(SEVERITIES)} times as many"
            )
        if odd := [kind for kind in self.kinds if counts[kind] != count]:
            odd_one = f"{self.root / odd[0]}.npy holds {counts[odd[0]]} images"
            raise ValueError(f"{odd_one}, and {first}.npy {count}: fetch it again")
        self._labels()


def stored_kinds(stored: StoredSet, root: Path) -> tuple[str, ...]:
    """Return a stored set's corruptions: the fifteen, and those of the extra four there are.

    ValueError names the missing ones of the fifteen, and severities that are missing of any.
    """
    name = "{}.npy" if stored.arrays else "{}"
    kinds = (*KINDS, *(kind for kind in EXTRA_KINDS if (root / name.format(kind)).exists()))
    parts = [f"{k}.npy" for k in kinds] if stored.arrays else list(corrupted_folders(kinds))
    missing = [part for part in parts if not (root / part).exists()]
    if missing:
        raise ValueError(f"{root} lacks {len(missing)} of {len(parts)}: {', '.join(missing)}")
    return kinds


def corrupted_folders(kinds: tuple[str, ...]) -> Iterator[str]:
    """Yield the folders of each kind and severity."""
    yield from (f"{kind}/{severity}" for kind, severity in product(kinds, SEVERITIES))


def stored_images(file: Path, side: int) -> np.ndarray:
    """Map a stored set's images, uint8 (N, side, side, 3); ValueError when the file holds none."""
    pixels = _load(file)
    if pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
        wanted = f"uint8 (N, {side}, {side}, 3)"
        raise ValueError(f"{file} holds {pixels.dtype} {pixels.shape}, not {wanted}")
    return pixels


def stored_labels(file: Path, count: int, classes: int) -> Tensor:
    """Read a stored set's labels; ValueError unless there are `count`, each of a class."""
    labels, last = _load(file), classes - 1
    whole = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not whole or not ((labels >= 0) & (labels <= last)).all():
        raise ValueError(f"{file} does not hold {count} labels from 0 to {last}")
    return torch.from_numpy(labels.astype(np.int64))


def _load(file: Path) -> np.ndarray:
    try:
        # Unlike load(), it takes no archives, and no objects, which would be unpickled.
        array: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header makes it raise all kinds of errors
        raise ValueError(f"{file} cannot be read: {error}") from None
    return array


def _as_split(stored: StoredSet, pixels_NHWC: np.ndarray, labels: Tensor) -> Split:
    """Return stored images, copied out of their file, as a split."""
    images = torch.from_numpy(np.array(pixels_NHWC)).permute(0, 3, 1, 2)
    width = len(str(stored.images))
    ids = tuple(f"{stored.name}/{place:0{width}d}" for place in range(len(labels)))
    return Split(images=images, labels=labels, ids=ids)
