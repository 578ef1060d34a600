"""One listing: where a study's images lie, and the images by class.

Nothing here opens an image or imports torch, so that `--plan` stays quick.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median_low
from typing import Any

from trainables.data.layouts import FORMATS, Paths, image_id, open_image, read_part, split_places
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

    `origin`: a folder or URI from which each node fills `root`, on its own disk, before it reads.
    `stored`: the stored out-of-distribution sets by name. `hold_out`: the share of each class's
    train images that stands for an absent val/. `memory_bytes`: what decoded images may take,
    shared by the processes of a machine in `cache`. `download`: fetch what is not there and may be
    had (CIFAR-10). `labels`: a file of the images' or the classes' labels.
    `eval_images`: judge by so many of the held-out images, 0: by all. `workers`: processes that
    decode for a worker of a training; None: as `fed` says.
    """

    root: Path | None = None
    origin: str = ""
    stored: tuple[tuple[str, Path], ...] = ()
    hold_out: float = 0.0
    memory_bytes: int = 2 * GIBIBYTE
    workers: int | None = None
    cache: Path | None = None
    download: bool = False
    labels: Path | None = None
    eval_images: int = 0

    def stage(self) -> None:
        """Bring the data to this node, where they are to be brought; ValueError."""
        if self.origin and self.root:
            from trainables.data.staging import stage

            stage(self.origin, self.root)

    def fed(self, threads: int, gpus: float, node: Mapping[str, float]) -> DataSource:
        """Return the data as read by one process less than there are cores for a worker.

        threads: its own. gpus: its share of those of its node, whose resources Ray names.
        """
        if self.workers is not None:
            return self
        cores = int(node.get("CPU", 0) * gpus / node["GPU"]) if gpus else 0
        return replace(self, workers=max(threads, cores) - 1)

    @property
    def folders(self) -> Mapping[str, Path]:
        """Return where each stored set lies: as it was given, or below the root."""
        below = {name: self.root / name for name in STORED_SETS} if self.root else {}
        return {name: path for name, path in below.items() if path.is_dir()} | dict(self.stored)

    def missing(self, data_set: DataSet) -> set[str]:
        """Return the sets that are not there and that nothing stands in for."""
        is_there = self.root and self.root.is_dir()  # else it is not known
        there = {*data_set.counterparts} & {*(self.folders if is_there else STORED_SETS)}
        return {name for name, stored in STORED_SETS.items() if stored.alone} - there


EMBEDDED = DataSource()
EMBEDDED_SCALE = "digits"
SAMPLED = 100  # images whose sides are read
LARGEST_USUAL = 224  # of the sizes that follow from a folder's images


@dataclass(frozen=True)
class ImageList:
    """The images of one split, by class and name: files below `root`, a label and an id each."""

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, places: Sequence[int]) -> ImageList:
        """Return the images at some places."""
        columns = ("paths", "labels", "ids")
        chosen: dict[str, Any] = {c: tuple(getattr(self, c)[p] for p in places) for c in columns}
        return replace(self, **chosen)

    def chosen(self, count: int) -> ImageList:
        """Return `count` of the images; 0: all."""
        # A million ids are not hashed for nothing.
        return self.at(choose(self.ids, self.labels, count)) if count else self


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


def list_splits(source: DataSource, data_set: DataSet | None = None) -> tuple[ImageList, ImageList]:
    """Return the images to train on and to judge by; ValueError says what the folders lack."""
    train, held_out = _whole_splits(source, data_set)
    count = data_set.chosen_train if data_set else 0
    return train.chosen(count), held_out.chosen(source.eval_images)


def _whole_splits(source: DataSource, data_set: DataSet | None) -> tuple[ImageList, ImageList]:
    """Return all train and all held-out images; ValueError says what the folders lack.

    Held out is what lies in val/, or in test/ where there is no val/. Class folders alone are train
    images. Without train/ the list of train images is empty, so that a checkpoint can be judged by
    val/ alone. Labels follow the order of the data set's classes, all or some of which these have
    to be, or the sorted names.
    """
    root = source.root
    assert root is not None
    source.stage()
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
    train, judged = (
        read_part(root, at, source.labels) if at else {} for at in (train_at, judged_at)
    )
    classes, relabelled = _classes_of(data_set, list(train or judged), root), bool(source.labels)
    train_images = _labelled(root, train, classes, relabelled=relabelled)
    if not judged:
        return _hold_out(train_images, source.hold_out)
    if source.hold_out:
        raise ValueError(f"{judged_at[0]} is there: --hold-out would put it aside; leave one out")
    return train_images, _labelled(root, judged, classes, relabelled=relabelled)


def list_stored(
    stored: StoredSet, folder: Path, names: tuple[str, ...], data_set: DataSet
) -> ImageList:
    """List the images of a stored set's class folders, labelled by the places of their classes.

    ValueError names a folder that is no class, the first missing classes of a complete set, and
    what is not as published of a set whose data are. Of data with some of their classes alone, so
    are the images. Foreign images have the label -1.
    """
    if stored.foreign:
        paths = [path for paths in read_part(folder, (folder,)).values() for path in paths]
        return ImageList(
            folder, names, tuple(paths), (-1,) * len(paths), tuple(map(image_id, paths))
        )
    images, known = Paths(), class_list(stored.classes)
    for part in stored.parts or ("",):
        for name, paths in read_part(folder, (folder / part,)).items():
            if name in names or not stored.others:
                images[name] = images.get(name, []) + paths
    if stored.complete and known:
        places = {str(place): name for place, name in enumerate(known)}
        images = {places.get(name, name): paths for name, paths in images.items()}
    if stored.complete and (missing := sorted(set(names) - set(images))):
        raise ValueError(f"{folder} lacks {len(missing)} classes; first: {missing[:3]}: add them")
    if not data_set.generated:
        present, count = [name for name in images if images[name]], sum(map(len, images.values()))
        if not stored.others and (problem := differing(stored.title, present, stored.classes)):
            raise ValueError(f"{folder} {problem}; fetch it again")
        if stored.complete and count != (stored.images or count):
            held = f"{folder} holds {count} images instead of {stored.images}"
            raise ValueError(f"{held}: fetch it again")
    foreign = set(class_list(data_set.classes)) - set(names)
    images = {name: paths for name, paths in images.items() if name not in foreign}
    return _labelled(folder, images, dict(zip(names, names, strict=True)))


def class_list(classes: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return class names in order; a text names timm's list of them."""
    if not classes or isinstance(classes, tuple):
        return tuple(classes)
    return tuple(resources.files("timm.data").joinpath("_info", classes).read_text().split())


def differing(title: str, names: Collection[str], classes: tuple[str, ...] | str) -> str:
    """Say how many of a set's classes lack and how many are foreign, the first of each.

    "" where none is or the set states no classes.
    """
    known = class_list(classes)
    lacking, foreign = sorted(set(known) - set(names)), sorted(set(names) - set(known))
    parts = []
    if lacking:
        parts.append(f"lacks {len(lacking)} of {len(known)} classes, the first {lacking[0]!r}")
    if foreign:
        parts.append(f"has {len(foreign)} foreign ones, the first {foreign[0]!r}")
    return f"is not {title}: it {', and '.join(parts)}" if known and parts else ""


def _classes_of(data_set: DataSet | None, names: Sequence[str], root: Path) -> dict[str, str]:
    """Return the class that each name stands for, in the data set's order; ValueError if none.

    A class is named as the data set does; ImageNet's by their numbers and timm's names as well.
    """
    classes = dict(zip(names, names, strict=True))
    if not data_set:
        return classes
    known = class_list(data_set.classes)
    if not known:
        if len(names) != data_set.num_classes:
            expected = f"scale {data_set.name!r} has {data_set.num_classes}"
            raise ValueError(f"{root} has {len(names)} classes, and {expected}: {ANY_CLASSES}")
        return classes
    if isinstance(data_set.classes, str) and not set(names) <= set(known):
        places = places_in_head(len(known))
        classes |= {name: known[places[plain(name)]] for name in names if plain(name) in places}
    if not set(classes.values()) <= set(known):
        problem = differing(data_set.short_title, classes.values(), known)
        raise ValueError(f"{root} {problem}; {ANY_CLASSES}")
    return dict(sorted(classes.items(), key=lambda item: known.index(item[1])))


def plain(class_name: str) -> str:
    """Return a class's name as it is compared: golden_retriever is Golden Retriever, 007 is 7."""
    if class_name.isdecimal():
        return str(int(class_name))
    return class_name.lower().replace("_", " ").replace("-", " ")


@cache
def places_in_head(outputs: int) -> dict[str, int]:
    """Return the outputs of a head by index, of ImageNet's heads by WordNet id and name as well.

    A name of several classes (crane) stands for none.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset  # imports torch

    places = {str(index): index for index in range(outputs)}
    if subset := infer_imagenet_subset({"num_classes": outputs}):
        info, owners = ImageNetInfo(subset), Counter[str]()
        for index, label in enumerate(info.label_names()):
            names = {plain(n) for n in info.label_name_to_description(label).split(", ")}
            owners.update(names)
            places |= dict.fromkeys((label, *names), index)
        places = {name: index for name, index in places.items() if owners[name] < 2}
    return places


def _labelled(
    root: Path, images: Paths, classes: Mapping[str, str], *, relabelled: bool = False
) -> ImageList:
    """Return the images of a split, sorted by class; ValueError names a foreign class.

    relabelled: the labels, which are not those of the files, are part of the ids.
    """
    names = tuple(dict.fromkeys(classes.values()))
    labels = {name: place for place, name in enumerate(names)}
    if foreign := next((name for name in images if images[name] and name not in classes), ""):
        text = f"{foreign!r}, the class of {images[foreign][0]}, is no class of the data"
        raise ValueError(f"{root}: {text}{nearest(foreign, names)}")
    paths, ids, places = list[str](), list[str](), list[int]()
    for name in sorted(filter(classes.__contains__, images), key=lambda n: labels[classes[n]]):
        paths += images[name]
        ids += [image_id(path) + (f"={name}" if relabelled else "") for path in images[name]]
        places += [labels[classes[name]]] * len(images[name])
    return ImageList(root, names, tuple(paths), tuple(places), tuple(ids))


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
    for option, value in (("--labels", source.labels), ("--hold-out", source.hold_out)):
        if value and source.root is None:
            raise ValueError(f"{option} {value} goes with --data DIR")
    if data_set.package and source.root is not None:
        raise ValueError(f"scale {name!r} is embedded: --data goes with another --scale")
    for stored, _ in source.stored:
        if stored not in data_set.counterparts:
            sets = f"its stored sets are {', '.join(data_set.counterparts) or 'none'}"
            raise ValueError(f"--stored {stored}=DIR is not read at scale {name!r}: {sets}")
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
            Image.open(content, formats=FORMATS) as file,
        ):
            sides.append(min(file.size))
    side = median_low(sides) if sides else LARGEST_USUAL
    return max(SMALLEST_SIZE, min(LARGEST_USUAL, side - side % SIZE_STEP))
