"""One listing: where a study's images lie, and the images by class.

Nothing here opens an image or imports torch, so that `--plan` stays quick.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress
from pathlib import Path

from trainables.data.registry import (
    FOLDER,
    STORED_SETS,
    DataSet,
    StoredSet,
    folder_data_set,
)
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

    `passed_over`: images beside the class folders and what else lies in them, as paths below
    `root`; not what is hidden.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    passed_over: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, chosen: Iterable[bool]) -> ImageList:
        """Return the list of the images that are chosen."""
        pairs = [*compress(zip(self.paths, self.labels, strict=True), chosen)]
        paths, labels = zip(*pairs, strict=True) if pairs else ((), ())
        return replace(self, paths=paths, labels=labels)

    def labelled(self, names: tuple[str, ...]) -> ImageList:
        """Return the list with labels by the order of other names of the same classes."""
        places = {name: place for place, name in enumerate(names)}
        labels = tuple(places[self.class_names[label]] for label in self.labels)
        return replace(self, class_names=names, labels=labels)


@contextmanager
def _system_errors_named() -> Iterator[None]:
    """Raise what the system will not read as a ValueError with its name."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def list_splits(source: DataSource) -> tuple[ImageList, ImageList]:
    """Return the train and the held-out images; ValueError says what the folders lack.

    Held out is what lies in val/, or in test/ where there is no val/.

    Labels follow the classes' sorted names. Without train/ the list of train images is empty, so
    that a checkpoint can be judged by val/ alone.
    """
    assert source.root is not None
    with _system_errors_named():
        return _listed(source, source.root)


def _listed(source: DataSource, root: Path) -> tuple[ImageList, ImageList]:
    if not root.is_dir():
        raise ValueError(f"data folder {root} is not there; --data wants train/ and val/ below it")
    train_folder, judged_folder = _split_folders(root)
    if train_folder is None and judged_folder is None:
        raise ValueError(
            f"{root} holds neither train/ nor val/ nor test/ nor folders of images by class"
        )
    both = train_folder, judged_folder
    classes = class_folders(next(folder for folder in both if folder is not None))
    names = tuple(classes)
    nothing = ImageList(root=root, class_names=names, paths=(), labels=())
    train = list_images(root, classes, names) if train_folder else nothing
    if judged_folder is None:
        return _hold_out(train, source.hold_out)
    if source.hold_out:
        raise ValueError(f"{judged_folder} is there: --hold-out would put it aside; leave one out")
    folders = class_folders(judged_folder)
    if foreign := sorted(set(folders) - set(names)):
        raise ValueError(f"{judged_folder / foreign[0]} is no class of {train_folder}: remove it")
    return train, list_images(root, folders, names)


def _split_folders(root: Path) -> tuple[Path | None, Path | None]:
    train, val, test = folders = [root / name for name in ("train", "val", "test")]
    for folder in folders:
        if folder.is_symlink():
            _check_link(folder, root)
    judged = next((folder for folder in (val, test) if folder.is_dir()), None)
    if train.is_dir() or judged:
        return (train if train.is_dir() else None), judged
    return (root if any(entry.is_dir() for entry in root.iterdir()) else None), None


def unused_test_folder(root: Path) -> str:
    """Say that test/ is left out because val/ is there; '' where that is not so."""
    val, test = root / "val", root / "test"
    return f"{test} is not used: {val} is judged by" if val.is_dir() and test.is_dir() else ""


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of a split by class name, sorted.

    ValueError on a symbolic link loop, and on names that some file systems hold for the same.
    """
    folders: dict[str, Path] = {}
    alike: dict[str, str] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_symlink():
            _check_link(path, folder)
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        same = unicodedata.normalize("NFC", entry.name).casefold().strip()
        if same in alike:
            raise ValueError(
                f"{folder} has two classes of the same name, {alike[same]!r} and {entry.name!r}: "
                "rename or merge one"
            )
        alike[same] = entry.name
        folders[entry.name] = path
    if not folders:
        raise ValueError(f"{folder} holds no class folders; expected <class>/<image>")
    return folders


def _check_link(path: Path, folder: Path) -> None:
    try:
        path.stat()
        looped = folder.resolve().is_relative_to(path.resolve())
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link to nothing: remove it") from None
        looped = True
    if looped:
        raise ValueError(f"{path} is a symbolic link loop: remove it")


def list_by_class(root: Path, names: tuple[str, ...], *, complete: bool = False) -> ImageList:
    """List a stored set's images, root/<class>/<image>, labelled by the places of their classes.

    ValueError names a folder that is no class, and with `complete` the first classes that lack.
    """
    with _system_errors_named():
        folders = class_folders(root)
        if foreign := sorted(set(folders) - set(names)):
            raise ValueError(f"{root / foreign[0]} is no class of the data: remove it")
        lacking = [name for name in names if name not in folders]
        if complete and lacking:
            raise ValueError(f"{root} lacks {len(lacking)} classes; first: {lacking[:3]}: add them")
        return list_images(root, folders, names)


def list_images(root: Path, folders: Mapping[str, Path], names: tuple[str, ...]) -> ImageList:
    """List the images of class folders below a root; ValueError where there is none."""
    paths: list[str] = []
    labels: list[int] = []
    split = next(iter(folders.values())).parent
    passed_over = sorted(
        Path(entry.path).relative_to(root).as_posix()
        for entry in os.scandir(split)
        if _is_image(entry.name) and not entry.is_dir()
    )
    for label, name in enumerate(names):
        if name not in folders:
            continue
        below = folders[name].relative_to(root).as_posix()
        entries = [entry.name for entry in os.scandir(folders[name]) if entry.name[0] != "."]
        files = sorted(filter(_is_image, entries))
        passed_over += sorted(f"{below}/{other}" for other in set(entries).difference(files))
        try:
            "".join((below, *files)).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{below!r} or an image in it has a name that is no UTF-8") from None
        paths += [f"{below}/{file}" for file in files]
        labels += [label] * len(files)
    if not paths:
        said = f"{split} holds no image in its classes"
        others = f"; {passed_over_text(root, passed_over)}" if passed_over else ""
        raise ValueError(f"{said}; expected <class>/<image>{others}")
    return ImageList(
        root=root,
        class_names=names,
        paths=tuple(paths),
        labels=tuple(labels),
        passed_over=tuple(passed_over),
    )


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(SUFFIXES)


def passed_over_text(root: Path, paths: Sequence[str]) -> str:
    """Say how many files and folders were passed over, the first, and what is taken."""
    # A name that is no UTF-8 can be opened, and not be printed.
    first = str(root / paths[0]).encode(errors="backslashreplace").decode()
    taken = f"images lie right below their class and end in {', '.join(SUFFIXES)}"
    return f"{len(paths)} files or folders are passed over, the first {first}: {taken}"


def differing_classes(found: Iterable[str], known: Collection[str]) -> str:
    """Say how many known classes lack and how many are foreign, the first of each; '' if none."""
    lacking, foreign = sorted(set(known) - set(found)), sorted(set(found) - set(known))
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
    counts = dict.fromkeys(range(len(images.class_names)), 0)
    for label in images.labels:
        counts[label] += 1
    wanted = {
        label: max(0, min(count - 1, max(1, round(count * (share or 0.2)))))
        for label, count in counts.items()
    }
    if not share:
        raise ValueError(
            f"{images.root} has no val/ or test/: add one, or give --hold-out 0.2, which keeps "
            f"{sum(wanted.values())} of the {len(images)} train images, a fifth of each class "
            "chosen by their names' hash, from training and judges by them"
        )
    order = sorted(
        range(len(images)), key=lambda i: hashlib.sha256(images.paths[i].encode()).digest()
    )
    held = set()
    for place in order:
        label = images.labels[place]
        if wanted[label]:
            wanted[label] -= 1
            held.add(place)
    train = images.only(place not in held for place in range(len(images)))
    return train, images.only(place in held for place in range(len(images)))


def content_digest(train: ImageList, held_out: ImageList) -> str:
    """Return 8 hex digits of the classes and of both splits' image ids."""
    parts = ("\n".join(part) for part in (train.class_names, train.paths, held_out.paths))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def class_list(classes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return class names in order; a text names timm's list of them."""
    if isinstance(classes, tuple):
        return classes
    return tuple(resources.files("timm.data").joinpath("_info", classes).read_text().split())


def check_classes(data_set: DataSet, listed: ImageList) -> None:
    """Raise ValueError unless the folders are the data set's classes, or as many as it has."""
    remedy = f"--scale folder --image-size {data_set.image_size} takes any classes"
    known, names = class_list(data_set.classes), listed.class_names
    if known and (differing := differing_classes(names, known)):
        raise ValueError(f"{listed.root} is not {data_set.short_title}: it {differing}; {remedy}")
    if len(names) != data_set.num_classes:
        raise ValueError(
            f"{listed.root} has {len(names)} classes, and scale {data_set.name!r} has "
            f"{data_set.num_classes}: {remedy}"
        )


def list_data_set(data_set: DataSet, source: DataSource) -> tuple[ImageList, ImageList]:
    """List a data set's train and held-out images; ValueError where they are not its own."""
    assert source.root is not None
    folders = ("train", "val", "test")
    if data_set.archive and not any((source.root / name).is_dir() for name in folders):
        raise ValueError(
            f"{source.root} holds neither torchvision's archive of {data_set.short_title} nor "
            "train/ and val/ in class folders; --download fetches the archive"
        )
    train, held_out = list_splits(source)
    check_classes(data_set, train)
    names = class_list(data_set.classes) or train.class_names
    return train.labelled(names), held_out.labelled(names)


def check_published(stored: StoredSet, listed: ImageList, data_set: DataSet) -> None:
    """Raise ValueError where a stored set of a published data set is not as published."""
    if not data_set.published:
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
