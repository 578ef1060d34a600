"""What a plan takes: work, hours, GPU-hours, dollars and disk. Pure: no clock, no files."""

from __future__ import annotations

from dataclasses import dataclass

from evaluators import evaluator_named
from grid.plan import Plan
from trainables.models import model_named
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_named

HOUR = 3600.0
# The share of images that withstand attacks, by whether the model was trained adversarially:
# means over tables T1 to T4 at scale digits.
WITHSTANDING = {False: 0.2, True: 0.5}
CHECKPOINTS = 2  # the newest two
MOMENTS = {"sgd": 1, "adamw": 2}
Item = tuple[str, str]  # a trial's digest, and an evaluator's name, "" for the training


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What trains and judges a plan.

    seconds_per_unit: of one worker, for a unit of the scale's cost. lanes: trials at once.
    cpus, gpus: of one worker; a worker that shares a GPU counts as a whole one.
    """

    seconds_per_unit: float
    lanes: int
    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0

    def hours(self, work: float) -> float:
        """Return the GPU-hours of so much work, or its core-hours where there are no GPUs."""
        devices = max(1.0, self.gpus) if self.gpus else self.cpus
        return work * self.seconds_per_unit / HOUR * devices

    def wall_seconds(self, work: float, chain: float) -> float:
        """Return the wall clock of a plan's work: that of its longest chain if that is longer."""
        return max(work / self.lanes, chain) * self.seconds_per_unit / self.workers


def work_of(plan: Plan, scale: Scale, held_out: int) -> dict[Item, float]:
    """Return the work of each training and each cell, in the unit of the scale's cost.

    An image's forward pass is a third of what it costs to train by it.
    """
    names = {name for trial in plan for name in trial.evaluators}
    evaluators = {name: evaluator_named(name, scale) for name in names}
    work: dict[Item, float] = {}
    for trial in plan:
        work[trial.digest, ""] = trial.cost
        epoch = scale.epoch_cost(trial.recipe.model)
        share = WITHSTANDING[trial.recipe.adversary is not None]
        for name in trial.evaluators:
            passes = evaluators[name].cost(held_out, withstanding=share)
            work[trial.digest, name] = passes * epoch / scale.data_set.train_images / 3
    return work


def longest_chain(plan: Plan) -> float:
    """Return the work of the longest run of trainings of which each teaches the next."""
    costs = {trial.digest: trial.cost for trial in plan}

    def chain(recipe: Recipe | None) -> float:
        return costs.get(recipe.digest(), 0.0) + chain(recipe.teacher) if recipe else 0.0

    return max((chain(trial.recipe) for trial in plan), default=0.0)


def checkpoint_bytes(recipe: Recipe, weights: int) -> int:
    """Return what a trial keeps at most, of `weights` bytes each: checkpoints with moments."""
    return weights * (CHECKPOINTS * (1 + MOMENTS[recipe.optimizer]) + 1)


def disk_bytes(plan: Plan) -> int:
    """Return about what a plan's checkpoints take, and its weights, which MLflow has too."""
    total = 0
    for trial in plan:
        parameters = model_named(trial.recipe.model).cost.parameters
        weights = 4 * parameters // scale_named(trial.recipe.scale).parameter_divisor
        total += weights + checkpoint_bytes(trial.recipe, weights)
    return total
