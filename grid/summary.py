"""`--plan`: what a study would train and judge, and what that takes, on one screen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from evaluators import evaluator_of
from grid.axes import field_text, format_settings
from grid.estimate import Item, Machines, disk_bytes, longest_chain, work_of
from grid.options import RunOptions
from grid.plan import Plan, Trial
from grid.progress import format_seconds
from grid.study import Study
from trainables.data.listing import GIBIBYTE, DataSource, list_splits
from trainables.recipe import Recipe
from trainables.scale import Scale
from trainables.store.results import DATABASE

MOST_REASONS = 8
MOST_VALUES = 12  # of a field in which trials differ
INDENT = " " * 16


def print_plan(
    options: RunOptions, study: Study, plan: Plan, scale: Scale, source: DataSource
) -> None:
    """Print a plan's trials by table, what is shared and refused, and what all of it takes."""
    settings = f" with {format_settings(study.settings)}" if study.settings else ""
    print(f"Study {study.name}{settings} at scale {scale.name}: {scale.title}")
    if options.all:
        _print_lines(_every_trial(study, plan))
    rate, origin = options.seconds_per_unit, "--seconds-per-unit"
    work: dict[Item, float] = {}
    measurable = options.mlflow or (options.results / DATABASE).exists()
    if rate or measurable:
        held_out = scale.data_set.held_out_images or len(list_splits(source)[1])
        work = work_of(plan, scale, held_out)
    if not rate and measurable:
        rate, origin = _measured(options, plan, scale, work)
    machines = _machines(options, rate) if rate else None
    _print_lines(_tables(study, plan, work, machines))
    _print_lines(_refused(plan, most=len(plan.refused) if options.all else MOST_REASONS))
    _print_lines((*_without_effect(study, plan), *plan.notes))
    print(
        f"{plan.requests} rows, {len(plan.trials)} trainings ({plan.requests - len(plan.trials)} "
        f"shared), {len(plan.refused)} combinations refused; "
        f"{sum(len(trial.evaluators) for trial in plan)} cells to judge"
    )
    print(f"Disk: about {disk_bytes(plan) / GIBIBYTE:.2g} GiB of checkpoints and weights")
    if machines is None:
        print("Hours: unknown; give --seconds-per-unit, or finish a few trials in --results first")
        return
    _print_lines(_hours(plan, work, machines, origin, options.dollars_per_gpu_hour))


def _print_lines(lines: Iterator[str] | tuple[str, ...]) -> None:
    for line in lines:
        print(line)


def _measured(
    options: RunOptions, plan: Plan, scale: Scale, work: Mapping[Item, float]
) -> tuple[float | None, str]:
    """Return the seconds that finished trials of the plan took for a unit of their work."""
    from grid.status import open_existing

    seconds, units, finished = 0.0, 0.0, 0
    with suppress(ValueError):  # no server answers: nothing is known
        tracker = open_existing(options.results, options.mlflow, scale)
        for digest, run in tracker.trials().items():
            if run.outcome == "finished" and (digest, "") in work:
                finished += 1
                seconds += tracker.seconds(run)
                units += sum(work.get((digest, name), 0.0) for name in ("", *run.cells))
    return (seconds / units if units else None), f"{finished} finished trials"


def _machines(options: RunOptions, rate: float) -> Machines:
    cpus, gpus, workers = options.cpus_per_worker, options.gpus_per_worker, options.workers
    here = 1 if gpus else max(1, len(os.sched_getaffinity(0)) // (cpus * workers))
    return Machines(
        seconds_per_unit=rate,
        lanes=options.trials_at_once or here,
        workers=workers,
        cpus=cpus,
        gpus=gpus,
    )


def _hours(
    plan: Plan, work: Mapping[Item, float], machines: Machines, origin: str, dollars: float | None
) -> Iterator[str]:
    """Say how long a plan takes on some machines, and what it costs at a price of a GPU-hour."""
    unit = "GPU-hours" if machines.gpus else "core-hours"
    total, chain = sum(work.values()), longest_chain(plan)
    training = sum(value for (_, name), value in work.items() if not name)
    to_train, to_judge = machines.hours(training), machines.hours(total - training)
    yield (
        f"Work: {_short(to_train + to_judge)} {unit}, {_short(to_train)} to train and "
        f"{_short(to_judge)} to judge ({machines.seconds_per_unit:.3g} s a unit: {origin})"
    )
    each = f" of {machines.workers} workers" if machines.workers > 1 else ""
    yield (
        f"Wall clock: {format_seconds(machines.wall_seconds(total, chain))} with {machines.lanes} "
        f"trials at once{each}; the longest chain of teachers and students alone takes "
        f"{format_seconds(machines.wall_seconds(0.0, chain))}"
    )
    if dollars:
        yield f"Cost: ${(to_train + to_judge) * dollars:,.2f} for the {unit} in use"


def _tables(
    study: Study, plan: Plan, work: Mapping[Item, float], machines: Machines | None
) -> Iterator[str]:
    """Say how many trials each table needs, and their hours; a shared trial counts in each."""
    for table in plan.tables:
        serving = {t.digest for t in plan if table.name in {s.split()[0] for s in t.serves}}
        columns = {"", *study.evaluators, *map(evaluator_of, table.columns)}
        spent = sum(work.get((digest, name), 0.0) for digest in serving for name in columns)
        hours = f"{_short(machines.hours(spent)):>8} h" if machines else ""
        yield f"  {table.name:<4}{len(serving):>4} trials{hours}  {table.question}"


def _refused(plan: Plan, most: int) -> Iterator[str]:
    """Say why combinations are refused, the commonest reasons first."""
    reasons = Counter(refused.reason for refused in plan.refused).most_common()
    for reason, times in reasons[:most]:
        first = next(r.combination for r in plan.refused if r.reason == reason)
        yield f"  refused: {times} x {reason} (first: {first})"
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
        yield f"  {trial.digest}  {trial.name}"
        yield f"{INDENT}{_hyperparameters(trial)}"
        yield f"{INDENT}{'; '.join(trial.serves)} | {', '.join(trial.evaluators)}"
    values = {
        name: list(dict.fromkeys(field_text(trial.recipe, name, study.library) for trial in plan))
        for name in Recipe.model_fields
    }
    differing = {name: texts for name, texts in values.items() if len(texts) > 1}
    if differing:
        yield "Trials differ in:"
    for name, texts in differing.items():
        more = f" and {len(texts) - MOST_VALUES} more" if len(texts) > MOST_VALUES else ""
        yield f"  {name}: {', '.join(texts[:MOST_VALUES])}{more}"


def _hyperparameters(trial: Trial) -> str:
    recipe = trial.recipe
    parts = [
        f"rate {recipe.learning_rate:g}",
        f"decay {recipe.weight_decay:g}",
        f"batch {recipe.batch_size}",
        f"warm-up {recipe.warmup_epochs:g}",
    ]
    if recipe.norm == "ghost":
        parts.append(f"ghost batch {recipe.ghost_batch} of {recipe.forward_batch}")
    if recipe.adversary:
        parts.append(f"epsilon {recipe.adversary.epsilon * 255:g}/255")
    return ", ".join(parts)


def _short(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
