"""One listing: where a study's images lie, and the images by class.

Nothing here opens an image or imports torch, so that `--plan` stays quick.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import median_low

from trainables.data.layouts import Part, open_image, read_part, split_places
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
from trainables.recipe import Preprocessing, nearest
from trainables.scale import Scale, scale_for, scale_named

ANY_CLASSES = "--scale folder takes any classes"
GIBIBYTE = 2**30
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the data of a scale lies and how it is read; it travels to every process.

    `stored`: the stored out-of-distribution sets by name. `hold_out`: the share of each class's
    train images that stands for an absent val/. `memory_bytes`: what decoded images may take,
    shared by the processes of a machine in `cache`. `download`: fetch what is not there and may be
    had (CIFAR-10). `labels`: a file of the images' or the classes' labels.
    `eval_images`: judge by so many of the held-out images, 0: by all.
    """

    root: Path | None = None
    stored: tuple[tuple[str, Path], ...] = ()
    hold_out: float = 0.0
    memory_bytes: int = 2 * GIBIBYTE
    workers: int = 0
    cache: Path | None = None
    download: bool = False
    labels: Path | None = None
    eval_images: int = 0

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
    """The images of one split, by class and name: files below `root`, a label and an id each.

    unlabelled: how many more there are, that a file of labels does not name.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, places: Sequence[int]) -> ImageList:
        """Return the images at some places."""
        return replace(
            self,
            paths=tuple(self.paths[place] for place in places),
            labels=tuple(self.labels[place] for place in places),
            ids=tuple(self.ids[place] for place in places),
        )


def choose(ids: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """Return the ascending places of `count` images, by class as in all; 0: of all.

    The ids' hashes choose. ValueError where there are fewer.
    """
    if count > len(ids):
        raise ValueError(f"{count:,} images are more than the {len(ids):,} that there are")
    shares = (
        ((number + 0.5) / len(places), place)
        for places in _by_class(ids, labels)
        for number, place in enumerate(places)
    )
    return sorted(place for _, place in sorted(shares)[: count or None])


def _by_class(ids: Sequence[str], labels: Sequence[int]) -> Collection[list[int]]:
    """Return the places of each class's images, in the order of their ids' hashes."""
    by_class = defaultdict[int, list[int]](list)
    for place in sorted(range(len(ids)), key=lambda p: hashlib.sha256(ids[p].encode()).digest()):
        by_class[labels[place]].append(place)
    return by_class.values()


def _part(images: ImageList, count: int) -> ImageList:
    """Return `count` of the images; 0: all."""
    # A million ids are not hashed for nothing.
    return images.at(choose(images.ids, images.labels, count)) if count else images


def list_splits(source: DataSource, data_set: DataSet | None = None) -> tuple[ImageList, ImageList]:
    """Return the images to train on and to judge by; ValueError says what the folders lack."""
    train, held_out = _whole_splits(source, data_set)
    chosen_train = data_set.chosen_train if data_set else 0
    return _part(train, chosen_train), _part(held_out, source.eval_images)


def _whole_splits(source: DataSource, data_set: DataSet | None) -> tuple[ImageList, ImageList]:
    """Return all train and all held-out images; ValueError says what the folders lack.

    Held out is what lies in val/, or in test/ where there is no val/. Class folders alone are train
    images. Without train/ the list of train images is empty, so that a checkpoint can be judged by
    val/ alone. Labels follow the order of the data set's classes, all or some of which these have
    to be, or the sorted names.
    """
    root = source.root
    assert root is not None
    if not root.is_dir():
        raise ValueError(f"data folder {root} is not there; --data wants train/ and val/ in it")
    train_at, judged_at = split_places(root)
    if not train_at and not judged_at:
        if data_set and data_set.archive:
            raise ValueError(
                f"{root} holds neither torchvision's archive of {data_set.short_title} nor "
                "train/ and val/ in class folders; --download fetches the archive"
            )
        train_at = (root,)
    train = read_part(root, train_at, source.labels) if train_at else None
    judged = read_part(root, judged_at, source.labels) if judged_at else None
    empty = Part((), [])
    classes = _classes_of(data_set, (train or judged or empty).classes, root)
    train_images = _labelled(root, train or empty, classes)
    if not judged:
        return _hold_out(train_images, source.hold_out)
    if source.hold_out:
        raise ValueError(f"{judged_at[0]} is there: --hold-out would put it aside; leave one out")
    return train_images, _labelled(root, judged, classes)


def list_stored(
    stored: StoredSet, folder: Path, names: tuple[str, ...], data_set: DataSet
) -> ImageList:
    """List the images of a stored set's class folders, labelled by the places of their classes.

    ValueError names a folder that is no class, the first missing classes of a complete set, and
    what is not as published of a set whose data are. Of data with some of their classes alone, so
    are the images.
    """
    part, known = read_part(folder, (folder,)), class_list(data_set.classes)
    missing = sorted(set(names) - set(part.classes))
    if stored.complete and missing:
        raise ValueError(f"{folder} lacks {len(missing)} classes; first: {missing[:3]}: add them")
    if not data_set.generated:
        present = {entry.label for entry in part.entries}
        if stored.classes and (differing := _differing(present, class_list(stored.classes))):
            raise ValueError(f"{folder} is not {stored.title}: it {differing}; fetch it again")
        if stored.complete and len(part.entries) != stored.images:
            held = f"{folder} holds {len(part.entries)} images instead of {stored.images}"
            raise ValueError(f"{held}: fetch it again")
    foreign = set(known) - set(names)
    entries = [entry for entry in part.entries if entry.label not in foreign]
    return _labelled(folder, part._replace(entries=entries), {name: name for name in names})


def class_list(classes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return class names in order; a text names timm's list of them."""
    if isinstance(classes, tuple):
        return classes
    return tuple(resources.files("timm.data").joinpath("_info", classes).read_text().split())


def missing_classes(data_set: DataSet, names: Sequence[str]) -> str:
    """Say which of the data set's classes are not among the names; '' where all are."""
    known = class_list(data_set.classes)
    differing = _differing(names, known) if known else ""
    return f"is not {data_set.short_title}: it {differing}" if differing else ""


def _classes_of(data_set: DataSet | None, names: tuple[str, ...], root: Path) -> dict[str, str]:
    """Return the class that each name stands for, in the data set's order; ValueError if none.

    A class is named as the data set does; ImageNet's by their numbers and timm's names as well.
    """
    known = class_list(data_set.classes) if data_set else ()
    if data_set and not known and len(names) != data_set.num_classes:
        expected = f"scale {data_set.name!r} has {data_set.num_classes}"
        raise ValueError(f"{root} has {len(names)} classes, and {expected}: {ANY_CLASSES}")
    classes = dict(zip(names, names, strict=True))
    if not data_set or not known:
        return classes
    if isinstance(data_set.classes, str) and not set(names) <= set(known):
        from trainables.data.base import places_in_head, plain  # imports torch

        places = places_in_head(len(known))
        classes |= {name: known[places[plain(name)]] for name in names if plain(name) in places}
    if not set(classes.values()) <= set(known):
        differing = missing_classes(data_set, list(classes.values()))
        raise ValueError(f"{root} {differing}; {ANY_CLASSES}")
    return dict(sorted(classes.items(), key=lambda item: known.index(item[1])))


def _differing(names: Collection[str], known: Collection[str]) -> str:
    """Say how many known classes lack and how many are foreign, the first of each; '' if none."""
    lacking, foreign = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} of {len(known)} classes, the first {lacking[0]!r}")
    if foreign:
        parts.append(f"has {len(foreign)} foreign ones, the first {foreign[0]!r}")
    return ", and ".join(parts)


def _labelled(root: Path, part: Part, classes: Mapping[str, str]) -> ImageList:
    """Return the images of a split, sorted by class; ValueError names a foreign class."""
    names = tuple(dict.fromkeys(classes.values()))
    places = {name: place for place, name in enumerate(names)}
    entries = part.entries
    if foreign := next((e for e in entries if e.label not in classes), None):
        text = f"{foreign.label!r}, the class of {foreign.path}, is no class of the data"
        raise ValueError(f"{root}: {text}{nearest(foreign.label, names)}")
    entries = sorted(entries, key=lambda entry: places[classes[entry.label]])
    return ImageList(
        root=root,
        class_names=names,
        paths=tuple(entry.path for entry in entries),
        labels=tuple(places[classes[entry.label]] for entry in entries),
        ids=tuple(entry.id for entry in entries),
        unlabelled=part.unlabelled,
    )


def _hold_out(images: ImageList, share: float) -> tuple[ImageList, ImageList]:
    """Part the images of each class by the hash of their names; ValueError without a share.

    Of each class at least one image is left to train on, but for a share of 1.
    """
    if not share:
        raise ValueError(
            f"{images.root} has no val/ or test/: add one, or give --hold-out 0.2, which judges by "
            "a fifth of each class's train images, chosen by their names' hash (1: by all)"
        )
    held = set[int]()
    for places in _by_class(images.ids, images.labels):
        count = min(len(places) - 1, max(1, round(len(places) * share)))
        held.update(places if share == 1 else places[:count])
    others = [place for place in range(len(images)) if place not in held]
    return images.at(others), images.at(sorted(held))


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
    if source.labels and source.root is None:
        raise ValueError(f"--labels {source.labels} goes with --data DIR")
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
    train, held_out = _whole_splits(source, None)
    if image_size is None or not is_buildable(image_size):
        image_size = _usual_size(train if len(train) else held_out)
    parts = ["\n".join(part) for part in (train.class_names, train.ids, held_out.ids)]
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
    for number in range(0, len(images), max(1, len(images) // SAMPLED)):
        with (
            suppress(Exception),  # --check names what is damaged
            open_image(images.root / images.paths[number]) as content,
            Image.open(content) as file,
        ):
            sides.append(min(file.size))
    side = median_low(sides) if sides else LARGEST_USUAL
    return max(SMALLEST_SIZE, min(LARGEST_USUAL, side - side % SIZE_STEP))
