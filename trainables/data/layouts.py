"""Layouts of labelled images: class folders, one folder with a file of labels, tar shards, tables.

A layout yields every image's file, label and id. Nothing here decodes an image or imports torch.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from trainables.data.registry import STORED_SETS
from trainables.recipe import unknown

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
TAR, PARQUET, ARROW = ".tar", ".parquet", ".arrow"
TRAIN, HELD_OUT = "train", ("val", "validation", "valid", "test")  # the first that there is
_SPLIT = re.compile(rf"({'|'.join((TRAIN, *HELD_OUT))})(?![a-z])")
_COLUMNS = {  # of a table, by their usual titles
    "name": ("image", "image_id", "file", "file_name", "filename", "path", "id", "folder", "name"),
    "label": ("label", "labels", "class", "class_name", "category", "target", "wnid"),
    "split": ("split", "set", "subset"),
}


class Entry(NamedTuple):
    """One image: its file below the root, its label, its id, and where in the file it lies.

    place: the first byte and how many in a shard; the row, and how many a row has in the mean, in
    a table; None: the whole file.
    split: as a file of labels has it.
    """

    path: str
    label: str
    id: str
    place: tuple[int, int] | None = None
    split: str = ""


class Part(NamedTuple):
    """The images of a split, its classes in order, and how many images a file of labels lacks."""

    classes: tuple[str, ...]
    entries: list[Entry]
    unlabelled: int = 0


@dataclass(frozen=True)
class Labels:
    """A file of labels: the label and the split of images, or of classes, by name.

    An image's name is its path, with or without the split's folder, or its file's name, with or
    without its ending.
    """

    file: Path
    rows: Mapping[str, tuple[str, str]]

    def apply(self, entries: Sequence[Entry]) -> Part:
        """Return the images with the file's labels; ValueError where it has none for them."""
        labelled = []
        for entry in entries:
            name = PurePosixPath(entry.id).name
            names = entry.id, entry.id.partition("/")[2], name, name.rpartition(".")[0], entry.label
            if row := next((self.rows[key] for key in names if key in self.rows), None):
                label, split = row
                labelled.append(entry._replace(label=label, id=f"{entry.id}={label}", split=split))
        if not labelled:
            first = entries[0]
            raise ValueError(
                f"{self.file} labels none of {len(entries)} images: its first name is "
                f"{next(iter(self.rows))!r}, and the first image is {first.id!r}"
                + (f" of class {first.label!r}" if first.label else "")
            )
        classes = _in_order(entry.label for entry in labelled)
        return Part(classes, labelled, len(entries) - len(labelled))


def split_places(root: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return where the train and the held-out images lie: folders, or shards and tables.

    Nothing where the root has no parts of these names.
    """
    folders = {name: root / name for name in (TRAIN, *HELD_OUT) if (root / name).is_dir()}
    places: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in folders.items()}
    if not any(_has_folders(path) for path in folders.values()):
        places = _packed(root) or places
    held_out = next((places[name] for name in HELD_OUT if name in places), ())
    return places.get(TRAIN, ()), held_out


def read_part(root: Path, places: Sequence[Path], labels: Labels | None, column: str) -> Part:
    """Return the images of a split; ValueError says what it lacks.

    column: of a table, the one that has the labels; "": the one that says so.
    """
    place = places[0]
    if column and place.suffix not in (PARQUET, ARROW):
        raise ValueError(f"--labels {column} is not a file; it may name a column of tables alone")
    if place.is_file():
        parts = [_READERS[path.suffix](root, path, column) for path in places]
        entries = [entry for part in parts for entry in part.entries]
        part = Part(parts[0].classes or _in_order(entry.label for entry in entries), entries)
    elif labels and not _has_folders(place):
        part = Part((), [Entry(path, "", path) for path in _images_in(root, place)])
    else:
        part = class_folders(root, place)
    if not part.entries:
        raise ValueError(f"{place} holds no image whose name ends in {', '.join(SUFFIXES)}")
    return labels.apply(part.entries) if labels else part


def by_split(part: Part) -> tuple[Part, Part | None]:
    """Part images by the split that a file of labels names; None: it holds none out."""
    held_out = next((name for name in HELD_OUT if any(e.split == name for e in part.entries)), "")
    train, judged = (
        part._replace(entries=[entry for entry in part.entries if entry.split == name])
        for name in (TRAIN, held_out)
    )
    return train, judged if held_out else None


def class_folders(root: Path, split: Path) -> Part:
    """Return the images of a split's class folders; ValueError where there is no folder."""
    try:
        names = [path.name for path in split.iterdir() if path.name[0] != "." and path.is_dir()]
    except OSError as error:
        raise ValueError(f"{split} cannot be read: {error.strerror}") from None
    if not names:
        raise ValueError(
            f"{split} holds no class folders; expected <class>/<image>, or --labels FILE that "
            "labels its images"
        )
    entries = [
        Entry(path, name, path) for name in sorted(names) for path in _images_in(root, split / name)
    ]
    if not entries:
        expected = f"expected <class>/<image>, whose name ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{split} holds no image in its classes; {expected}")
    return Part(tuple(sorted(names)), entries)


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
    packed: dict[str, tuple[Path, ...]] = {}
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in STORED_SETS]
    for folder in (root, *sorted(folders)):
        for path in sorted(Path(e.path) for e in os.scandir(folder) if e.name.endswith(_PACKED)):
            match = _SPLIT.match(path.name) or (folder != root and _SPLIT.match(folder.name))
            if (match or folder == root) and not path.name.startswith(_ASIDE):
                split = match[1] if match else TRAIN
                others = packed.get(split, ())
                if others and others[0].parent != folder:
                    both = f"{others[0].parent} and {folder}"
                    raise ValueError(f"images of {split} lie in {both}: give --data one of them")
                packed[split] = (*others, path)
    return packed


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels that there are, by name, or by number where all are numbers."""
    names = set(labels)
    return tuple(sorted(names, key=int if all(map(str.isdecimal, names)) else None))


# Shards of WebDataset.


def _tar(root: Path, file: Path, column: str) -> Part:
    """List a shard's images; each is labelled by the .cls file of its name, or by its folder."""
    images, labels = [], {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                stem, _, suffix = member.name.rpartition(".")
                if member.isfile() and suffix == "cls":
                    labels[stem] = shard.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
                elif member.isfile() and member.name.lower().endswith(SUFFIXES):
                    images.append((stem, member.name, (member.offset_data, member.size)))
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}; fetch or make it again") from None
    below, entries = file.relative_to(root).as_posix(), []
    for stem, name, place in images:
        label = labels.get(stem, PurePosixPath(name).parent.name)
        entries.append(Entry(below, label, f"{below}/{name}", place))
    return Part((), entries)


# Tables of Hugging Face: Parquet, or the Arrow files of `save_to_disk`.


def _table(root: Path, file: Path, column: str) -> Part:
    """List a table's rows, labelled by the names of the column's classes, or its own values."""
    import pyarrow.parquet as pq

    try:
        schema = open_table(file).schema if file.suffix == ARROW else pq.read_schema(file)
        label, names = _label_column(schema, column)
        table = open_table(file) if file.suffix == ARROW else pq.read_table(file, columns=[label])
        values = table[label].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: {error}") from None
    below, entries = file.relative_to(root).as_posix(), []
    in_a_row = file.stat().st_size // max(1, len(values))
    for row, value in enumerate(values):
        if value is None or (names and not 0 <= value < len(names)):
            raise ValueError(f"{file}: row {row} has no label, but {value}: are these labelled?")
        text = names[value] if names else str(value)
        entries.append(Entry(below, text, f"{below}/{row:07d}", (row, in_a_row)))
    return Part(names, entries)


def _label_column(schema: Any, wanted: str) -> tuple[str, tuple[str, ...]]:
    """Return the column of the labels, and the names of its classes where it has them."""
    features = _features(schema)
    classes = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    known = [name for name in _COLUMNS["label"] if name in schema.names]
    name = wanted or (classes[0] if len(classes) == 1 else next(iter(known), ""))
    if name not in schema.names:
        ways = "columns " + ", ".join(schema.names)
        raise ValueError(f"no column {name or 'label'!r}; --labels COLUMN names one of its {ways}")
    return name, tuple(features.get(name, {}).get("names") or ())


def _features(schema: Any) -> dict[str, Any]:
    """Return what `datasets` writes of a table's columns."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = stated.get("info", {}).get("features", {})
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


@cache
def open_table(file: Path) -> Any:
    """Return a table: that of an Arrow file is mapped, that of a Parquet file is in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ARROW:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    schema = pq.read_schema(file)
    return pq.read_table(file, columns=[_image_column(schema)])


def _image_column(schema: Any) -> str:
    import pyarrow as pa

    images = [name for name, kind in _features(schema).items() if kind.get("_type") == "Image"]
    for column in schema:
        is_file = pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
        if is_file or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            images.append(column.name)
    if not images:
        raise ValueError(f"no column of encoded images among {', '.join(schema.names)}")
    return str(images[0])


def open_at(file: Path, place: tuple[int, int]) -> IO[bytes]:
    """Open an image that lies within a shard or a table."""
    if file.suffix == TAR:
        with file.open("rb") as shard:
            shard.seek(place[0])
            return BytesIO(shard.read(place[1]))
    table = open_table(file)
    value = table[_image_column(table.schema)][place[0]].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise ValueError(f"row {place[0]} has no bytes of an image, only its path")
    return BytesIO(content)


_READERS = {TAR: _tar, PARQUET: _table, ARROW: _table}
_PACKED = tuple(_READERS)
_ASIDE = "cache-"  # Arrow files that `datasets` makes of others


# Files of labels.


@cache
def read_labels(file: Path) -> Labels:
    """Read a file of labels: columns with or without a header; ValueError names a wrong row."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {file} cannot be read: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = next((mark for mark in "\t,;" if lines and mark in lines[0]), " ")
    table = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    columns = _columns([title.strip().lower() for title in table[0]] if table else [])
    rows: dict[str, tuple[str, str]] = {}
    for row in table[1:] if columns else table:
        name, label, split = columns or (0, 1, None)
        if len(row) <= max(name, label, split or 0):
            raise ValueError(f"--labels {file}: {delimiter.join(row)!r} is not NAME,LABEL")
        key = row[name].strip().removeprefix("./")
        value = row[label].strip(), _split_named(row[split], file) if split is not None else ""
        if rows.setdefault(key, value) != value:
            raise ValueError(f"--labels {file}: {key!r} has two labels")
    if not rows:
        raise ValueError(f"--labels {file} is empty; it wants rows of NAME,LABEL")
    files = Counter(PurePosixPath(key).name for key in rows)
    unique = {key: PurePosixPath(key).name for key in rows if files[PurePosixPath(key).name] == 1}
    return Labels(file, {name: rows[key] for key, name in unique.items()} | rows)


def _columns(titles: list[str]) -> tuple[int, int, int | None] | None:
    """Return where name, label and split stand; None where the titles name no label."""
    where = {
        kind: next((titles.index(title) for title in known if title in titles), None)
        for kind, known in _COLUMNS.items()
    }
    label, name = where["label"], where["name"]
    if label is None:
        return None
    return (int(label == 0) if name is None else name), label, where["split"]


def _split_named(text: str, file: Path) -> str:
    match = _SPLIT.match(text.strip().lower())
    if match is None:
        raise ValueError(f"--labels {file}: {unknown('split', text, (TRAIN, *HELD_OUT))}")
    return match[1]
