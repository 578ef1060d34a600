"""One listing: where a study's images lie, and the images by class.

Nothing here opens an image or imports torch, so that `--plan` stays quick.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress
from pathlib import Path
from statistics import median_low

from trainables.data.registry import (
    FOLDER,
    SIZE_STEP,
    SMALLEST_SIZE,
    STORED_SETS,
    DataSet,
    StoredSet,
    folder_data_set,
    is_buildable,
)
from trainables.recipe import Preprocessing
from trainables.scale import Scale, scale_for, scale_named

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
GIBIBYTE = 2**30
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the data of a scale lies and how it is read; it travels to every process.

    `stored`: the stored out-of-distribution sets by name. `hold_out`: the share of each class's
    train images that stands for an absent val/. `memory_bytes`: what decoded images may take,
    shared by the processes of a machine in `cache`. `download`: fetch what is not there and may be
    had (CIFAR-10).
    """

    root: Path | None = None
    stored: tuple[tuple[str, Path], ...] = ()
    hold_out: float = 0.0
    memory_bytes: int = 2 * GIBIBYTE
    workers: int = 0
    cache: Path | None = None
    download: bool = False

    @property
    def folders(self) -> Mapping[str, Path]:
        """Return where each stored set lies: as it was given, or below the root."""
        below = {name: self.root / name for name in STORED_SETS} if self.root else {}
        return {name: path for name, path in below.items() if path.is_dir()} | dict(self.stored)


EMBEDDED = DataSource()
EMBEDDED_SCALE = "digits"
SAMPLED = 100  # images whose sides are read
LARGEST_USUAL = 224  # of the sizes that follow from a folder's images


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of one split, by class and name: paths below `root`, a label each."""

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


def list_splits(source: DataSource, data_set: DataSet | None = None) -> tuple[ImageList, ImageList]:
    """Return the train and the held-out images; ValueError says what the folders lack.

    Held out is what lies in val/, or in test/ where there is no val/. Class folders alone are train
    images. Without train/ the list of train images is empty, so that a checkpoint can be judged by
    val/ alone. Labels follow the order of the data set's classes, whose folders these have to be,
    or the sorted names.
    """
    root = source.root
    assert root is not None
    if not root.is_dir():
        raise ValueError(f"data folder {root} is not there; --data wants train/ and val/ in it")
    train, val, test = (
        path if path.is_dir() else None for path in (root / "train", root / "val", root / "test")
    )
    judged = val or test
    if not train and not judged:
        if data_set and data_set.archive:
            raise ValueError(
                f"{root} holds neither torchvision's archive of {data_set.short_title} nor "
                "train/ and val/ in class folders; --download fetches the archive"
            )
        train = root
    names = class_folders(train or judged or root)
    if data_set:
        names = _classes_of(data_set, names, root)
    train_images = ImageList(root=root, class_names=names)
    if train:
        train_images = _listed(root, train, names)
    if not judged:
        return _hold_out(train_images, source.hold_out)
    if source.hold_out:
        raise ValueError(f"{judged} is there: --hold-out would put it aside; leave one out")
    return train_images, _listed(root, judged, names)


def list_stored(
    stored: StoredSet, folder: Path, names: tuple[str, ...], data_set: DataSet
) -> ImageList:
    """List the images of a stored set's class folders, labelled by the places of their classes.

    ValueError names a folder that is no class, the first missing classes of a complete set, and
    what is not as published of a set whose data are.
    """
    missing = sorted(set(names) - set(class_folders(folder)))
    if stored.complete and missing:
        raise ValueError(f"{folder} lacks {len(missing)} classes; first: {missing[:3]}: add them")
    images = _listed(folder, folder, names)
    if not data_set.generated:
        present = {names[label] for label in images.labels}
        if stored.classes and (differing := _differing(present, class_list(stored.classes))):
            raise ValueError(f"{folder} is not {stored.title}: it {differing}; fetch it again")
        if stored.complete and len(images) != stored.images:
            held = f"{folder} holds {len(images)} images instead of {stored.images}"
            raise ValueError(f"{held}: fetch it again")
    return images


def class_folders(split: Path) -> tuple[str, ...]:
    """Return the names of a split's class folders, sorted; ValueError where there is none."""
    try:
        names = [path.name for path in split.iterdir() if path.name[0] != "." and path.is_dir()]
    except OSError as error:
        raise ValueError(f"{split} cannot be read: {error.strerror}") from None
    if not names:
        raise ValueError(f"{split} holds no class folders; expected <class>/<image>")
    return tuple(sorted(names))


def class_list(classes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return class names in order; a text names timm's list of them."""
    if isinstance(classes, tuple):
        return classes
    return tuple(resources.files("timm.data").joinpath("_info", classes).read_text().split())


def _classes_of(data_set: DataSet, names: tuple[str, ...], root: Path) -> tuple[str, ...]:
    """Return the names in the data set's order; ValueError unless they are its classes."""
    known = class_list(data_set.classes)
    remedy = f"--scale folder --image-size {data_set.image_size} takes any classes"
    if known and (differing := _differing(names, known)):
        raise ValueError(f"{root} is not {data_set.short_title}: it {differing}; {remedy}")
    if len(names) != data_set.num_classes:
        expected = f"scale {data_set.name!r} has {data_set.num_classes}"
        raise ValueError(f"{root} has {len(names)} classes, and {expected}: {remedy}")
    return known or names


def _differing(names: Collection[str], known: Collection[str]) -> str:
    """Say how many known classes lack and how many are foreign, the first of each; '' if none."""
    lacking, foreign = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} of {len(known)} classes, the first {lacking[0]!r}")
    if foreign:
        parts.append(f"has {len(foreign)} foreign ones, the first {foreign[0]!r}")
    return ", and ".join(parts)


def _listed(root: Path, split: Path, names: tuple[str, ...]) -> ImageList:
    """List the images of a split's class folders, as paths below a root; ValueError if none."""
    folders = class_folders(split)
    if foreign := sorted(set(folders) - set(names)):
        raise ValueError(f"{split / foreign[0]} is no class of the data: remove it")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        if name in folders:
            below = (split / name).relative_to(root).as_posix()
            images = sorted(e.name for e in os.scandir(split / name) if _is_image(e))
            paths += [f"{below}/{image}" for image in images]
            labels += [label] * len(images)
    if not paths:
        expected = f"expected <class>/<image>, whose name ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{split} holds no image in its classes; {expected}")
    return ImageList(root=root, class_names=names, paths=tuple(paths), labels=tuple(labels))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _hold_out(images: ImageList, share: float) -> tuple[ImageList, ImageList]:
    """Part the images of each class by the hash of their names; ValueError without a share.

    Of each class at least one image is left to train on.
    """
    by_class: defaultdict[int, list[str]] = defaultdict(list)
    for path, label in zip(images.paths, images.labels, strict=True):
        by_class[label].append(path)
    held: set[str] = set()
    for paths in by_class.values():
        paths.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
        count = min(len(paths) - 1, max(1, round(len(paths) * (share or 0.2))))
        held.update(paths[:count])
    if not share:
        raise ValueError(
            f"{images.root} has no val/ or test/: add one, or give --hold-out 0.2, which keeps "
            f"{len(held)} of the {len(images)} train images, a fifth of each class chosen by their "
            "names' hash, from training and judges by them"
        )
    is_held = [path in held for path in images.paths]
    train, held_out = (
        replace(
            images,
            paths=tuple(compress(images.paths, chosen)),
            labels=tuple(compress(images.labels, chosen)),
        )
        for chosen in ([not held for held in is_held], is_held)
    )
    return train, held_out


def scale_of(name: str | None, source: DataSource, *, image_size: int | None = None) -> Scale:
    """Return the scale that the options name; a folder's own says what lies in the folder.

    Without a name: the folder's, or digits where there is none. A folder's images are seen at the
    median of their shorter sides, at most 224 px, unless `image_size` says otherwise.
    """
    name = name or (FOLDER if source.root else EMBEDDED_SCALE)
    scale = _folder_scale(source, image_size) if name == FOLDER else scale_named(name)
    data_set = scale.data_set
    if source.download and not (data_set.archive and source.root):
        raise ValueError("--download fetches CIFAR-10: it goes with --scale cifar10 --data DIR")
    if data_set.package and source.root is not None:
        raise ValueError(f"scale {name!r} is embedded: --data goes with another --scale")
    for stored, _ in source.stored:
        if stored not in data_set.counterparts:
            raise ValueError(
                f"--stored {stored}=DIR is not read at scale {name!r}: its stored sets are "
                f"{', '.join(data_set.counterparts) or 'none'}"
            )
    return scale.preprocessed(Preprocessing(size=image_size))


def _folder_scale(source: DataSource, image_size: int | None) -> Scale:
    if source.root is None:
        raise ValueError("--scale folder needs --data DIR")
    train, held_out = list_splits(source)
    if image_size is None or not is_buildable(image_size):
        image_size = _usual_size(train if len(train) else held_out)
    parts = ("\n".join(part) for part in (train.class_names, train.paths, held_out.paths))
    return scale_for(
        folder_data_set(
            image_size=image_size,
            num_classes=len(train.class_names),
            train_images=len(train),
            content=hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8],
        )
    )


def _usual_size(images: ImageList) -> int:
    """Return the median of the images' shorter sides, of a sample, that models are built for."""
    from PIL import Image

    sides = []
    for path in images.paths[:: max(1, len(images) // SAMPLED)]:
        with suppress(Exception), Image.open(images.root / path) as file:  # --check names damage
            sides.append(min(file.size))
    side = median_low(sides) if sides else LARGEST_USUAL
    return max(SMALLEST_SIZE, min(LARGEST_USUAL, side - side % SIZE_STEP))
