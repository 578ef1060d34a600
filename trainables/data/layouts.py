"""Layouts of labelled images: class folders, one folder with a file of labels, tar shards, tables.

A layout yields the places of the images of each class. Nothing here decodes an image or imports
torch.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

from trainables.data.registry import STORED_SETS

logger = logging.getLogger(__name__)

# The paths below the root of each class's images, by class, in order. The path of an image in a
# shard is FILE/LABEL/NAME@FIRST+COUNT, its bytes; of one in a table FILE/LABEL/@ROW+COUNT, the
# bytes of a mean row.
Paths = dict[str, list[str]]

# What takes the place of class folders (packing.py): shards, and a Parquet file with a row for each
# image: its path, shard, first byte and size; its metadata state the classes and the shards' sizes.
_SHARDS = "packed-"
SHARD, INDEX = _SHARDS + "{:06d}.tar", _SHARDS + "index.parquet"
CLASSES, SHARDS = "classes", "shards"
AGAIN = "remove .staged and stage again, or pack again"

# Pillow knows more formats, and hands one of them (EPS) to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
TAR, PARQUET, ARROW = PACKED = ".tar", ".parquet", ".arrow"
TRAIN, HELD_OUT = "train", ("val", "validation", "valid", "test")  # the first that there is
_SPLIT = re.compile(rf"({'|'.join((TRAIN, *HELD_OUT))})(?![a-z])")
_INSIDE = re.compile(rf"(.*(?:{'|'.join(PACKED)}))/.*@(\d+)\+(\d+)", re.DOTALL)
_PACKED = re.compile(r"((?:.*/)?)packed-\d{6}\.tar/(.*)@\d+\+\d+", re.DOTALL)
_ASIDE = "cache-"  # Arrow files that `datasets` makes of others


def split_places(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return where the train and the held-out images lie: folders, or shards and tables.

    Nothing where the root has no parts of these names.
    """
    names = [name for name in (TRAIN, *HELD_OUT) if (root / name).is_dir()]
    places: dict[str, tuple[Path, ...]] = {name: (root / name,) for name in names}
    if not any(_folders_in(root / name) or _is_packed(root / name) for name in names):
        places = _packed_files(root) or places
    held_out = next((places[name] for name in HELD_OUT if name in places), ())
    return places.get(TRAIN, ()), held_out


def read_part(root: Path, places: Sequence[Path], labels: Path | None = None) -> Paths:
    """Return the images of a split, maybe with a file's labels; ValueError says what it lacks."""
    place = places[0]
    if place.is_file():
        images = _images_of_files(root, places)
    elif _is_packed(place):
        images = _indexed(root, place)
    elif labels and not _folders_in(place):
        images = {"": _images_in(root, place)}
    elif images := images_by_class(root, place):
        pass
    else:
        expected = "expected <class>/<image>, or --labels FILE that labels its images"
        raise ValueError(f"{place} holds no class folders; {expected}")
    if not any(images.values()):
        expected = f"expected <class>/<image>, whose name ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{place} holds no image; {expected}")
    if labels:
        return _relabelled(images, labels)
    if bare := images.get(""):
        raise ValueError(f"{bare[0]} has neither .cls nor a class folder; --labels FILE labels it")
    return images


def _relabelled(images: Paths, file: Path) -> Paths:
    """Return the images with a file's labels, without those that it has none for.

    An image's name in the file is its path, with or without the split's folder, or its file's name,
    with or without its ending, or its class. ValueError where the file names no image.
    """
    rows, labelled = _read_labels(file), defaultdict[str, list[str]](list)
    missing: list[str] = []
    # Those of shards and tables as they lie there, whatever their old classes.
    entries = [(path, name) for name, paths in images.items() for path in paths]
    for path, old in sorted(entries, key=_place):
        image = image_id(path)
        image = image.rpartition("@")[0] if _inside(image) else image
        name = PurePosixPath(image).name
        names = image, image.partition("/")[2], name, name.rpartition(".")[0], old
        label = next((rows[key] for key in names if key in rows), None)
        (missing if label is None else labelled[label]).append(path)
    if not labelled:
        firsts = f"its first name is {next(iter(rows))!r}, and the first image is {missing[0]!r}"
        raise ValueError(f"{file} labels none of {len(missing)} images: {firsts}")
    if missing:
        _warn_once(f"{file} does not label {len(missing)} images: they are left out")
    return _in_order(labelled)


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _inside(path: Path | str) -> re.Match[str] | None:
    """Match the file, the place and the size of an image in a shard or table."""
    text = str(path)
    return _INSIDE.fullmatch(text) if "@" in text else None


def image_id(path: str) -> str:
    """Return the path by which an image is known: of one that was packed, as it was before."""
    packed = _PACKED.fullmatch(path)
    return packed[1] + packed[2] if packed else path


def _place(image: tuple[str, str]) -> tuple[str, int]:
    """Return the file and the place in it of an image (path, class): none of one in its own."""
    inside = _inside(image_id(image[0]))
    return (inside[1], int(inside[2])) if inside else ("", 0)


def bytes_and_stamp(path: Path) -> tuple[int, bytes]:
    """Return how many bytes an image takes as it is stored, and a line that changes with them."""
    inside = _inside(path)
    stat = (Path(inside[1]) if inside else path).stat()
    size = int(inside[3]) if inside else stat.st_size
    return size, f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()


def open_image(path: Path) -> IO[bytes]:
    """Open an image in its own file, in a shard or in a table."""
    inside = _inside(path)
    if inside is None:
        return path.open("rb")
    file, first, count = Path(inside[1]), int(inside[2]), int(inside[3])
    if file.suffix == TAR:
        with file.open("rb") as shard:
            shard.seek(first)
            return BytesIO(shard.read(count))
    value = _open_table(file)[0][first].as_py()
    return BytesIO(value["bytes"] if isinstance(value, dict) else value)


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(folder) if e.name[0] != "." and e.is_dir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None


def images_by_class(root: Path, folder: Path) -> Paths:
    """Return the images of class folders by name, as paths below the root."""
    return {name: _images_in(root, folder / name) for name in _folders_in(folder)}


def _images_in(root: Path, folder: Path) -> list[str]:
    """Return the images of a folder by name, as paths below the root."""
    below = folder.relative_to(root).as_posix()
    files = (e for e in os.scandir(folder) if e.name.lower().endswith(SUFFIXES) and e.is_file())
    names = sorted(file.name for file in files if file.name[0] != ".")
    return names if below == "." else [f"{below}/{name}" for name in names]


def _in_order(images: Mapping[str, list[str]]) -> Paths:
    """Return the classes by name, or by number where all are numbers."""
    return {
        label: images[label]
        for label in sorted(images, key=int if all(map(str.isdecimal, images)) else None)
    }


def _is_packed(folder: Path) -> bool:
    return any(_is_pack_file(path.name) for path in folder.glob(f"{_SHARDS}*"))


def _is_pack_file(name: str) -> bool:
    return name == INDEX or re.fullmatch(rf"{_SHARDS}\d{{6,}}\.tar", name) is not None


def _indexed(root: Path, folder: Path) -> Paths:
    """Return the images that an index lists; ValueError where its shards are not whole."""
    import pyarrow.parquet as pq

    if apart := next(chain(*images_by_class(root, folder).values()), ""):
        raise ValueError(f"{folder} holds shards and class folders ({apart}): keep one form")
    below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    try:
        table = pq.read_table(folder / INDEX, columns=["image", "shard", "first", "size"])
        stated = {k.decode(): json.loads(text) for k, text in table.schema.metadata.items()}
        images: Paths = {name: [] for name in stated[CLASSES]}
        for image, shard, first, size in zip(*table.to_pydict().values(), strict=True):
            images[image.partition("/")[0]].append(f"{below}{shard}/{image}@{first}+{size}")
    except Exception as error:  # pyarrow's, of bytes that are no Parquet, are of all kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder / INDEX} cannot be read: {reason}; {AGAIN}") from None
    for shard, size in stated[SHARDS].items():
        there = (folder / shard).stat().st_size if (folder / shard).is_file() else 0
        if there != size:
            lost = f"has {there:,} bytes of {size:,}: {table['shard'].to_pylist().count(shard):,}"
            raise ValueError(f"{folder / shard} {lost} images are lost; {AGAIN}")
    return images


# Shards of WebDataset, and tables of Hugging Face: Parquet, or the Arrow files of `save_to_disk`.


def _packed_files(root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the shards and tables of each split, named train-*, val-* or lying in train/, val/."""
    packed = defaultdict[str, list[Path]](list)
    for below in ("", *(name for name in _folders_in(root) if name not in STORED_SETS)):
        files = (e.name for e in os.scandir(root / below) if e.name.endswith(PACKED))
        for name in sorted(
            name for name in files if not (name.startswith(_ASIDE) or _is_pack_file(name))
        ):
            if (split := _SPLIT.match(name) or _SPLIT.match(below)) or not below:
                packed[split[1] if split else TRAIN].append(root / below / name)
    for name, paths in packed.items():
        if len(folders := {str(path.parent) for path in paths}) > 1:
            lie = f"images of {name} lie in {' and '.join(sorted(folders))}"
            raise ValueError(f"{lie}: give --data one of them")
    return {name: tuple(paths) for name, paths in packed.items()}


def _images_of_files(root: Path, files: Sequence[Path]) -> Paths:
    """Return the images of shards or tables; ValueError names one that cannot be read."""
    images: Paths = {}
    names: Sequence[str] = ()
    for file in files:
        below = file.relative_to(root).as_posix()
        try:
            names, rows = ((), _tar(file)) if file.suffix == TAR else _table(file)
            images = images or {name: [] for name in names}
            for label, place in rows:
                images.setdefault(label, []).append(f"{below}/{label}/{place}")
        except (OSError, ValueError, tarfile.TarError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    return images if names else _in_order(images)


def _tar(file: Path) -> Iterator[tuple[str, str]]:
    """Yield label and place of a shard's images: by the .cls file of the name, or by the folder."""
    images, labels = [], {}
    with tarfile.open(file, "r:") as shard:
        for member in shard:
            stem, _, suffix = member.name.rpartition(".")
            if member.isfile() and suffix == "cls":
                labels[stem] = shard.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
            elif member.isfile() and member.name.lower().endswith(SUFFIXES):
                images.append((stem, member))
    for stem, member in images:
        path = PurePosixPath(member.name)
        place = f"{path.name}@{member.offset_data}+{member.size}"
        yield labels.get(stem, path.parent.name), place


def _table(file: Path) -> tuple[Sequence[str], Iterable[tuple[str, str]]]:
    """Return the stated classes of a table, if any, and the label and place of each row."""
    table = _read(file, _label_column)
    names, values = _classes(table.schema).get(table.column_names[0], ()), table[0].to_pylist()
    for row, value in enumerate(values):
        if value in (None, -1):
            raise ValueError(f"row {row} has no label, but {value}: leave the file out")
    count = file.stat().st_size // max(1, len(values))
    labels = [names[value] if names else str(value) for value in values]
    return names, [(label, f"@{row}+{count}") for row, label in enumerate(labels)]


@cache
def _open_table(file: Path) -> Any:
    """Return a table of encoded images."""
    return _read(file, _image_column)


def open_tables(root: Path, paths: Iterable[str]) -> None:
    """Open the tables in which some images below a root lie."""
    in_tables = (path for path in paths if f"{PARQUET}/" in path or f"{ARROW}/" in path)
    for file in {Path(inside[1]) for path in in_tables if (inside := _inside(f"{root}/{path}"))}:
        _open_table(file)


def _read(file: Path, choose: Callable[[Any], str]) -> Any:
    """Return a table of one column, mapped from an Arrow file or read from a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == PARQUET:
        return pq.read_table(file, columns=[choose(pq.read_schema(file))])
    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    return table.select([choose(table.schema)])


def _classes(schema: Any) -> dict[str, Sequence[str]]:
    """Return the names of the classes of each column that has some, as `datasets` writes them."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stated.get("info", {}).get("features", {})
    return {name: kind["names"] for name, kind in features.items() if "names" in kind}


def _label_column(schema: Any) -> str:
    known = {*_classes(schema), "label", "labels", "class"} & {*schema.names}
    if len(known) != 1:
        raise ValueError(f"it needs one column of labels, and has {', '.join(schema.names)}")
    return str(known.pop())


def _image_column(schema: Any) -> str:
    from pyarrow.types import is_binary, is_struct

    for name, kind in zip(schema.names, schema.types, strict=True):
        if is_binary(kind) or (is_struct(kind) and kind.get_field_index("bytes") >= 0):
            return str(name)
    raise ValueError(f"no column of encoded images among {', '.join(schema.names)}")


@cache
def _read_labels(file: Path) -> Mapping[str, str]:
    """Read a file's labels by name, rows of name and label; ValueError names a wrong row.

    A header is a row that names nothing.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {file} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"--labels {file} is empty; it wants rows of NAME,LABEL")
    delimiter = next((mark for mark in "\t,;" if mark in lines[0]), " ")
    rows: dict[str, str] = {}
    for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True):
        if len(row) < 2:
            raise ValueError(f"--labels {file}: {row[0]!r} is not NAME,LABEL")
        name, label = row[0].strip().removeprefix("./"), row[1].strip()
        if rows.setdefault(name, label) != label:
            raise ValueError(f"--labels {file}: {name!r} has two labels")
    return rows
