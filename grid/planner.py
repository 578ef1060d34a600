"""`--plan`: what a study would train, ask, take and cost, printed without doing any of it."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

from grid.forecast import (
    HOUR,
    Calibration,
    Forecast,
    Throughput,
    affordable,
    disk_bytes,
    forecast,
    needs_of_tables,
)
from grid.passes import held_out_images
from grid.plan import Plan, field_text
from grid.progress import format_seconds
from grid.schedule import Interruptions, Job, Machines, gpu_machines, simulate, speed_of
from grid.studies import Study, format_settings
from trainables.data.listing import GIBIBYTE, DataSource
from trainables.options import amount, count
from trainables.recipe import Recipe
from trainables.scale import Scale

INDENT = " " * 16
MINUTES_AWAY = 10.0
MOST_VALUES = 12  # of a field in which trials differ


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add --plan, --calibrate and what they can be told."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan", action="store_true", help="print trials, hours, disk and cost, and stop"
    )
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="measure here how long things take, keep it in the results, and plan by it",
    )
    group.add_argument("--nodes", type=count, metavar="N", help="plan for N nodes")
    group.add_argument("--gpus-per-node", type=count, metavar="G", help="of these nodes")
    group.add_argument(
        "--seconds-per-unit",
        type=amount,
        metavar="X",
        help="seconds of one worker for a unit of cost, instead of --calibrate: at digits a second "
        "of one core, at imagenet an epoch of 10^9 multiply-accumulates an image",
    )
    group.add_argument(
        "--interruptions-per-node-day",
        type=amount,
        metavar="R",
        help="plan for spot nodes that are taken away so often, and are back after "
        "--minutes-away; one draw",
    )
    group.add_argument("--minutes-away", type=amount, default=MINUTES_AWAY, metavar="M")
    group.add_argument("--dollars-per-gpu-hour", type=amount, metavar="D", help="plan the cost")
    group.add_argument(
        "--budget-gpu-hours",
        "--budget-hours",
        type=amount,
        metavar="H",
        help="say which tables, as many as can be, H hours of GPUs (or cores) are enough for",
    )


def check_plan_options(options: argparse.Namespace) -> None:
    """Raise ValueError where an option of the plan lacks what it goes with."""
    planned = options.plan or options.calibrate
    if bool(options.nodes) != bool(options.gpus_per_node):
        raise ValueError("--nodes and --gpus-per-node go together")
    if options.interruptions_per_node_day and not options.nodes:
        raise ValueError("--interruptions-per-node-day goes with --nodes and --gpus-per-node")
    for name in ("nodes", "seconds_per_unit", "dollars_per_gpu_hour", "budget_gpu_hours"):
        if getattr(options, name) and not planned:
            raise ValueError(f"--{name.replace('_', '-')} goes with --plan")
    if options.calibrate and options.seconds_per_unit:
        raise ValueError("--calibrate measures what --seconds-per-unit states: leave one out")


def print_plan(
    options: argparse.Namespace, study: Study, plan: Plan, scale: Scale, source: DataSource
) -> None:
    """Print the trials, what they share, what was refused, and what all of it takes."""
    settings = f" with {format_settings(study.settings)}" if study.settings else ""
    print(f"Study {study.name}{settings} at scale {scale.name}: {scale.title}")
    for trial in plan:
        print(f"  {trial.digest}  {trial.name}")
        print(f"{INDENT}{_hyperparameters(trial.recipe)}")
        print(f"{INDENT}{'; '.join(trial.serves)} | {', '.join(trial.evaluators)}")
    for refused in plan.refused:
        print(f"  refused: {refused.combination}: {refused.reason}")
    for name, images in _subsets(plan, scale).items():
        print(f"  {name}: {images} images, an interval of at most ±{_reach(images):.0f} points")
    for line in (*_without_effect(study, plan), *_fields_that_differ(plan), *plan.notes):
        print(line)
    shared = plan.asked - len(plan.trials)
    print(
        f"{plan.asked} rows asked for, {len(plan.trials)} trainings ({shared} shared), "
        f"{len(plan.refused)} combinations refused"
    )
    throughput, measured = _throughput(options, plan, scale, source)
    held_out = held_out_images(scale, source)
    found = forecast(plan, scale, throughput or Throughput(seconds_per_unit=0), held_out=held_out)
    print(f"Evaluation: {_passes_text(found)}")
    print(f"Disk: at most {disk_bytes(plan) / GIBIBYTE:.1f} GiB of checkpoints and weights")
    if throughput is None:
        if options.nodes or options.budget_gpu_hours or options.dollars_per_gpu_hour:
            raise ValueError("hours are unknown: --calibrate first, or give --seconds-per-unit")
        print("Hours: unknown; --calibrate measures them, --seconds-per-unit states them")
        return
    for line in _hours(options, study, scale, found, throughput, measured):
        print(line)


def _without_effect(study: Study, plan: Plan) -> Iterator[str]:
    """Say which fields that are set for every trial change nothing in some."""
    for name in filter(Recipe.model_fields.__contains__, study.settings):
        usual = Recipe.model_fields[name].default
        others = [trial for trial in plan if getattr(trial.recipe, name) != usual]
        if inert := [trial for trial in others if name not in trial.recipe.effective()]:
            yield (
                f"{name} has no effect in {len(inert)} of {len(plan.trials)} trials, "
                f"the first {inert[0].name}"
            )


def _fields_that_differ(plan: Plan) -> Iterator[str]:
    """Say every field of a recipe in which trials differ, with its values there."""
    found = {
        name: list(dict.fromkeys(field_text(trial.recipe, name) for trial in plan))
        for name in Recipe.model_fields
    }
    differing = {name: texts for name, texts in found.items() if len(texts) > 1}
    if not differing:
        return
    yield "Trials differ in:"
    for name, texts in differing.items():
        more = f" and {len(texts) - MOST_VALUES} more" if len(texts) > MOST_VALUES else ""
        yield f"  {name}: {', '.join(texts[:MOST_VALUES])}{more}"


def _throughput(
    options: argparse.Namespace, plan: Plan, scale: Scale, source: DataSource
) -> tuple[Throughput | None, str]:
    """Return how fast the machines are, and how that is known: stated, measured now or before."""
    if options.seconds_per_unit:
        return Throughput(seconds_per_unit=options.seconds_per_unit), "as --seconds-per-unit says"
    device = "cuda" if _gpus_per_worker(options) else "cpu"
    path = Path(options.results) / f"calibration-{scale.name}-{device}.json"
    if options.calibrate:
        from grid.calibrate import calibrate

        calibration = calibrate(
            plan,
            scale,
            source,
            threads=options.cpus_per_worker,
            lanes=_lanes_here(options.cpus_per_worker),
            device=device,
        )
        calibration.save(path)
        print(f"Calibration: {path}")
    elif path.exists():
        calibration = Calibration.load(path)
    else:
        return None, ""
    return calibration.throughput, f"measured {calibration.measured} on {calibration.machine}"


def _gpus_per_worker(options: argparse.Namespace) -> float:
    return float(options.gpus_per_worker or (1 if options.nodes else 0))


def _hours(
    options: argparse.Namespace,
    study: Study,
    scale: Scale,
    found: Forecast,
    throughput: Throughput,
    measured: str,
) -> Iterator[str]:
    """Say what the plan takes: work, wall clock, cost, by table, and what a budget buys."""
    gpus = _gpus_per_worker(options)
    # What a worker's second alone is of GPUs, or of cores: also a share of a GPU trains on all.
    each = (max(1.0, gpus) if gpus else options.cpus_per_worker) / HOUR
    judged_each = (1.0 if gpus else options.cpus_per_worker) / HOUR
    unit = "GPU-hours" if gpus else "core-hours"
    hours = {
        item: value * (judged_each if item[1] else each) for item, value in found.seconds.items()
    }
    total, training = sum(hours.values()), found.training * each
    yield (
        f"Work: {_hours_text(total)} {unit}, {_hours_text(training)} to train and "
        f"{_hours_text(total - training)} to judge ({measured})"
    )
    needs = needs_of_tables(study, scale, found.plan)
    for name, items in needs.items():
        trainings = sum(not evaluator for _, evaluator in items)
        cost = sum(hours[item] for item in items)
        yield f"  {name} alone: {trainings} trainings, {_hours_text(cost)} {unit}"
    yield from _wall_clock(options, found, throughput, gpus)
    if options.dollars_per_gpu_hour:
        yield f"Cost: ${total * options.dollars_per_gpu_hour:,.2f} for the {unit} in use"
    if options.budget_gpu_hours and not needs:
        yield (
            f"For {options.budget_gpu_hours:g} {unit}: a budget chooses among tables, and study "
            f"{study.name} has none; all of it takes {_hours_text(total)}"
        )
    elif options.budget_gpu_hours:
        tables, cost = affordable(needs, hours, options.budget_gpu_hours)
        yield (
            f"For {options.budget_gpu_hours:g} {unit}: {len(tables)} of {len(needs)} tables, "
            f"{' '.join(tables) or 'none'}, for {_hours_text(cost)}"
        )


def _wall_clock(
    options: argparse.Namespace, found: Forecast, throughput: Throughput, gpus: float
) -> Iterator[str]:
    if options.nodes:
        machines = gpu_machines(
            options.nodes, options.gpus_per_node, workers=options.workers, gpus_per_worker=gpus
        )
        where = f"On {options.nodes} nodes of {options.gpus_per_node} GPUs"
    elif gpus:
        return
    else:
        lanes = _lanes_here(options.cpus_per_worker * options.workers)
        machines, where = Machines(lanes=lanes, evaluators=lanes), "Here"
    jobs = found.jobs(options.workers * speed_of(gpus))
    quiet = simulate(jobs, machines)
    over = quiet.makespan / quiet.lower_bound - 1 if quiet.lower_bound else 0.0
    each = f" of {options.workers} workers" if options.workers > 1 else ""
    yield (
        f"{where}, {machines.lanes} trials at once{each}: "
        f"{format_seconds(quiet.makespan + throughput.start_up)}, {over:.0%} over the least "
        f"possible; trained after {format_seconds(quiet.trained + throughput.start_up)}, "
        f"{quiet.utilisation:.0%} of the lanes in use"
    )
    if options.interruptions_per_node_day:
        yield _spot(options, jobs, machines, quiet.makespan)
    if options.dollars_per_gpu_hour and options.nodes:
        held = options.nodes * options.gpus_per_node * quiet.makespan / HOUR
        yield (
            f"Cost of holding all {options.nodes * options.gpus_per_node} GPUs until the end: "
            f"${held * options.dollars_per_gpu_hour:,.2f}"
        )


def _lanes_here(threads: int) -> int:
    """Return how many trials of so many threads this machine's cores train at once."""
    return max(1, len(os.sched_getaffinity(0)) // threads)


def _spot(
    options: argparse.Namespace, jobs: Sequence[Job], machines: Machines, undisturbed: float
) -> str:
    rate, away = options.interruptions_per_node_day, options.minutes_away
    drawn = Interruptions(per_node_day=rate, seconds_away=60 * away)
    spot = simulate(jobs, machines, drawn)
    return (
        f"Taken away {rate:g} times a node and day, for {away:g} min: "
        f"{format_seconds(spot.makespan)} ({spot.makespan / undisturbed - 1:+.0%}), "
        f"{spot.interruptions} interruptions, {format_seconds(spot.repeated)} trained twice"
    )


def _passes_text(found: Forecast) -> str:
    asked, most = found.asked.values(), found.at_most.values()
    forward, gradient = sum(p.forward for p in asked), sum(p.gradient for p in asked)
    bound = sum(p.forward + p.gradient for p in most)
    return (
        f"{len(found.asked)} cells; an image through a model {forward:.3g} times, and through it "
        f"and back {gradient:.3g} times (at most {bound:.3g} in all)"
    )


def _hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _subsets(plan: Plan, scale: Scale) -> dict[str, int]:
    """Return how many images the costly evaluators ask about."""
    sizes = {
        "pgd": scale.attack_subset,
        "pgd-as-published": scale.attack_subset,
        "autoattack-small": scale.autoattack_subset,
        "autoattack": scale.autoattack_subset,
        "tpa": scale.patch.images,
    }
    asked = {name for trial in plan for name in trial.evaluators}
    return {name: images for name, images in sizes.items() if name in asked}


def _reach(images: int) -> float:
    """Return half the width, in points, of the widest 95 % Wilson interval of n images."""
    z = NormalDist().inv_cdf(0.975)
    return 50 * z / math.sqrt(images + z**2)


def _hyperparameters(recipe: Recipe) -> str:
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
