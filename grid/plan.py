"""Recipe x axes -> trials: apply, refuse with a reason, share, order. Pure: no Ray, no clock."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from operator import attrgetter
from typing import Any

from evaluators import EVALUATORS
from grid.studies import (
    ADVERSARIAL_RATE,
    AS_RELEASED,
    BASES,
    BY_RULE,
    CURRICULA,
    Axes,
    Mode,
    Study,
    Table,
    check_settings,
    format_settings,
    problem,
    warmup_notes,
    with_settings,
)
from trainables.recipe import CurriculumRow, Recipe, format_augmentations
from trainables.scale import Scale, scale_named

Asked = tuple[Recipe, str, list[str]]  # a recipe, what it serves, the evaluators that ask it
MOST_RECIPES = 100_000
# The axes that a recipe's description tells of.
DESCRIBED = {
    *("family", "size", "model", "activation", "optimizer", "scheduler", "augmentation", "epochs"),
    *("augmentations", "training", "norm", "protocol", "precision", "seed"),
}


@dataclass(frozen=True)
class Trial:
    """One recipe of a study, the table rows it serves and the evaluators that judge it.

    Its `name` is unlike those of the study's others.
    """

    recipe: Recipe
    digest: str
    name: str
    serves: tuple[str, ...]
    evaluators: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class Refused:
    """A combination of axes that cannot be, and why."""

    combination: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The trials of a study, the longest first, and what was refused.

    `asked` counts the recipes and teachers asked for before equal ones were shared; `tables` hold
    the recipes as they are trained at the scale; `notes` say what was adapted to what is set.
    """

    trials: tuple[Trial, ...]
    refused: tuple[Refused, ...] = ()
    asked: int = 0
    tables: tuple[Table, ...] = ()
    seeds: int = 1
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)


@dataclass
class _Draft:
    recipe: Recipe
    serves: dict[str, None] = field(default_factory=dict)
    evaluators: dict[str, None] = field(default_factory=dict)


def enumerate_trials(
    base: Recipe,
    axes: Axes,
    *,
    mode: Mode = "product",
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Recipe], list[Refused]]:
    """Return every recipe that the axes span over a base, and what was refused.

    product: all combinations. one-at-a-time: the base, then each axis varied alone. `settings`
    are axes that every recipe has so.
    """
    recipes, refused = [], []
    for combination in _combinations(axes, mode):
        try:
            recipes.append(with_settings(base, settings or {}, combination))
        except ValueError as error:
            named = " ".join(f"{axis}={value}" for axis, value in combination.items())
            refused.append(Refused(named, problem(error)))
    return recipes, refused


def _combinations(axes: Axes, mode: Mode) -> Iterable[dict[str, Any]]:
    if mode == "product":
        for values in product(*axes.values()):
            yield dict(zip(axes, values, strict=True))
        return
    yield {}
    for axis, values in axes.items():
        for value in values:
            yield {axis: value}


def build_plan(
    study: Study,
    scale: Scale,
    *,
    tables: Iterable[str] | None = None,
    only: Mapping[str, tuple[str, ...]] | None = None,
    seeds: int = 1,
    evaluators: Iterable[str] | None = None,
) -> Plan:
    """Turn a study into trials at a scale; ValueError teaches what was asked wrongly.

    Equal recipes are one trial. `only` keeps recipes whose axes have one of the given values;
    `evaluators` are the only ones asked: of a grid any, of tables those that their columns ask.
    """
    if study.base is not None and evaluators is not None:
        evaluators = tuple(evaluators)
        study = replace(study, evaluators=evaluators)
    chosen = _choose_tables(study, tables)
    _check_size(study, seeds)
    check_settings(study.settings, study.axes or {})
    asked, refused = _ask(study, chosen)
    asked = [(_shrunk(recipe, scale), serves, columns) for recipe, serves, columns in asked]
    if only:
        asked = _keep_only(asked, only, study.name)
    drafts: dict[str, _Draft] = {}
    for recipe, serves, columns in asked:
        for seed in range(seeds):
            seeded = recipe.with_seed(seed) if seed else recipe
            draft = drafts.setdefault(seeded.digest(), _Draft(seeded))
            draft.serves[serves] = None
            draft.evaluators |= dict.fromkeys((*study.evaluators, *columns))
    count = len(asked) * seeds + _add_teachers(drafts, study)
    chosen_evaluators = _choose_evaluators(drafts, evaluators)
    trials = [
        Trial(
            d.recipe,
            digest,
            _name(d.recipe, (*(study.axes or {}), *study.settings)),
            tuple(d.serves),
            tuple(name for name in d.evaluators if name in chosen_evaluators),
            scale.cost(d.recipe),
        )
        for digest, d in drafts.items()
    ]
    chains = _longest_chains(trials)
    trials.sort(key=lambda trial: (-chains[trial.digest], trial.digest))
    trained = tuple(_as_trained(table, study, scale) for table in chosen)
    return Plan(tuple(trials), tuple(refused), count, trained, seeds, _notes(study, chosen))


def _check_size(study: Study, seeds: int) -> None:
    spanned = math.prod(len(values) for values in (study.axes or {}).values())
    if spanned * seeds > MOST_RECIPES:
        raise ValueError(
            f"{spanned:,} combinations with {seeds:,} seeds each are more than the "
            f"{MOST_RECIPES:,} recipes that a study can have"
        )


def _ask(study: Study, tables: Iterable[Table]) -> tuple[list[Asked], list[Refused]]:
    """Return what tables and axes ask for, set as all are, and what was refused."""
    asked: list[Asked] = [
        (_set(row.recipe, study), f"{table.name} {row.label}", [c.evaluator for c in table.columns])
        for table in tables
        for row in table.rows
    ]
    if study.settings:
        _check_still_apart(asked, tables, study.settings)
    if study.base is None:
        return asked, []
    recipes, refused = enumerate_trials(
        study.base, study.axes or {}, mode=study.mode, settings=study.settings
    )
    if refused and not recipes:
        named = " ".join(filter(None, (format_settings(study.settings), refused[0].combination)))
        raise ValueError(
            f"study {study.name!r} has no trial left, all {len(refused)} are refused; "
            f"the first, {named}: {refused[0].reason}"
        )
    return [*asked, *((recipe, study.name, []) for recipe in recipes)], refused


def _notes(study: Study, tables: Iterable[Table]) -> tuple[str, ...]:
    """Say what was adapted to what is set."""
    rows: list[tuple[Recipe, dict[str, Any]]] = [
        (row.recipe, {}) for table in tables for row in table.rows
    ]
    if study.base is not None:
        rows += [(study.base, values) for values in _combinations(study.axes or {}, study.mode)]
    notes: dict[str, None] = {}
    for recipe, values in rows:
        with suppress(ValueError):  # a combination that is refused
            notes |= dict.fromkeys(warmup_notes(recipe, study.settings, values))
    return tuple(notes)


def _name(recipe: Recipe, axes: Iterable[str]) -> str:
    """Describe a recipe, and what it has on those axes that its description does not tell."""
    untold = dict.fromkeys(axis for axis in axes if axis not in DESCRIBED)
    told = (f"{axis}={axis_value(recipe, axis)}" for axis in untold)
    return " ".join([recipe.describe(), *told])


def _add_teachers(drafts: dict[str, _Draft], study: Study) -> int:
    """Make every teacher a trial, judged as all of the study's are; return how many were not."""
    before = len(drafts)
    for draft in list(drafts.values()):
        student, teacher = draft.recipe, draft.recipe.teacher
        while teacher is not None:
            taught = drafts.setdefault(teacher.digest(), _Draft(teacher))
            taught.serves.setdefault(f"teacher of {student.digest()}")
            taught.evaluators |= dict.fromkeys(study.evaluators)
            student, teacher = teacher, teacher.teacher
    return len(drafts) - before


def _choose_evaluators(drafts: Mapping[str, _Draft], names: Iterable[str] | None) -> set[str]:
    known = {name for draft in drafts.values() for name in draft.evaluators}
    chosen = known if names is None else set(names)
    if no_evaluators := sorted(chosen - EVALUATORS.keys()):
        raise ValueError(f"unknown evaluator {no_evaluators[0]!r}; one of {', '.join(EVALUATORS)}")
    if unknown := sorted(chosen - known):
        raise ValueError(
            f"no trial here asks evaluator {unknown[0]!r}; they ask {', '.join(sorted(known))}"
        )
    return chosen


def _longest_chains(trials: list[Trial]) -> dict[str, float]:
    """Return each trial's cost with the longest chain of students behind it."""
    own = {trial.digest: trial.cost for trial in trials}
    chains = dict(own)
    for trial in sorted(trials, key=_depth, reverse=True):
        if trial.recipe.teacher is not None:
            teacher = trial.recipe.teacher.digest()
            chains[teacher] = max(chains[teacher], own[teacher] + chains[trial.digest])
    return chains


def _depth(trial: Trial) -> int:
    depth, teacher = 0, trial.recipe.teacher
    while teacher is not None:
        depth, teacher = depth + 1, teacher.teacher
    return depth


def _check_still_apart(
    asked: Iterable[Asked], tables: Iterable[Table], settings: Mapping[str, Any]
) -> None:
    """Raise ValueError where what is set for all makes one recipe of two: no row says so."""
    found: dict[str, tuple[str, str]] = {}
    rows = (row.recipe for table in tables for row in table.rows)
    for (changed, serves, _), recipe in zip(asked, rows, strict=True):
        digest, name = recipe.digest(), f"{serves} ({recipe.describe()})"
        first, other = found.setdefault(changed.digest(), (digest, name))
        if first != digest:
            raise ValueError(
                f"--set {format_settings(settings)} makes one trial of {other} and {name}, which "
                "the study tells apart: leave it out, or choose --tables without one of them"
            )


def _set(recipe: Recipe, study: Study) -> Recipe:
    """Return a row's recipe as all trials are set; ValueError names the row."""
    try:
        return with_settings(recipe, study.settings) if study.settings else recipe
    except ValueError as error:
        raise ValueError(
            f"--set {format_settings(study.settings)}: {recipe.describe()}: {problem(error)}"
        ) from None


def _shrunk(recipe: Recipe, scale: Scale) -> Recipe:
    try:
        return scale.shrink(recipe)
    except ValueError as error:
        raise ValueError(f"{recipe.describe()} at scale {scale.name}: {problem(error)}") from None


def _as_trained(table: Table, study: Study, scale: Scale) -> Table:
    """Return a table with its rows' recipes as they are trained; its question tells what is set."""
    rows = tuple(replace(row, recipe=_shrunk(_set(row.recipe, study), scale)) for row in table.rows)
    told = ", ".join(f"{axis.replace('_', ' ')} {v}" for axis, v in study.settings.items())
    question = f"{table.question} (every trial: {told})" if told else table.question
    return replace(table, question=question, rows=rows)


def _choose_tables(study: Study, names: Iterable[str] | None) -> list[Table]:
    if names is None:
        return list(study.tables)
    known = {table.name: table for table in study.tables}
    if not known:
        raise ValueError(f"study {study.name!r} has no tables to choose from")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"unknown table {unknown[0]!r}; study {study.name!r} has {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(names)]


def axis_value(recipe: Recipe, axis: str) -> str:
    """Return the value a recipe has on an axis, as a user would write it."""
    if axis in ("augmentation", "augmentations"):
        return format_augmentations(recipe.augmentations)
    if axis == "teacher":
        return _base_of(recipe.teacher) if recipe.teacher else "none"
    if axis == ADVERSARIAL_RATE:
        return _adversarial_rate(recipe)
    value = getattr(recipe, axis)
    return _curriculum_name(value) if axis == "curriculum" else str(value)


def _adversarial_rate(recipe: Recipe) -> str:
    released = scale_named(recipe.scale).shrink(BASES["adversarial_resnet50_gelu"]())
    same_kind = attrgetter("family", "activation", "optimizer", "training", "learning_rate")
    return AS_RELEASED if same_kind(recipe) == same_kind(released) else BY_RULE


def field_text(recipe: Recipe, name: str) -> str:
    """Return the value of a recipe's field as a plan shows it, in a few words."""
    if name == "adversary" and recipe.adversary:
        attack = recipe.adversary
        return (
            f"epsilon {attack.epsilon * 255:g}/255 in {attack.steps} steps of "
            f"{attack.step_size * 255:g}/255 (plain start {attack.plain_start:g})"
        )
    if name == "distillation":
        return f"teacher {axis_value(recipe, 'teacher')}"
    value = getattr(recipe, name)
    return f"{value:g}" if isinstance(value, float) else axis_value(recipe, name)


def _base_of(teacher: Recipe) -> str:
    """Return the base that a recipe was shrunk from, by what no scale changes."""
    kept = attrgetter(
        "model", "activation", "optimizer", "scheduler", "augmentations", "pixel_range"
    )
    named = (name for name, base in BASES.items() if kept(base()) == kept(teacher))
    return next(named, teacher.model)


def _curriculum_name(rows: tuple[CurriculumRow, ...]) -> str:
    named = (name for name, known in CURRICULA.items() if known == rows)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:4]
    return next(named, f"{len(rows)}-rows-{digest}")


def _keep_only(asked: list[Asked], only: Mapping[str, tuple[str, ...]], study: str) -> list[Asked]:
    for axis, values in only.items():
        present = {axis_value(recipe, axis) for recipe, _, _ in asked}
        unknown = [value for value in values if value not in present]
        if unknown:
            raise ValueError(
                f"no trial of study {study!r} left has {axis}={unknown[0]}; "
                f"values there: {', '.join(sorted(present))}"
            )
        asked = [entry for entry in asked if axis_value(entry[0], axis) in values]
    return asked
