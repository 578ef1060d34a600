"""A study is a TOML file: bases, axes, tables, published figures and claims. It runs no code.

`grid/studies/` has the shipped ones. A user's file has the same powers; unless it says otherwise
it knows the paper's bases and curricula.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
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
from grid.axes import Library, at_key, axis_value, check_axis, with_axes, with_origin
from grid.space import BASE, Labels, Mode, Sample, conditions, drawn, size, spanned
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
    check_known,
    check_model,
    one_of,
    with_tuples,
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


def _of_grid(axis: str, info: ValidationInfo) -> str:
    return check_known("axis of this grid", axis, info.data.get("axes", ()))


Axis = Annotated[str, AfterValidator(check_axis)]
Conditions = Annotated[dict[str, tuple[str, ...]], BeforeValidator(conditions)]
Count = Annotated[int, Field(ge=1)]


def _bases(value: Any, info: ValidationInfo) -> Any:
    """Return recipes by name: bases, rows as 'TABLE/label', or what a pattern as 'TABLE/*' is."""
    if isinstance(value, Recipe):
        return {value.model: value}
    if not isinstance(value, str | tuple):
        return value
    tables: tuple[Table, ...] = info.data.get("tables", ())
    rows = {f"{table.name}/{row.label}": row.recipe for table in tables for row in table.rows}
    known = {**(info.context or Library()).bases, **rows}
    names = map(str, (value,) if isinstance(value, str) else value)
    return {one: known[one] for name in names for one in _matching("base", name, known)}


def _matching(kind: str, pattern: str, names: Collection[str]) -> list[str]:
    """Return the names that a name or a pattern as '*' is about; ValueError: none is."""
    matching = [name for name in names if fnmatchcase(name, pattern)]
    return matching if matching and pattern not in names else [check_known(kind, pattern, names)]


def _by_label(values: Any) -> Any:
    """Return an axis's values by label, which is the value itself in a list."""
    if not isinstance(values, tuple | dict):
        raise ValueError(f"an axis has a list of values, or a table of them by label, not {values}")
    if not values:
        raise ValueError("an axis has at least one value")
    return {str(value): value for value in values} if isinstance(values, tuple) else values


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

    docs/study.md explains them. A file that states what it `extends` has all of that study but the
    keys that it states itself; otherwise it knows the bases and curricula of the paper's study.
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
    exclude: tuple[Conditions, ...] = ()  # where a combination has a value of each axis
    only_with: dict[Annotated[str, AfterValidator(_of_grid)], Conditions] = Field({})
    sample: Annotated[
        Sample | None, BeforeValidator(lambda v: {"size": v} if isinstance(v, int) else v)
    ] = None
    replicates: int | None = Field(None, ge=1)
    evaluators: tuple[Annotated[str, one_of("evaluator", EVALUATORS)], ...] | None = None
    placement: dict[Annotated[str, AfterValidator(check_family)], PlacementOfFamily] = Field({})
    early_stop: Annotated[EarlyStop | None, BeforeValidator(lambda v: v or None)] = None
    claims: tuple[Claim, ...] = ()
    reduced: bool = False
    reduced_epochs: int = Field(0, ge=0)
    detect_points: float | None = Field(None, gt=0, lt=100)
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
    def size(self) -> int:
        """How many combinations its grid spans, those that are left out among them."""
        return size({BASE: self.base, **self.axes}, self.mode)

    def combinations(self) -> Iterator[Labels]:
        """Yield each combination once, the base's name in it; of a sample those drawn, in order."""
        yielded, choices = set(), {BASE: self.base, **self.axes}
        sample = self.sample if self.sample and self.size > self.sample.size else None
        for labels in drawn(choices, sample) if sample else spanned(choices, self.mode):
            meant = self._with_their_conditions(labels)
            excluded = any(self._meets(meant, entry) for entry in self.exclude)
            if (key := tuple(meant.items())) not in yielded and not excluded:
                yield meant
            yielded.add(key)

    def label_of(self, labels: Labels, axis: str) -> str:
        """Return the label of a combination on an axis; the base's value where it states none."""
        if axis in labels:
            return labels[axis]
        value = axis_value(self.base[labels[BASE]], axis, self.library)
        return next((label for label, v in self.axes[axis].items() if str(v) == value), value)

    def _with_their_conditions(self, labels: Labels) -> Labels:
        """Return the labels without axes whose conditions do not hold."""
        for axis, needed in self.only_with.items():
            if axis in labels and not self._meets(labels, needed):
                return self._with_their_conditions({a: v for a, v in labels.items() if a != axis})
        return labels

    def _meets(self, labels: Labels, needed: Mapping[str, tuple[str, ...]]) -> bool:
        return all(self.label_of(labels, axis) in values for axis, values in needed.items())

    def detect_at(self, scale: Scale) -> float:
        """Return the difference that claims are to tell at a scale, as a share; 0: not stated."""
        return (self.detect_points or 100 * scale.detect) / 100 if scale.detect else 0.0

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

    @model_validator(mode="after")
    def _spans_a_grid(self) -> Study:
        if not self.base and (self.axes or not self.tables):
            raise ValueError("axes need a base" if self.axes else "it has neither base nor tables")
        lengths = {axis: len(values) for axis, values in self.axes.items()}
        if self.mode == "zip" and len(set(lengths.values())) > 1:
            counts = ", ".join(f"{axis} {length}" for axis, length in lengths.items())
            raise ValueError(f"mode 'zip' takes axes in step: each has as many values ({counts})")
        if self.sample and self.mode != "product":
            raise ValueError(f"a sample is of mode 'product', not of {self.mode!r}")
        return self

    @model_validator(mode="after")
    def _holds_together(self) -> Study:
        check_once("table", [table.name for table in self.tables])
        tables = {table.name: table for table in self.tables}
        rows = (row.recipe for table in self.tables for row in table.rows)
        models = {r.model for r in (*self.bases.values(), *self.base.values(), *rows)}
        models |= {m for axis in ("model", "family") for m in self.axes.get(axis, {}).values()}
        with at_key("relatives"):
            for model in self.relatives:
                check_known("model of the study", model, models)
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
        for claim in study.claims:
            if claim.column and not column_named(claim.column).by_image:
                raise ValueError(
                    f"study file {path}: claim {claim.says!r}: {claim.column} is no mean over "
                    "images, and claims compare models image by image"
                )
    return study


def _study(path: Path, below: tuple[Path, ...] = ()) -> Study:
    """Return the study of a file; below: the files that extend it."""
    entries, above = _read(path), None
    with at_key(f"study file {path}"):
        if extended := entries.get("extends", DEFAULT):
            with at_key("extends"):
                file = _path_of(str(extended), path.parent)
                if file.resolve() in (path.resolve(), *below):
                    raise ValueError(f"{file} extends itself")
                above = _study(file, (*below, path.resolve()))
        library = _library(entries, path.parent, above.library if above else Library())
        if above and "extends" in entries:
            entries = _with_inherited(entries, above, library)
        entries |= {"bases": library.bases, "curricula": library.curricula}
        study = Study.model_validate(entries, context=library)
        study._folder = path.parent
    return _with_published(study, above) if above and "extends" in entries else study


def _with_inherited(entries: dict[str, Any], above: Study, library: Library) -> dict[str, Any]:
    """Return a file's entries beside those of the study that it extends; ValueError.

    Claims and published figures are not among them: they follow where the rows are known.
    """
    rows = [f"{table.name}/{row.label}" for table in above.tables for row in table.rows]
    names, patterns = [*(table.name for table in above.tables), *rows], entries.get("drop", ())
    with at_key("drop"):
        dropped = {n for p in patterns for n in _matching("table or row", str(p), names)}
    tables: dict[str, dict[str, Any]] = {}
    for table in above.tables:
        left = tuple(r for r in table.rows if f"{table.name}/{r.label}" not in dropped)
        if table.name not in dropped:
            fields = {key: getattr(table, key) for key in ("name", "question", "columns")}
            tables[table.name] = {**fields, "rows": left}
    stated = _TABLES.validate_python(entries.get("tables", ()))
    check_once("table", [str(entry.get("name")) for entry in stated])
    for number, entry in enumerate(stated):
        known = tables.get(name := str(entry.get("name", number)), {"rows": ()})
        with at_key(f"tables.{number}"):
            changes = _TABLES.validate_python(entry.get("rows", ()))
            changed = _changed_rows(known["rows"], changes, library)
        tables[name] = {**known, **entry, "rows": changed}
    inherited = {
        str(Study.model_fields[name].validation_alias or name): getattr(above, name)
        for name in above.model_fields_set - {"name", "claims", "drop"}
    }
    return {**inherited, **entries, "tables": tuple(tables.values())}


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
    tables, claims = {table.name: table for table in study.tables}, []
    same = set()
    for table in above.tables:
        if (changed := tables.get(table.name)) is None:
            continue
        labels = {row.label for row in table.rows if row in changed.rows}
        same |= {(table.name, label) for label in labels}
        figures = {
            (label, column): figure
            for (label, column), figure in table.published.items()
            if label in labels and column in changed.columns
        }
        update = {"published": figures | changed.published}
        tables[table.name] = changed.model_copy(update=update)
    restated = {claim.says for claim in study.claims}
    for claim in above.claims:
        with suppress(ValueError):
            check_claim(claim, tables)
            if claim.says not in restated:
                changes = {} if claim.places <= same else {"published": None}
                claims.append(claim.model_copy(update=changes))
    inherited = {"tables": tuple(tables.values()), "claims": (*claims, *study.claims)}
    return study.model_copy(update=inherited)


@cache
def base_named(name: str) -> Recipe:
    """Return a base of the paper's study."""
    return load_study(DEFAULT).bases[name]


def _path_of(name_or_file: str, folder: Path) -> Path:
    if name_or_file in STUDIES:
        return FOLDER / f"{name_or_file}.toml"
    if Path(name_or_file).suffix != ".toml":
        check_known("study", name_or_file, (*STUDIES, "the path of a .toml file"))
    return folder / name_or_file


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"study file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"study file {path} is not TOML: {error}") from None
    return dict(with_tuples(entries))


_TABLES = TypeAdapter(tuple[dict[str, Any], ...])
_BASES = TypeAdapter(dict[str, dict[str, Any]])
_CURRICULA = TypeAdapter(dict[str, tuple[dict[str, Any], ...]])


def _library(entries: Mapping[str, Any], folder: Path, above: Library) -> Library:
    """Return a file's bases and curricula beside those of the study that it extends."""
    curricula, bases = dict(above.curricula), dict(above.bases)
    with at_key("curricula"):
        for name, rows in _CURRICULA.validate_python(entries.get("curricula", {})).items():
            numbered = ({"epoch": epoch, **row} for epoch, row in enumerate(rows))
            curricula[name] = tuple(map(CurriculumRow.model_validate, numbered))
    with at_key("bases"):
        stated = _BASES.validate_python(entries.get("bases", {}))
        for name, values in stated.items():
            with at_key(name):
                for key in ("extends", "teacher", "warm_start"):
                    if (other := str(values.get(key))) in stated.keys() - bases.keys():
                        raise ValueError(
                            f"{key} {other!r} is this base or one below it: a base names bases "
                            "above it, so that none needs itself"
                        )
                bases[name] = _new_base(values, Library(bases, curricula, folder))
    return Library(bases, curricula, folder)


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
