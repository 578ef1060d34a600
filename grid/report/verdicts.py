"""What the ledgers say beyond single scores: paired comparisons, red flags and example images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageChops

from evaluators import CHECKED, EVALUATORS
from evaluators.base import Column
from evaluators.health import is_checked, red_flags
from evaluators.intervals import (
    ImageScores,
    Paired,
    compare,
    image_scores,
    minus_none,
    notes_on_rest,
)
from evaluators.ledger import from_parquet, scores_as_metrics, scores_of
from evaluators.transfer import TRANSFER
from grid.plan import Plan, Trial
from grid.report.tables import FilledTable, saturation
from grid.table import Row
from trainables.data.listing import WORDNET_ID
from trainables.store.tracking import DAMAGED_LEDGER, STOPPED, Tracker, TrialRun

ATTACKS = ("health", *(n for n in EVALUATORS if n.startswith(CHECKED)))
CACHED_LEDGERS = 256
MOST_ROWS = 100  # of more, each against the first says less than the effects of the axes
MODELS = 4  # whose images the gallery shows
MIDDLE = 128  # grey
T = TypeVar("T")
SMALL_CHANGE = 32  # of 255: a change of an image that is shown magnified


@dataclass(frozen=True)
class Health:
    """Whether the attacks on models are to be believed, by the models' names.

    flags: why not, of every model with a judged attack; empty where it is sound. unchecked: models
    on which nothing looks for misleading gradients. waiting: the attacks of a model that are not
    judged yet, so that it is neither flagged nor cleared by them. bounds: what may not survive of
    the images that the last attacks spared.
    """

    flags: Mapping[str, list[str]]
    unchecked: tuple[str, ...]
    waiting: Mapping[str, list[str]]
    bounds: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def standing(self) -> str:
        """Say in a sentence how many models have a red flag, and how many are not judged yet."""
        flagged = sum(map(bool, self.flags.values()))
        text = f"{flagged} of {len(self.flags)} models whose attacks were judged have a red flag"
        return f"{text}; {len(self.waiting)} not judged yet." if self.waiting else f"{text}."


class Verdicts:
    """The runs of a study, by digest, and their ledgers, which are read when they are needed."""

    def __init__(self, tracker: Tracker, runs: Mapping[str, TrialRun]) -> None:
        self.tracker, self.runs = tracker, runs
        self.ledger = lru_cache(CACHED_LEDGERS)(self._ledger)

    def read_scores(self, trials: Iterable[Trial]) -> None:
        """Add each ledger's scores, with intervals, to its run's metrics.

        A cell whose ledger is damaged or missing counts as not judged, here and in MLflow.
        """
        for run in (self.runs[t.digest] for t in trials if t.digest in self.runs):
            for evaluator in list(run.cells):
                scores = self._read(run, evaluator, scores_of)
                if scores is not None and evaluator in EVALUATORS:  # not along the way
                    run.metrics |= scores_as_metrics(scores)

    def is_judged(self, digest: str, evaluator: str) -> bool:
        """Say whether a cell has a ledger."""
        return digest in self.runs and evaluator in self.runs[digest].cells

    def _ledger(self, digest: str, evaluator: str) -> pa.Table | None:
        """Return a cell's ledger; None where it is not judged."""
        if not self.is_judged(digest, evaluator):
            return None
        read = self._read(self.runs[digest], evaluator, from_parquet)
        if read and evaluator == TRANSFER:  # it keeps every image, too many to remember them
            rows, nothing = read[0], pa.nulls(len(read[0]), pa.binary())
            return rows.set_column(rows.column_names.index("image"), "image", nothing)
        return read and read[0]

    def _read(self, run: TrialRun, evaluator: str, read: Callable[[bytes], T]) -> T | None:
        """Return what a cell's ledger holds; None, and the cell is forgotten, where it is damaged.

        A ledger that another command has written meanwhile is read in its place.
        """
        while evaluator in run.cells:
            try:
                return read(self.tracker.ledger(run, evaluator))
            except ValueError:
                self.tracker.forget_cell(run, evaluator, DAMAGED_LEDGER)
        return None

    def difference(self, rows: Sequence[Row], column: Column) -> Paired | None:
        """Return a row minus a second in a column, or minus 0; None where one is not judged."""
        ours, *theirs = (self._scores(row, column) for row in rows)
        if not (ours and all(theirs)):
            return None
        return compare(ours, *theirs) if theirs else minus_none(ours)

    def saturations(self, table: FilledTable) -> list[str]:
        """Say of each column where all rows that are judged, two at least, are saturated alike."""
        ends = []
        for column in table.shown:
            shares = [
                fmean(fmean(seed.values()) for seed in scores)
                for row in table.rows
                if (scores := self._scores(row, column))
            ]
            end = saturation(shares, column) if len(shares) > 1 else ""
            ends.append(end and f"saturated, at the {end}")
        return ends

    def _scores(self, row: Row, column: Column) -> list[ImageScores]:
        """Return the image scores of every seed; nothing where one lacks."""
        ledgers = [self.ledger(digest, column.evaluator) for digest in row.digests]
        scores = [image_scores(ledger, column.score) for ledger in ledgers if ledger is not None]
        known = [score for score in scores if score is not None]
        return known if len(known) == len(ledgers) else []

    def comparisons(self, table: FilledTable) -> dict[str, list[Paired | None]]:
        """Compare each row with the first, on the images on which both were judged.

        By label, a difference per column. Rows that share no judged column with the first are left
        out, and tables of very many rows.
        """
        reference, *others = table.rows if len(table.rows) <= MOST_ROWS else table.rows[:1]
        compared = {
            row.label: [self.difference((row, reference), column) for column in table.shown]
            for row in others
        }
        return {label: cells for label, cells in compared.items() if any(cells)}

    def health(self, trials: Iterable[Trial]) -> Health:
        """Say for every trial with attacks whether they can be believed.

        A trial that collapsed or was stopped early has no model to attack.
        """
        flags, unchecked, waiting, bounds = {}, [], {}, {}
        for trial in trials:
            attacks = [name for name in ATTACKS if name in trial.evaluators]
            ledgers = {name: self.ledger(trial.digest, name) for name in ATTACKS}
            known = [ledger for ledger in ledgers.values() if ledger is not None]
            if known:
                flags[trial.name] = red_flags(known)
                bounds[trial.name] = [n for ledger in known for n in notes_on_rest(ledger)]
            if known and not {"health", "audit"} & {*attacks} and not is_checked(known):
                unchecked.append(trial.name)
            lacking = [name for name in attacks if ledgers[name] is None]
            run = self.runs.get(trial.digest)
            if lacking and not (run and run.outcome in ("collapsed", STOPPED)):
                waiting[trial.name] = lacking
        bounds = {model: notes for model, notes in bounds.items() if notes}
        return Health(flags, tuple(unchecked), waiting, bounds)


@dataclass(frozen=True)
class Shot:
    """An image as a data URI, its title and, where it was judged, the answer and if it is right."""

    title: str
    source: str
    answer: str = ""
    right: bool = True


Gallery = dict[tuple[str, str], dict[str, list[Shot]]]  # by image id and class, by model


def gallery(plan: Plan, verdicts: Verdicts, classes: Sequence[str]) -> Gallery:
    """Return the example images that the ledgers of a few unlike models hold.

    classes: their names by label; a class without one goes by its label.
    """
    readable = dict(enumerate(_readable(classes)))

    def name(label: int) -> str:
        return readable.get(label, str(label))

    shown: Gallery = {}
    for trial in _unlike(plan, verdicts):
        for image_id, rows in _examples(trial, verdicts).items():
            if "clean" in rows:
                example = shown.setdefault((image_id, name(rows["clean"]["label"])), {})
                example[trial.name] = list(_shots(rows, name))
    return dict(sorted(shown.items()))


def _readable(classes: Sequence[str]) -> list[str]:
    """Say in words what WordNet ids stand for; other names are left as they are."""
    if not classes or not all(map(WORDNET_ID.fullmatch, classes)):
        return list(classes)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return [info.label_name_to_description(name).partition(",")[0] for name in classes]


def _unlike(plan: Plan, verdicts: Verdicts) -> list[Trial]:
    """Choose of each family, trained cleanly or adversarially, the trial with most ledgers."""

    def judged(trial: Trial) -> int:
        return sum(verdicts.is_judged(trial.digest, name) for name in trial.evaluators)

    best: dict[tuple[bool, str], Trial] = {}
    for trial in filter(judged, sorted(plan, key=judged, reverse=True)):
        best.setdefault((trial.recipe.adversary is not None, trial.recipe.family), trial)
    return [best[kind] for kind in sorted(best)][:MODELS]


def _examples(trial: Trial, verdicts: Verdicts) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the ledgers' rows that hold an image, by image and question, cheap ones first."""
    examples: dict[str, dict[str, dict[str, Any]]] = {}
    for evaluator in (name for name in EVALUATORS if name in trial.evaluators):
        ledger = verdicts.ledger(trial.digest, evaluator)
        if ledger is not None:
            for row in ledger.filter(pc.is_valid(ledger["image"])).to_pylist():
                examples.setdefault(row["image_id"], {})[row["question"]] = row
    return examples


def _shots(rows: Mapping[str, Mapping[str, Any]], name: Callable[[int], str]) -> Iterator[Shot]:
    for question, row in rows.items():
        remark, _, label = (row["stage"] or "").partition(":")  # such as texture:3
        about = f" ({remark} {name(int(label))})" if label.isdigit() else ""
        right = row["predicted"] == row["label"]
        title = question.replace("_", " ") + about
        yield Shot(title, _data_uri(row["image"]), name(row["predicted"]), right)
        if question != "clean":
            yield from _small_change(rows["clean"]["image"], row["image"])


def _small_change(clean: bytes, changed: bytes) -> Iterator[Shot]:
    """Show what an attack added, grey where nothing, magnified to the full range."""
    before, after = (Image.open(io.BytesIO(png)).convert("RGB") for png in (clean, changed))
    most = int(np.asarray(ImageChops.difference(after, before)).max())
    if before.size == after.size and 0 < most <= SMALL_CHANGE:
        factor, buffer = MIDDLE // most, io.BytesIO()
        ImageChops.subtract(after, before, 1 / factor, MIDDLE).save(buffer, "png")
        yield Shot(f"added, x {factor}", _data_uri(buffer.getvalue()))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
