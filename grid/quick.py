"""A quick look: how many images and epochs fit into the minutes that a user has."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice

import torch

from evaluators import evaluator_named
from evaluators.base import device_named, judge_images
from grid.estimate import work_of
from grid.options import RunOptions
from grid.plan import STUDYS_EPOCHS, Plan, Sizes, format_seconds
from trainables.data.base import WHOLE, Shard
from trainables.data.listing import DataSource, list_splits
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.scale import Scale
from trainables.store.results import sole_run
from trainables.train.loop import train

START_SECONDS = 60.0  # of Ray, every process's imports and the report, on two cores without load
CONTENTION = 1.3  # of processes on every core, beside one alone
JUDGING = 0.4  # of the time
LEAST_EPOCHS = 15  # before more images are trained by
PROBE = Sizes(64, 8)  # what is measured, of a larger batch all of it
ROUND = (50_000, 20_000, 10_000, 5_000, 2_000, 1_000, 700, 500, 300, 200, 100, 70, 50, 30)
Seconds = Callable[[Sizes], tuple[float, float]]  # of one core to train, and to judge


def fit(
    options: RunOptions,
    source: DataSource,
    sized: Callable[[Sizes], Scale],
    planned: Callable[[Scale], Plan],
) -> Sizes:
    """Return the sizes that fit into the minutes of the options, with those that they state.

    A results folder remembers what was chosen. sized: the scale of sizes. planned: a scale's plan.
    ValueError where nothing fits, or where a command that only looks comes before any run.
    """
    scale = sized(Sizes())
    plan = planned(scale)
    trials = sorted((trial.digest, trial.evaluators) for trial in plan)
    key = hashlib.sha256(repr((options.minutes, options.sizes, trials)).encode()).hexdigest()[:12]
    path = options.results / f"quick-{key}.json"
    if path.exists():
        return Sizes(**json.loads(path.read_text()))
    if options.status or options.report:
        raise ValueError(f"{path} is not there: run the study with these options first")
    whole = Sizes(
        scale.data_set.train_images,
        scale.data_set.held_out_images or len(list_splits(source)[1]),
        max(1, round(STUDYS_EPOCHS * scale.epochs_factor)),
    )
    least = max(trial.recipe.batch_size for trial in plan)
    few = Sizes(
        min(max(PROBE.train_images, least), whole.train_images),
        min(PROBE.eval_images, whole.eval_images),
        whole.epochs,
    )
    with sole_run(options.results):
        limit, began = 60 * (options.minutes or 0.0), time.monotonic()
        seconds, load, lanes = _measured(options, planned(sized(few)), sized(few), source, few)
        spent = time.monotonic() - began + START_SECONDS * load
        room = (limit - spent) * lanes / CONTENTION
        chosen = largest(options.sizes, whole, room, seconds, least=least)
        takes = sum(seconds(chosen)) * CONTENTION / lanes + spent
        said = chosen.described(scale)
        if takes > limit:
            raise ValueError(
                f"{said} takes about {format_seconds(takes)} on this machine, as loaded as it is: "
                f"give --minutes {math.ceil(takes / 60)}, or fewer trials or evaluators"
            )
        why = (
            f"chosen for {options.minutes:g} min by the pace and load of this machine at the start"
        )
        chosen = replace(chosen, why=f"{said}; {why}: about {format_seconds(takes)}")
        path.write_text(json.dumps(asdict(chosen)))
    return chosen


def _measured(
    options: RunOptions, plan: Plan, scale: Scale, source: DataSource, few: Sizes
) -> tuple[Seconds, float, int]:
    """Measure the longest trial on a few images; the others follow by what their models cost.

    Returns what sizes take, the machine's load (wall time by processor time, at least 1) and how
    many trials run side by side.
    """
    longest = max(plan, key=lambda trial: (trial.cost, scale.epoch_cost(trial.recipe)))
    names = tuple(plan.evaluators)
    trial, recipe = replace(longest, evaluators=names), longest.recipe
    work = work_of(replace(plan, trials=(trial,)), scale, few.eval_images)
    shown = scale.preprocessed(recipe.preprocessing.geometry())
    data = load_data(shown, replace(source, eval_images=few.eval_images))
    device = device_named("cuda" if options.gpus_per_worker else "cpu")
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    paces, threads = {"": 0.0}, torch.get_num_threads()
    torch.set_num_threads(options.cpus_per_worker)
    busy, began = time.process_time(), time.monotonic()
    now = began
    for _ in islice(train(recipe, classifier, data, device=device, teacher=teacher), 2):
        paces[""] = (time.monotonic() - now) * recipe.epochs / trial.cost
        now = time.monotonic()
    for name in names:
        evaluator = evaluator_named(name, shown)
        for shard in (Shard(0, 1), WHOLE):  # the first pays for what is made once
            now = time.monotonic()
            judge_images(evaluator, classifier, data, device=device, shard=shard)
        paces[name] = (time.monotonic() - now) / work[trial.digest, name]
    load = max(1.0, (time.monotonic() - began) / (time.process_time() - busy))
    torch.set_num_threads(threads)
    lanes = 1 if options.gpus_per_worker else len(os.sched_getaffinity(0))
    lanes = max(1, lanes // (options.cpus_per_worker * options.workers))
    training = max(sum(trial.cost for trial in plan), lanes * plan.longest_chain) * paces[""]

    def seconds(sizes: Sizes) -> tuple[float, float]:
        images = sizes.train_images + sizes.eval_images / scale.validate_every / 3
        share = images / few.train_images * sizes.epochs / few.epochs
        cells = work_of(plan, scale, sizes.eval_images).items()
        return training * share, sum(paces[name] * units for (_, name), units in cells if name)

    return seconds, load, lanes


def largest(stated: Sizes, whole: Sizes, room: float, seconds: Seconds, *, least: int = 1) -> Sizes:
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
    for trained in trains:
        once, judging = seconds(Sizes(trained, judged, 1))
        left = math.floor((room - judging) / once) if once else whole.epochs
        if left >= wanted:
            break
    return Sizes(trained, judged, stated.epochs or max(1, min(left, whole.epochs)))
