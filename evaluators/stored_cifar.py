"""CIFAR-10-C and CIFAR-10.1 as published: arrays in .npy files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluators import EXTRA_KINDS, SEVERITIES
from evaluators.corruption_kinds import KINDS
from trainables.data.base import Split
from trainables.data.cifar import CLASSES

CIFAR10_1_FILES = ("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy")


@dataclass(frozen=True)
class CIFAR10C:
    """CIFAR-10-C as published: per kind a file, five severities of the same images in a row."""

    root: Path
    kinds: tuple[str, ...]
    labels: Tensor

    @classmethod
    def open(cls, root: Path) -> CIFAR10C:
        """Open the folder; ValueError names what lacks of the fifteen kinds, or does not fit."""
        lacking = [kind for kind in KINDS if not (root / f"{kind}.npy").is_file()]
        if lacking:
            raise ValueError(f"{root} lacks {len(lacking)} kinds: {', '.join(lacking)}")
        present = [kind for kind in EXTRA_KINDS if (root / f"{kind}.npy").is_file()]
        kinds = (*KINDS, *present)
        counts = {kind: len(stored_images(root / f"{kind}.npy")) for kind in kinds}
        count = counts[kinds[0]]
        if count % len(SEVERITIES):
            raise ValueError(
                f"{root} has {count} images of a kind, not {len(SEVERITIES)} times as many"
            )
        if odd := [kind for kind in kinds if counts[kind] != count]:
            held = f"{root / odd[0]}.npy holds {counts[odd[0]]} images"
            raise ValueError(f"{held}, and {kinds[0]}.npy {count}: fetch it again")
        return cls(root, kinds, stored_labels(root / "labels.npy", count))

    @property
    def per_severity(self) -> int:
        return len(self.labels) // len(SEVERITIES)

    def ids(self) -> tuple[str, ...]:
        """Return an id for each of the images that every kind and severity shows."""
        return tuple(f"cifar10-c/{i:05d}" for i in range(self.per_severity))

    def ids_hash(self) -> str:
        """Return 12 hex digits of the labels, by which one version of the set is told apart."""
        return hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()[:12]

    def files(self) -> list[str]:
        """Return the names of the set's files."""
        return ["labels.npy", *(f"{kind}.npy" for kind in self.kinds)]

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield each kind and severity as 'kind-severity' with its images."""
        ids = self.ids()
        for kind in self.kinds:
            images = stored_images(self.root / f"{kind}.npy")
            for severity in SEVERITIES:
                part = slice((severity - 1) * len(ids), severity * len(ids))
                yield f"{kind}-{severity}", as_split(images[part], self.labels[part], ids)


def load_cifar10_1(root: Path) -> Split:
    """Load CIFAR-10.1 (version 6) as published."""
    images = stored_images(root / CIFAR10_1_FILES[0])
    labels = stored_labels(root / CIFAR10_1_FILES[1], len(images))
    return as_split(images, labels, tuple(f"cifar10.1/{i:04d}" for i in range(len(images))))


def stored_images(file: Path) -> np.ndarray:
    """Map a stored set's images, uint8 (N, 32, 32, 3); ValueError when the file holds no such."""
    found = _load(file)
    if found.ndim != 4 or found.shape[1:] != (32, 32, 3) or found.dtype != np.uint8:
        raise ValueError(f"{file} holds {found.dtype} {found.shape}, not uint8 (N, 32, 32, 3)")
    return found


def stored_labels(file: Path, count: int) -> Tensor:
    """Read a stored set's labels; ValueError unless there are `count`, each of a class."""
    found = _load(file)
    whole = found.dtype.kind in "iu" and found.shape == (count,)
    if not whole or not ((found >= 0) & (found < len(CLASSES))).all():
        raise ValueError(f"{file} does not hold {count} labels from 0 to {len(CLASSES) - 1}")
    return torch.from_numpy(found.astype(np.int64))


def _load(file: Path) -> np.ndarray:
    try:
        # Unlike load(), it takes no archives, and no objects, which would be unpickled.
        found: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # what a header that is none makes it raise is anything
        raise ValueError(f"{file} cannot be read: {error}") from None
    return found


def as_split(images_NHWC: np.ndarray, labels: Tensor, ids: tuple[str, ...]) -> Split:
    """Return stored images, copied out of their file, as a split."""
    images = torch.from_numpy(np.array(images_NHWC)).permute(0, 3, 1, 2)
    return Split(images=images, labels=labels, ids=ids)
