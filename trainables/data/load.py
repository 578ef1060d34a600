"""Loading: a package's images, torchvision's archive, class folders, and stored sets beside them.

Stored out-of-distribution sets are read as published: class folders, or arrays in .npy files.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from trainables.data.base import Data, Split
from trainables.data.images import ImageFiles, ResizedImages
from trainables.data.listing import EMBEDDED, DataSource, ImageList, list_splits, list_stored
from trainables.data.registry import (
    DATA_SETS,
    IMAGENET_CLASSES,
    SEVERITIES,
    DataSet,
    StoredSet,
)
from trainables.scale import Scale

Loaded = tuple[Split, Split, tuple[str, ...]]  # train, held out, the classes' names


def load_data(scale: Scale, source: DataSource = EMBEDDED) -> Data:
    """Load a scale's data, once per process; ValueError when it has none here, or unfit."""
    data_set = scale.data_set
    if source.root is None and not data_set.package:
        raise ValueError(f"scale {scale.name!r} has no embedded data: give --data DIR")
    embedded = replace(EMBEDDED, eval_images=source.eval_images)
    return _loaded(data_set, embedded if data_set.package else source)


@cache
def _loaded(data_set: DataSet, source: DataSource) -> Data:
    source.stage()
    origin = partial(_loaded, data_set.origin, source) if data_set.origin else None
    if origin and data_set.in_memory:
        data = origin()
        train, held_out = (_resized(part, data_set) for part in (data.train, data.held_out))
        return replace(data, data_set=data_set, train=train, held_out=held_out, origin=origin)
    if data_set.package:
        module, _, function = data_set.package.partition(":")
        train, held_out, names = getattr(import_module(module), function)(data_set)
    else:
        archive = archive_of(data_set, source)
        read = partial(_archived, archive) if archive else _folders
        train, held_out, names = read(data_set, source)
    return Data(
        data_set=data_set,
        train=train.chosen(data_set.chosen_train),
        held_out=held_out.chosen(source.eval_images),
        class_names=names,
        roots=source.folders,
        workers=source.workers or 0,
        cache=source.cache,
        origin=origin,
    )


def _resized(split: Split, data_set: DataSet) -> Split:
    """Return images that are stored at one size as a preprocessing shows them."""
    if split.images.shape[2:] == (data_set.image_size,) * 2:
        return split
    return replace(split, images=ResizedImages(split.images[:], data_set.preprocessing))


def digits(data_set: DataSet) -> Loaded:
    """Return scikit-learn's digits, enlarged to the data set's size and split once and for all."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    stored = load_digits()
    pixels = torch.from_numpy(stored.images / 16).float()[:, None]
    enlarged = F.interpolate(pixels, size=data_set.image_size, mode="bicubic", antialias=True)
    images = enlarged.clamp(0, 1).mul(255).round().byte().expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(stored.target).long()
    train, held_out = train_test_split(
        np.arange(len(labels)),
        test_size=data_set.held_out_images,
        stratify=stored.target,
        random_state=0,
    )
    ids = tuple(f"digits/{place:04d}" for place in range(len(labels)))
    whole = Split(images=images, labels=labels, ids=ids)
    names = tuple(str(name) for name in stored.target_names)
    return whole.at(np.sort(train)), whole.at(np.sort(held_out)), names


def _folders(data_set: DataSet, source: DataSource) -> Loaded:
    """Read class folders; what fits the source's memory is decoded once, the train images first.

    Images of an exact size become one tensor in any case.
    """
    listed, budget = list_splits(source, data_set), source.memory_bytes
    train, held_out = (image_files(part, data_set, source.workers or 0) for part in listed)
    shown: list[Tensor | ImageFiles]
    if data_set.exact_size:
        shown = [files.cropped_once(source.cache, budget)[:] for files in (train, held_out)]
    else:
        originals, taken = train.decoded_once(source.cache, budget)
        shown = [originals, held_out.cropped_once(source.cache, budget - taken)]
    train_split, held_out_split = (
        Split(images=images, labels=torch.tensor(part.labels, dtype=torch.int64), ids=part.ids)
        for part, images in zip(listed, shown, strict=True)
    )
    return train_split, held_out_split, listed[0].class_names


def image_files(
    listed: ImageList, data_set: DataSet, workers: int = 0, *, native: int | None = None
) -> ImageFiles:
    """Return listed images as the data set shows them, undecoded.

    native: the side at which they are stored, 0 for any; as the data set has it by default.
    """
    if native is None:
        native = data_set.stored_size if data_set.exact_size else 0
    preprocessing = data_set.preprocessing
    return ImageFiles(
        listed.root, listed.paths, preprocessing=preprocessing, native=native, workers=workers
    )


def archive_of(data_set: DataSet, source: DataSource) -> Any:
    """Return torchvision's class for an archive that is there or is to be fetched, or None."""
    if not data_set.archive or source.root is None:
        return None
    from torchvision import datasets  # type: ignore[import-untyped]

    archive = getattr(datasets, data_set.archive)
    there = source.root / archive.base_folder, source.root / archive.filename
    return archive if source.download or any(path.exists() for path in there) else None


def _archived(archive: Any, data_set: DataSet, source: DataSource) -> Loaded:
    """Read torchvision's archive, fetched and unpacked where it has to be; ValueError on another.

    torchvision compares the archive and its files with their published MD5 before it reads them.
    """
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    if source.labels or source.hold_out:
        raise ValueError("torchvision's archive has its own: leave out --labels and --hold-out")
    root = source.root
    assert root is not None
    assert isinstance(data_set.classes, tuple)
    packed, splits = root / archive.filename, []
    try:
        there = check_integrity(packed, archive.tgz_md5)
        for part in ("train", "test"):
            stored = archive(root, train=part == "train", download=source.download or there)
            images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
            ids = tuple(f"{data_set.name}/{part}/{place:05d}" for place in range(len(images)))
            splits.append(Split(images=images, labels=torch.tensor(stored.targets), ids=ids))
    except (OSError, RuntimeError, tarfile.TarError) as error:
        where, title = f"{packed} or {root / archive.base_folder}", data_set.short_title
        raise ValueError(f"{where} is not {title} as published: {error}; fetch it again") from None
    return splits[0], splits[1], data_set.classes


def stored_split(stored: StoredSet, root: Path, data: Data, *, native: bool | None = None) -> Split:
    """Return a stored set's images, their ids the classes and files' names without ending.

    Not `native`: they are resized and cut as held-out images are. Where the set is of labels: the
    held-out images that have some.
    """
    if stored.labels:
        places = reassessed(stored, root, data.held_out.ids)
        return data.held_out.at(np.flatnonzero([*map(bool, places)]))
    if stored.arrays:
        images, labels = (root / name for name in stored.arrays)
        pixels = stored_images(images, data.data_set.stored_size)
        classes = stored_labels(labels, len(pixels), len(data.class_names))
        return _as_split(stored, pixels, classes, data.data_set)
    names = stored.classes if isinstance(stored.classes, tuple) else data.class_names
    listed = list_stored(stored, root / stored.folder, names, data.data_set)
    is_native = stored.native if native is None else native
    side = (stored.size or data.data_set.stored_size) if is_native else 0
    data_set = replace(data.data_set, squash=stored.squash or data.data_set.squash)
    files = image_files(listed, data_set, data.workers, native=side)
    files.border = stored.border
    ids = tuple(image_id.rpartition(".")[0] for image_id in listed.ids)
    return Split(images=files, labels=torch.tensor(listed.labels), ids=ids)


def reassessed(stored: StoredSet, root: Path, ids: Sequence[str]) -> list[list[int]]:
    """Return the places that a set's file has for each of ImageNet's held-out images, maybe none.

    ValueError where the file is not as published, or an id does not end in the image's number.
    """
    lists = _reassessed_lists(root / stored.labels)
    numbers = [re.search(r"ILSVRC2012_val_(\d{8})(\.\w+)?(=.*)?$", image_id) for image_id in ids]
    if other := [i for i, n in zip(ids, numbers, strict=True) if not n or int(n[1]) > len(lists)]:
        wanted = f"ILSVRC2012_val_00000001.JPEG to {len(lists):08d}: keep the published names"
        raise ValueError(f"{stored.title} has no labels for {other[0]!r}, only for {wanted}")
    return [lists[int(number[1]) - 1] for number in numbers if number]


@cache
def _reassessed_lists(file: Path) -> list[list[int]]:
    """Read lists of places, one for each image; ValueError names the first that is none."""
    try:
        lists: list[list[int]] = TypeAdapter(list[list[int]]).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    held_out = DATA_SETS["imagenet"].held_out_images
    if len(lists) != held_out:
        raise ValueError(
            f"{file} has labels of {len(lists)} images, not of {held_out}: fetch it again"
        )
    for number, places in enumerate(lists, 1):
        if len({*places} & {*range(IMAGENET_CLASSES)}) != len(places):
            text = f"image {number} has the labels {places}, not different ones"
            raise ValueError(f"{file}: {text} from 0 to {IMAGENET_CLASSES - 1}: fetch it again")
    return lists


class CorruptedSet:
    """A stored set of corruptions: the same images by kind and severity.

    ValueError names what is missing of its kinds and of their severities, and arrays that do not
    fit together. Of the extra kinds those count that there are.
    """

    def __init__(self, stored: StoredSet, root: Path, data: Data) -> None:
        self.stored, self.root, self.data = stored, root, data
        end = ".npy" if stored.arrays else ""
        extra = (kind for kind in stored.extra if (root / f"{kind}{end}").exists())
        self.kinds = (*stored.kinds, *extra)
        ends = [end] if stored.arrays else [f"/{stored.severity.format(s)}" for s in SEVERITIES]
        parts = [f"{kind}{end}" for kind, end in product(self.kinds, ends)]
        if missing := [part for part in parts if not (root / part).exists()]:
            raise ValueError(f"{root} lacks {len(missing)} of {len(parts)}: {', '.join(missing)}")
        if stored.arrays:
            side, classes = data.data_set.stored_size, len(data.class_names)
            self._pixels = {kind: stored_images(root / f"{kind}.npy", side) for kind in self.kinds}
            for pixels in self._pixels.values():
                self._labels = stored_labels(root / stored.arrays[0], len(pixels), classes)
            if len(self._labels) % len(SEVERITIES):
                text = f"{len(self._labels)} labels, not as many of each of {len(SEVERITIES)}"
                raise ValueError(f"{root / stored.arrays[0]} holds {text} severities: fetch again")

    def ids_hash(self) -> str:
        """Return 12 hex digits of the images' names; of arrays, which have none, of the labels."""
        if not self.stored.arrays:
            return self._split(self.kinds[0], SEVERITIES[0]).ids_hash()
        return hashlib.sha256(self._labels.numpy().tobytes()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self._split(self.kinds[0], SEVERITIES[0]))

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield each kind and severity as 'kind-severity' with its images."""
        for kind, severity in product(self.kinds, SEVERITIES):
            yield f"{kind}-{severity}", self._split(kind, severity)

    def _split(self, kind: str, severity: int) -> Split:
        if not self.stored.arrays:
            place = self.root / kind / self.stored.severity.format(severity)
            return stored_split(self.stored, place, self.data)
        count = len(self._labels) // len(SEVERITIES)
        part = slice((severity - 1) * count, severity * count)
        pixels, labels = self._pixels[kind][part], self._labels[part]
        return _as_split(self.stored, pixels, labels, self.data.data_set)


def stored_images(file: Path, side: int) -> np.ndarray:
    """Map a stored set's images, uint8 (N, side, side, 3); ValueError when the file holds none."""
    pixels = _mapped_array(file)
    if pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
        wanted = f"uint8 (N, {side}, {side}, 3)"
        raise ValueError(f"{file} holds {pixels.dtype} {pixels.shape}, not {wanted}")
    return pixels


def stored_labels(file: Path, count: int, classes: int) -> Tensor:
    """Read a stored set's labels; ValueError unless there are `count`, each of a class."""
    labels, last = _mapped_array(file), classes - 1
    whole = labels.dtype.kind in "iu" and labels.shape == (count,)
    if not whole or not ((labels >= 0) & (labels <= last)).all():
        raise ValueError(f"{file} does not hold {count} labels from 0 to {last}")
    return torch.from_numpy(labels.astype(np.int64))


def _mapped_array(file: Path) -> np.ndarray:
    try:
        # Unlike load(), it takes no archives, and no objects, which would be unpickled.
        array: np.ndarray = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header makes it raise all kinds of errors
        raise ValueError(f"{file} cannot be read: {error}") from None
    return array


def _as_split(
    stored: StoredSet, pixels_NHWC: np.ndarray, labels: Tensor, data_set: DataSet
) -> Split:
    """Return stored images, copied out of their file, as a split."""
    images = torch.from_numpy(np.array(pixels_NHWC)).permute(0, 3, 1, 2)
    width = len(str(stored.images))
    ids = tuple(f"{stored.name}/{place:0{width}d}" for place in range(len(labels)))
    return _resized(Split(images=images, labels=labels, ids=ids), data_set)
