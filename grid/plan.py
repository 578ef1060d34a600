"""Recipe x axes -> trials: apply, refuse with a reason, share, order. Pure: no Ray, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from evaluators import EVALUATORS, evaluator_of
from grid.axes import (
    Axes,
    Library,
    axis_value,
    check_settings,
    format_settings,
    warmup_notes,
    with_settings,
)
from grid.study import Mode, Study, Table
from trainables.recipe import Recipe, problem, unknown
from trainables.scale import Scale

# A recipe, what it serves, and the evaluators of its columns.
Request = tuple[Recipe, str, tuple[str, ...]]
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

    `requests` counts rows, combinations and teachers before equal ones are shared; `tables` hold
    the recipes as they are trained at the scale; `notes` say what was adapted to what is set.
    """

    trials: tuple[Trial, ...]
    refused: tuple[Refused, ...] = ()
    requests: int = 0
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
    library: Library | None = None,
) -> tuple[list[Recipe], list[Refused]]:
    """Return every recipe that the axes span over a base, and what was refused.

    product: all combinations. one-at-a-time: the base, then each axis varied alone. `settings`
    are axes that every recipe has so.
    """
    recipes, refused = [], []
    for combination in _combinations(axes, mode):
        try:
            recipes.append(with_settings(base, settings or {}, combination, library))
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
    """Turn a study into trials at a scale; ValueError teaches which request is wrong.

    Equal recipes are one trial. `only` keeps recipes whose axes have one of the given values;
    `evaluators` are the only ones to judge: of a grid any, of tables those of their columns.
    """
    if study.base is not None and evaluators is not None:
        evaluators = tuple(evaluators)
        study = replace(study, evaluators=evaluators)
    chosen = _choose_tables(study, tables)
    _check_size(study, seeds)
    check_settings(study.settings, study.axes or {})
    requests, refused = _requests(study, chosen)
    requests = [(_shrunk(recipe, scale), serves, names) for recipe, serves, names in requests]
    if only:
        requests = _keep_only(requests, only, study)
    drafts: dict[str, _Draft] = {}
    for recipe, serves, names in requests:
        for seed in range(seeds):
            seeded = recipe.with_seed(seed) if seed else recipe
            draft = drafts.setdefault(seeded.digest(), _Draft(seeded))
            draft.serves[serves] = None
            draft.evaluators |= dict.fromkeys((*study.evaluators, *names))
    count = len(requests) * seeds + _add_teachers(drafts, study)
    chosen_evaluators = _choose_evaluators(drafts, evaluators)
    trials = [
        Trial(
            d.recipe,
            digest,
            _name(d.recipe, study),
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


def _requests(study: Study, tables: Iterable[Table]) -> tuple[list[Request], list[Refused]]:
    """Return the recipes that tables and axes need, set as all are, and what was refused."""
    requests: list[Request] = [
        (
            _set(row.recipe, study),
            f"{table.name} {row.label}",
            tuple(map(evaluator_of, table.columns)),
        )
        for table in tables
        for row in table.rows
    ]
    if study.settings:
        _check_still_apart(requests, tables, study.settings)
    if study.base is None:
        return requests, []
    recipes, refused = enumerate_trials(
        study.base,
        study.axes or {},
        mode=study.mode,
        settings=study.settings,
        library=study.library,
    )
    if refused and not recipes:
        named = " ".join(filter(None, (format_settings(study.settings), refused[0].combination)))
        raise ValueError(
            f"study {study.name!r} has no trial left, all {len(refused)} are refused; "
            f"the first, {named}: {refused[0].reason}"
        )
    return [*requests, *((recipe, study.name, ()) for recipe in recipes)], refused


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
            notes |= dict.fromkeys(warmup_notes(recipe, study.settings, values, study.library))
    return tuple(notes)


def _name(recipe: Recipe, study: Study) -> str:
    """Describe a recipe, and the study's axes that its description does not tell of."""
    axes = dict.fromkeys((*(study.axes or {}), *study.settings))
    others = (
        f"{axis}={axis_value(recipe, axis, study.library)}"
        for axis in axes
        if axis not in DESCRIBED
    )
    return " ".join([recipe.describe(), *others])


def _teachers(recipe: Recipe) -> Iterator[Recipe]:
    """Yield a recipe's teacher, the teacher's teacher and so on."""
    while recipe.teacher is not None:
        recipe = recipe.teacher
        yield recipe


def _add_teachers(drafts: dict[str, _Draft], study: Study) -> int:
    """Make every teacher a trial, judged as all of the study's are; return how many were not."""
    before = len(drafts)
    for draft in list(drafts.values()):
        student = draft.recipe
        for teacher in _teachers(draft.recipe):
            teaching = drafts.setdefault(teacher.digest(), _Draft(teacher))
            teaching.serves.setdefault(f"teacher of {student.digest()}")
            teaching.evaluators |= dict.fromkeys(study.evaluators)
            student = teacher
    return len(drafts) - before


def _choose_evaluators(drafts: Mapping[str, _Draft], names: Iterable[str] | None) -> set[str]:
    known = {name for draft in drafts.values() for name in draft.evaluators}
    chosen = known if names is None else set(names)
    if no_evaluators := sorted(chosen - EVALUATORS.keys()):
        raise ValueError(unknown("evaluator", no_evaluators[0], EVALUATORS))
    if elsewhere := sorted(chosen - known):
        raise ValueError(
            f"no trial here asks evaluator {elsewhere[0]!r}; they ask {', '.join(sorted(known))}"
        )
    return chosen


def _longest_chains(trials: list[Trial]) -> dict[str, float]:
    """Return each trial's cost with the longest chain of students behind it."""
    costs = {trial.digest: trial.cost for trial in trials}
    chains = dict(costs)
    for trial in sorted(trials, key=lambda t: len(list(_teachers(t.recipe))), reverse=True):
        if trial.recipe.teacher is not None:
            teacher = trial.recipe.teacher.digest()
            chains[teacher] = max(chains[teacher], costs[teacher] + chains[trial.digest])
    return chains


def _check_still_apart(
    requests: Iterable[Request], tables: Iterable[Table], settings: Mapping[str, Any]
) -> None:
    """Raise ValueError where what is set for all makes one recipe of two: no row says so."""
    first: dict[str, tuple[str, str]] = {}
    rows = (row.recipe for table in tables for row in table.rows)
    for (changed, serves, _), recipe in zip(requests, rows, strict=True):
        digest, name = recipe.digest(), f"{serves} ({recipe.describe()})"
        other, other_name = first.setdefault(changed.digest(), (digest, name))
        if other != digest:
            raise ValueError(
                f"--set {format_settings(settings)} makes one trial of {other_name} and {name}, "
                "which the study tells apart: leave it out, or choose --tables without one of them"
            )


def _set(recipe: Recipe, study: Study) -> Recipe:
    """Return a row's recipe as all trials are set; ValueError names the row."""
    if not study.settings:
        return recipe
    try:
        return with_settings(recipe, study.settings, library=study.library)
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
    settings = ", ".join(f"{axis.replace('_', ' ')} {v}" for axis, v in study.settings.items())
    question = f"{table.question} (every trial: {settings})" if settings else table.question
    return replace(table, question=question, rows=rows)


def _choose_tables(study: Study, names: Iterable[str] | None) -> list[Table]:
    if names is None:
        return list(study.tables)
    known = {table.name: table for table in study.tables}
    if not known:
        raise ValueError(f"study {study.name!r} has no tables to choose from")
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"study {study.name!r}: {unknown('table', wrong[0], known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _keep_only(
    requests: list[Request], only: Mapping[str, tuple[str, ...]], study: Study
) -> list[Request]:
    for axis, values in only.items():
        present = {axis_value(recipe, axis, study.library) for recipe, *_ in requests}
        if wrong := [value for value in values if value not in present]:
            raise ValueError(
                f"no trial of study {study.name!r} left has {axis}={wrong[0]}; "
                f"values there: {', '.join(sorted(present))}"
            )
        requests = [r for r in requests if axis_value(r[0], axis, study.library) in values]
    return requests
