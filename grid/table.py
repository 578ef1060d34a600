"""A study's tables: rows, columns and published figures, and the claims about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from evaluators import evaluator_of
from grid.axes import Library, at_key, recipe_of_weights, with_axes
from trainables.recipe import Frozen, Recipe, check_known

SCALE = "imagenet"  # of every base: a study states the values of full-size images
ALONE = ("none survive", "collapses")  # tests of one row
Test = Literal["ahead", "behind", "level", "no gain", "none survive", "collapses"]
LEADS: tuple[Test, ...] = ("ahead", "behind")
Figure = tuple[float, str]  # a published figure in percent, and its source


def check_once(kind: str, names: Iterable[str]) -> None:
    """Raise ValueError where a name is there twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{kind} {twice[0]!r} is there twice")


def _check_cell(labels: Sequence[str], columns: Sequence[str], label: str, column: str) -> None:
    """Raise ValueError where a table has no such row or column; "": no column is meant."""
    check_known("row", label, labels)
    if column:
        check_known("column", column, columns)


def _place(value: Any) -> Any:
    table, slash, label = value.partition("/") if isinstance(value, str) else ("", "", "")
    if not slash:
        raise ValueError(f"{value!r} is not a row: write 'TABLE/label'")
    return table, label


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Columns = tuple[Annotated[str, AfterValidator(lambda name: evaluator_of(name) and name)], ...]
Place = Annotated[tuple[str, str], BeforeValidator(_place)]  # a table and the label of a row of it


@dataclass(frozen=True)
class Row:
    """One row of a table: a label, the recipe behind it and with how many seeds it is trained."""

    label: str
    recipe: Recipe
    seeds: int = 1

    @property
    def digests(self) -> list[str]:
        """The digests of its trials, one per seed; without a training there is one."""
        seeds = range(self.seeds if self.recipe.epochs else 1)
        return [self.recipe.with_seed(seed).digest() for seed in seeds]


def _row(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        return value
    changes, library = dict(value), info.context or Library()
    label = changes.pop("label", "")
    with at_key(f"row {label!r}"):
        if not label or not isinstance(label, str):
            raise ValueError("its label is missing, or no text")
        if "weights" in changes:
            return Row(label, recipe_of_weights(changes, library.folder, SCALE))
        if not (base := changes.pop("base", "")):
            raise ValueError(f"a row has weights, or a base: one of {', '.join(library.bases)}")
        return Row(label, with_axes(base_of(base, library), changes, library))


def base_of(name: Any, library: Any) -> Recipe:
    """Return a library's base by name; ValueError."""
    bases: Mapping[str, Recipe] = library.bases
    return bases[check_known("base", str(name), bases)]


def recipe_or_base(value: Any, info: ValidationInfo) -> Any:
    """Return the base of a name, for a field that holds a recipe; ValueError."""
    return base_of(value, info.context) if isinstance(value, str) else value


class PublishedFigures(Frozen):
    """Published figures in a file: values by row, one for each of the columns, in percent."""

    source: str
    columns: tuple[str, ...]
    figures: dict[str, tuple[float, ...]]


class Table(Frozen):
    """Cells laid out beside the published figures, which a file lists by row.

    `columns` are names of scores.
    """

    name: Name
    question: str
    columns: Columns
    rows: tuple[Annotated[Row, BeforeValidator(_row)], ...]
    published: dict[tuple[str, str], Figure] = Field({})

    @field_validator("rows")
    @classmethod
    def _differ(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        check_once("row", [row.label for row in rows])
        if not rows:
            raise ValueError("a table has at least one row")
        return rows

    @field_validator("columns")
    @classmethod
    def _are_columns(cls, columns: Columns, info: ValidationInfo) -> Columns:
        check_once("column", columns)
        if not columns and info.context is not None:  # the report's own of a grid may have none
            raise ValueError("a table has at least one column, the name of a score as 'clean'")
        return columns

    @field_validator("published", mode="before")
    @classmethod
    def _by_cell(cls, entries: Any, info: ValidationInfo) -> Any:
        """Return the figures by row and column; they stand in the file by source."""
        if not isinstance(entries, tuple) or not {"rows", "columns"} <= info.data.keys():
            return entries
        labels, cells = [row.label for row in info.data["rows"]], {}
        with at_key("figures"):
            entries = [PublishedFigures.model_validate(entry) for entry in entries]
        for entry in entries:
            for label, values in entry.figures.items():
                if len(values) != len(entry.columns):
                    columns = ", ".join(entry.columns)
                    raise ValueError(
                        f"{label!r} has {len(values)} for {len(entry.columns)} columns, {columns}"
                    )
                for column, value in zip(entry.columns, values, strict=True):
                    _check_cell(labels, info.data["columns"], label, column)
                    cells[label, column] = (value, entry.source)
        return cells


class Claim(Frozen):
    """A claim: a row minus another, `of`, in a column of the row's table.

    ahead, behind: the difference is above or below 0. level: within five points of 0. no gain:
    not more than five points above it. none survive: the row itself is not. collapses: the row's
    training does. `also`: further labels of a row and another in the same tables, which differ as
    the first two do; the claim is of the mean over these pairs. `published`: the published
    difference in points, where it is stated as one. `headline`: where the study's subject is
    compared, which is `row`, for the answer to its question.
    """

    says: str
    test: Test
    row: Place
    of: Place = ("", "")
    column: str = ""
    published: float | None = None
    headline: str = ""
    also: tuple[tuple[str, str], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[tuple[str, str], tuple[str, str]], ...]:
        """Return each row with the one that it is compared with."""
        others = (((self.row[0], ours), (self.of[0], theirs)) for ours, theirs in self.also)
        return ((self.row, self.of), *others)

    @property
    def places(self) -> set[tuple[str, str]]:
        """The rows that it is about, each with its table."""
        return {place for pair in self.pairs for place in pair} - {("", "")}

    @model_validator(mode="after")
    def _is_complete(self) -> Claim:
        if (self.test in ALONE) != (self.of == ("", "")):
            needs = "is of one row" if self.test in ALONE else "needs a second row"
            raise ValueError(f"test {self.test!r} {needs}: `of`")
        if self.test != "collapses" and not self.column:
            raise ValueError(f"test {self.test!r} needs a column")
        return self


def trainings_compared(rows: Iterable[Row]) -> int:
    """Return by how many trainings of each row rows are compared: as many as all have."""
    return min((row.seeds for row in rows if row.recipe.epochs), default=1)


def check_claim(claim: Claim, tables: Mapping[str, Table]) -> None:
    """Raise ValueError where tables lack a row or the column of a claim."""
    for name, label in claim.places:
        table = tables[check_known("table", name, tables)]
        _check_cell([row.label for row in table.rows], table.columns, label, claim.column)
