"""Recipe x axes -> trials: apply, refuse with a reason, share, order. Pure: no Ray, no clock."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from operator import attrgetter
from typing import Any

from evaluators import EVALUATORS
from grid.studies import AXES, BASES, CURRICULA, Axes, Mode, Study, Table, problem, with_axis
from trainables.recipe import CurriculumRow, Recipe, format_augmentations
from trainables.scale import Scale

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
    the recipes as they are trained at the scale.
    """

    trials: tuple[Trial, ...]
    refused: tuple[Refused, ...] = ()
    asked: int = 0
    tables: tuple[Table, ...] = ()
    seeds: int = 1

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)


@dataclass
class _Draft:
    recipe: Recipe
    serves: dict[str, None] = field(default_factory=dict)
    evaluators: dict[str, None] = field(default_factory=dict)


def enumerate_trials(
    base: Recipe, axes: Axes, *, mode: Mode = "product"
) -> tuple[list[Recipe], list[Refused]]:
    """Return every recipe that the axes span over a base, and what was refused.

    product: all combinations. one-at-a-time: the base, then each axis varied alone.
    """
    recipes, refused = [], []
    for combination in _combinations(axes, mode):
        try:
            recipe = base
            # What brings other fields along comes first, whatever order the axes are named in.
            for axis in sorted(combination, key=AXES.index):
                recipe = with_axis(recipe, axis, combination[axis])
            recipes.append(recipe)
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
    chosen = [_shrunk(table, scale) for table in _choose_tables(study, tables)]
    spanned = math.prod(len(values) for values in (study.axes or {}).values())
    if spanned * seeds > MOST_RECIPES:
        raise ValueError(
            f"{spanned:,} combinations with {seeds:,} seeds each are more than the "
            f"{MOST_RECIPES:,} recipes that a study can have"
        )
    asked = [
        (row.recipe, f"{table.name} {row.label}", [c.evaluator for c in table.columns])
        for table in chosen
        for row in table.rows
    ]
    refused: list[Refused] = []
    if study.base is not None:
        recipes, refused = enumerate_trials(study.base, study.axes or {}, mode=study.mode)
        asked += [(scale.shrink(recipe), study.name, []) for recipe in recipes]
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
            _name(d.recipe, study.axes or {}),
            tuple(d.serves),
            tuple(name for name in d.evaluators if name in chosen_evaluators),
            scale.cost(d.recipe),
        )
        for digest, d in drafts.items()
    ]
    chains = _longest_chains(trials)
    trials.sort(key=lambda trial: (-chains[trial.digest], trial.digest))
    return Plan(tuple(trials), tuple(refused), count, tuple(chosen), seeds)


def _name(recipe: Recipe, axes: Axes) -> str:
    """Describe a recipe, and what it has on those axes that its description does not tell."""
    told = (f"{axis}={axis_value(recipe, axis)}" for axis in axes if axis not in DESCRIBED)
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


def _shrunk(table: Table, scale: Scale) -> Table:
    rows = tuple(replace(row, recipe=scale.shrink(row.recipe)) for row in table.rows)
    return replace(table, rows=rows)


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
    value = getattr(recipe, axis)
    return _curriculum_name(value) if axis == "curriculum" else str(value)


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


def _keep_only(
    asked: list[tuple[Recipe, str, list[str]]],
    only: Mapping[str, tuple[str, ...]],
    study: str,
) -> list[tuple[Recipe, str, list[str]]]:
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
