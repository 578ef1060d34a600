"""One listing: where a study's images lie, and the images by class.

Nothing here opens an image or imports torch, so that `--plan` stays quick.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress
from pathlib import Path

from trainables.data.registry import FOLDER, STORED_SETS, DataSet, StoredSet, folder_data_set
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


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of one split, by class and name: paths below `root`, a label each.

    `passed_over`: files and folders of the classes that are not images, as paths below `root`.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    passed_over: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, chosen: Collection[bool]) -> ImageList:
        """Return the list of the images that are chosen."""
        paths, labels = compress(self.paths, chosen), compress(self.labels, chosen)
        return replace(self, paths=tuple(paths), labels=tuple(labels))

    def labelled(self, names: tuple[str, ...]) -> ImageList:
        """Return the list with labels by the order of other names of the same classes."""
        places = {name: place for place, name in enumerate(names)}
        labels = tuple(places[self.class_names[label]] for label in self.labels)
        return replace(self, class_names=names, labels=labels)


def list_splits(source: DataSource) -> tuple[ImageList, ImageList]:
    """Return the train and the held-out images; ValueError says what the folders lack.

    Held out is what lies in val/, or in test/ where there is no val/. Labels follow the classes'
    sorted names. Without train/ the list of train images is empty, so that a checkpoint can be
    judged by val/ alone. Class folders alone are train images.
    """
    root = source.root
    assert root is not None
    with _readable():
        if not root.is_dir():
            raise ValueError(f"data folder {root} is not there; --data wants train/ and val/ in it")
        train, val, test = (path if path.is_dir() else None for path in _split_folders(root))
        judged = val or test
        if not train and not judged:
            train = root
        names = class_folders(train or judged or root)
        nothing = ImageList(root=root, class_names=names)
        train_images = _listed(root, train, names) if train else nothing
        if not judged:
            return _hold_out(train_images, source.hold_out)
        if source.hold_out:
            raise ValueError(f"{judged} is there: --hold-out would put it aside; leave one out")
        return train_images, _listed(root, judged, names)


def _split_folders(root: Path) -> tuple[Path, Path, Path]:
    return root / "train", root / "val", root / "test"


def list_by_class(root: Path, names: tuple[str, ...], *, complete: bool = False) -> ImageList:
    """List a stored set's images, root/<class>/<image>, labelled by the places of their classes.

    ValueError names a folder that is no class, and with `complete` the first missing classes.
    """
    with _readable():
        missing = sorted(set(names) - set(class_folders(root)))
        if complete and missing:
            raise ValueError(f"{root} lacks {len(missing)} classes; first: {missing[:3]}: add them")
        return _listed(root, root, names)


@contextmanager
def _readable() -> Iterator[None]:
    """Raise what the system refuses as a ValueError that names the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def class_folders(split: Path) -> tuple[str, ...]:
    """Return the names of a split's class folders, sorted; ValueError where there is none."""
    names = [path.name for path in split.iterdir() if path.name[0] != "." and path.is_dir()]
    if not names:
        raise ValueError(f"{split} holds no class folders; expected <class>/<image>")
    return tuple(sorted(names))


def _listed(root: Path, split: Path, names: tuple[str, ...]) -> ImageList:
    """List the images of a split's class folders, as paths below a root; ValueError if none."""
    paths: list[str] = []
    labels: list[int] = []
    passed_over: list[str] = []
    folders = class_folders(split)
    if foreign := sorted(set(folders) - set(names)):
        raise ValueError(f"{split / foreign[0]} is no class of the data: remove it")
    places = {name: place for place, name in enumerate(names)}
    for name in sorted(folders, key=places.__getitem__):
        below = (split / name).relative_to(root).as_posix()
        for entry in sorted(os.scandir(split / name), key=lambda entry: entry.name):
            if entry.name.lower().endswith(SUFFIXES) and entry.name[0] != "." and entry.is_file():
                paths.append(f"{below}/{entry.name}")
                labels.append(places[name])
            elif entry.name[0] != ".":
                passed_over.append(f"{below}/{entry.name}")
    listed = ImageList(
        root=root,
        class_names=names,
        paths=tuple(paths),
        labels=tuple(labels),
        passed_over=tuple(passed_over),
    )
    if not paths:
        others = f"; {passed_over_text(listed)}" if passed_over else ""
        raise ValueError(f"{split} holds no image in its classes; expected <class>/<image>{others}")
    return listed


def passed_over_text(images: ImageList) -> str:
    """Say how many files and folders were passed over, the first, and what is taken."""
    taken = f"images lie right below their class and end in {', '.join(SUFFIXES)}"
    first = images.root / images.passed_over[0]
    return f"{len(images.passed_over)} files or folders are passed over, the first {first}: {taken}"


def differing_classes(names: Iterable[str], known: Collection[str]) -> str:
    """Say how many known classes lack and how many are foreign, the first of each; '' if none."""
    lacking, foreign = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} of {len(known)} classes, the first {lacking[0]!r}")
    if foreign:
        parts.append(f"has {len(foreign)} foreign ones, the first {foreign[0]!r}")
    return ", and ".join(parts)


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
        held.update(paths[: min(len(paths) - 1, max(1, round(len(paths) * (share or 0.2))))])
    if not share:
        raise ValueError(
            f"{images.root} has no val/ or test/: add one, or give --hold-out 0.2, which keeps "
            f"{len(held)} of the {len(images)} train images, a fifth of each class chosen by their "
            "names' hash, from training and judges by them"
        )
    is_held = [path in held for path in images.paths]
    return images.only([not held for held in is_held]), images.only(is_held)


def content_digest(train: ImageList, held_out: ImageList) -> str:
    """Return 8 hex digits of the classes and of both splits' image ids."""
    parts = ("\n".join(part) for part in (train.class_names, train.paths, held_out.paths))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def class_list(classes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return class names in order; a text names timm's list of them."""
    if isinstance(classes, tuple):
        return classes
    return tuple(resources.files("timm.data").joinpath("_info", classes).read_text().split())


def list_data_set(data_set: DataSet, source: DataSource) -> tuple[ImageList, ImageList]:
    """List a data set's train and held-out images; ValueError where they are not its own."""
    root = source.root
    assert root is not None
    if data_set.archive and not any(folder.is_dir() for folder in _split_folders(root)):
        raise ValueError(
            f"{root} holds neither torchvision's archive of {data_set.short_title} nor "
            "train/ and val/ in class folders; --download fetches the archive"
        )
    train, held_out = list_splits(source)
    names, known = train.class_names, class_list(data_set.classes)
    remedy = f"--scale folder --image-size {data_set.image_size} takes any classes"
    if known and (differing := differing_classes(names, known)):
        raise ValueError(f"{root} is not {data_set.short_title}: it {differing}; {remedy}")
    if len(names) != data_set.num_classes:
        raise ValueError(
            f"{root} has {len(names)} classes, and scale {data_set.name!r} has "
            f"{data_set.num_classes}: {remedy}"
        )
    return train.labelled(known or names), held_out.labelled(known or names)


def check_published(stored: StoredSet, listed: ImageList, data_set: DataSet) -> None:
    """Raise ValueError where a stored set of a published data set is not as published."""
    if data_set.generated:
        return
    present = {listed.class_names[label] for label in listed.labels}
    if stored.classes and (differing := differing_classes(present, class_list(stored.classes))):
        raise ValueError(f"{listed.root} is not {stored.title}: it {differing}; fetch it again")
    if stored.complete and len(listed) != stored.images:
        raise ValueError(
            f"{listed.root} holds {len(listed)} images instead of {stored.images}: fetch it again"
        )


def scale_of(name: str, source: DataSource, *, image_size: int | None = None) -> Scale:
    """Return the scale that the options name; a folder's own says what lies in the folder."""
    scale = _folder_scale(source, image_size) if name == FOLDER else scale_named(name)
    data_set = scale.data_set
    if source.download and not (data_set.archive and source.root):
        raise ValueError("--download fetches CIFAR-10: it goes with --scale cifar10 --data DIR")
    if name != FOLDER and image_size is not None:
        raise ValueError(f"--image-size belongs to --scale folder, not to scale {name!r}")
    if data_set.package and source.root is not None:
        raise ValueError(f"scale {name!r} is embedded: --data goes with another --scale")
    for stored, _ in source.stored:
        if stored not in data_set.counterparts:
            raise ValueError(
                f"--stored {stored}=DIR is not read at scale {name!r}: its stored sets are "
                f"{', '.join(data_set.counterparts) or 'none'}"
            )
    return scale


def _folder_scale(source: DataSource, image_size: int | None) -> Scale:
    if source.root is None or image_size is None:
        raise ValueError("--scale folder needs --data DIR and --image-size N")
    train, held_out = list_splits(source)
    return scale_for(
        folder_data_set(
            image_size=image_size,
            num_classes=len(train.class_names),
            train_images=len(train),
            content=content_digest(train, held_out),
        )
    )
