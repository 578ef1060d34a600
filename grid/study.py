"""A study is a TOML file: bases, axes, tables, published figures and claims. It runs no code.

`grid/studies/` has the shipped ones. A user's file has the same powers; unless it says otherwise
it extends the paper's, whose bases and curricula it then knows.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from evaluators import EVALUATORS, column_named, evaluator_of
from grid.axes import AXES, Axes, Library, check_settings, with_axes
from trainables.models import check_family
from trainables.recipe import CurriculumRow, Frozen, Recipe, problem, unknown

if TYPE_CHECKING:
    from evaluators.base import Column

FOLDER = Path(__file__).parent / "studies"
STUDIES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
DEFAULT = "bai2021"
SCALE = "imagenet"  # whose values a study states
Mode = Literal["product", "one-at-a-time"]
Test = Literal["ahead", "behind", "level", "no gain", "none survive", "collapses"]
ALONE = ("none survive", "collapses")  # tests of one row
AxisValue = str | int | float | list[dict[str, int | float]] | dict[str, int | float | str]
Place = tuple[str, str]  # a table and the label of one of its rows
Figure = tuple[float, str]  # a published figure in percent, and its source


@dataclass(frozen=True)
class Row:
    """One row of a table: a label and the recipe behind it."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Table:
    """Cells laid out beside the published figures.

    `columns` are names of scores. `shown`: the columns as they are for a study's data, in a report.
    """

    name: str
    question: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    published: Mapping[tuple[str, str], Figure] = field(default_factory=dict)
    plots: tuple[str, ...] = ()
    shown: tuple[Column, ...] = ()


def _frozen_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _place(value: Any) -> Any:
    table, slash, label = value.partition("/") if isinstance(value, str) else ("", "", "")
    if not slash:
        raise ValueError(f"{value!r} is not a row: write 'TABLE/label'")
    return table, label


class Claim(Frozen):
    """A claim: a row minus another, `of`, in a column of the row's table.

    ahead, behind: the difference is above or below 0. level: within five points of 0. no gain:
    not more than five points above it. none survive: the row itself is not. collapses: the row's
    training does. `also`: further labels of a row and another in the same tables, which differ as
    the first two do; the claim is of the mean over these pairs. `published`: the published
    difference in points, where it is stated as one. `headline`: where the study's subject is
    compared, for the answer to its question; `sign` -1: a difference above 0 speaks against it.
    """

    says: str
    test: Test
    row: Annotated[Place, BeforeValidator(_place)]
    of: Annotated[Place, BeforeValidator(_place)] = ("", "")
    column: str = ""
    published: float | None = None
    headline: str = ""
    sign: Literal[1, -1] = 1
    also: Annotated[
        tuple[Annotated[tuple[str, str], BeforeValidator(_frozen_list)], ...],
        BeforeValidator(_frozen_list),
    ] = ()

    @property
    def pairs(self) -> tuple[tuple[Place, Place], ...]:
        """Return each row with the one that it is compared with."""
        others = (((self.row[0], ours), (self.of[0], theirs)) for ours, theirs in self.also)
        return ((self.row, self.of), *others)


@dataclass(frozen=True)
class Study:
    """A named set of recipes with the tables they serve.

    `evaluators` judge every trial, beside those that the tables' columns need. `placement` maps a
    family to where its trials' placement differs. `settings` are axes that every trial and every
    teacher has so, whatever other axes bring along. `subject`: what the headlines are about;
    `answer`: the published answer to the title, a sentence.
    """

    name: str
    title: str = ""
    source: str = ""
    tables: tuple[Table, ...] = ()
    base: Recipe | None = None
    axes: Axes | None = None
    mode: Mode = "product"
    evaluators: tuple[str, ...] = ("clean", "pgd", "health")
    placement: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    subject: str = ""
    answer: str = ""
    library: Library = field(default_factory=Library)


class PlacementOfFamily(Frozen):
    """How the trials of one family are placed; the command's options stand for the rest."""

    workers: int | None = Field(None, ge=1)
    cpus: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)


class PublishedEntry(Frozen):
    """Published figures in a file: values by row, one for each of the columns, in percent."""

    source: str
    columns: list[str]
    figures: dict[str, list[float]]


class TableEntry(Frozen):
    """A table in a file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    question: str
    columns: list[str]
    rows: list[dict[str, AxisValue]]
    published: list[PublishedEntry] = Field([])
    plots: list[Literal["size"]] = Field([])


class StudyFile(Frozen):
    """What a study's file may hold."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    title: str = ""
    source: str = ""
    extends: str = DEFAULT
    bases: dict[str, dict[str, AxisValue]] = Field({})
    curricula: dict[str, list[dict[str, int | float]]] = Field({})
    base: str | None = None
    set: dict[str, AxisValue] = Field({})
    axes: dict[str, list[AxisValue]] = Field({})
    mode: Mode = "product"
    evaluators: list[str] | None = None
    placement: dict[Annotated[str, AfterValidator(check_family)], PlacementOfFamily] = Field({})
    tables: list[TableEntry] = Field([])
    claims: list[Claim] = Field([])
    subject: str = ""
    answer: str = ""


def load_study(name_or_file: str) -> Study:
    """Return a study by name or from a TOML file; ValueError says which key is wrong and why."""
    path = _path_of(name_or_file, Path())
    parsed = _read(path)
    with _at(f"study file {path}"):
        study = _study(parsed, _library(parsed, path))
        if path.parent != FOLDER:
            _check_scores(study)
    return study


@cache
def base_named(name: str) -> Recipe:
    """Return a base of the paper's study."""
    return load_study(DEFAULT).library.bases[name]


@contextmanager
def _at(key: str) -> Iterator[None]:
    """Say in a ValueError under which key it was raised."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {problem(error)}") from None


def _path_of(name_or_file: str, folder: Path) -> Path:
    if name_or_file in STUDIES:
        return FOLDER / f"{name_or_file}.toml"
    if Path(name_or_file).suffix != ".toml":
        known = (*STUDIES, "the path of a .toml file")
        raise ValueError(unknown("study", name_or_file, known))
    return folder / name_or_file


def _read(path: Path) -> StudyFile:
    try:
        return StudyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"study file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"study file {path}: {problem(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"study file {path} is not TOML: {error}") from None


def _library(parsed: StudyFile, path: Path, below: tuple[Path, ...] = ()) -> Library:
    """Return a file's bases and curricula beside those of the study that it extends.

    below: the files that extend it.
    """
    inherited, files = Library(), (*below, path.resolve())
    if parsed.extends:
        with _at("extends"):
            above = _path_of(parsed.extends, path.parent)
            if above.resolve() in files:
                raise ValueError(f"{above} extends itself")
            inherited = _library(_read(above), above, files)
    curricula = dict(inherited.curricula)
    curricula |= {
        name: tuple(
            CurriculumRow.model_validate({"epoch": epoch, **row}) for epoch, row in enumerate(rows)
        )
        for name, rows in parsed.curricula.items()
    }
    bases = dict(inherited.bases)
    for name, values in parsed.bases.items():
        with _at(f"bases.{name}"):
            bases[name] = _base(values, Library(bases, curricula))
    return Library(bases, curricula)


def _base(values: Mapping[str, Any], library: Library) -> Recipe:
    """Return a base: one above it with axes set, or a recipe of its own fields."""
    changes = dict(values)
    if "extends" in changes:
        return with_axes(_extended(changes.pop("extends"), library), changes, library)
    if wrong := [axis for axis in changes if axis not in AXES]:
        raise ValueError(unknown("axis", wrong[0], (*AXES, "extends")))
    fields = {name: changes[name] for name in Recipe.model_fields.keys() & changes}
    recipe = Recipe.model_validate({"scale": SCALE, **fields})
    return with_axes(recipe, {k: v for k, v in changes.items() if k not in fields}, library)


def _extended(name: Any, library: Library) -> Recipe:
    if name not in library.bases:
        raise ValueError(unknown("base", str(name), library.bases))
    return library.bases[name]


def _study(parsed: StudyFile, library: Library) -> Study:
    axes = {axis: tuple(values) for axis, values in parsed.axes.items()}
    if wrong := [axis for axis in (*parsed.set, *axes) if axis not in AXES]:
        raise ValueError(unknown("axis", wrong[0], AXES))
    check_settings(parsed.set, axes)
    base = None if parsed.base is None else _extended(parsed.base, library)
    if base is None and (axes or not parsed.tables):
        raise ValueError("axes need a base" if axes else "it has neither a base nor tables")
    for axis, value in parsed.set.items():
        bases = (base, *library.bases.values()) if base else tuple(library.bases.values())
        _check_value(bases, axis, value, library)
    evaluators = parsed.evaluators
    if evaluators is None:
        evaluators = ["clean", "pgd"] if base else []
    if wrong := [name for name in evaluators if name not in EVALUATORS]:
        raise ValueError(f"evaluators: {unknown('evaluator', wrong[0], EVALUATORS)}")
    _check_once("table", [entry.name for entry in parsed.tables])
    tables = tuple(_table(entry, library) for entry in parsed.tables)
    _check_claims(parsed.claims, {table.name: table for table in tables})
    return Study(
        name=parsed.name,
        title=parsed.title,
        source=parsed.source,
        tables=tables,
        base=base,
        axes=axes if base else None,
        mode=parsed.mode,
        evaluators=tuple(evaluators),
        placement={k: v.model_dump(exclude_none=True) for k, v in parsed.placement.items()},
        settings=parsed.set,
        claims=tuple(parsed.claims),
        subject=parsed.subject,
        answer=parsed.answer,
        library=library,
    )


def _check_value(bases: Iterable[Recipe], axis: str, value: Any, library: Library) -> None:
    """Raise ValueError where no recipe can have a value; which trials can, the plan says."""
    errors = []
    for recipe in bases:
        try:
            with_axes(recipe, {axis: value}, library)
        except ValueError as error:
            errors.append(error)
            continue
        return
    about_fields_together = (
        isinstance(errors[0], ValidationError) and not errors[0].errors()[0]["loc"]
    )
    if not about_fields_together:
        text = problem(errors[0])
        raise ValueError(f"set.{text}" if text.startswith(axis) else f"set.{axis}: {text}")


def _table(entry: TableEntry, library: Library) -> Table:
    with _at(f"table {entry.name}"):
        for name in entry.columns:
            evaluator_of(name)
        rows = tuple(_row(row, library) for row in entry.rows)
        _check_once("row", [row.label for row in rows])
        table = Table(
            entry.name, entry.question, rows, tuple(entry.columns), plots=tuple(entry.plots)
        )
        return replace(table, published=dict(_figures(entry, table)))


def _row(entry: Mapping[str, Any], library: Library) -> Row:
    changes = dict(entry)
    label, base = changes.pop("label", ""), changes.pop("base", "")
    with _at(f"row {label!r}"):
        if not label or not isinstance(label, str):
            raise ValueError("its label is missing, or no text")
        return Row(label, with_axes(_extended(base, library), changes, library))


def _figures(entry: TableEntry, table: Table) -> Iterator[tuple[tuple[str, str], Figure]]:
    for published in entry.published:
        for label, values in published.figures.items():
            with _at(f"published figures of {label!r}"):
                if len(values) != len(published.columns):
                    raise ValueError(
                        f"{len(values)} for {len(published.columns)} columns, "
                        f"{', '.join(published.columns)}"
                    )
                for column, value in zip(published.columns, values, strict=True):
                    _check_cell(table, label, column)
                    yield (label, column), (value, published.source)


def _check_cell(table: Table, label: str, column: str = "") -> None:
    """Raise ValueError where a table has no such row or column; "": no column is meant."""
    labels = [row.label for row in table.rows]
    if label not in labels:
        raise ValueError(f"table {table.name}: {unknown('row', label, labels)}")
    if column and column not in table.columns:
        raise ValueError(f"table {table.name}: {unknown('column', column, table.columns)}")


def _check_once(kind: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{kind} {twice[0]!r} is there twice")


def _check_claims(claims: Iterable[Claim], tables: Mapping[str, Table]) -> None:
    for claim in claims:
        with _at(f"claim {claim.says!r}"):
            if (claim.test in ALONE) != (claim.of == ("", "")):
                needs = "is of one row" if claim.test in ALONE else "needs a second row"
                raise ValueError(f"test {claim.test!r} {needs}: `of`")
            if claim.test != "collapses" and not claim.column:
                raise ValueError(f"test {claim.test!r} needs a column")
            for table, label in {place for pair in claim.pairs for place in pair} - {("", "")}:
                if table not in tables:
                    raise ValueError(unknown("table", table, tables))
                _check_cell(tables[table], label, claim.column)


def _check_scores(study: Study) -> None:
    """Raise ValueError where an evaluator has no such score; it imports those of the columns."""
    for table in study.tables:
        for name in table.columns:
            with _at(f"table {table.name}: columns"):
                column_named(name)
