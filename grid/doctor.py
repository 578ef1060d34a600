"""The doctor: looks at everything a run rests on before it starts, and says what to do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluators import SEVERITIES
from evaluators.corruptions import stored_kinds
from evaluators.natural import IMAGENET_A_IMAGES, check_imagenet_a
from evaluators.stored_cifar import CIFAR10_1_FILES, CIFAR10C, load_cifar10_1
from evaluators.stylized import IMAGENET_IMAGES
from evaluators.textures import open_dictionary
from grid.estimate import checkpoint_bytes
from grid.plan import Plan
from trainables.data.cifar import CLASSES, OTHER_SIZES, archived, list_cifar10, load_cifar10
from trainables.data.folders import check_classes
from trainables.data.listing import (
    GIBIBYTE,
    DataSource,
    ImageList,
    list_by_class,
    list_splits,
    passed_over_text,
    unused_test_folder,
)
from trainables.data.scan import Opened, Scan
from trainables.networks import classifier_named, count_parameters
from trainables.scale import Scale

Level = Literal["ok", "warning", "error"]
COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "red"}
SCAN_FILE = "scan.parquet"
LEAST_FREE_BYTES = GIBIBYTE
IMAGENET_TRAIN_IMAGES = 1_281_167
NAMED = 3


@dataclass(frozen=True)
class Finding:
    """What one look found, and where it is wrong what to do."""

    subject: str
    level: Level
    text: str


@dataclass
class Examination:
    """All findings.

    `manifest` names the data by every file's set, path below it and size; arrays, whose size says
    nothing of what they hold, by their content. `skipped`: the damaged images, as paths below the
    data, that the run does without.
    """

    findings: list[Finding] = field(default_factory=list)
    manifest: str = ""
    skipped: frozenset[str] = frozenset()

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
        table = Table("Looked at", "", "Found")
        for finding in self.findings:
            level = f"[{COLOURS[finding.level]}]{finding.level}[/]"
            # A folder's name may read as markup.
            table.add_row(finding.subject, level, escape(finding.text))
        console.print(table)
        if self.manifest:
            console.print(f"Manifest of the data: {self.manifest}")


def examine(scale: Scale, source: DataSource, plan: Plan, *, results: Path) -> Examination:
    """Look at the data, the disk, the memory and the device; nothing here raises ValueError."""
    examination = Examination()
    if source.root is not None:
        _Data(scale, source, examination, Scan(results / SCAN_FILE)).examine()
    examination.findings += [*_disk(scale, plan, results), *_device()]
    return examination


@dataclass
class _Data:
    """The part of an examination that opens files; `files` gathers the manifest."""

    scale: Scale
    source: DataSource
    examination: Examination
    scan: Scan
    files: dict[str, int | str] = field(default_factory=dict)

    @cached_property
    def splits(self) -> tuple[ImageList, ImageList]:
        """The train and the held-out images, listed once for all that is looked at."""
        listed = list_cifar10 if self.scale.name == "cifar10" else list_splits
        return listed(self.source)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The data's classes; CIFAR-10's archive has no folders of theirs."""
        return CLASSES if self.scale.name == "cifar10" else self.splits[0].class_names

    def examine(self) -> None:
        looks = {
            "images": self._splits,
            "imagenet-a": self._natural,
            "imagenet-c": self._corruptions,
            "imagenet-stylized": self._stylized,
            "textures": self._textures,
            "cifar10-c": self._cifar10_c,
            "cifar10.1": self._cifar10_1,
        }
        for subject, look in looks.items():
            root = self.source.root if subject == "images" else self.source.folders.get(subject)
            if root is None:
                continue
            try:
                for level, text in look(root):
                    self._find(subject, level, text)
            except ValueError as error:
                self._find(subject, "error", str(error))
            except OSError as error:
                self._find(subject, "error", f"{root} cannot be read: {error.strerror or error}")
        listed = "\n".join(f"{path} {size}" for path, size in sorted(self.files.items()))
        self.examination.manifest = hashlib.sha256(listed.encode()).hexdigest()[:12]
        try:
            self.scan.save()
        except OSError:
            # The look at the disk says so; without the file the next scan opens all again.
            return

    def _find(self, subject: str, level: Level, text: str) -> None:
        self.examination.findings.append(Finding(subject, level, text))

    def _splits(self, root: Path) -> Iterator[tuple[Level, str]]:
        if self.scale.name == "cifar10" and (archived(root) or self.source.download):
            data = load_cifar10(self.scale, replace(self.source, cache=None))
            # torchvision has compared the files with their published MD5.
            self.files["CIFAR-10"] = len(data.train) + len(data.held_out)
            yield "ok", f"{len(data.train):,} and {len(data.held_out):,} images as published"
            return
        train, held_out = self.splits
        names = train.class_names
        yield "ok", f"{len(names)} classes, {len(train):,} to train, {len(held_out):,} held out"
        if not len(train):
            yield "error", f"{root} has no train/: there is nothing to train on"
        check_classes(self.scale, train)
        published = len(train) == IMAGENET_TRAIN_IMAGES and len(held_out) == IMAGENET_IMAGES
        if self.scale.name == "imagenet" and not published:
            many = f"{IMAGENET_TRAIN_IMAGES:,} and {IMAGENET_IMAGES:,}"
            yield "warning", f"{len(train):,} and {len(held_out):,} images; as published {many}"
        if unused := unused_test_folder(root):
            yield "warning", unused
        # Where a share is held out both splits are of one folder, and name the same.
        for passed_over in dict.fromkeys((train.passed_over, held_out.passed_over)):
            yield from _passed_over(root, passed_over)
        lacking = set(range(len(names))) - set(held_out.labels)
        if lacking:
            first = [names[k] for k in sorted(lacking)[:NAMED]]
            yield "warning", f"{len(lacking)} classes have no held-out images; first: {first}"
        yield from self._opened(train, held_out)
        yield from self._untaught()

    def _untaught(self) -> Iterator[tuple[Level, str]]:
        """Look for classes that nothing is left of to train on once the damaged are skipped."""
        train, _ = self.splits
        if self.examination.skipped:
            train, _ = list_splits(without_damaged(self.source, self.examination))
        lacking = sorted(set(range(len(train.class_names))) - set(train.labels))
        if lacking and len(train):
            first = [train.class_names[k] for k in lacking[:NAMED]]
            many = f"{len(lacking)} classes have no image to train on; first: {first}"
            yield "error", f"{many}: add images, or remove their folders"

    def _opened(self, *splits: ImageList) -> Iterator[tuple[Level, str]]:
        small: list[str] = []
        damaged: list[str] = []
        decoded = 0
        for number, split in enumerate(splits):
            for path, opened in zip(split.paths, self._open(split, "images"), strict=True):
                if opened.problem:
                    damaged.append(path)
                elif not self._fits(opened):
                    small.append(f"{path} ({opened.width} x {opened.height})")
                decoded += 3 * opened.width * opened.height if number == 0 else 0
        if damaged:
            yield self._damaged(splits[0].root, damaged)
        if small:
            yield self._small(splits[0].root, small)
        decoded += 3 * self.scale.image_size**2 * len(splits[-1])
        yield _memory(decoded, self.source)

    def _damaged(self, root: Path, damaged: list[str]) -> tuple[Level, str]:
        classes = Counter(path.split("/")[-2] for path in damaged)
        named = f"{root / damaged[0]} (class {damaged[0].split('/')[-2]})"
        many = f"{len(damaged)} unreadable images in {len(classes)} classes, the first {named}"
        if self.source.skip_damaged:
            self.examination.skipped = frozenset(damaged)
            return "warning", f"{many}: skipped"
        return "error", f"{many}: replace them, or --skip-damaged goes on without them"

    def _fits(self, opened: Opened) -> bool:
        size = self.scale.image_size
        if self.scale.name == "cifar10":
            return opened.width == opened.height == size
        return min(opened.width, opened.height) >= size

    def _small(self, root: Path, small: list[str]) -> tuple[Level, str]:
        size = self.scale.image_size
        first = f"the first {root / small[0]}"
        if self.scale.name == "cifar10":
            many = f"{len(small)} images are not {size} x {size} px, {first}"
            return "error", f"{many}: {OTHER_SIZES}"
        many = f"{len(small)} images are smaller than {size} px, {first}"
        if self.scale.name == "imagenet":
            return "warning", f"{many}: they are enlarged, as in the study"
        return "error", f"{many}: give a smaller --image-size, or remove them"

    def _natural(self, root: Path) -> Iterator[tuple[Level, str]]:
        images = list_by_class(root, self.class_names)
        level: Level = "ok"
        if self.scale.name == "imagenet":
            check_imagenet_a(images)
            level = "ok" if len(images) == IMAGENET_A_IMAGES else "warning"
        present = len(set(images.labels))
        yield level, f"{len(images):,} images of {present} classes (as published: 7,500 of 200)"
        yield from _passed_over(root, images.passed_over)
        yield from self._sound(images, "imagenet-a")

    def _corruptions(self, root: Path) -> Iterator[tuple[Level, str]]:
        kinds = stored_kinds(root)
        counts: Counter[int] = Counter()
        passed_over: list[str] = []
        for part in (f"{kind}/{severity}" for kind, severity in product(kinds, SEVERITIES)):
            images = list_by_class(root / part, self.class_names, complete=True)
            counts[len(images)] += 1
            passed_over += [f"{part}/{path}" for path in images.passed_over]
            yield from self._sound(images, f"imagenet-c/{part}", side=self.scale.image_size)
        yield from _passed_over(root, passed_over)
        if len(counts) > 1:
            yield "error", f"{root}: its kinds and severities hold {sorted(counts)} images"
        else:
            yield "ok", f"{len(kinds)} kinds, 5 severities, {min(counts):,} images each"

    def _stylized(self, root: Path) -> Iterator[tuple[Level, str]]:
        images = list_by_class(root / "val", self.class_names, complete=True)
        wrong = self.scale.name == "imagenet" and len(images) != IMAGENET_IMAGES
        yield ("error" if wrong else "ok"), f"{len(images):,} images (as published: 50,000)"
        yield from _passed_over(root / "val", images.passed_over)
        yield from self._sound(images, "imagenet-stylized/val", side=self.scale.image_size)

    def _textures(self, root: Path) -> Iterator[tuple[Level, str]]:
        dictionary = open_dictionary(root, self.scale)
        self.files["textures"] = dictionary.digest
        classes = len(dictionary.classes)
        yield "ok", f"{dictionary.clusters} textures of each of {classes} classes"

    def _cifar10_c(self, root: Path) -> Iterator[tuple[Level, str]]:
        stored = CIFAR10C.open(root)
        self._digest("cifar10-c", root, stored.files())
        yield "ok", f"{len(stored.kinds)} kinds, 5 severities, {stored.per_severity:,} images each"

    def _cifar10_1(self, root: Path) -> Iterator[tuple[Level, str]]:
        yield "ok", f"{len(load_cifar10_1(root)):,} images"
        self._digest("cifar10.1", root, CIFAR10_1_FILES)

    def _digest(self, stored: str, root: Path, names: Iterable[str]) -> None:
        """Enter a stored set's arrays in the manifest."""
        for name in names:
            with (root / name).open("rb") as file:
                self.files[f"{stored}/{name}"] = hashlib.file_digest(file, "sha256").hexdigest()

    def _sound(
        self, images: ImageList, place: str, *, side: int | None = None
    ) -> Iterator[tuple[Level, str]]:
        """Open a stored set's images; say which are damaged, or not of the side it wants.

        place: the set, and where in it the images lie, as the manifest has them.
        """
        found = list(zip(images.paths, self._open(images, place), strict=True))
        damaged = [path for path, opened in found if opened.problem]
        if damaged:
            level: Level = "warning" if self.source.skip_damaged else "error"
            named = f"the first {images.root / damaged[0]}"
            yield level, f"{len(damaged)} unreadable images, {named}: replace, or --skip-damaged"
        odd = [p for p, o in found if side and not o.problem and {o.width, o.height} != {side}]
        if odd:
            yield "error", f"{len(odd)} images are not {side} px, the first {images.root / odd[0]}"

    def _open(self, images: ImageList, place: str) -> list[Opened]:
        opened = self.scan.open(images.root, images.paths)
        for path, found in zip(images.paths, opened, strict=True):
            self.files[f"{place}/{path}"] = found.bytes
        return opened


def _passed_over(root: Path, paths: Sequence[str]) -> Iterator[tuple[Level, str]]:
    if paths:
        yield "warning", passed_over_text(root, paths)


def _memory(decoded: int, source: DataSource) -> tuple[Level, str]:
    wanted = f"decoded the images take {decoded / GIBIBYTE:.2f} GiB"
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if decoded > source.memory_bytes:
        files = f"{wanted}, more than --data-memory: they are read from files"
        if source.workers:
            return "ok", files
        return "warning", f"{files}, by one process of each trial: give --data-workers N"
    if decoded > available:
        return "warning", f"{wanted}, and {available / GIBIBYTE:.1f} are free: lower --data-memory"
    return "ok", f"{wanted} and are kept in memory"


def _disk(scale: Scale, plan: Plan, results: Path) -> Iterator[Finding]:
    there = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "error", f"{there} is read-only: give --results another folder")
        return
    free = shutil.disk_usage(there).free
    wanted = _checkpoint_bytes(scale, plan)
    text = f"{free / GIBIBYTE:.1f} GiB free, checkpoints take up to {wanted / GIBIBYTE:.1f}"
    if free < max(wanted, LEAST_FREE_BYTES):
        text = f"{results}: {text}: make room, or give --results a folder on another disk"
        yield Finding("disk", "error" if free < LEAST_FREE_BYTES else "warning", text)
    else:
        yield Finding("disk", "ok", text)


def _checkpoint_bytes(scale: Scale, plan: Plan) -> int:
    """Return what the plan's checkpoints take, with the optimizer's moments, beside the weights."""
    sizes: dict[str, int] = {}
    for model in {trial.recipe.model for trial in plan}:
        with torch.device("meta"):
            sizes[model] = 4 * count_parameters(classifier_named(model, scale))
    return sum(checkpoint_bytes(trial.recipe, sizes[trial.recipe.model]) for trial in plan)


def _device() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads; no GPU")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        memory = torch.cuda.get_device_properties(index).total_memory / GIBIBYTE
        halves = "bf16 and fp16" if torch.cuda.is_bf16_supported() else "fp16, no bf16"
        yield Finding("device", "ok", f"{name}, {memory:.0f} GiB, mixed precision by {halves}")


def without_damaged(source: DataSource, examination: Examination) -> DataSource:
    """Return the source that passes over the damaged images."""
    return replace(source, skipped=examination.skipped) if examination.skipped else source
