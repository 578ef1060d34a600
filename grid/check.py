"""The check: looks at the data, the disk and the device before a run, and says what to do."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluators.textures import open_dictionary
from grid.estimate import disk_bytes
from grid.plan import Plan
from trainables.data.base import Data, Split
from trainables.data.images import ImageFiles, in_threads, size_or_problem
from trainables.data.layouts import bytes_and_stamp, image_id
from trainables.data.listing import (
    ANY_CLASSES,
    GIBIBYTE,
    DataSource,
    ImageList,
    class_list,
    differing,
    list_splits,
)
from trainables.data.load import CorruptedSet, archive_of, image_files, load_data, stored_split
from trainables.data.registry import STORED_SETS, DataSet, StoredSet
from trainables.scale import Scale
from trainables.store.storage import write_atomically

Level = Literal["ok", "warning", "error"]
Remark = tuple[Level, str]  # what a thing is, or what is wrong with it and what to do
Finding = tuple[str, Level, str]  # a subject and a remark on it
COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}
SOUND_FILE = "checked.json"  # lists of images that are sound, by the stamps of their files
DAMAGED_FILE = "damaged.txt"
SOUND = TypeAdapter(dict[str, list[Remark]])
LEAST_FREE_BYTES = GIBIBYTE
NAMED = 3


def show(findings: Sequence[Finding], *, table: bool, manifest: str = "") -> None:
    """Print the findings as a table, or the warnings alone; ValueError is the first error."""
    rows = Table("Checked", "", "Finding")
    for subject, level, text in findings:
        # A folder's name may read as markup.
        rows.add_row(subject, f"[{COLOURS[level]}]{level}[/]", escape(text))
        if level == "warning" and not table:
            print(f"warning: {text}", file=sys.stderr)
    if table:
        Console().print(rows, f"Manifest of the data: {manifest}" if manifest else "")
    if errors := [text for _, level, text in findings if level == "error"]:
        raise ValueError(errors[0])


def check(
    scale: Scale, source: DataSource, plan: Plan, *, results: Path
) -> tuple[list[Finding], str]:
    """Check the data, the disk and the device; nothing here raises ValueError.

    Returns the findings and the data's manifest: 12 hex digits of every file's set, path below it
    and size; of arrays, whose size says nothing of their content, by that.
    """
    findings, manifest = _check_data(scale, source, plan, results)
    if source.root is not None:
        findings += _standing_in(scale.data_set, source, plan)
    findings.append(("disk", *_disk(plan, results)))
    return [*findings, *(("device", "ok", text) for text in _devices())], manifest


def check_data_here(
    scale: Scale, source: DataSource, plan: Plan, results: Path
) -> tuple[list[Finding], str]:
    """Check the data where they lie on this node of a cluster, which may share the results."""
    return _check_data(scale, source, plan, results / "nodes" / platform.node())


def _check_data(
    scale: Scale, source: DataSource, plan: Plan, results: Path
) -> tuple[list[Finding], str]:
    if source.root is None:
        return [], ""
    trains = any(trial.recipe.epochs for trial in plan)
    data_check = _DataCheck(scale, source, results, trains=trains)
    findings = data_check.run(source.root)
    files = data_check.sizes | data_check.digests
    listed = "\n".join(f"{path} {size}" for path, size in sorted(files.items()))
    return findings, hashlib.sha256(listed.encode()).hexdigest()[:12]


def _standing_in(data_set: DataSet, source: DataSource, plan: Plan) -> Iterator[Finding]:
    """Warn of the published sets that are not there and that generated ones stand in for."""
    evaluators = {evaluator for trial in plan for evaluator in trial.evaluators} - {"tpa"}
    for stored in (STORED_SETS[name] for name in data_set.counterparts):
        missing = stored.evaluator in evaluators and stored.name not in source.folders
        if missing and not data_set.generated:
            text = f"{stored.title} is not there: {stored.evaluator} is judged on generated images"
            yield stored.name, "warning", f"{text}; --stored {stored.name}=DIR reads it"


class _DataCheck:
    """The part of the check that opens files; `sizes` and `digests` of files are the manifest.

    A list of images is opened again only when the path, size or time of one of them changes.
    """

    def __init__(self, scale: Scale, source: DataSource, results: Path, *, trains: bool) -> None:
        self.scale, self.source, self.results, self.trains = scale, source, results, trains
        self.data_set = scale.data_set
        self.class_names = class_list(scale.data_set.classes)
        self.sizes: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self.held_out: Split | None = None
        self.damaged: list[str] = []
        self.sound: dict[str, list[Remark]] = {}
        with suppress(OSError, ValueError):
            self.sound = SOUND.validate_json((results / SOUND_FILE).read_bytes())

    def run(self, root: Path) -> list[Finding]:
        """Check the images, then each stored set that there is."""
        findings = _findings("images", self._images(root))
        if self.class_names:
            for name in self.data_set.counterparts:
                if place := self.source.folders.get(name):
                    findings += _findings(name, self._stored(STORED_SETS[name], place))
        with suppress(OSError):  # the look at the disk says so
            write_atomically(self.results / SOUND_FILE, SOUND.dump_json(self.sound))
            if self.damaged:
                write_atomically(self.results / DAMAGED_FILE, "\n".join(self.damaged).encode())
        return findings

    def _images(self, root: Path) -> Iterator[Remark]:
        data_set = self.data_set
        if archive_of(data_set, self.source):
            data = load_data(self.scale, self.source)
            self.sizes[data_set.short_title] = len(data.train) + len(data.held_out)
            yield "ok", f"{len(data.train):,} and {len(data.held_out):,} images as published"
            return
        train, held_out = list_splits(self.source, data_set)
        self.class_names = train.class_names
        text = f"{len(train):,} to train, {len(held_out):,} held out"
        yield "ok", f"{len(self.class_names)} classes, {text}"
        published = data_set.train_images, data_set.held_out_images
        if not data_set.generated and (len(train), len(held_out)) != published:
            yield "warning", "{}; as published {:,} and {:,}".format(text, *published)
        if missing := _missing_classes(held_out):
            yield "warning", f"{missing} have no held-out images"
        if some := differing(data_set.short_title, train.class_names, data_set.classes):
            yield "error" if self.trains else "warning", f"{root} {some}; {ANY_CLASSES}"
        if self.trains and not len(train):
            yield "error", f"{root} has no train/ with class folders to train on: add it"
        elif self.trains and (missing := _missing_classes(train)):
            yield "error", f"{missing} have no image to train on: add images, or remove the folders"
        for images in (train, held_out):
            files = image_files(images, data_set)
            yield from self._opened(files, "images")
        self.held_out = Split(images=files, labels=torch.tensor(held_out.labels), ids=held_out.ids)
        if self.source.workers == 0 and sum(self.sizes.values()) > self.source.memory_bytes:
            text = "the images take more than --data-memory: each trial reads them from files"
            yield "warning", f"{text} by one process; give --data-workers N"

    def _stored(self, stored: StoredSet, root: Path) -> Iterator[Remark]:
        if stored.evaluator == "tpa":
            textures = open_dictionary(root, self.scale)
            self.digests["textures"] = textures.digest
            yield "ok", f"{textures.clusters} textures of each of {len(textures.classes)} classes"
            return
        none = Split(images=torch.empty(0), labels=torch.empty(0), ids=())
        held_out = self.held_out or none
        names = self.class_names
        data = Data(data_set=self.data_set, train=none, held_out=held_out, class_names=names)
        if stored.kinds:
            splits = CorruptedSet(stored, root, data).splits()
        else:
            splits = iter([(stored.folder, stored_split(stored, root, data))])
        counts, classes = set(), 0
        for part, split in splits:
            counts.add(len(split))
            classes = len(set(split.labels.tolist()))
            if isinstance(split.images, ImageFiles) and not stored.labels:
                yield from self._opened(split.images, f"{stored.name}/{part}")
        arrays = [*root.glob("*.npy")] if stored.arrays else []
        for file in [*arrays, *([root / stored.labels] if stored.labels else [])]:
            with file.open("rb") as array:
                digest = hashlib.file_digest(array, "sha256").hexdigest()
            self.digests[f"{stored.name}/{file.name}"] = digest
        if len(counts) > 1:
            text = f"{root}: its kinds and severities hold {sorted(counts)} images"
            yield "error", f"{text}: fetch it again"
        odd = stored.images and not self.data_set.generated and counts != {stored.images}
        text = f"{max(counts):,} images of {classes} classes"
        published = f" (as published: {stored.images:,})" if stored.images else ""
        yield "warning" if odd else "ok", f"{text}{published}"

    def _opened(self, images: ImageFiles, place: str) -> list[Remark]:
        """Open every image; return what is wrong with some.

        place: the images' set, and where in it they lie, as the manifest has them.
        """
        paths = [images.path(number) for number in range(len(images))]
        digest = hashlib.sha256(f"{self.scale.name} {place}".encode())
        for path in paths:
            size, stamp = bytes_and_stamp(path)
            self.sizes[f"{place}/{image_id(str(path.relative_to(images.root)))}"] = size
            digest.update(stamp)
        key = digest.hexdigest()
        if key not in self.sound:
            workers = len(os.sched_getaffinity(0))
            opened = list(zip(paths, in_threads(size_or_problem, paths, workers), strict=True))
            if damaged := [path for path, size in opened if isinstance(size, str)]:
                self.damaged += map(str, damaged)
                classes = {path.parent.name for path in damaged}
                first = f"the first {damaged[0]} (class {damaged[0].parent.name})"
                text = f"{len(damaged)} unreadable images in {len(classes)} classes, {first}"
                listed = self.results / DAMAGED_FILE
                return [("error", f"{text}: replace or remove those in {listed}")]
            self.sound[key] = self._misfits(opened, images.native, place == "images")
        return self.sound[key]

    def _misfits(self, opened: list[tuple[Path, Any]], native: int, is_data: bool) -> list[Remark]:
        """Say how many images have not the data's size, or are smaller where they need not."""
        side = native or self.scale.image_size
        wrong = f"are not {side} x {side} px" if native else f"are smaller than {side} px"
        odd = [(p, s) for p, s in opened if (s != (side, side) if native else min(s) < side)]
        if not odd:
            return []
        path, (width, height) = odd[0]
        text = f"{len(odd)} images {wrong}, the first {path} ({width} x {height})"
        if not native:
            return [("warning", f"{text}: they are enlarged")]
        remedy = "--scale folder takes images of any size" if is_data else "make them anew"
        return [("error", f"{text}: {remedy}")]


def _findings(subject: str, remarks: Iterator[Remark]) -> list[Finding]:
    """Return the remarks on a subject; one that is raised is the last."""
    findings: list[Finding] = []
    try:
        for level, text in remarks:
            findings.append((subject, level, text))
    except (OSError, ValueError) as error:
        findings.append((subject, "error", str(error)))
    return findings


def _missing_classes(images: ImageList) -> str:
    """Say how many classes have no image, and name the first; '' where all have one."""
    missing = sorted(set(range(len(images.class_names))) - set(images.labels))
    first = [images.class_names[label] for label in missing[:NAMED]]
    return f"{len(missing)} classes (the first: {', '.join(first)})" if missing else ""


def _disk(plan: Plan, results: Path) -> Remark:
    there = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return "error", f"{there} is read-only: give --results another folder"
    free, needed = shutil.disk_usage(there).free, disk_bytes(plan)
    text = f"{free / GIBIBYTE:.1f} GiB free, checkpoints take up to {needed / GIBIBYTE:.1f}"
    if free >= max(needed, LEAST_FREE_BYTES):
        return "ok", text
    text = f"{results}: {text}: make room, or give --results a folder on another disk"
    return "error" if free < LEAST_FREE_BYTES else "warning", text


def _devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"CPU, {torch.get_num_threads()} threads; no GPU"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"{properties.name}, {properties.total_memory / GIBIBYTE:.0f} GiB"
