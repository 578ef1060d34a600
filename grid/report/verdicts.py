"""What the ledgers say beyond single scores: paired comparisons and red flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa

from evaluators.ledger import from_parquet
from evaluators.paired import Paired, compare, image_scores
from evaluators.red_flags import is_checked, red_flags
from grid.report.tables import digests_of
from grid.studies import Column, Row, Table
from trainables.tracking import Tracker, TrialRun

ATTACKS = ("health", "pgd", "autoattack-small", "autoattack")
KEPT_LEDGERS = 256
MOST_ROWS = 100  # of more, each against the first says less than the effects of the axes


@dataclass(frozen=True)
class Comparison:
    """One row of a table against its first row, column by column, in shares."""

    label: str
    cells: tuple[Paired | None, ...]


class Verdicts:
    """The ledgers of the runs, read when they are asked for."""

    def __init__(self, tracker: Tracker, runs: Mapping[str, TrialRun]) -> None:
        self._tracker, self._runs = tracker, runs
        self._read = lru_cache(KEPT_LEDGERS)(self._fetch)

    def comparisons(self, table: Table, seeds: int) -> tuple[Comparison, ...]:
        """Compare each row with the first, on the images that both were asked about.

        Rows that share no judged column with it are left out, and tables of very many rows.
        """
        reference, *others = table.rows if len(table.rows) <= MOST_ROWS else table.rows[:1]
        found = (
            Comparison(
                row.label,
                tuple(self.compare(row, reference, column, seeds) for column in table.columns),
            )
            for row in others
        )
        return tuple(comparison for comparison in found if any(comparison.cells))

    def red_flags(self, digests: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
        """Return why attacks are not to be believed, for every trial whose attacks were judged.

        A trial with an empty list was looked at and found sound; the second value are those that
        were not asked what tells misleading gradients.
        """
        found, unchecked = {}, []
        for digest in digests:
            ledgers = [self._read(digest, name) for name in ATTACKS]
            if known := [ledger for ledger in ledgers if ledger is not None]:
                found[digest] = red_flags(known)
                unchecked += [] if is_checked(known) else [digest]
        return found, unchecked

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
        except ValueError as error:
            where = f"{run.artifact_uri}/ledgers/{evaluator}.parquet"
            raise ValueError(f"{where}: {error}; restore it, or delete run {run.run_id}") from None
