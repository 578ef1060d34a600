"""Tables filled from MLflow: our value and interval beside the published figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scipy.stats import t as student

from evaluators import EVALUATORS, column_named, columns_of
from evaluators.base import Column
from evaluators.intervals import with_trainings
from grid.plan import Plan
from grid.study import Row, Study, Table
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_named
from trainables.store.tracking import TrialRun

STORED = ("natural", "corruptions", "stylized")  # evaluators with images of their own


@dataclass(frozen=True)
class FilledCell:
    """One cell of a table, in percent, or the reason why it has no value."""

    state: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    published: float | None = None
    source: str = ""

    def text(self) -> str:
        """Write our side of the cell: '96.1 [94.3, 97.4]', or why there is nothing."""
        if self.value is None or self.low is None or self.high is None:
            return self.state
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    def published_text(self) -> str:
        """Write the published side of the cell, empty where there is no figure."""
        return "" if self.published is None else f"{self.published:g}"

    @property
    def difference(self) -> float | None:
        """Return ours minus the published figure, in points."""
        if self.value is None or self.published is None:
            return None
        return self.value - self.published

    @property
    def kind(self) -> str:
        """Return the state in a word: done, damaged, collapsed, failed, blocked, stopped, ..."""
        return self.state.partition(":")[0].split()[0]


@dataclass(frozen=True)
class FilledRow:
    """One model of a table with its cells; `run_id` is its MLflow run, if there is one.

    images: how many it was trained on and how many were held out, where that was noted.
    """

    label: str
    recipe: Recipe
    run_id: str
    cells: tuple[FilledCell, ...]
    images: Mapping[str, int] = field(default_factory=dict)

    @property
    def trained_on(self) -> str:
        """Write the number of train images: '1,200', or '5,000 of CIFAR-10's 50,000'."""
        scale = scale_named(self.recipe.scale)
        return _of_all(self.images.get("train", 0), scale.data_set.train_images, scale)


@dataclass(frozen=True)
class FilledTable:
    """One table of the study, filled as far as the runs go.

    judged_on: how many images each column's models were judged on, '64 of 597'; '' where none was.
    """

    name: str
    question: str
    columns: tuple[str, ...]
    rows: tuple[FilledRow, ...]
    judged_on: tuple[str, ...]


def tables_of(study: Study, plan: Plan, runs: Mapping[str, TrialRun]) -> tuple[Table, ...]:
    """Return a plan's tables with the columns `shown` that exist for its data.

    A study without tables gets one of all its trials.
    """
    scores = {name for t in plan if t.digest in runs for name in runs[t.digest].metrics}
    scale = plan.trials[0].recipe.scale if plan.trials else ""
    tables = plan.tables or (_table_of_all(study, plan),)
    return tuple(
        table.model_copy(
            update={
                "shown": tuple(
                    filter(None, (column_named(c).at(scale, scores) for c in table.columns))
                )
            }
        )
        for table in tables
    )


def digests_of(recipe: Recipe, seeds: int) -> list[str]:
    """Return the digests of a row's trials, one per seed."""
    return [recipe.with_seed(seed).digest() for seed in range(seeds)]


def fill_tables(
    tables: Iterable[Table], seeds: int, runs: Mapping[str, TrialRun]
) -> list[FilledTable]:
    """Fill tables as far as the runs go."""
    return [_fill(table, runs, seeds) for table in tables]


def _table_of_all(study: Study, plan: Plan) -> Table:
    names = {name for trial in plan for name in trial.evaluators}
    columns = tuple(c for name in EVALUATORS if name in names for c in columns_of(name))
    first = [trial for trial in plan if trial.recipe.seed == 0] or list(plan)
    rows = tuple(Row(trial.name, trial.recipe) for trial in first)
    question = "Every trial of the study"
    return Table(name=study.name, question=question, rows=rows, columns=columns)


def _fill(table: Table, runs: Mapping[str, TrialRun], seeds: int) -> FilledTable:
    rows = []
    for row in table.rows:
        trained = [runs.get(digest) for digest in digests_of(row.recipe, seeds)]
        cells = tuple(_cell(table, row, column, trained) for column in table.shown)
        first = next(filter(None, trained), None)
        run_id, images = (first.run_id, first.images) if first else ("", {})
        rows.append(FilledRow(row.label, row.recipe, run_id, cells, images))
    titles = tuple(column.title for column in table.shown)
    judged_on = tuple(_judged_on(column, i, rows) for i, column in enumerate(table.shown))
    return FilledTable(table.name, table.question, titles, tuple(rows), judged_on)


def _judged_on(column: Column, place: int, rows: Sequence[FilledRow]) -> str:
    counts = sorted({row.cells[place].n for row in rows} - {0})
    if not counts:
        return ""
    text = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    held_out = max(row.images.get("held_out", 0) for row in rows)
    # A stored set of its own is no part of what is held out.
    is_part = column.evaluator not in STORED or column.heading
    return f"{text} of {held_out:,}" if is_part and counts[-1] < held_out else text


def images_text(runs: Iterable[TrialRun], scale: Scale) -> str:
    """Say in a sentence how many images models were trained on and how many were held out."""
    counts = {(r.images["train"], r.images["held_out"]) for r in runs if r.images}
    parts = (
        f"{_of_all(train, scale.data_set.train_images, scale)} (held out: "
        f"{_of_all(held_out, scale.data_set.held_out_images or held_out, scale)})"
        for train, held_out in sorted(counts)
    )
    return f"Images trained on: {'; '.join(parts)}." if counts else ""


def _of_all(count: int, total: int, scale: Scale) -> str:
    if not count:
        return ""
    name = scale.title.partition(",")[0]
    return f"{count:,} of {name}'s {total:,}" if count < total else f"{count:,}"


def _cell(table: Table, row: Row, column: Column, runs: Sequence[TrialRun | None]) -> FilledCell:
    paper, source = table.published.get((row.label, column.name), (None, ""))
    metrics = [run.metrics for run in runs if run and _has_score(run, column)]
    if len(metrics) < len(runs):
        lacking = next(r for r in runs if r is None or not _has_score(r, column))
        return FilledCell(_state(lacking, column), published=paper, source=source)
    value, low, high = over_seeds(metrics, column.score)
    # Every seed is asked about the same images.
    n = int(max(entry[f"{column.score}/n"] for entry in metrics))
    return FilledCell("done", value, low, high, n, paper, source)


def over_seeds(metrics: Sequence[Mapping[str, float]], score: str) -> tuple[float, float, float]:
    """Return value, low and high in percent: of one seed as judged.

    Of several: their mean interval over images, widened by Student's t over the trainings.
    """
    value, low, high = (
        100 * statistics.fmean(entry[score + end] for entry in metrics)
        for end in ("", "/low", "/high")
    )
    if len(metrics) == 1:
        return value, low, high
    spread = 100 * statistics.stdev(entry[score] for entry in metrics) / len(metrics) ** 0.5
    reach = float(student.ppf(0.975, len(metrics) - 1)) * spread
    return value, *with_trainings(value, (low, high), reach)


def _has_score(run: TrialRun, column: Column) -> bool:
    return column.score in run.metrics and not run.is_forgotten(column.evaluator)


def _state(run: TrialRun | None, column: Column) -> str:
    if run is None:
        return "not run yet"
    if run.is_forgotten(column.evaluator):
        return run.failed_cells[column.evaluator]
    if column.evaluator in run.failed_cells:
        return f"failed: {run.failed_cells[column.evaluator]}"
    if run.outcome == "collapsed":
        return f"collapsed: {run.reason}"
    if run.outcome == "failed":
        return f"failed: {run.reason}"
    if run.outcome == "blocked":
        return run.reason
    return run.state if run.outcome == "training" else "not judged yet"
