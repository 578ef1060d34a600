"""A quick look: how many images and epochs fit into the minutes that a user has."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from evaluators import evaluator_named
from grid.options import RunOptions
from grid.plan import Plan, Trial, format_seconds
from trainables.data.listing import DataSource, list_splits
from trainables.data.registry import REDUCED
from trainables.scale import Scale, scale_named

if TYPE_CHECKING:
    import torch

    from evaluators.base import Evaluator
    from trainables.data.base import Data

SIZES_FILE = "quick.json"  # in the results: the same command goes on with the same sizes
STUDYS_EPOCHS = 100  # that --epochs stands for
PROBE_SHARE = 0.1  # of the minutes; trials that are not measured by then are estimated
START_SECONDS = 60.0  # of Ray, of every process's imports and of the report, on two cores
CONTENTION = 1.3  # of processes on every core, beside one alone
JUDGING = 0.4  # of the time
LEAST_EPOCHS = 15  # before more images are trained by
ROUND = (50_000, 20_000, 10_000, 5_000, 2_000, 1_000, 700, 500, 300, 200, 100, 70, 50, 30)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a quick look, 0 where nothing is cut; `why` says where they are from."""

    train_images: int = 0
    eval_images: int = 0
    epochs: int = 0
    why: str = ""


PROBE = Sizes(64, 8)  # what is measured, of a larger batch all of it
_STORED = TypeAdapter(dict[str, Sizes])
Pace = tuple[float, dict["Evaluator", float]]  # seconds alone: of an image's epoch; of judging some


def with_sizes(scale: Scale, sizes: Sizes, *, reduced: bool) -> Scale:
    """Return a scale with so many train images and epochs; ValueError where there are fewer.

    reduced: its models are cut down as at digits, unless they are already.
    """
    name, there = scale.name, scale.data_set.train_images
    if sizes.train_images > there:
        raise ValueError(f"--train-images {sizes.train_images}: there are {there:,}")
    if sizes.train_images not in (0, there):
        name += f"-{sizes.train_images}train"
    if reduced and scale.depth_divisor == 1:
        name += REDUCED
    sized = scale_named(name).preprocessed(scale.data_set.departure)
    factor = Fraction(sizes.epochs, STUDYS_EPOCHS) or scale.epochs_factor
    return replace(sized, epochs_factor=factor)


def fit(
    options: RunOptions,
    scale: Scale,
    source: DataSource,
    planned: Callable[[Scale], Plan],
    *,
    reduced: bool,
) -> Sizes:
    """Return the sizes that the options state, and for --minutes those that fit into them.

    A results folder remembers what was chosen. planned: a scale's plan. ValueError where nothing
    fits, or where a command that only looks comes before any run.
    """
    stated = Sizes(options.train_images or 0, options.eval_images or 0, options.epochs or 0)
    if not options.minutes:
        return replace(stated, why=_described(stated, scale)) if stated != Sizes() else stated
    whole = planned(with_sizes(scale, Sizes(), reduced=reduced))
    trials = sorted((trial.digest, trial.evaluators) for trial in whole)
    key = hashlib.sha256(repr((options.minutes, stated, trials)).encode()).hexdigest()[:12]
    path, stored = options.results / SIZES_FILE, dict[str, Sizes]()
    with suppress(OSError, ValueError):
        stored = _STORED.validate_json(path.read_bytes())
    if key not in stored:
        if options.status or options.report:
            raise ValueError(f"{path} has no sizes of these options: run the study first")
        least = max(trial.recipe.batch_size for trial in whole)
        few = min(max(PROBE.train_images, least), scale.data_set.train_images)
        probed = with_sizes(scale, Sizes(few), reduced=reduced)
        stored[key] = _measured(options, stated, scale, source, planned(probed), probed)
        from trainables.store.storage import write_atomically

        write_atomically(path, _STORED.dump_json(stored, indent=1))
    return stored[key]


def _measured(
    options: RunOptions, stated: Sizes, scale: Scale, source: DataSource, plan: Plan, probed: Scale
) -> Sizes:
    """Measure the trials on a few images and choose the largest sizes for the time that is left."""
    began, limit = time.monotonic(), 60 * (options.minutes or 0.0)
    held_out = scale.data_set.held_out_images or len(list_splits(source)[1])
    usual = max(1, round(STUDYS_EPOCHS * scale.epochs_factor))
    whole = Sizes(scale.data_set.train_images, held_out, usual)
    few = min(PROBE.eval_images, held_out)
    paces = _paces(options, plan, probed, replace(source, eval_images=few), limit)
    lanes = 1 if options.gpus_per_worker else len(os.sched_getaffinity(0))
    lanes = max(1, lanes // (options.cpus_per_worker * options.workers))
    spent = time.monotonic() - began + START_SECONDS

    def seconds(sizes: Sizes) -> tuple[float, float]:
        """Return the work of all cores to train, and to judge; the longest trial keeps them all."""
        images = sizes.train_images + sizes.eval_images / probed.validate_every / 3
        training = [sizes.epochs * images * image for image, _ in paces]
        judging = [
            taken * e.cost(sizes.eval_images, withstanding=0.5) / e.cost(few, withstanding=0.5)
            for _, times in paces
            for e, taken in times.items()
        ]
        return max(sum(training), lanes * max(training)), sum(judging)

    least = max(trial.recipe.batch_size for trial in plan)
    chosen = largest(stated, whole, (limit - spent) * lanes / CONTENTION, seconds, least=least)
    takes = sum(seconds(chosen)) * CONTENTION / lanes + spent
    if takes > limit:
        raise ValueError(
            f"{_described(chosen, scale)} takes about {format_seconds(takes)}: give --minutes "
            f"{math.ceil(takes / 60)}, or fewer trials or evaluators"
        )
    image, judged = (
        sum(times) / len(paces)
        for times in zip(*((i, sum(t.values())) for i, t in paces), strict=True)
    )
    why = (
        f"{_described(chosen, scale)}; chosen for {options.minutes:g} min, about "
        f"{format_seconds(takes)} are needed: measured here, training takes {1000 * image:.2g} ms "
        f"an image and epoch, and all evaluators together {judged / few:.2g} s an image"
    )
    return replace(chosen, why=why)


def largest(
    stated: Sizes,
    whole: Sizes,
    room: float,
    seconds: Callable[[Sizes], tuple[float, float]],
    *,
    least: int = 1,
) -> Sizes:
    """Return the largest sizes whose work has room, or the smallest; stated ones stay.

    First the images to judge by, then as many to train by as leave some epochs, then the epochs.
    seconds: the work of training and of judging. least: images to train by.
    """
    evals, trains = (
        [size] if size else [most, *(count for count in ROUND if count < most)]
        for size, most in (
            (stated.eval_images, whole.eval_images),
            (stated.train_images, whole.train_images),
        )
    )
    trains = [count for count in trains if count >= least] or trains
    fits = (n for n in evals if seconds(Sizes(0, n, 0))[1] <= room * JUDGING)
    judged, wanted = next(fits, evals[-1]), stated.epochs or min(LEAST_EPOCHS, whole.epochs)
    for train in trains:
        once, judging = seconds(Sizes(train, judged, 1))
        left = math.floor((room - judging) / once) if once else whole.epochs
        if left >= wanted:
            break
    return Sizes(train, judged, stated.epochs or max(1, min(left, whole.epochs)))


def _described(sizes: Sizes, scale: Scale) -> str:
    """Say the sizes beside what there is."""
    usual = round(STUDYS_EPOCHS * scale.epochs_factor)
    parts = (
        (sizes.train_images, f"of {scale.data_set.train_images:,} train images"),
        (sizes.epochs, f"epochs in place of {usual}"),
        (sizes.eval_images, "held-out images"),
    )
    return f"Quick look: {', '.join(f'{size:,} {text}' for size, text in parts if size)}"


def _paces(
    options: RunOptions, plan: Plan, scale: Scale, source: DataSource, limit: float
) -> list[Pace]:
    """Measure the plan's trials, or estimate them by the first once a share of the time is over."""
    import torch

    from evaluators.base import device_named
    from trainables.data.load import load_data

    began, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(options.cpus_per_worker)
    device, paces = device_named("cuda" if options.gpus_per_worker else "cpu"), list[Pace]()
    trials = sorted(plan, key=lambda trial: not trial.recipe.epochs)
    for trial in trials:
        if paces and time.monotonic() - began > limit * PROBE_SHARE:
            ratio, (image, judging) = (
                _of_epoch(trial, scale) / _of_epoch(trials[0], scale),
                paces[0],
            )
            each = ratio * image if trial.recipe.epochs else 0.0
            paces.append((each, {e: ratio * taken for e, taken in judging.items()}))
        else:
            shown = scale.preprocessed(trial.recipe.preprocessing.geometry())
            paces.append(_pace(trial, load_data(shown, source), shown, device, began + limit / 2))
    torch.set_num_threads(threads)
    return paces


def _of_epoch(trial: Trial, scale: Scale) -> float:
    """Return what an epoch of a trial costs, of a model as it is what one would."""
    return (
        trial.cost / trial.recipe.epochs if trial.recipe.epochs else scale.epoch_cost(trial.recipe)
    )


def _pace(trial: Trial, data: Data, scale: Scale, device: torch.device, end: float) -> Pace:
    """Time a trial's second epoch, and its evaluators; ValueError where that lasts past the end.

    end: as of the monotonic clock.
    """
    from evaluators.base import judge_images
    from trainables.data.base import WHOLE, Shard
    from trainables.networks import build_classifier
    from trainables.train.loop import train

    recipe, judging = trial.recipe, {}
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    now, epoch = time.monotonic(), 0.0
    for _ in islice(train(recipe, classifier, data, device=device, teacher=teacher), 2):
        epoch, now = time.monotonic() - now, time.monotonic()
    images, held_out = len(data.train), len(data.held_out)
    for evaluator in (evaluator_named(name, scale) for name in trial.evaluators):
        needed = evaluator.cost(held_out, withstanding=0.5) * epoch / images / 3
        if now + needed > end:
            raise ValueError(
                f"{evaluator.name} of {trial.name} takes about {format_seconds(needed)} for "
                f"{held_out} images here: give more --minutes, fewer --evaluators, or --study quick"
            )
        for shard in (Shard(0, 1), WHOLE):  # the first pays for what is made once
            now = time.monotonic()
            judge_images(evaluator, classifier, data, device=device, shard=shard)
        judging[evaluator] = time.monotonic() - now
    return epoch / images, judging
