"""What the ledgers say beyond single scores: paired comparisons and red flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from evaluators.base import Column
from evaluators.health import is_checked, red_flags
from evaluators.intervals import Paired, compare, image_scores
from evaluators.ledger import from_parquet
from grid.plan import Trial
from grid.report.tables import digests_of
from grid.study import Row, Table
from trainables.store.storage import DamagedError
from trainables.store.tracking import DAMAGED_LEDGER, Tracker, TrialRun

ATTACKS = ("health", "pgd", "autoattack-small", "autoattack")
KEPT_LEDGERS = 256
MOST_ROWS = 100  # of more, each against the first says less than the effects of the axes


@dataclass(frozen=True)
class Comparison:
    """One row of a table against its first row, column by column, in shares."""

    label: str
    cells: tuple[Paired | None, ...]


@dataclass(frozen=True)
class Health:
    """Whether the attacks on models are to be believed, by the models' names.

    flags: why not, of every model with a judged attack; empty where it was found sound. unchecked:
    models that are not asked what tells misleading gradients. waiting: which attacks are asked and
    not judged yet, so that their model is neither flagged nor cleared by them.
    """

    flags: Mapping[str, list[str]]
    unchecked: tuple[str, ...]
    waiting: Mapping[str, list[str]]

    @property
    def standing(self) -> str:
        """Say in a sentence how many models were looked at, and how many are not judged yet."""
        flagged = sum(map(bool, self.flags.values()))
        looked = f"{flagged} of {len(self.flags)} models whose attacks were judged have a red flag"
        return f"{looked}; {len(self.waiting)} not judged yet." if self.waiting else f"{looked}."


class Verdicts:
    """The ledgers of the runs, read when they are asked for."""

    def __init__(self, tracker: Tracker, runs: Mapping[str, TrialRun]) -> None:
        self._tracker, self._runs = tracker, runs
        self._read = lru_cache(KEPT_LEDGERS)(self._fetch)

    def forget_damaged(self, trials: Iterable[Trial]) -> None:
        """Count cells whose ledger is damaged or missing as not judged, here and in MLflow."""
        for run in (self._runs[t.digest] for t in trials if t.digest in self._runs):
            for evaluator in list(run.cells):
                try:
                    self._tracker.ledger(run, evaluator)
                except DamagedError:
                    self._tracker.forget_cell(run, evaluator, DAMAGED_LEDGER)

    def comparisons(self, table: Table, seeds: int) -> tuple[Comparison, ...]:
        """Compare each row with the first, on the images that both were asked about.

        Rows that share no judged column with it are left out, and tables of very many rows.
        """
        reference, *others = table.rows if len(table.rows) <= MOST_ROWS else table.rows[:1]
        compared = (
            Comparison(
                row.label,
                tuple(self.compare(row, reference, column, seeds) for column in table.shown),
            )
            for row in others
        )
        return tuple(comparison for comparison in compared if any(comparison.cells))

    def health(self, trials: Iterable[Trial]) -> Health:
        """Say what tells of the attacks on every trial whose attacks are asked.

        A collapsed trial has no model to attack.
        """
        flags, unchecked, waiting = {}, [], {}
        for trial in trials:
            attacks = [name for name in ATTACKS if name in trial.evaluators]
            ledgers = {name: self._read(trial.digest, name) for name in ATTACKS}
            known = [ledger for ledger in ledgers.values() if ledger is not None]
            if known:
                flags[trial.name] = red_flags(known)
            if known and "health" not in attacks and not is_checked(known):
                unchecked.append(trial.name)
            lacking = [name for name in attacks if ledgers[name] is None]
            if lacking and not self._is_collapsed(trial.digest):
                waiting[trial.name] = lacking
        return Health(flags, tuple(unchecked), waiting)

    def _is_collapsed(self, digest: str) -> bool:
        return digest in self._runs and self._runs[digest].outcome == "collapsed"

    def compare(self, row: Row, reference: Row, column: Column, seeds: int) -> Paired | None:
        """Return a row minus another in a column; None where either is not judged."""
        ours = self._scores(digests_of(row.recipe, seeds), column)
        other = self._scores(digests_of(reference.recipe, seeds), column)
        return compare(ours, other) if ours and other else None

    def is_judged(self, digest: str, evaluator: str) -> bool:
        """Say whether a cell has a ledger."""
        return digest in self._runs and evaluator in self._runs[digest].cells

    def ledger(self, digest: str, evaluator: str) -> pa.Table | None:
        """Return a cell's ledger; None where it is not judged."""
        return self._read(digest, evaluator)

    def _scores(self, digests: Sequence[str], column: Column) -> list[dict[str, float]]:
        """Return the image scores of every seed; nothing where one lacks."""
        ledgers = [self._read(digest, column.evaluator) for digest in digests]
        scores = [image_scores(ledger, column.score) for ledger in ledgers if ledger is not None]
        known = [score for score in scores if score is not None]
        return known if len(known) == len(digests) else []

    def _fetch(self, digest: str, evaluator: str) -> pa.Table | None:
        if not self.is_judged(digest, evaluator):
            return None
        run = self._runs[digest]
        try:
            return from_parquet(self._tracker.ledger(run, evaluator))[0]
        except ValueError:
            self._tracker.forget_cell(run, evaluator, DAMAGED_LEDGER)
            return None
