"""`--plan`: what a study would train and judge, and what that takes, on one screen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evaluators import BOUNDED, evaluator_named, evaluator_of
from grid.axes import axis_value, format_settings
from grid.options import RunOptions
from grid.plan import Plan, format_seconds, transferring
from grid.study import Study
from trainables.data.listing import GIBIBYTE, DataSource, list_splits
from trainables.models import model_named
from trainables.recipe import BEYOND_STUDY, Recipe
from trainables.scale import Scale, scale_named
from trainables.store.results import DATABASE

if TYPE_CHECKING:
    from grid.design import Designed

HOUR = 3600.0
# The share of images that withstand attacks, by whether the model was trained adversarially:
# means over tables T1 to T4 at scale digits.
WITHSTANDING = {False: 0.2, True: 0.5}
CHECKPOINTS = 2  # the newest two
MOMENTS = {"sgd": 1}  # that an optimizer keeps of a weight
MOST_MOMENTS = 2
FEW_TRIALS = 20  # are printed one by one
MOST_REASONS = 8
MOST_VALUES = 12  # of a field in which trials differ
INDENT = " " * 16
Work = dict[tuple[str, str], float]  # by trial's digest and evaluator's name, "" for the training


def work_of(plan: Plan, scale: Scale, held_out: int) -> Work:
    """Return the work of each training and each cell, in the unit of the scale's cost.

    An image's forward pass is a third of what it costs to train by it.
    """
    named = cache(lambda name, images: evaluator_named(name, scale, images=images))
    sources = {trial.digest for trial in transferring(plan)}  # whose images each of them judges
    work: Work = {}
    for trial in plan:
        work[trial.digest, ""] = trial.cost
        epoch = scale.epoch_cost(trial.recipe)
        share = WITHSTANDING[trial.recipe.adversary is not None]
        for name in trial.evaluators:
            evaluator = named(name, trial.images[name])
            passes = evaluator.cost(held_out, withstanding=share)
            if name == "transfer" and trial.digest in sources:
                passes += (1 + len(sources)) * evaluator.asked_about(held_out)
            work[trial.digest, name] = passes * epoch / scale.data_set.train_images / 3
    return work


def disk_bytes(plan: Plan) -> int:
    """Return about what a plan's checkpoints take, and its weights, which MLflow has too."""
    total = 0
    for recipe, along in ((trial.recipe, trial.checkpoints) for trial in plan):
        parameters = model_named(recipe.model).cost.parameters
        weights = 4 * parameters // scale_named(recipe.scale).parameter_divisor
        if not recipe.epochs and (file := Path(recipe.init)).is_file():
            weights = file.stat().st_size
        moments = MOMENTS.get(recipe.optimizer, MOST_MOMENTS) + (recipe.ema_decay > 0)
        checkpoints = CHECKPOINTS * (1 + moments) if recipe.epochs else 0
        total += weights * (checkpoints + 2 + 2 * len(along))
    return total


def held_out_images(scale: Scale, source: DataSource) -> int:
    """Return how many images models are judged by."""
    there = scale.data_set.held_out_images or len(list_splits(source)[1])
    return min(source.eval_images or there, there)


def print_plan(
    options: RunOptions,
    study: Study,
    plan: Plan,
    scale: Scale,
    source: DataSource,
    design: Designed | None = None,
) -> None:
    """Print a plan's trials by table, what is shared and refused, and what all of it takes."""
    settings = f" with {format_settings(study.settings)}" if study.settings else ""
    lines = [f"Study {study.name}{settings} at scale {scale.name}: {scale.title}"]
    if options.all or len(plan.trials) <= FEW_TRIALS:
        lines += _every_trial(study, plan)
    work, rate, origin = _work_and_rate(options, plan, scale, source)
    gpus = options.gpus_per_worker
    hours = (rate or 0.0) / HOUR * (max(1.0, gpus) if gpus else options.cpus_per_worker)
    lines += _tables(study, plan, work, hours)
    if design:
        seconds = {cell: units * (rate or 0.0) for cell, units in work.items()}
        lines += design.described(seconds, briefly=not (options.detect or options.all))
    lines += _refused(plan, most=len(plan.refused) if options.all else MOST_REASONS)
    lines += [*_without_effect(study, plan), *plan.notes]
    lines.append(
        f"{plan.requests} rows, {plan.makeup} ({plan.requests - len(plan.trials)} shared), "
        f"{len(plan.refused)} combinations refused; "
        f"{sum(len(trial.evaluators) for trial in plan)} cells to judge"
    )
    lines.append(f"Disk: about {disk_bytes(plan) / GIBIBYTE:.2g} GiB of checkpoints and weights")
    if rate:
        lines += _hours(options, plan, work, rate, hours, origin)
    else:
        lines.append("Hours: unknown; give --seconds-per-unit, or finish a few trials in --results")
    print("\n".join(lines))


def _work_and_rate(
    options: RunOptions, plan: Plan, scale: Scale, source: DataSource
) -> tuple[Work, float | None, str]:
    """Return the work, the seconds of one worker for a unit of it and where they come from.

    They are as given, or as finished trials of the plan took; None: not known.
    """
    rate = options.seconds_per_unit
    if not rate and not options.mlflow and not (options.results / DATABASE).exists():
        return {}, None, ""
    work = work_of(plan, scale, held_out_images(scale, source))
    if rate:
        return work, rate, "--seconds-per-unit"
    from grid.status import open_existing

    seconds, units, finished = 0.0, 0.0, 0
    with suppress(ValueError):  # no server answers: nothing is known
        tracker = open_existing(options.results, options.mlflow, scale)
        for digest, run in tracker.trials().items():
            if run.outcome == "finished" and (digest, "") in work:
                finished += 1
                seconds += tracker.seconds(run)
                units += sum(work.get((digest, name), 0.0) for name in ("", *run.cells))
    return work, (seconds / units if units else None), f"{finished} finished trials"


def _hours(
    options: RunOptions, plan: Plan, work: Work, rate: float, hours: float, origin: str
) -> Iterator[str]:
    """Say how long a plan takes and what it costs; rate, hours: of a unit of work.

    A worker that shares a GPU counts as a whole one.
    """
    unit = "GPU-hours" if options.gpus_per_worker else "core-hours"
    total, workers = sum(work.values()), options.workers
    training = sum(value for (_, name), value in work.items() if not name)
    cores = len(os.sched_getaffinity(0)) // (options.cpus_per_worker * workers)
    lanes = options.trials_at_once or (1 if options.gpus_per_worker else max(1, cores))
    wall = max(total / lanes, plan.longest_chain) * rate / workers
    yield (
        f"Work: {_short(total * hours)} {unit}, {_short(training * hours)} to train and "
        f"{_short((total - training) * hours)} to judge ({rate:.3g} s a unit: {origin})"
    )
    each = f" of {workers} workers" if workers > 1 else ""
    yield f"Wall clock: {format_seconds(wall)} with {lanes} trials at once{each}"
    if options.dollars_per_gpu_hour:
        yield f"Cost: ${total * hours * options.dollars_per_gpu_hour:,.2f} for the {unit} in use"


def _tables(study: Study, plan: Plan, work: Work, hours: float) -> Iterator[str]:
    """Say how many trials each table needs, and their hours; a shared trial counts in each."""
    for table in plan.tables:
        serving = {trial.digest for trial in plan if table.name in trial.tables}
        columns = {"", *study.for_all, *map(evaluator_of, table.columns)}
        columns |= {BOUNDED.get(name, name) for name in columns}
        spent = sum(work.get((digest, name), 0.0) for digest in serving for name in columns)
        text = f"{_short(spent * hours):>8} h" if hours else ""
        yield f"  {table.name:<4}{len(serving):>4} trials{text}  {table.question}"


def _refused(plan: Plan, most: int) -> Iterator[str]:
    """Say why combinations are refused, the commonest reasons first."""
    first = {reason: combination for combination, reason in reversed(plan.refused)}
    reasons = Counter(reason for _, reason in plan.refused).most_common()
    for reason, times in reasons[:most]:
        yield f"  refused: {times} x {reason} (first: {first[reason]})"
    if rest := sum(times for _, times in reasons[most:]):
        yield f"  refused: {rest} x {len(reasons) - most} other reasons; --all prints them"


def _without_effect(study: Study, plan: Plan) -> Iterator[str]:
    """Say which fields that are set for every trial change nothing in some."""
    for name in filter(Recipe.model_fields.__contains__, study.settings):
        default = Recipe.model_fields[name].default
        others = [trial for trial in plan if getattr(trial.recipe, name) != default]
        if inert := [trial for trial in others if name not in trial.recipe.effective()]:
            yield (
                f"{name} has no effect in {len(inert)} of {len(plan.trials)} trials, "
                f"the first {inert[0].name}"
            )


def _every_trial(study: Study, plan: Plan) -> Iterator[str]:
    """Say every trial with its hyper-parameters, then every field in which trials differ."""
    for trial in plan:
        described = trial.recipe.describe()
        named = trial.name if described in trial.name else f"{trial.name}: {described}"
        yield f"  {trial.digest}  {named}"
        yield INDENT + _hyperparameters(trial.recipe)
        yield f"{INDENT}{'; '.join(trial.serves)} | {', '.join(trial.evaluators)}"
    yield "Trials differ in:"
    for name in Recipe.model_fields:
        texts = list(dict.fromkeys(axis_value(t.recipe, name, study.library) for t in plan))
        more = f" and {len(texts) - MOST_VALUES} more" if len(texts) > MOST_VALUES else ""
        if len(texts) > 1:
            yield f"  {name}: {', '.join(texts[:MOST_VALUES])}{more}"


def _hyperparameters(recipe: Recipe) -> str:
    if not recipe.epochs:
        return f"not trained; {str(recipe.preprocessing) or 'images as the data set has them'}"
    fields = recipe.effective()
    beyond = (f", {name} {fields[name]}" for name in BEYOND_STUDY if name in fields)
    return (
        f"rate {recipe.learning_rate:g}, decay {recipe.weight_decay:g}, "
        f"batch {recipe.batch_size}, warm-up {recipe.warmup_epochs:g}{''.join(beyond)}"
    )


def _short(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
