"""Loading: a scale's data from a package, torchvision's archive or class folders."""

from __future__ import annotations

import tarfile
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.data.base import Data, Split
from trainables.data.cache import cached
from trainables.data.images import ImageFiles, keep_decoded, keep_originals
from trainables.data.listing import EMBEDDED, DataSource, ImageList, list_data_set
from trainables.data.registry import DataSet
from trainables.scale import Scale

Loaded = tuple[Split, Split, tuple[str, ...]]  # train, held out, the classes' names


def load_data(scale: Scale, source: DataSource = EMBEDDED) -> Data:
    """Load a scale's data, once per process; ValueError when it has none here, or unfit."""
    data_set = scale.data_set
    if source.root is None and not data_set.package:
        raise ValueError(f"scale {scale.name!r} has no embedded data: give --data DIR")
    return _loaded(data_set, EMBEDDED if data_set.package else source)


@cache
def _loaded(data_set: DataSet, source: DataSource) -> Data:
    if data_set.package:
        module, _, function = data_set.package.partition(":")
        train, held_out, names = getattr(import_module(module), function)(data_set)
    elif is_archived(data_set, source):
        train, held_out, names = _archive(data_set, source)
    else:
        train, held_out, names = _folders(data_set, source)
    return Data(
        data_set=data_set,
        train=train,
        held_out=held_out,
        class_names=names,
        roots=source.folders,
        workers=source.workers,
        cache=source.cache,
    )


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
    listed = list_data_set(data_set, source)
    train, held_out = (
        ImageFiles(
            part.root,
            part.paths,
            size=data_set.image_size,
            native=data_set.exact_size,
            workers=source.workers,
        )
        for part in listed
    )
    images: list[ImageFiles | Tensor] = [train, held_out]
    if data_set.exact_size:
        images = [_in_memory(part, source) for part in (train, held_out)]
    elif source.cache:
        budget = source.memory_bytes
        originals = keep_originals(train, source.cache, budget) if len(train) else None
        if originals:
            budget -= int(originals.ends[-1])
            images[0] = train.out_of(originals)
        decoded = keep_decoded(held_out, source.cache, budget)
        images[1] = held_out if decoded is None else decoded
    train_split, held_out_split = map(_split, listed, images)
    return train_split, held_out_split, listed[0].class_names


def _split(listed: ImageList, images: ImageFiles | Tensor) -> Split:
    labels = torch.tensor(listed.labels, dtype=torch.int64)
    return Split(images=images, labels=labels, ids=listed.paths)


def _in_memory(images: ImageFiles, source: DataSource) -> Tensor:
    decoded = None
    if source.cache and len(images):
        decoded = keep_decoded(images, source.cache, source.memory_bytes)
    return images[:] if decoded is None else decoded


def is_archived(data_set: DataSet, source: DataSource) -> bool:
    """Tell whether torchvision's archive is there, or is to be fetched."""
    if not data_set.archive or source.root is None:
        return False
    archive = _torchvision(data_set)
    there = source.root / archive.base_folder, source.root / archive.filename
    return source.download or any(path.exists() for path in there)


def _torchvision(data_set: DataSet) -> Any:
    from torchvision import datasets  # type: ignore[import-untyped]

    return getattr(datasets, data_set.archive)


def _archive(data_set: DataSet, source: DataSource) -> Loaded:
    assert source.root is not None
    unpack(data_set, source.root, download=source.download)
    assert isinstance(data_set.classes, tuple)
    train, held_out = (_archived(data_set, source, part) for part in ("train", "test"))
    return train, held_out, data_set.classes


def unpack(data_set: DataSet, root: Path, *, download: bool) -> None:
    """Unpack the published archive, and no other, fetched where asked for; ValueError else."""
    from torchvision.datasets.utils import (  # type: ignore[import-untyped]
        check_integrity,
        download_url,
        extract_archive,
    )

    archive = _torchvision(data_set)
    packed, folder = root / archive.filename, archive.base_folder
    if (root / folder).is_dir():
        return
    if packed.exists() and not check_integrity(packed, archive.tgz_md5):
        raise ValueError(
            f"{packed} is not {data_set.short_title} as published (another MD5): fetch it again"
        )
    try:
        if download:
            download_url(archive.url, root, archive.filename, archive.tgz_md5)
        with TemporaryDirectory(dir=root) as aside:
            extract_archive(packed, aside)
            if not (root / folder).is_dir():  # another process may have been quicker
                (Path(aside) / folder).rename(root / folder)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise ValueError(f"{packed} cannot be fetched or unpacked: {error}") from None


def _archived(data_set: DataSet, source: DataSource, part: str) -> Split:
    """Read one split of torchvision's archive, whose files it knows by their MD5."""
    assert source.root is not None
    root, side = source.root, data_set.image_size

    def read() -> tuple[np.ndarray, np.ndarray]:
        try:
            stored = _torchvision(data_set)(root, train=part == "train")
        except RuntimeError:
            raise ValueError(
                f"{root / _torchvision(data_set).base_folder} is not {data_set.short_title} as "
                "published (another MD5): fetch it again"
            ) from None
        return stored.data.transpose(0, 3, 1, 2), np.array(stored.targets, dtype=np.int64)

    def write(out: BinaryIO) -> None:
        for array in read():
            out.write(np.ascontiguousarray(array).data)

    if source.cache and source.memory_bytes:
        content = cached(source.cache / f"{data_set.name}-{part}.u8", write)
        count = len(content) // (3 * side**2 + 8)
        images, labels = content[: -8 * count].reshape(-1, 3, side, side), content[-8 * count :]
        labels = np.array(labels).view(np.int64)
    else:
        images, labels = map(np.ascontiguousarray, read())
    ids = tuple(f"{data_set.name}/{part}/{place:05d}" for place in range(len(labels)))
    return Split(images=torch.from_numpy(images), labels=torch.from_numpy(labels), ids=ids)
