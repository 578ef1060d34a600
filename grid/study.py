"""A study is a TOML file: bases, axes, tables, published figures and claims. It runs no code.

`grid/studies/` has the shipped ones. A user's file has the same powers; unless it says otherwise
it knows the paper's bases and curricula.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)

from evaluators import EVALUATORS, column_named
from grid.axes import Library, at_key, check_axis, with_axes, with_origin
from grid.space import BASE, Mode, Sample, Space, conditions_of
from grid.table import (
    SCALE,
    Claim,
    Name,
    Row,
    Table,
    base_of,
    check_claim,
    check_once,
    recipe_or_base,
)
from trainables.models import check_family, model_named
from trainables.recipe import (
    Arguments,
    CurriculumRow,
    Frozen,
    Recipe,
    check_model,
    one_of,
    unknown,
)
from trainables.scale import Scale

FOLDER = Path(__file__).parent / "studies"
STUDIES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
DEFAULT = "bai2021"
QUICK = "quick"  # the default of a quick look


def _every(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = re.fullmatch(r"every ([1-9]\d*) epochs?", value)
    if not words:
        raise ValueError(f"{value!r} is not like 'every 10 epochs', nor a list of epochs")
    return int(words[1])


Axis = Annotated[str, AfterValidator(check_axis)]
Count = Annotated[int, Field(ge=1)]


def _bases(value: Any, info: ValidationInfo) -> Any:
    """Return recipes by name: bases, rows as 'TABLE/label', or 'TABLE/*' for all of a table."""
    if isinstance(value, Recipe):
        return {value.model: value}
    if not isinstance(value, str | tuple):
        return value
    tables: tuple[Table, ...] = info.data.get("tables", ())
    rows = {f"{table.name}/{row.label}": row.recipe for table in tables for row in table.rows}
    library, chosen = info.context or Library(), {}
    known = {**library.bases, **rows}
    for name in map(str, (value,) if isinstance(value, str) else value):
        whole = [row for row in rows if name.endswith("/*") and row.startswith(name[:-1])]
        for one in whole or [name]:
            if one not in known:
                raise ValueError(unknown("base", one, known))
            chosen[one] = known[one]
    return chosen


def _by_label(values: Any) -> Any:
    """Return an axis's values by label, which is the value itself in a list."""
    if not isinstance(values, tuple | dict):
        raise ValueError(f"an axis has a list of values, or a table of them by label, not {values}")
    if not values:
        raise ValueError("an axis has at least one value")
    return {str(value): value for value in values} if isinstance(values, tuple) else values


def _sample(value: Any) -> Any:
    return {"size": value} if isinstance(value, int) else value


class PlacementOfFamily(Frozen):
    """How the trials of one family are placed; the command's options stand for the rest."""

    workers: int | None = Field(None, ge=1)
    cpus: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)


class EarlyStop(Frozen):
    """A rule of Ray Tune's that ends trials behind others early; epochs are of full size.

    grace: no trial ends before it. reduction: asha compares after `grace`, `grace * reduction`, ...
    epochs, and the best of so many go on. median: a trial goes on while its best figure is not
    below the median of the others' means since `grace`.
    """

    rule: Annotated[str, one_of("rule", ("asha", "median"))]
    grace: int = Field(10, ge=1)
    reduction: int = Field(3, ge=2)

    @model_validator(mode="after")
    def _is_of_the_rule(self) -> EarlyStop:
        if self.rule == "median" and "reduction" in self.model_fields_set:
            raise ValueError("reduction belongs to the rule 'asha': leave it out of 'median'")
        return self

    def first(self, recipe: Recipe, scale: Scale) -> int:
        """Return after which epoch at a scale a recipe can first be stopped, 0 where never."""
        grace = max(1, round(self.grace * scale.epochs_factor))
        return grace if grace < recipe.epochs else 0


class Relative(Frozen):
    """A small model that stands for one of the study at scales that cut models down.

    It is trained by the recipe of the other, whose arguments stay where `model_args` has none; by
    that of `base` where the other's is one of published weights.
    """

    model: Annotated[str, AfterValidator(check_model)]
    model_args: Arguments = Field({})
    base: Annotated[Recipe | None, BeforeValidator(recipe_or_base)] = None

    def stand_in(self, recipe: Recipe) -> Recipe:
        """Return the recipe of this model in the place of another's; ValueError."""
        if recipe.init and not self.base:
            raise ValueError(
                f"{self.model} has no place for the weights {recipe.origin}: give the relative of "
                f"{recipe.model} a base, which says how it is trained"
            )
        trained = self.base.replace(seed=recipe.seed) if self.base else recipe
        kinds = {model_named(name).settings == "cnn" for name in (trained.model, self.model)}
        if len(kinds) > 1:  # whose rates at a scale are in another proportion to the study's
            raise ValueError(
                f"{self.model} is not of the kind of {trained.model}, whose rates and batches it "
                "would be trained with: give the relative a base of its kind"
            )
        arguments = {**trained.model_args, **self.model_args}
        return trained.replace(model=self.model, model_args=arguments)


class Study(Frozen):
    """A named set of recipes with the tables they serve; its fields are the keys of a file.

    A file that states what it `extends` has all of it, but the keys that it states itself: tables
    are changed by name, their rows by label, and claims by what they say; `drop` leaves out tables,
    rows as 'TABLE/label', or what a pattern as '*' matches. Otherwise it knows the bases and
    curricula of the paper's study alone.

    `base`: one or several bases of a grid, or rows as 'TABLE/label'; `axes`, `mode`, `exclude`,
    `only_with` and `sample` say what the grid spans (`grid.space`); an axis has a list of values,
    or a table of them by label. `replicates`: seeds of every trial unless the command says
    otherwise; else rows of headline claims have those of the scale, others one. `evaluators` judge
    every trial, beside those that the tables' columns need. `placement` maps a family to
    where its trials' placement differs. `early_stop` ends trials that are behind others; false, the
    default: none. `settings`, in a file `set`, are axes that every trial and every teacher has so,
    whatever other axes bring along. `reduced`: models are cut down as at scale digits, whatever the
    scale. `reduced_epochs`: epochs for 100 of the study where models are cut down, unless
    `--epochs` says how many. `checkpoints`: the epochs, or every how many, after which the
    evaluators of every trial judge it while it trains. `relatives`: by a model's name what stands
    for it where models are cut down. `subject`: what the headlines are about; `answer`: the
    published answer to the title, a sentence.
    """

    name: Name
    title: str = ""
    source: str = ""
    extends: str = DEFAULT
    drop: tuple[str, ...] = ()
    bases: dict[str, Recipe] = Field({})
    curricula: dict[str, tuple[CurriculumRow, ...]] = Field({})
    tables: tuple[Table, ...] = ()
    base: Annotated[dict[str, Recipe], BeforeValidator(_bases)] = Field({})
    settings: dict[Axis, Any] = Field({}, validation_alias="set")
    axes: dict[Axis, Annotated[dict[str, Any], BeforeValidator(_by_label)]] = Field({})
    mode: Mode = "product"
    exclude: tuple[dict[str, Any], ...] = ()
    only_with: dict[str, dict[str, Any]] = Field({})
    sample: Annotated[Sample | None, BeforeValidator(_sample)] = None
    replicates: int | None = Field(None, ge=1)
    evaluators: tuple[Annotated[str, one_of("evaluator", EVALUATORS)], ...] | None = None
    placement: dict[Annotated[str, AfterValidator(check_family)], PlacementOfFamily] = Field({})
    early_stop: Annotated[EarlyStop | None, BeforeValidator(lambda v: v or None)] = None
    claims: tuple[Claim, ...] = ()
    reduced: bool = False
    reduced_epochs: int = Field(0, ge=0)
    checkpoints: Annotated[int | tuple[Count, ...], BeforeValidator(_every)] = ()
    relatives: dict[Annotated[str, AfterValidator(check_model)], Relative] = Field({})
    subject: str = ""
    answer: str = ""
    _folder: Path = PrivateAttr(Path())  # of its file

    @property
    def library(self) -> Library:
        """The bases, curricula and weights files that it may name."""
        return Library(self.bases, self.curricula, self._folder)

    @property
    def for_all(self) -> tuple[str, ...]:
        """The evaluators of every trial; unless stated, a grid's are clean and pgd."""
        if self.evaluators is not None:
            return self.evaluators
        return ("clean", "pgd") if self.base else ()

    @property
    def space(self) -> Space:
        """What its grid spans."""
        choices = {BASE: dict.fromkeys(self.base), **self.axes}
        exclude, only_with = [], {}
        for number, entry in enumerate(self.exclude):
            with at_key(f"exclude.{number}"):
                exclude.append(conditions_of(entry, choices))
        for axis, entry in self.only_with.items():
            with at_key(f"only_with.{axis}"):
                if axis not in self.axes:
                    raise ValueError(unknown("axis of this grid", axis, self.axes))
                only_with[axis] = conditions_of(entry, choices)
        return Space(
            self.base, self.axes, self.library, self.mode, tuple(exclude), only_with, self.sample
        )

    def checkpoints_of(self, recipe: Recipe, scale: Scale) -> tuple[int, ...]:
        """Return the epochs, before the last, after which a recipe is judged at a scale."""
        stated, factor = self.checkpoints, scale.epochs_factor
        if isinstance(stated, int):
            step = max(1, round(stated * factor))
            return tuple(range(step, recipe.epochs, step))
        epochs = {max(1, round(epoch * factor)) for epoch in stated}
        return tuple(sorted(epoch for epoch in epochs if epoch < recipe.epochs))

    def workers_of(self, family: str, default: int) -> int:
        """Return how many workers a family's trials have, unless stated as the command does."""
        stated = self.placement.get(family)
        return (stated and stated.workers) or default

    def cut_down(self, recipe: Recipe, scale: Scale) -> Recipe:
        """Return a recipe, and those that it needs, with relatives where the scale cuts models."""
        if scale.depth_divisor == 1:
            return recipe
        recipe = recipe.with_prerequisites(lambda other: self.cut_down(other, scale))
        relative = self.relatives.get(recipe.model)
        return relative.stand_in(recipe) if relative else recipe

    def _spans_a_grid(self) -> None:
        lengths = {axis: len(values) for axis, values in self.axes.items()}
        if self.mode == "zip" and len(set(lengths.values())) > 1:
            counts = ", ".join(f"{axis} {length}" for axis, length in lengths.items())
            raise ValueError(
                f"mode 'zip' takes the axes in step: each has as many values ({counts})"
            )
        if self.sample and self.mode != "product":
            raise ValueError(f"a sample is of mode 'product', not of {self.mode!r}")
        _ = self.space  # what it excludes is among what it spans

    @model_validator(mode="after")
    def _holds_together(self) -> Study:
        if not self.base and (self.axes or not self.tables):
            raise ValueError("axes need a base" if self.axes else "it has neither base nor tables")
        self._spans_a_grid()
        check_once("table", [table.name for table in self.tables])
        tables = {table.name: table for table in self.tables}
        recipes = [*self.bases.values(), *(row.recipe for t in self.tables for row in t.rows)]
        models = {recipe.model for recipe in (*recipes, *self.base.values())}
        models |= {m for axis in ("model", "family") for m in self.axes.get(axis, {}).values()}
        for model in self.relatives:
            if model not in models:
                raise ValueError(f"relatives: {unknown('model of the study', model, models)}")
        if self.drop and not (self.extends and "extends" in self.model_fields_set):
            raise ValueError("drop leaves out parts of a study: state which one this `extends`")
        for claim in self.claims:
            with at_key(f"claim {claim.says!r}"):
                check_claim(claim, tables)
        return self


def load_study(name_or_file: str) -> Study:
    """Return a study by name or from a TOML file; ValueError says which key is wrong and why."""
    path = _path_of(name_or_file, Path())
    study = _study(path)
    if path.parent != FOLDER:
        for table in study.tables:
            for name in table.columns:
                with at_key(f"study file {path}: table {table.name}: columns"):
                    column_named(name)  # imports the evaluator, which takes seconds
    return study


def _study(path: Path) -> Study:
    entries = _read(path)
    with at_key(f"study file {path}"):
        library = _library(entries, path)
        above = (
            _study(_path_of(entries["extends"], path.parent)) if entries.get("extends") else None
        )
        if above:
            entries = _with_inherited(entries, above, library)
        entries |= {"bases": library.bases, "curricula": library.curricula}
        study = Study.model_validate(entries, context=library)
        study._folder = path.parent
    return _with_published(study, above) if above else study


def _with_inherited(entries: dict[str, Any], above: Study, library: Library) -> dict[str, Any]:
    """Return a file's entries beside those of the study that it extends; ValueError.

    Claims and published figures are not among them: they follow where the rows are known.
    """
    dropped = {
        name for pattern in entries.get("drop", ()) for name in _matching(str(pattern), above)
    }
    inherited: dict[str, dict[str, Any]] = {
        table.name: {
            "name": table.name,
            "question": table.question,
            "columns": table.columns,
            "rows": tuple(r for r in table.rows if f"{table.name}/{r.label}" not in dropped),
        }
        for table in above.tables
        if table.name not in dropped
    }
    tables = _TABLES.validate_python(entries.get("tables", ()))
    check_once("table", [str(table.get("name")) for table in tables])
    for number, table in enumerate(tables):
        name = str(table.get("name", number))
        rows = inherited[name]["rows"] if name in inherited else ()
        with at_key(f"tables.{number}"):
            stated = _TABLES.validate_python(table.get("rows", ()))
            changed = {"rows": _changed_rows(rows, stated, library)}
        inherited[name] = {**inherited.get(name, {}), **table, **changed}
    keys = {str(f.validation_alias or name): name for name, f in Study.model_fields.items()}
    inheritable = keys.items() - {("name", "name"), ("claims", "claims"), ("drop", "drop")}
    return {
        **{k: getattr(above, name) for k, name in inheritable if name in above.model_fields_set},
        **entries,
        "tables": tuple(inherited.values()),
    }


def _matching(pattern: str, study: Study) -> list[str]:
    """Return the tables and rows of a study that a word to drop is about; ValueError: none is."""
    rows = [f"{table.name}/{row.label}" for table in study.tables for row in table.rows]
    names = [*(table.name for table in study.tables), *rows]
    matching = [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]
    if not matching:
        raise ValueError(f"drop: {unknown('table or row', pattern, names)}")
    return matching


def _changed_rows(
    rows: tuple[Row, ...], stated: tuple[Any, ...], library: Library
) -> tuple[Any, ...]:
    """Return a table's rows with those that a file states: changed by label, or added.

    A row that states a base or weights is a new one in the place of the other.
    """
    changed: dict[str, Any] = {row.label: row for row in rows}
    labels = [str(entry.get("label", number)) for number, entry in enumerate(stated)]
    check_once("row", labels)
    for label, entry in zip(labels, stated, strict=True):
        if label in changed and not entry.keys() & {"base", "weights"}:
            changes = {axis: value for axis, value in entry.items() if axis != "label"}
            with at_key(f"row {label!r}"):
                changed[label] = Row(label, with_axes(changed[label].recipe, changes, library))
        else:
            changed[label] = entry
    return tuple(changed.values())


def _with_published(study: Study, above: Study) -> Study:
    """Return a study with the published figures and claims of the one that it extends.

    Of a row whose recipe is another the published figures are not its own; a claim that lacks a row
    or its column is left out.
    """
    known = {(t.name, row.label): row.recipe for t in above.tables for row in t.rows}
    same = {
        (t.name, row.label)
        for t in study.tables
        for row in t.rows
        if known.get((t.name, row.label)) == row.recipe
    }
    figures = {t.name: t.published for t in above.tables}
    tables = []
    for table in study.tables:
        published = {
            (label, column): figure
            for (label, column), figure in figures.get(table.name, {}).items()
            if (table.name, label) in same and column in table.columns
        }
        tables.append(table.model_copy(update={"published": published | table.published}))
    by_name, claims = {table.name: table for table in tables}, []
    for claim in above.claims:
        with suppress(ValueError):
            check_claim(claim, by_name)
            unchanged = claim.places <= same
            claims.append(claim if unchanged else claim.model_copy(update={"published": None}))
    restated = {claim.says for claim in study.claims}
    inherited = (claim for claim in claims if claim.says not in restated)
    return study.model_copy(update={"tables": tuple(tables), "claims": (*inherited, *study.claims)})


@cache
def base_named(name: str) -> Recipe:
    """Return a base of the paper's study."""
    return load_study(DEFAULT).bases[name]


def _path_of(name_or_file: str, folder: Path) -> Path:
    if name_or_file in STUDIES:
        return FOLDER / f"{name_or_file}.toml"
    if Path(name_or_file).suffix != ".toml":
        known = (*STUDIES, "the path of a .toml file")
        raise ValueError(unknown("study", name_or_file, known))
    return folder / name_or_file


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"study file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"study file {path} is not TOML: {error}") from None
    return {key: _frozen(value) for key, value in entries.items()}


def _frozen(value: Any) -> Any:
    """Return the value with tuples for lists."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


_TABLES = TypeAdapter(tuple[dict[str, Any], ...])
_BASES = TypeAdapter(dict[str, dict[str, Any]])
_CURRICULA = TypeAdapter(dict[str, tuple[dict[str, Any], ...]])


def _library(entries: Mapping[str, Any], path: Path, below: tuple[Path, ...] = ()) -> Library:
    """Return a file's bases and curricula beside those of the study that it extends.

    below: the files that extend it.
    """
    inherited, files = Library(), (*below, path.resolve())
    if extended := entries.get("extends", DEFAULT):
        with at_key("extends"):
            above = _path_of(str(extended), path.parent)
            if above.resolve() in files:
                raise ValueError(f"{above} extends itself")
            inherited = _library(_read(above), above, files)
    curricula, bases, folder = dict(inherited.curricula), dict(inherited.bases), path.parent
    with at_key("curricula"):
        for name, rows in _CURRICULA.validate_python(entries.get("curricula", {})).items():
            numbered = ({"epoch": epoch, **row} for epoch, row in enumerate(rows))
            curricula[name] = tuple(map(CurriculumRow.model_validate, numbered))
    with at_key("bases"):
        stated = _BASES.validate_python(entries.get("bases", {}))
        for name, values in stated.items():
            with at_key(name):
                _check_above(values, stated.keys() - bases.keys())
                bases[name] = _new_base(values, Library(bases, curricula, folder))
    return Library(bases, curricula, folder)


def _check_above(values: Mapping[str, Any], below: Collection[str]) -> None:
    """Raise ValueError where a base needs one that comes below it, or itself."""
    for key in ("extends", "teacher", "warm_start"):
        if str(values.get(key)) in below:
            raise ValueError(
                f"{key} {values[key]!r} is this base or one below it: a base names bases above it, "
                "so that none needs itself"
            )


def _new_base(values: Mapping[str, Any], library: Library) -> Recipe:
    """Return a base: one above it with axes set, or a recipe of its own fields."""
    changes = with_origin(values, library.folder)
    if "extends" in changes:
        return with_axes(base_of(changes.pop("extends"), library), changes, library)
    for axis in changes:
        check_axis(axis)
    names = [name for name in Recipe.model_fields if name in changes and name != "warm_start"]
    fields = {name: changes.pop(name) for name in names}
    return with_axes(Recipe.model_validate({"scale": SCALE, **fields}), changes, library)
