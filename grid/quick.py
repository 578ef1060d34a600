"""A quick look: how many images and epochs fit into the minutes that a user has."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

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

SIZES_FILE = "quick.json"  # of the results: the same command continues with the same sizes
STUDYS_EPOCHS = 100  # that --epochs stands for
PROBE_TRAIN, PROBE_EVAL = 256, 16  # images
PROBE_SHARE = 0.1  # of the minutes; trials that are not measured by then are estimated
START_SECONDS = 45.0  # of Ray, of every process's imports and of the report, on two cores
CONTENTION = 1.3  # of processes on every core, beside one alone
JUDGING = 0.4  # of the time
LEAST_EPOCHS = 15  # before all images are trained by
LEAST_EVAL = 30


@dataclass(frozen=True)
class Sizes:
    """The sizes of a quick look, 0 where nothing is cut; `why` says where they are from."""

    train_images: int = 0
    eval_images: int = 0
    epochs: int = 0
    why: str = ""


@dataclass(frozen=True)
class Pace:
    """What a trial takes alone: seconds of an epoch by one image, and of judging by so many."""

    image: float
    judging: dict[str, float]
    evaluators: dict[str, Evaluator]

    def of(self, sizes: Sizes, validations: float) -> tuple[float, float]:
        """Return the seconds to train and to judge; a validation forwards every image."""
        images = sizes.train_images + sizes.eval_images * validations / 3
        judging = 0.0
        for name, seconds in self.judging.items():
            cost = [
                self.evaluators[name].cost(count, withstanding=0.5)
                for count in (sizes.eval_images, PROBE_EVAL)
            ]
            judging += seconds * cost[0] / max(cost[1], 1.0)
        return sizes.epochs * images * self.image, judging


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
    if sizes.epochs:
        sized = replace(sized, epochs_factor=Fraction(sizes.epochs, STUDYS_EPOCHS))
    return sized


def fit(
    options: RunOptions,
    scale: Scale,
    source: DataSource,
    planned: Callable[[Scale], Plan],
    *,
    reduced: bool,
) -> Sizes:
    """Return the sizes that the options state, and for --minutes those that fit into them.

    A results folder remembers the sizes that were chosen. ValueError where nothing fits, or where
    a command that only looks comes before any run.
    """
    stated = Sizes(options.train_images or 0, options.eval_images or 0, options.epochs or 0)
    if not options.minutes:
        return replace(stated, why=_described(stated, scale)) if stated != Sizes() else stated
    whole = planned(with_sizes(scale, Sizes(), reduced=reduced))
    trials = sorted((trial.digest, trial.evaluators) for trial in whole)
    key = hashlib.sha256(repr((options.minutes, stated, trials)).encode()).hexdigest()[:12]
    path = options.results / SIZES_FILE
    sizes = _stored(path)
    if key not in sizes:
        if options.status or options.report:
            raise ValueError(f"{path} has no sizes of these options: run the study first")
        sizes[key] = _measured(options, stated, scale, source, planned, reduced=reduced)
        from trainables.store.storage import write_atomically

        write_atomically(path, _SIZES.dump_json(sizes, indent=1))
    return sizes[key]


_SIZES = TypeAdapter(dict[str, Sizes])


def _stored(path: Path) -> dict[str, Sizes]:
    try:
        return _SIZES.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def _measured(
    options: RunOptions,
    stated: Sizes,
    scale: Scale,
    source: DataSource,
    planned: Callable[[Scale], Plan],
    *,
    reduced: bool,
) -> Sizes:
    """Measure the trials on a few images and choose the largest sizes for the time that is left."""
    began, limit = time.monotonic(), 60 * (options.minutes or 0.0)
    held_out = scale.data_set.held_out_images or len(list_splits(source)[1])
    whole = Sizes(
        scale.data_set.train_images,
        held_out,
        max(1, round(STUDYS_EPOCHS * scale.epochs_factor)),
    )
    few = Sizes(min(PROBE_TRAIN, whole.train_images), min(PROBE_EVAL, held_out))
    probed = with_sizes(scale, few, reduced=reduced)
    plan = planned(probed)
    paces = _paces(options, plan, probed, replace(source, eval_images=few.eval_images), limit)
    lanes = 1
    if not options.gpus_per_worker:
        cores = len(os.sched_getaffinity(0))
        lanes = max(1, cores // (options.cpus_per_worker * options.workers))
    spent = time.monotonic() - began
    room = (limit - spent - START_SECONDS) * lanes / CONTENTION

    def seconds(sizes: Sizes) -> tuple[float, float]:
        """Return the work of all cores to train, and to judge; the longest trial keeps them all."""
        each = [pace.of(sizes, 1 / probed.validate_every) for pace in paces]
        training = [train for train, _ in each]
        return max(sum(training), lanes * max(training)), sum(judge for _, judge in each)

    chosen = largest(stated, whole, room, seconds)
    takes = sum(seconds(chosen)) * CONTENTION / lanes + spent + START_SECONDS
    if takes > limit:
        raise ValueError(
            f"{_described(chosen, scale)} takes about {format_seconds(takes)}: give --minutes "
            f"{math.ceil(takes / 60)}, or fewer trials or evaluators"
        )
    images = 1000 * sum(pace.image for pace in paces) / len(paces)
    judged = sum(sum(pace.judging.values()) for pace in paces) / len(paces) / few.eval_images
    why = (
        f"{_described(chosen, scale)}; chosen for {options.minutes:g} min, about "
        f"{format_seconds(takes)} are needed: measured here, a training takes {images:.2g} ms an "
        f"image and epoch, and all that is asked of a model {judged:.2g} s an image"
    )
    return replace(chosen, why=why)


def largest(
    stated: Sizes, whole: Sizes, room: float, seconds: Callable[[Sizes], tuple[float, float]]
) -> Sizes:
    """Return the largest sizes whose work has room, or the smallest; stated ones stay.

    First the images to judge by, then as many to train by as leave some epochs, then the epochs.
    seconds: the work of training and of judging.
    """
    evals = [stated.eval_images] if stated.eval_images else list(_ladder(whole.eval_images))
    trains = [stated.train_images] if stated.train_images else list(_ladder(whole.train_images))
    fits = (n for n in evals if seconds(Sizes(0, n, 0))[1] <= room * JUDGING)
    judged, wanted = next(fits, evals[-1]), stated.epochs or min(LEAST_EPOCHS, whole.epochs)
    for train in trains:
        once, judging = seconds(Sizes(train, judged, 1))
        left = math.floor((room - judging) / once) if once else whole.epochs
        if left >= wanted:
            break
    return Sizes(train, judged, stated.epochs or max(1, min(left, whole.epochs)))


def _ladder(most: int) -> Iterator[int]:
    """Yield all, then round numbers below, down to the fewest that say something."""
    yield most
    for power in range(len(str(most)), 0, -1):
        for digit in (7, 5, 3, 2, 1):
            if LEAST_EVAL <= digit * 10**power < most:
                yield digit * 10**power


def _described(sizes: Sizes, scale: Scale) -> str:
    """Say the sizes beside what there is."""
    parts = []
    if sizes.train_images:
        parts.append(f"{sizes.train_images:,} of {scale.data_set.train_images:,} train images")
    if sizes.epochs:
        usual = round(STUDYS_EPOCHS * scale.epochs_factor)
        parts.append(f"{sizes.epochs} epochs in place of {usual}")
    if sizes.eval_images:
        parts.append(f"{sizes.eval_images:,} held-out images")
    return f"Quick look: {', '.join(parts)}"


def _paces(
    options: RunOptions, plan: Plan, scale: Scale, source: DataSource, limit: float
) -> list[Pace]:
    """Measure the plan's trials, or estimate them by the first once a share of the time is over."""
    import torch

    from evaluators.base import device_named
    from trainables.data.load import load_data

    began, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(options.cpus_per_worker)
    device = device_named("cuda" if options.gpus_per_worker else "cpu")
    data = load_data(scale, source)
    evaluators = {name: evaluator_named(name, scale) for trial in plan for name in trial.evaluators}
    paces: list[Pace] = []
    for trial in plan:
        if paces and time.monotonic() - began > limit * PROBE_SHARE:
            ratio = trial.cost / plan.trials[0].cost
            judging = {name: ratio * s for name, s in paces[0].judging.items()}
            paces.append(Pace(ratio * paces[0].image, judging, evaluators))
        else:
            paces.append(_pace(trial, data, evaluators, device))
    torch.set_num_threads(threads)
    return paces


def _pace(trial: Trial, data: Data, evaluators: dict[str, Evaluator], device: torch.device) -> Pace:
    """Time a trial's second epoch, and its evaluators."""
    from evaluators.base import judge_images
    from trainables.data.base import WHOLE, Shard
    from trainables.networks import build_classifier
    from trainables.train.loop import train

    recipe = trial.recipe
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    now, epoch = time.monotonic(), 0.0
    for _ in islice(train(recipe, classifier, data, device=device, teacher=teacher), 2):
        epoch, now = time.monotonic() - now, time.monotonic()
    judging = {}
    for name in trial.evaluators:
        for shard in (Shard(0, 1), WHOLE):  # the first pays for what is made once
            now = time.monotonic()
            judge_images(evaluators[name], classifier, data, device=device, shard=shard)
        judging[name] = time.monotonic() - now
    return Pace(epoch / max(1, len(data.train)), judging, evaluators)
