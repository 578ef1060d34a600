"""What a plan takes: passes, hours, wall clock, disk and money, and what a budget buys. Pure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

from evaluators import EVALUATORS, SHARD_SECONDS
from grid.passes import Passes, passes
from grid.plan import Plan, Trial, build_plan
from grid.schedule import Job
from grid.studies import Study
from trainables.recipe import Recipe
from trainables.scale import Scale

HOUR = 3600.0
MOST_TABLES = 16  # 2^16 sets of tables are looked at in a second
MOST_SHARDS = 10  # of a cell: enough to spread it over evaluators
CHECKPOINTS = 2  # the newest two
MOMENTS = {"sgd": 1, "adamw": 2}
# Of the models with ImageNet's classes, and at scale digits; a model of timm's as the largest.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet200": 64_673_832,
    "deit_mini": 9_982_184,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "hybrid_deit": 21_055_528,
}
PARAMETERS_DIGITS = {
    "resnet18": 78_002,
    "resnet50": 147_794,
    "resnet101": 218_962,
    "resnet200": 295_058,
    "deit_mini": 88_618,
    "deit_small": 155_018,
    "deit_base": 604_938,
    "hybrid_deit": 166_162,
}
Item = tuple[str, str]  # a trial's digest, and an evaluator, or "" for its training


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast one worker is, in seconds.

    seconds_per_unit: for a unit of a scale's cost; it stands for what was not measured. epochs:
    of an epoch, and `passes` of an image forward, and forward and back, by kind of training.
    start_up: of the whole command beside the work.
    """

    seconds_per_unit: float
    epochs: Mapping[str, float] = field(default_factory=dict)
    passes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    start_up: float = 0.0

    def training(self, recipe: Recipe, scale: Scale) -> float:
        """Return the seconds of a training by one worker."""
        measured = self.epochs.get(kind_of(recipe))
        if measured is None:
            return scale.cost(recipe) * self.seconds_per_unit
        return measured * recipe.epochs

    def judging(self, asked: Passes, recipe: Recipe, scale: Scale) -> float:
        """Return the seconds of a cell by one worker.

        Where no pass was measured, an image forward is a third of what it costs to train by it.
        """
        unit = scale.epoch_cost.get(recipe.model, max(scale.epoch_cost.values()))
        third = unit * self.seconds_per_unit / scale.train_images / 3
        forward, gradient = self.passes.get(kind_of(recipe), (third, 2 * third))
        return asked.forward * forward + asked.gradient * gradient


def kind_of(recipe: Recipe) -> str:
    """Name what decides how long an epoch takes: model, adversary, teacher and precision."""
    adversary = f" AT-{recipe.adversary.steps}" if recipe.adversary else ""
    teacher = f" teacher {recipe.teacher.model}" if recipe.teacher else ""
    precision = "" if recipe.precision == "float32" else f" {recipe.precision}"
    return f"{recipe.model}{adversary}{teacher}{precision}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A throughput as it was measured, and where."""

    scale: str
    machine: str
    versions: Mapping[str, str]
    measured: str
    throughput: Throughput

    def save(self, path: Path) -> None:
        """Write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read it; ValueError where the file is no calibration."""
        try:
            found = json.loads(path.read_text())
            measured = found.pop("throughput")
            measured["passes"] = {kind: (f, g) for kind, (f, g) in measured["passes"].items()}
            return cls(**found, throughput=Throughput(**measured))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no calibration: remove it, or --calibrate") from None


@dataclass(frozen=True)
class Forecast:
    """What each training and each cell of a plan asks and takes of one worker."""

    plan: Plan
    asked: Mapping[Item, Passes]
    at_most: Mapping[Item, Passes]
    seconds: Mapping[Item, float]

    @property
    def training(self) -> float:
        """Return the seconds of all trainings."""
        return sum(seconds for (_, name), seconds in self.seconds.items() if not name)

    @property
    def judging(self) -> float:
        """Return the seconds of all cells."""
        return sum(seconds for (_, name), seconds in self.seconds.items() if name)

    def jobs(self, workers: float = 1) -> list[Job]:
        """Return the trials as a schedule takes them; workers divide a training without loss.

        Those that share a GPU count for what they have of its speed.
        """
        ranks = {name: rank for rank, name in enumerate(EVALUATORS)}
        jobs = []
        for trial in self.plan:
            shards: list[tuple[int, float]] = []
            for name in trial.evaluators:
                item = (trial.digest, name)
                count = min(MOST_SHARDS, math.ceil(self.seconds[item] / SHARD_SECONDS))
                shards += [(ranks[name], self.seconds[item] / count)] * count
            teacher = trial.recipe.teacher.digest() if trial.recipe.teacher else ""
            seconds = self.seconds[trial.digest, ""] / workers
            epochs = trial.recipe.epochs
            jobs.append(Job(trial.digest, seconds, epochs, teacher, tuple(shards)))
        return jobs


def forecast(plan: Plan, scale: Scale, throughput: Throughput, *, held_out: int) -> Forecast:
    """Count a plan's passes and estimate its seconds."""
    asked: dict[Item, Passes] = {}
    at_most: dict[Item, Passes] = {}
    seconds: dict[Item, float] = {}
    for trial in plan:
        recipe, adversarial = trial.recipe, trial.recipe.adversary is not None
        seconds[trial.digest, ""] = throughput.training(recipe, scale)
        for name in trial.evaluators:
            item = (trial.digest, name)
            count = partial(passes, name, scale, held_out=held_out, adversarial=adversarial)
            asked[item], at_most[item] = count(), count(at_most=True)
            seconds[item] = throughput.judging(asked[item], recipe, scale)
    return Forecast(plan, asked, at_most, seconds)


def items_of(trials: Iterable[Trial]) -> set[Item]:
    """Return the trainings and cells of some trials."""
    return {(trial.digest, name) for trial in trials for name in ("", *trial.evaluators)}


def needs_of_tables(study: Study, scale: Scale, plan: Plan) -> dict[str, set[Item]]:
    """Return what each table of a plan needs of the plan's trainings and cells, teachers too."""
    whole = items_of(plan)
    return {
        table.name: whole
        & items_of(build_plan(study, scale, tables=[table.name], seeds=plan.seeds))
        for table in plan.tables
    }


def affordable(
    needs: Mapping[str, Collection[Item]], seconds: Mapping[Item, float], budget: float
) -> tuple[tuple[str, ...], float]:
    """Return the most tables that fit a budget of seconds, the cheapest such set, and its cost.

    What tables share is paid once. Every set is looked at: ValueError beyond 16 tables.
    """
    if len(needs) > MOST_TABLES:
        raise ValueError(f"a budget is spent on at most {MOST_TABLES} tables, not {len(needs)}")
    shared = Counter[frozenset[str]]()  # the tables that need something -> its seconds
    for item in set().union(*needs.values()):
        shared[frozenset(t for t in needs if item in needs[t])] += seconds[item]  # type: ignore[assignment]
    for count in range(len(needs), 0, -1):
        fitting = [
            (cost, tables)
            for tables in combinations(needs, count)
            if (cost := _cost(shared, set(tables))) <= budget
        ]
        if fitting:
            cost, tables = min(fitting)
            return tables, cost
    return (), 0.0


def _cost(shared: Mapping[frozenset[str], float], tables: set[str]) -> float:
    return sum(seconds for needed_by, seconds in shared.items() if needed_by & tables)


def checkpoint_bytes(recipe: Recipe, weights: int) -> int:
    """Return what a trial keeps at most, of `weights` bytes each: checkpoints with moments."""
    return weights * (CHECKPOINTS * (1 + MOMENTS[recipe.optimizer]) + 1)


def disk_bytes(plan: Plan) -> int:
    """Return what a plan's checkpoints take at most, and its weights, which MLflow has too."""
    total = 0
    for trial in plan:
        known = PARAMETERS_DIGITS if trial.recipe.scale == "digits" else PARAMETERS
        weights = 4 * known.get(trial.recipe.model, max(known.values()))
        total += weights + checkpoint_bytes(trial.recipe, weights)
    return total
