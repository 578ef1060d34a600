"""Tables filled from MLflow: our value and interval beside the published figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pandas as pd

from evaluators import BOUNDED, EVALUATORS, column_named, columns_of, evaluator_of
from evaluators.base import Column
from evaluators.intervals import over_several
from grid.plan import Plan, format_seconds, named
from grid.power import MARGIN
from grid.study import Study
from grid.table import SCALE, Figure, Row, Table
from trainables.data.registry import STORED_SETS
from trainables.scale import Scale
from trainables.store.tracking import STOPPED, TrialRun

Published = Mapping[tuple[str, str], Figure]  # by row and column
DATE = "%Y-%m-%d %H:%M"
RELATIVE = "/mCE"  # an error in relation to AlexNet's
PROVENANCE_LABELS = {"python": "Python", "cpu": "CPU", "gpu": "GPU", "attacks_in": "attacks in"}


@dataclass(frozen=True)
class FilledCell:
    """One cell of a table, in percent, or the reason why it has no value.

    difference: ours minus the published figure, where both are of the same data.
    """

    state: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    published: float | None = None
    source: str = ""
    difference: float | None = None

    def text(self) -> str:
        """Write our side of the cell: '96.1 [94.3, 97.4]', or why there is nothing."""
        if self.value is None or self.low is None or self.high is None:
            return self.state
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def published_text(self) -> str:
        """Write the published side of the cell, empty where there is no figure."""
        return "" if self.published is None else f"{self.published:g}"

    @property
    def kind(self) -> str:
        """Return the state in a word: done, damaged, collapsed, failed, blocked, stopped, ..."""
        return self.state.partition(":")[0].split()[0]


@dataclass(frozen=True)
class FilledRow(Row):
    """One model of a table with its cells; `run` is its first training's, if there is one."""

    cells: tuple[FilledCell, ...] = ()
    run: TrialRun | None = None

    @property
    def name(self) -> str:
        """Return the label with the short digest of the first training, as trials are named."""
        return named(self.label, self.recipe.digest())


@dataclass(frozen=True)
class FilledTable:
    """One table of the study, filled as far as the runs go; shown: its columns for these data."""

    name: str
    question: str
    shown: tuple[Column, ...]
    rows: tuple[FilledRow, ...]
    published: Published = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Return the columns' titles."""
        return [column.title for column in self.shown]

    @property
    def sources(self) -> list[str]:
        """Return where the published figures are from."""
        cells = (cell for row in self.rows for cell in row.cells)
        return [*dict.fromkeys(cell.source for cell in cells if cell.source)]

    @property
    def judged_on(self) -> list[str]:
        """Write on how many images each column's models were judged: '64', '30 to 64' or ''."""
        texts = []
        for place in range(len(self.shown)):
            counts = sorted({row.cells[place].n for row in self.rows} - {0})
            texts.append(" to ".join(f"{n:,}" for n in dict.fromkeys(counts[:1] + counts[-1:])))
        return texts


def tables_of(study: Study, plan: Plan, runs: Mapping[str, TrialRun]) -> list[FilledTable]:
    """Return a plan's tables with the columns that exist for its data, as far as the runs go.

    A study without tables gets one of all its trials. Beside a column that stands in for a
    published set there is no published figure.
    """
    scores = {name for t in plan if t.digest in runs for name in runs[t.digest].metrics}
    scale = plan.trials[0].recipe.scale if plan.trials else ""
    alone = {name: stored.title for name, stored in STORED_SETS.items() if stored.alone}
    absent = {name: alone[name] for name in alone.keys() - plan.evaluators}
    tables = []
    for table in plan.tables or (_table_of_all(study, plan),):
        names = sorted(table.columns, key=_is_secondary)
        columns = (shown_column(name, scale, scores, plan.evaluators) for name in names)
        shown = tuple(replace(c, lacks=absent.get(c.evaluator, "")) for c in columns if c)
        standing_in = {column.name for column in shown if column.stands_in}
        published = {k: v for k, v in table.published.items() if k[1] not in standing_in}
        rows = tuple(_filled(row, shown, published, runs) for row in table.rows)
        tables.append(FilledTable(table.name, table.question, shown, rows, published))
    return tables


def _is_secondary(name: str) -> int:
    """Order columns: clean accuracy, AutoAttack, the standard of attacks, then the others."""
    order = ("clean", "autoattack", "autoattack-small", name.removesuffix("-bounded"))
    return order.index(order[-1])


def shown_column(
    name: str, scale: str, scores: Collection[str] = (), judges: Collection[str] = ()
) -> Column | None:
    """Return a column as a scale shows it, filled by what answers for its evaluator, or None."""
    column = column_named(name).at(scale, scores)
    bounded = BOUNDED.get(evaluator_of(name), "")
    if column is None or bounded not in judges:
        return column
    answering = columns_of(bounded).get(name.replace(column.evaluator, bounded))
    other = answering and answering.at(scale, scores)
    return other and column.answered_by(other)


def _table_of_all(study: Study, plan: Plan) -> Table:
    names = [name for name in EVALUATORS if name in plan.evaluators]
    columns = tuple(column for name in names for column in columns_of(name))
    first = [trial for trial in plan if trial.recipe.seed == 0] or list(plan)
    rows = tuple(Row(trial.name, trial.recipe, plan.seeds) for trial in first)
    question = "Every trial of the study"
    return Table(name=study.name, question=question, rows=rows, columns=columns)


def _filled(
    row: Row, shown: Iterable[Column], published: Published, runs: Mapping[str, TrialRun]
) -> FilledRow:
    trained = [runs.get(digest) for digest in row.digests]
    cells = (_cell(row, c, trained, *published.get((row.label, c.name), (None, ""))) for c in shown)
    run = next(filter(None, trained), None)
    return FilledRow(row.label, row.recipe, row.seeds, tuple(cells), run)


def _cell(
    row: Row, column: Column, runs: Sequence[TrialRun | None], published: float | None, source: str
) -> FilledCell:
    for run in runs:
        known = run and f"{column.score}/n" in run.metrics
        if run is None or not known or run.is_forgotten(column.evaluator):
            return FilledCell(_state(run, column), published=published, source=source)
    metrics = [run.metrics for run in runs if run]
    value, low, high = over_seeds(metrics, column.score)
    # Every seed is judged on the same images.
    n = int(max(entry[f"{column.score}/n"] for entry in metrics))
    comparable = published is not None and row.recipe.scale == SCALE
    difference = value - (published or 0) if comparable else None
    return FilledCell("done", value, low, high, n, published, source, difference)


def _state(run: TrialRun | None, column: Column) -> str:
    if run is None:
        return "not run yet"
    if run.is_forgotten(column.evaluator):
        return run.failed_cells[column.evaluator]
    if column.evaluator in run.failed_cells:
        return f"failed: {run.failed_cells[column.evaluator]}"
    if run.outcome in ("collapsed", "failed", STOPPED):
        return f"{run.outcome}: {run.reason}"
    if run.outcome == "blocked":
        return run.reason
    waiting = f"needs {column.lacks}" if column.lacks else "not judged yet"
    return run.state if run.outcome == "training" else waiting


def saturation(shares: Iterable[float], column: Column) -> str:
    """Return "floor" or "ceiling" where all shares are within five points of the one, else ''.

    There a column cannot tell models apart by more than that, however many images it has. The
    floor of an error is 1.
    """
    right = [1 - share if column.error else share for share in shares]
    ends = {"floor": max(right) <= MARGIN, "ceiling": min(right) >= 1 - MARGIN}
    return next((end for end, reached in ends.items() if reached), "")


def over_seeds(metrics: Sequence[Mapping[str, float]], score: str) -> tuple[float, float, float]:
    """Return value, low and high in percent: of one seed as judged.

    Of several: their mean interval over images, widened by Student's t over the trainings, within
    what a share can be; only an error relative to AlexNet's can be more than 100.
    """
    values = [100 * entry[score] for entry in metrics]
    ends = [(100 * entry[f"{score}/low"], 100 * entry[f"{score}/high"]) for entry in metrics]
    low, high = over_several(values, ends)
    most = math.inf if score.endswith(RELATIVE) else 100.0
    return statistics.fmean(values), max(low, 0.0), min(high, most)


def images_text(runs: Iterable[TrialRun], scale: Scale) -> str:
    """Say in a sentence how many images models were trained on and how many were held out."""
    data_set, name = scale.data_set, scale.title.partition(",")[0]

    def of_all(count: int, total: int) -> str:
        return f"{count:,} of {name}'s {total:,}" if count < total else f"{count:,}"

    counts = sorted({(r.images["train"], r.images["held_out"]) for r in runs if r.images})
    parts = (
        f"{of_all(train, data_set.train_images)} "
        f"(held out: {of_all(held_out, data_set.held_out_images)})"
        for train, held_out in counts
    )
    return f"Images trained on: {'; '.join(parts)}." if counts else ""


def describe_work(runs: Sequence[TrialRun], seconds: float, command: str) -> str:
    """Say when and by which command the runs were made, and the seconds of training and judging."""
    times = [time for run in runs for time in (run.start_time, run.end_time) if time] or [0]
    first, last = (f"{datetime.fromtimestamp(end(times) / 1000, UTC):{DATE}}" for end in (min, max))
    work = f"{format_seconds(seconds)} of training and judging"
    trials = f"{len(runs)} trials, {first} to {last} UTC: {work}." if runs else ""
    return " ".join(filter(None, [trials, command and f"Command: {command}."]))


def describe_provenance(runs: Sequence[TrialRun]) -> str:
    """Say which versions and hardware trained and judged the runs, and where they are mixed."""
    trained = [run.trained for run in runs if run.logged_epochs]
    judged = [run.judged.get(evaluator, {}) for run in runs for evaluator in run.cells]
    alike = judged and all(e in trained for e in judged) and all(e in judged for e in trained)
    by = ["Judged with the same."] if alike else _provenance("Judged", judged, "cells")
    return " ".join([*_provenance("Trained", trained, "trials"), *by])


def _provenance(verb: str, entries: Sequence[Mapping[str, str]], unit: str) -> Iterator[str]:
    """Name what all have in common, then every mix with its numbers."""
    frame = (
        pd.DataFrame(entries)
        .fillna({"attacks_in": "float32"})
        .fillna("unknown")
        .rename(columns=PROVENANCE_LABELS)
    )
    counts = {label: column.value_counts().sort_index() for label, column in frame.items()}
    alike = [f"{label} {count.index[0]}" for label, count in counts.items() if len(count) == 1]
    if entries and (alike or not counts):
        yield f"{verb} with {', '.join(alike) or 'unknown versions'}."
    for label, count in counts.items():
        if len(count) > 1:
            values, numbers = (" and ".join(map(str, part)) for part in (count.index, count))
            yield f"{verb} with {label} {values}: {numbers} {unit}."
