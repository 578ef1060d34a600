"""Measure how fast this machine trains and judges a plan's models, as a study would."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from evaluators.base import evaluate, split_batches
from evaluators.clean import Clean
from grid.forecast import Calibration, Throughput, kind_of
from grid.plan import Plan
from trainables.data.base import Data
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_named
from trainables.train.adversary import attacked, pgd_iterates
from trainables.train.folding import folded
from trainables.train.loop import train

RUN = Path(__file__).with_name("run.py")
TRAIN_IMAGES = 1200  # at least; and at least a batch
ATTACKED_IMAGES, ATTACK_STEPS = 64, 10
FORWARD_IMAGES, FORWARD_REPEATS = 600, 2
# A training of one epoch, judged by the least question: what is left is the command itself.
START_UP_STUDY = (
    'name = "start-up"\nbase = "resnet50"\nevaluators = ["clean"]\n[set]\nepochs = 10\n'
)


@dataclass(frozen=True)
class Measured:
    """Seconds of an epoch and of an image's passes, forward, and forward and back."""

    epoch: float
    forward: float
    gradient: float


def calibrate(
    plan: Plan, scale: Scale, source: DataSource, *, threads: int, lanes: int, device: str
) -> Calibration:
    """Measure each kind of training of a plan, in as many processes at once as a study has.

    On a CPU each lane has a training and an evaluator, which share it and slow each other: all
    measure the same kind, and half of their mean counts. A study of next to nothing is run besides,
    for what the command costs by itself. ValueError without the device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "hours on GPUs are measured on one, and this machine has none: --calibrate on a node "
            "that has, or state --seconds-per-unit"
        )
    kinds: dict[str, Recipe] = {}
    for trial in plan:
        kinds.setdefault(kind_of(trial.recipe), trial.recipe)
    sharing = 1 if device == "cuda" else 2
    at_once = sharing * (1 if device == "cuda" else lanes)
    measure = partial(measure_kind, source=source, threads=threads, device=device)
    each_process = [recipe for recipe in kinds.values() for _ in range(at_once)]
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        measured = iter(pool.map(measure, each_process))
        found = {
            kind: _mean([next(measured) for _ in range(at_once)], sharing=sharing) for kind in kinds
        }
    units = [one.epoch * kinds[k].epochs / scale.cost(kinds[k]) for k, one in found.items()]
    return Calibration(
        scale=scale.name,
        machine=_machine(device, at_once, threads),
        versions={name: version(name) for name in ("torch", "timm", "ray", "mlflow")},
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        throughput=Throughput(
            seconds_per_unit=sum(units) / len(units),
            epochs={kind: one.epoch for kind, one in found.items()},
            passes={kind: (one.forward, one.gradient) for kind, one in found.items()},
            start_up=start_up_seconds(lanes, threads),
        ),
    )


def _mean(measured: list[Measured], *, sharing: int) -> Measured:
    """Return what a process would take by itself, where `sharing` of them have a lane."""
    columns = zip(*(astuple(one) for one in measured), strict=True)
    return Measured(*(sum(column) / len(measured) / sharing for column in columns))


def measure_kind(recipe: Recipe, source: DataSource, *, threads: int, device: str) -> Measured:
    """Train two epochs, of which the second counts, and ask the model a few passes."""
    torch.set_num_threads(threads)
    scale = scale_named(recipe.scale)
    whole = load_data(scale, source)
    data = _some_of(whole, max(TRAIN_IMAGES, recipe.batch_size))
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    epochs = train(recipe, classifier, data, device=torch.device(device), teacher=teacher)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        if next(epochs, None) is not None:
            seconds.append(time.perf_counter() - began)
    return Measured(
        seconds[-1] * len(whole.train) / len(data.train),
        _forward_seconds(classifier, scale, data, device),
        _gradient_seconds(classifier, scale, data, device),
    )


def start_up_seconds(lanes: int, threads: int) -> float:
    """Return the wall clock of a study of one epoch on every lane, embedded data, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study.toml"
        study.write_text(START_UP_STUDY)
        command = [sys.executable, str(RUN), "--study", str(study), "--seeds", str(lanes)]
        command += ["--cpus-per-trial", str(threads), "--address", "local"]
        command += ["--results", f"{folder}/results"]
        environment = {name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        began = time.perf_counter()
        ended = subprocess.run(  # noqa: S603
            command, env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise ValueError(f"the study that measures the start-up failed: {ended.stderr[-500:]}")
        return time.perf_counter() - began


def _some_of(data: Data, images: int) -> Data:
    return replace(
        data,
        train=data.train.subset(images, seed=0),
        held_out=data.held_out.subset(FORWARD_IMAGES, seed=0),
    )


def _forward_seconds(classifier: Classifier, scale: Scale, data: Data, device: str) -> float:
    question, on = Clean(scale), torch.device(device)
    timed = []
    for _ in range(FORWARD_REPEATS):
        began = time.perf_counter()
        evaluate(question, classifier, data, device=on)
        timed.append(time.perf_counter() - began)
    return timed[-1] / len(data.held_out)


def _gradient_seconds(classifier: Classifier, scale: Scale, data: Data, device: str) -> float:
    batch = next(iter(split_batches(data.held_out, batch_size=ATTACKED_IMAGES)))
    images, labels = batch.images.to(device), batch.labels.to(device)
    epsilon = float(scale.epsilon)
    began = time.perf_counter()
    with attacked(classifier):
        iterates = pgd_iterates(
            folded(classifier, images) or classifier,
            images,
            labels,
            epsilon=epsilon,
            step_size=epsilon / 4,
            stops=(1, ATTACK_STEPS),
            start_BCHW=images,
        )
        next(iterates)[1].cpu()
        began = time.perf_counter()
        next(iterates)[1].cpu()
    return (time.perf_counter() - began) / (ATTACK_STEPS - 1) / len(images)


def _machine(device: str, at_once: int, threads: int) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return f"{name}, {at_once} processes at once of {threads} threads"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
