"""The check: looks at the data, the disk and the device before a run, and says what to do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluators.textures import open_dictionary
from grid.estimate import disk_bytes
from grid.plan import Plan
from trainables.data.base import Data, Split
from trainables.data.listing import (
    GIBIBYTE,
    DataSource,
    ImageList,
    check_published,
    class_list,
    list_by_class,
    list_data_set,
    passed_over_text,
    unused_test_folder,
)
from trainables.data.load import is_archived, load_data
from trainables.data.registry import STORED_SETS, StoredSet
from trainables.data.scan import Opened, Scan
from trainables.data.stored import CorruptedSet, corrupted_folders, stored_kinds, stored_split
from trainables.scale import Scale

Level = Literal["ok", "warning", "error"]
Remark = tuple[Level, str]
COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}
SCAN_FILE = "scan.parquet"
LEAST_FREE_BYTES = GIBIBYTE
NAMED = 3
NO_IMAGES = Split(images=torch.empty(0), labels=torch.empty(0), ids=())


@dataclass(frozen=True)
class Finding:
    """One line about one subject: what it is, or what is wrong with it and what to do."""

    subject: str
    level: Level
    text: str


@dataclass
class Findings:
    """All findings.

    `manifest` names the data by every file's set, path below it and size; arrays, whose size says
    nothing of what they hold, by their content.
    """

    findings: list[Finding] = field(default_factory=list)
    manifest: str = ""

    @property
    def problem(self) -> str:
        """Return the first error, '' where there is none."""
        return next((f.text for f in self.findings if f.level == "error"), "")

    @property
    def warnings(self) -> list[str]:
        """Return what is odd, and does not stop a run."""
        return [f.text for f in self.findings if f.level == "warning"]

    def print(self, console: Console) -> None:
        """Print the findings as a table."""
        table = Table("Checked", "", "Finding")
        for finding in self.findings:
            level = f"[{COLOURS[finding.level]}]{finding.level}[/]"
            # A folder's name may read as markup.
            table.add_row(finding.subject, level, escape(finding.text))
        console.print(table)
        if self.manifest:
            console.print(f"Manifest of the data: {self.manifest}")


def check(scale: Scale, source: DataSource, plan: Plan, *, results: Path) -> Findings:
    """Check the data, the disk, the memory and the device; nothing here raises ValueError."""
    findings = Findings()
    if source.root is not None:
        _DataCheck(scale, source, findings, Scan(results / SCAN_FILE)).run(source.root)
    findings.findings += [*_disk(plan, results), *_device()]
    return findings


@dataclass
class _DataCheck:
    """The part of the check that opens files; `files` gathers the manifest."""

    scale: Scale
    source: DataSource
    findings: Findings
    scan: Scan
    files: dict[str, int | str] = field(default_factory=dict)

    @cached_property
    def splits(self) -> tuple[ImageList, ImageList]:
        """The train and the held-out images, listed once."""
        return list_data_set(self.scale.data_set, self.source)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The data's classes; an archive has no folders of theirs."""
        if is_archived(self.scale.data_set, self.source):
            return class_list(self.scale.data_set.classes)
        return self.splits[0].class_names

    def run(self, root: Path) -> None:
        """Check the images, then each stored set that there is."""
        if self._look("images", root, self._images(root)):
            for name in self.scale.data_set.counterparts:
                if place := self.source.folders.get(name):
                    self._look(name, place, self._stored(STORED_SETS[name], place))
        listed = "\n".join(f"{path} {size}" for path, size in sorted(self.files.items()))
        self.findings.manifest = hashlib.sha256(listed.encode()).hexdigest()[:12]
        try:
            self.scan.save()
        except OSError:
            # The look at the disk says so; without the file the next scan opens all again.
            return

    def _look(self, subject: str, root: Path, remarks: Iterator[Remark]) -> bool:
        """Enter the remarks on a subject; False where it cannot be listed at all."""
        try:
            for level, text in remarks:
                self.findings.findings.append(Finding(subject, level, text))
        except ValueError as error:
            text = str(error)
        except OSError as error:
            text = f"{root} cannot be read: {error.strerror or error}"
        else:
            return True
        self.findings.findings.append(Finding(subject, "error", text))
        return False

    def _images(self, root: Path) -> Iterator[Remark]:
        data_set = self.scale.data_set
        if is_archived(data_set, self.source):
            data = load_data(self.scale, replace(self.source, cache=None))
            # torchvision has compared the files with their published MD5.
            self.files[data_set.short_title] = len(data.train) + len(data.held_out)
            yield "ok", f"{len(data.train):,} and {len(data.held_out):,} images as published"
            return
        train, held_out = self.splits
        counts = len(train), len(held_out)
        classes = f"{len(train.class_names)} classes"
        yield "ok", f"{classes}, {counts[0]:,} to train, {counts[1]:,} held out"
        if not len(train):
            yield "error", f"{root} has no train/ with class folders to train on: add it"
        published = data_set.train_images, data_set.held_out_images
        if data_set.published and counts != published:
            text = "{:,} and {:,} images; as published {:,} and {:,}"
            yield "warning", text.format(*counts, *published)
        if unused := unused_test_folder(root):
            yield "warning", unused
        # Where a share is held out both splits are of one folder, and name the same.
        for passed_over in dict.fromkeys((train.passed_over, held_out.passed_over)):
            yield from _passed_over(root, passed_over)
        if missing := _missing_classes(held_out):
            yield "warning", f"{missing[0]} classes have no held-out images; first: {missing[1]}"
        yield from self._decoded(train, held_out)
        if len(train) and (missing := _missing_classes(train)):
            many = f"{missing[0]} classes have no image to train on; first: {missing[1]}"
            yield "error", f"{many}: add images, or remove their folders"

    def _decoded(self, train: ImageList, held_out: ImageList) -> Iterator[Remark]:
        """Open every image; say which are damaged or too small, and what decoded ones take."""
        opened = [self._open(split, "images") for split in (train, held_out)]
        paths, images = train.paths + held_out.paths, opened[0] + opened[1]
        damaged = [path for path, image in zip(paths, images, strict=True) if image.problem]
        if damaged:
            yield self._damaged(train.root, damaged)
        size, exact = self.scale.image_size, self.scale.data_set.exact_size
        small = [
            f"{train.root / path} ({image.width} x {image.height})"
            for path, image in zip(paths, images, strict=True)
            if not image.problem and not _fits(image, size, exact=exact)
        ]
        if small:
            yield self._small(small)
        decoded = 3 * sum(image.width * image.height for image in opened[0])
        yield _memory(decoded + 3 * size**2 * len(held_out), self.source)

    def _damaged(self, root: Path, damaged: list[str]) -> Remark:
        classes = {path.split("/")[-2] for path in damaged}
        named = f"{root / damaged[0]} (class {damaged[0].split('/')[-2]})"
        many = f"{len(damaged)} unreadable images in {len(classes)} classes, the first {named}"
        return "error", f"{many}: replace or remove them"

    def _small(self, small: list[str]) -> Remark:
        size, first = self.scale.image_size, f"the first {small[0]}"
        if self.scale.data_set.exact_size:
            remedy = "--scale folder --image-size N takes images of N px a side and more"
            return "error", f"{len(small)} images are not {size} x {size} px, {first}: {remedy}"
        many = f"{len(small)} images are smaller than {size} px, {first}"
        if self.scale.data_set.published:
            return "warning", f"{many}: they are enlarged, as in the study"
        return "error", f"{many}: give a smaller --image-size, or remove them"

    def _stored(self, stored: StoredSet, root: Path) -> Iterator[Remark]:
        if stored.arrays:
            return self._arrays(stored, root)
        return self._textures(root) if stored.evaluator == "tpa" else self._folders(stored, root)

    def _folders(self, stored: StoredSet, root: Path) -> Iterator[Remark]:
        corrupted = stored.evaluator == "corruptions"
        parts = corrupted_folders(stored_kinds(stored, root)) if corrupted else [stored.folder]
        counts: Counter[int] = Counter()
        for part in parts:
            images = list_by_class(root / part, self.class_names, complete=stored.complete)
            check_published(stored, images, self.scale.data_set)
            counts[len(images)] += 1
            yield from _passed_over(images.root, images.passed_over)
            yield from self._sound(stored, images, "/".join(filter(None, (stored.name, part))))
        if len(counts) > 1:
            yield (
                "error",
                f"{root}: its kinds and severities hold {sorted(counts)} images: fetch it again",
            )
            return
        (count,) = counts
        odd = self.scale.data_set.published and count != stored.images
        text = f"{count:,} images of {len(set(images.labels))} classes"
        of_each = " of each kind and severity" if corrupted else ""
        yield "warning" if odd else "ok", f"{text}{of_each} (as published: {stored.images:,})"

    def _sound(self, stored: StoredSet, images: ImageList, place: str) -> Iterator[Remark]:
        """Open a stored set's images; say which are damaged, or not of the data's size.

        place: the set, and where in it the images lie, as the manifest has them.
        """
        opened = list(zip(images.paths, self._open(images, place), strict=True))
        if damaged := [path for path, image in opened if image.problem]:
            yield self._damaged(images.root, damaged)
        side = self.scale.image_size
        odd = [p for p, i in opened if not i.problem and (i.width, i.height) != (side, side)]
        if stored.native and odd:
            first = images.root / odd[0]
            yield "error", f"{len(odd)} images are not {side} px, the first {first}: make them anew"

    def _arrays(self, stored: StoredSet, root: Path) -> Iterator[Remark]:
        data = Data(
            data_set=self.scale.data_set,
            train=NO_IMAGES,
            held_out=NO_IMAGES,
            class_names=self.class_names,
        )
        names, of_each = list(stored.arrays), ""
        if stored.evaluator == "corruptions":
            corrupted = CorruptedSet.open(stored, root, data)
            count, of_each = len(corrupted), " of each kind and severity"
            names += [f"{kind}.npy" for kind in corrupted.kinds]
        else:
            count = len(stored_split(stored, root, data))
        for name in names:
            with (root / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[f"{stored.name}/{name}"] = digest
        yield "ok", f"{count:,} images{of_each} (as published: {stored.images:,})"

    def _textures(self, root: Path) -> Iterator[Remark]:
        dictionary = open_dictionary(root, self.scale)
        self.files["textures"] = dictionary.digest
        classes = len(dictionary.classes)
        yield "ok", f"{dictionary.clusters} textures of each of {classes} classes"

    def _open(self, images: ImageList, place: str) -> list[Opened]:
        opened = self.scan.open(images.root, images.paths, workers=len(os.sched_getaffinity(0)))
        for path, image in zip(images.paths, opened, strict=True):
            self.files[f"{place}/{path}"] = image.bytes
        return opened


def _fits(image: Opened, size: int, *, exact: bool) -> bool:
    sides = image.width, image.height
    return sides == (size, size) if exact else min(sides) >= size


def _missing_classes(images: ImageList) -> tuple[int, list[str]] | None:
    """Return how many classes have no image, and the names of the first; None: all have one."""
    missing = sorted(set(range(len(images.class_names))) - set(images.labels))
    return (len(missing), [images.class_names[k] for k in missing[:NAMED]]) if missing else None


def _passed_over(root: Path, paths: Sequence[str]) -> Iterator[Remark]:
    if paths:
        yield "warning", passed_over_text(root, paths)


def _memory(decoded: int, source: DataSource) -> Remark:
    needed = f"decoded the images take {decoded / GIBIBYTE:.2f} GiB"
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if decoded > source.memory_bytes:
        files = f"{needed}, more than --data-memory: they are read from files"
        if source.workers:
            return "ok", files
        return "warning", f"{files}, by one process of each trial: give --data-workers N"
    if decoded > available:
        return "warning", f"{needed}, and {available / GIBIBYTE:.1f} are free: lower --data-memory"
    return "ok", f"{needed} and are kept in memory"


def _disk(plan: Plan, results: Path) -> Iterator[Finding]:
    there = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "error", f"{there} is read-only: give --results another folder")
        return
    free, needed = shutil.disk_usage(there).free, disk_bytes(plan)
    text = f"{free / GIBIBYTE:.1f} GiB free, checkpoints take up to {needed / GIBIBYTE:.1f}"
    if free < max(needed, LEAST_FREE_BYTES):
        text = f"{results}: {text}: make room, or give --results a folder on another disk"
        yield Finding("disk", "error" if free < LEAST_FREE_BYTES else "warning", text)
    else:
        yield Finding("disk", "ok", text)


def _device() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads; no GPU")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        memory = torch.cuda.get_device_properties(index).total_memory / GIBIBYTE
        halves = "bf16 and fp16" if torch.cuda.is_bf16_supported() else "fp16, no bf16"
        yield Finding("device", "ok", f"{name}, {memory:.0f} GiB, mixed precision by {halves}")
