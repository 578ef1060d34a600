"""Layouts of labelled images: class folders, one folder with a file of labels, tar shards, tables.

A layout yields every image's file, label and id. Nothing here decodes an image or imports torch.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from trainables.data.registry import STORED_SETS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
TAR, PARQUET, ARROW = ".tar", ".parquet", ".arrow"
TABLES = PARQUET, ARROW
TRAIN, HELD_OUT = "train", ("val", "validation", "valid", "test")  # the first that there is
_SPLIT = re.compile(rf"({'|'.join((TRAIN, *HELD_OUT))})(?![a-z])")
_PLACE = re.compile(r"@(\d+)\+(\d+)$")
_PACKED = re.compile(rf"(.*(?:{TAR}|{PARQUET}|{ARROW}))/.*{_PLACE.pattern}", re.DOTALL)
_ASIDE = "cache-"  # Arrow files that `datasets` makes of others


class Entry(NamedTuple):
    """One image: its path below the root, its label and its id.

    The path of an image in a shard is FILE/LABEL/NAME@FIRST+COUNT, its bytes; of one in a table
    FILE/LABEL/@ROW+COUNT, the bytes of a mean row.
    """

    path: str
    label: str
    id: str


class Part(NamedTuple):
    """The images of a split, its classes in order, and how many images a file of labels lacks."""

    classes: tuple[str, ...]
    entries: list[Entry]
    unlabelled: int = 0


def split_places(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return where the train and the held-out images lie: folders, or shards and tables.

    Nothing where the root has no parts of these names.
    """
    names = [name for name in (TRAIN, *HELD_OUT) if (root / name).is_dir()]
    places: dict[str, tuple[Path, ...]] = {name: (root / name,) for name in names}
    if not any(_has_folders(root / name) for name in names):
        places = _packed(root) or places
    held_out = next((places[name] for name in HELD_OUT if name in places), ())
    return places.get(TRAIN, ()), held_out


def read_part(root: Path, places: Sequence[Path], labels: Path | None = None) -> Part:
    """Return the images of a split, maybe with a file's labels; ValueError says what it lacks."""
    place = places[0]
    if place.is_file():
        parts = [_READERS[path.suffix](root, path) for path in places]
        entries = [entry for part in parts for entry in part.entries]
        part = Part(parts[0].classes or _in_order(entry.label for entry in entries), entries)
    elif labels and not _has_folders(place):
        part = Part((), [Entry(path, "", path) for path in _images_in(root, place)])
    else:
        part = _class_folders(root, place)
    if not part.entries:
        expected = f"expected <class>/<image>, whose name ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{place} holds no image; {expected}")
    if labels:
        return _relabelled(part.entries, labels)
    if bare := next((entry.path for entry in part.entries if not entry.label), ""):
        raise ValueError(f"{bare} has neither .cls nor a class folder; --labels FILE labels images")
    return part


def _relabelled(entries: Sequence[Entry], file: Path) -> Part:
    """Return the images with a file's labels; ValueError where it has none for them.

    An image's name in the file is its path, with or without the split's folder, or its file's name,
    with or without its ending, or its class.
    """
    rows, labelled = _read_labels(file), []
    for entry in entries:
        image = _PLACE.sub("", entry.id)
        name = PurePosixPath(image).name
        names = image, image.partition("/")[2], name, name.rpartition(".")[0], entry.label
        if label := next((rows[key] for key in names if key in rows), None):
            labelled.append(Entry(entry.path, label, f"{entry.id}={label}"))
    if not labelled:
        raise ValueError(
            f"{file} labels none of {len(entries)} images: its first name is {next(iter(rows))!r}, "
            f"and the first image is {entries[0].id!r}"
        )
    classes = _in_order(entry.label for entry in labelled)
    return Part(classes, labelled, len(entries) - len(labelled))


def _packed_at(path: Path) -> re.Match[str] | None:
    text = str(path)
    return _PACKED.fullmatch(text) if "@" in text else None


def file_of(path: Path) -> Path:
    """Return the file in which an image lies: its own, or its shard or table."""
    packed = _packed_at(path)
    return Path(packed[1]) if packed else path


def bytes_and_stamp(path: Path) -> tuple[int, bytes]:
    """Return how many bytes an image takes as it is stored, and a line that changes with them."""
    packed, stat = _packed_at(path), file_of(path).stat()
    size = int(packed[3]) if packed else stat.st_size
    return size, f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()


def open_image(path: Path) -> IO[bytes]:
    """Open an image in its own file, in a shard or in a table."""
    packed = _packed_at(path)
    if packed is None:
        return path.open("rb")
    file, first, count = Path(packed[1]), int(packed[2]), int(packed[3])
    if file.suffix == TAR:
        with file.open("rb") as shard:
            shard.seek(first)
            return BytesIO(shard.read(count))
    value = open_table(file)[0][first].as_py()
    return BytesIO(value["bytes"] if isinstance(value, dict) else value)


def _class_folders(root: Path, split: Path) -> Part:
    """Return the images of a split's class folders; ValueError where there is no folder."""
    try:
        names = sorted(p.name for p in split.iterdir() if p.name[0] != "." and p.is_dir())
    except OSError as error:
        raise ValueError(f"{split} cannot be read: {error.strerror}") from None
    if not names:
        raise ValueError(
            f"{split} holds no class folders; expected <class>/<image>, or --labels FILE that "
            "labels its images"
        )
    paths = ((name, path) for name in names for path in _images_in(root, split / name))
    return Part(tuple(names), [Entry(path, name, path) for name, path in paths])


def _images_in(root: Path, folder: Path) -> list[str]:
    """Return the images of a folder by name, as paths below the root."""
    below = folder.relative_to(root).as_posix()
    names = sorted(entry.name for entry in os.scandir(folder) if _is_image(entry))
    return names if below == "." else [f"{below}/{name}" for name in names]


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.name[0] != "." and entry.is_dir() for entry in entries)


def _packed(root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the shards and tables of each split, named train-*, val-* or lying in train/, val/."""
    packed = defaultdict[str, list[Path]](list)
    for path in sorted([*root.iterdir(), *root.glob("*/*")]):
        below = path.parent.name if path.parent != root else ""
        split = _SPLIT.match(path.name) or _SPLIT.match(below)
        is_packed = path.suffix in ENDINGS and not path.name.startswith(_ASIDE)
        if is_packed and (split or not below) and below not in STORED_SETS:
            packed[split[1] if split else TRAIN].append(path)
    for name, paths in packed.items():
        if len(folders := {str(path.parent) for path in paths}) > 1:
            lie = f"images of {name} lie in {' and '.join(sorted(folders))}"
            raise ValueError(f"{lie}: give --data one of them")
    return {name: tuple(paths) for name, paths in packed.items()}


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels that there are, by name, or by number where all are numbers."""
    names = set(labels)
    return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else None))


# Shards of WebDataset.


def _tar(root: Path, file: Path) -> Part:
    """List a shard's images; each is labelled by the .cls file of its name, or by its folder."""
    images, labels = [], {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                stem, _, suffix = member.name.rpartition(".")
                if member.isfile() and suffix == "cls":
                    labels[stem] = shard.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
                elif member.isfile() and member.name.lower().endswith(SUFFIXES):
                    images.append((stem, member.name, f"{member.offset_data}+{member.size}"))
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; fetch or make it again") from None
    below, entries = file.relative_to(root).as_posix(), []
    for stem, name, inside in images:
        label = labels.get(stem, PurePosixPath(name).parent.name)
        path = f"{below}/{label}/{PurePosixPath(name).name}@{inside}"
        entries.append(Entry(path, label, path))
    return Part((), entries)


# Tables of Hugging Face: Parquet, or the Arrow files of `save_to_disk`.


def _table(root: Path, file: Path) -> Part:
    """List a table's rows, labelled by the names of the column's classes, or its own values."""
    try:
        table = _read(file, _label_column)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    names, values = _classes(table.schema).get(table.column_names[0], ()), table[0].to_pylist()
    below, entries = file.relative_to(root).as_posix(), []
    count = file.stat().st_size // max(1, len(values))
    for row, value in enumerate(values):
        if value in (None, -1):
            raise ValueError(f"{file}: row {row} has no label, but {value}: leave the file out")
        text = names[value] if names else str(value)
        path = f"{below}/{text}/@{row}+{count}"
        entries.append(Entry(path, text, path))
    return Part(tuple(names), entries)


@cache
def open_table(file: Path) -> Any:
    """Return a table of encoded images."""
    return _read(file, _image_column)


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
        raise ValueError(f"needs one column of labels, and has {', '.join(schema.names)}")
    return str(known.pop())


def _image_column(schema: Any) -> str:
    from pyarrow.types import is_binary, is_struct

    for name, kind in zip(schema.names, schema.types, strict=True):
        if is_binary(kind) or (is_struct(kind) and kind.get_field_index("bytes") >= 0):
            return str(name)
    raise ValueError(f"no column of encoded images among {', '.join(schema.names)}")


_READERS = {TAR: _tar, PARQUET: _table, ARROW: _table}
ENDINGS = tuple(_READERS)


# Files of labels.


@cache
def _read_labels(file: Path) -> Mapping[str, str]:
    """Read a file's labels by name, rows of name and label; ValueError names a wrong row.

    A header is a row that names nothing.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {file} cannot be read: {error}") from None
    delimiter = next((mark for mark in "\t,;" if lines and mark in lines[0]), " ")
    rows: dict[str, str] = {}
    for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True):
        if len(row) < 2:
            raise ValueError(f"--labels {file}: {row[0]!r} is not NAME,LABEL")
        name, label = row[0].strip().removeprefix("./"), row[1].strip()
        if rows.setdefault(name, label) != label:
            raise ValueError(f"--labels {file}: {name!r} has two labels")
    if not rows:
        raise ValueError(f"--labels {file} is empty; it wants rows of NAME,LABEL")
    files = Counter(PurePosixPath(name).name for name in rows)
    short = {PurePosixPath(name).name: label for name, label in rows.items()}
    return {name: label for name, label in short.items() if files[name] == 1} | rows
