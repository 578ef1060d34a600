"""CIFAR-10 at 32 px: torchvision's archive or class folders, and the stored sets beside it."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from trainables.data.base import Data, Split
from trainables.data.images import ImageFiles, as_tensor, remove_unused, sole_writer, stamps_of
from trainables.data.listing import DataSource, ImageList, differing_classes, list_splits
from trainables.scale import Scale
from trainables.store.sealed import is_sealed, sealed
from trainables.store.storage import write_atomically

ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = "cifar-10-batches-py"
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
NAME = "name"  # in a decoded file's header: what it is kept as
OTHER_SIZES = "--scale folder --image-size N takes images of N px a side and more"
Content = dict[str, Tensor]  # images uint8 (N, 3, 32, 32) and labels int64 (N,)


def load_cifar10(scale: Scale, source: DataSource) -> Data:
    """Load CIFAR-10 as tensors, shared by the processes of a machine where there is a cache."""
    assert source.root is not None
    _fetch(source)
    if archived(source.root):
        train, held_out = (_archived(source, train=train) for train in (True, False))
    else:
        train, held_out = (_from_files(part, scale, source.cache) for part in list_cifar10(source))
    return Data(
        name=scale.name,
        train=train,
        held_out=held_out,
        class_names=CLASSES,
        roots=source.folders,
        skip_damaged=source.skip_damaged,
        workers=source.workers,
        cache=source.cache,
    )


def list_cifar10(source: DataSource) -> tuple[ImageList, ImageList]:
    """List CIFAR-10's train and held-out images in class folders; ValueError where it is not."""
    assert source.root is not None
    if not any((source.root / name).is_dir() for name in ("train", "val")):
        raise ValueError(
            f"{source.root} holds neither {BATCHES}/ or {ARCHIVE} nor train/ and val/ in class "
            "folders; --download fetches the archive"
        )
    train, held_out = list_splits(source)
    if differing := differing_classes(train.class_names, CLASSES):
        raise ValueError(
            f"{source.root} is not CIFAR-10: it {differing}; "
            "--scale folder --image-size 32 takes any classes"
        )
    return train, held_out


def _fetch(source: DataSource) -> None:
    """Fetch torchvision's archive where it is asked for and not there.

    ValueError where it cannot be had.
    """
    assert source.root is not None
    if archived(source.root) or not source.download:
        return
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    try:
        CIFAR10(source.root, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"CIFAR-10 cannot be fetched into {source.root}: {error}") from None


def archived(root: Path) -> bool:
    """Tell whether torchvision's archive is there, packed or not."""
    return (root / BATCHES).is_dir() or (root / ARCHIVE).is_file()


def _archived(source: DataSource, *, train: bool) -> Split:
    """Read one split of torchvision's archive, whose files it knows by their MD5."""
    assert source.root is not None
    name = "train" if train else "test"
    read = partial(_read_archive, source.root, train=train)
    content = _kept(source.cache, name, read)
    ids = tuple(f"cifar10/{name}/{i:05d}" for i in range(len(content["labels"])))
    return Split(images=content["images"], labels=content["labels"], ids=ids)


def _read_archive(root: Path, *, train: bool) -> Content:
    from torchvision.datasets import CIFAR10

    if not (root / BATCHES).is_dir():
        _unpack(root / ARCHIVE, CIFAR10.tgz_md5)
    try:
        stored = CIFAR10(root, train=train)
    except RuntimeError:
        raise ValueError(
            f"{root / BATCHES} is not CIFAR-10 as published (another MD5): fetch it again"
        ) from None
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return {"images": images, "labels": torch.tensor(stored.targets)}


def _unpack(archive: Path, md5: str) -> None:
    """Unpack the published archive, and no other, beside itself; ValueError where it cannot be."""
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    if not check_integrity(archive, md5):
        raise ValueError(f"{archive} is not CIFAR-10 as published (another MD5): fetch it again")
    try:
        with TemporaryDirectory(dir=archive.parent) as aside, tarfile.open(archive) as packed:
            batches = Path(aside) / BATCHES
            batches.mkdir()
            for entry in packed:
                # Python before 3.11.4 has no filter for what would climb out of the folder.
                path = PurePosixPath(entry.name)
                content = packed.extractfile(entry) if entry.isfile() else None
                if content and str(path.parent) == BATCHES:
                    (batches / path.name).write_bytes(content.read())
            if not (archive.parent / BATCHES).is_dir():  # another process may have been quicker
                batches.rename(archive.parent / BATCHES)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from None


def _kept(cache: Path | None, name: str, read: Callable[[], Content]) -> Content:
    """Return what the cache holds by a name, written on first use; processes share its pages.

    What is not as it was written is read anew.
    """
    if cache is None:
        return read()
    file = cache / f"cifar10-{name}.safetensors"
    try:
        with sole_writer(cache):
            if not _is_whole(file, name):
                remove_unused(cache)
                write_atomically(file, sealed(save(read(), metadata={NAME: name})))
            file.touch()
        found: Content = load_file(file)
    except OSError as error:
        raise ValueError(f"{cache} cannot keep the decoded images: {error.strerror}") from error
    return found


def _is_whole(file: Path, name: str) -> bool:
    """Tell whether a file is there as it was written under a name."""
    if not file.exists() or not is_sealed(file.read_bytes()):
        return False
    with safe_open(file, framework="pt") as opened:
        return bool(opened.metadata()[NAME] == name)


def _from_files(listed: ImageList, scale: Scale, cache: Path | None) -> Split:
    files = ImageFiles(listed.root, listed.paths, size=scale.image_size)
    content = _kept(cache, str(stamps_of(files)), partial(_read_files, files, listed))
    return Split(images=content["images"], labels=content["labels"], ids=listed.paths)


def _read_files(files: ImageFiles, listed: ImageList) -> Content:
    images = torch.empty(files.shape, dtype=torch.uint8)
    for place in range(len(files)):
        image = files.original(place)
        if image.size != (files.size, files.size):
            raise ValueError(
                f"{files.path(place)} is {image.width} x {image.height} px, not 32 x 32: "
                f"{OTHER_SIZES}"
            )
        images[place] = as_tensor(image)
    return {"images": images, "labels": torch.tensor(listed.labels, dtype=torch.int64)}
