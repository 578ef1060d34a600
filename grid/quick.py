"""A quick look: how many images and epochs fit into the minutes that a user has."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice

from evaluators import evaluator_named
from grid.options import RunOptions
from grid.plan import Plan, format_seconds
from trainables.data.listing import DataSource, list_splits
from trainables.data.registry import REDUCED
from trainables.scale import Scale, scale_named

STUDYS_EPOCHS = 100  # that --epochs stands for
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
Seconds = Callable[[Sizes], tuple[float, float]]  # of one core to train, and to judge


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
    plan = planned(with_sizes(scale, Sizes(), reduced=reduced))
    trials = sorted((trial.digest, trial.evaluators) for trial in plan)
    key = hashlib.sha256(repr((options.minutes, stated, trials)).encode()).hexdigest()[:12]
    path = options.results / f"quick-{key}.json"
    if path.exists():
        return Sizes(**json.loads(path.read_text()))
    if options.status or options.report:
        raise ValueError(f"{path} is not there: run the study with these options first")
    there, least = scale.data_set, max(trial.recipe.batch_size for trial in plan)
    whole = Sizes(
        there.train_images,
        there.held_out_images or len(list_splits(source)[1]),
        max(1, round(STUDYS_EPOCHS * scale.epochs_factor)),
    )
    few = Sizes(
        min(max(PROBE.train_images, least), whole.train_images),
        min(PROBE.eval_images, whole.eval_images),
    )
    probed = with_sizes(scale, replace(few, eval_images=0), reduced=reduced)
    lanes = 1 if options.gpus_per_worker else len(os.sched_getaffinity(0))
    lanes = max(1, lanes // (options.cpus_per_worker * options.workers))
    limit, began = 60 * options.minutes, time.monotonic()
    seconds = _measured(options, planned(probed), probed, source, few, lanes)
    spent = time.monotonic() - began + START_SECONDS
    chosen = largest(stated, whole, (limit - spent) * lanes / CONTENTION, seconds, least=least)
    takes = sum(seconds(chosen)) * CONTENTION / lanes + spent
    said = _described(chosen, scale)
    if takes > limit:
        raise ValueError(
            f"{said} takes about {format_seconds(takes)}: give --minutes {math.ceil(takes / 60)}, "
            "or fewer trials or evaluators"
        )
    why = f"chosen for {options.minutes:g} min: about {format_seconds(takes)}, as measured here"
    chosen = replace(chosen, why=f"{said}; {why}")
    from trainables.store.storage import write_atomically

    write_atomically(path, json.dumps(asdict(chosen)).encode())
    return chosen


def _measured(
    options: RunOptions, plan: Plan, scale: Scale, source: DataSource, few: Sizes, lanes: int
) -> Seconds:
    """Measure the longest trial on a few images; the others follow by what their models cost."""
    import torch

    from evaluators.base import device_named, judge_images
    from trainables.data.base import WHOLE, Shard
    from trainables.data.load import load_data
    from trainables.networks import build_classifier
    from trainables.train.loop import train

    trial = max(plan, key=lambda trial: (trial.cost, scale.epoch_cost(trial.recipe)))
    recipe, threads = trial.recipe, torch.get_num_threads()
    torch.set_num_threads(options.cpus_per_worker)
    shown = scale.preprocessed(recipe.preprocessing.geometry())
    data = load_data(shown, replace(source, eval_images=few.eval_images))
    device = device_named("cuda" if options.gpus_per_worker else "cpu")
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    now, epoch = time.monotonic(), 0.0
    for _ in islice(train(recipe, classifier, data, device=device, teacher=teacher), 2):
        epoch, now = time.monotonic() - now, time.monotonic()
    shares = [other.cost / (trial.cost or 1) for other in plan]
    image = epoch / len(data.train) * max(sum(shares), lanes * max(shares))  # it holds one lane
    image *= recipe.epochs / (STUDYS_EPOCHS * float(scale.epochs_factor))
    paces = {}
    for name in {name for trial in plan for name in trial.evaluators}:
        evaluator = evaluator_named(name, shown)
        for shard in (Shard(0, 1), WHOLE):  # the first pays for what is made once
            now = time.monotonic()
            judge_images(evaluator, classifier, data, device=device, shard=shard)
        took = time.monotonic() - now
        models = sum(scale.epoch_cost(t.recipe) for t in plan if name in t.evaluators)
        cost = evaluator.cost(few.eval_images, withstanding=0.5) * scale.epoch_cost(recipe)
        paces[evaluator] = took * models / cost
    torch.set_num_threads(threads)

    def seconds(sizes: Sizes) -> tuple[float, float]:
        images = sizes.train_images + sizes.eval_images / scale.validate_every / 3
        judging = (
            pace * evaluator.cost(sizes.eval_images, withstanding=0.5)
            for evaluator, pace in paces.items()
        )
        return image * sizes.epochs * images, sum(judging)

    return seconds


def largest(
    stated: Sizes,
    whole: Sizes,
    room: float,
    seconds: Seconds,
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
    planned = round(STUDYS_EPOCHS * scale.epochs_factor)
    parts = (
        (sizes.train_images, f"of {scale.data_set.train_images:,} train images"),
        (sizes.epochs, f"epochs in place of {planned}"),
        (sizes.eval_images, "held-out images"),
    )
    return f"Quick look: {', '.join(f'{size:,} {text}' for size, text in parts if size)}"
