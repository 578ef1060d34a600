"""What a trial costs the grid as trials grow in number: time and memory of each must not grow.

    python -m benchmarks.scale                      # 100 and 1,000 trials through Ray
    python -m benchmarks.scale --trials 100 1000 10000
    python -m benchmarks.scale --paper              # what 512 GPUs and 1,536 trials would ask for

The trainable is a stub that trains nothing and keeps a kilobyte of weights; all else is the real
path: enumerate, look up what is done, schedule through Ray Tune, record to MLflow, find all of it
done, report. Each number of trials has a process of its own. Times are in milliseconds a trial: of
the wall clock for the run, of the driver's processor time for all else. In seconds: a run when all
is done already, which needs no Ray, and what Ray's start takes.

`--paper` measures unit costs: of 100 and 400 trials, of one and eleven reports each, and what the
head holds of a trial that two workers train; then it multiplies.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from grid.plan import Plan, build_plan
from grid.run import ENVIRONMENT
from grid.study import Study, base_named
from trainables.scale import DIGITS
from trainables.store.storage import below
from trainables.trial import RecipeTrial

DECAYS = tuple(1e-5 * (place + 1) for place in range(10))
STUDY = Study(
    name="scale", base=base_named("resnet50"), axes={"weight_decay": DECAYS}, evaluators=()
)
EPOCH = {"epoch": 1.0, "train/loss": 0.5, "train/rate": 0.1, "train/seconds": 0.0}
EACH = ("enumerate", "run", "of it driver", "look up", "report")
ONCE = ("resume s", "Ray up s")
COLUMNS = (*EACH, "calls", "MiB", *ONCE)
REPORTS = "GRID_STUB_REPORTS"  # how many a stub makes
# On paper: GPUs, trials, GPU-minutes an epoch (ResNet-50 at 224 px on one of today's), epochs, and
# the memory of cluster.yaml's head (m6i.2xlarge).
GPUS, TRIALS, EPOCH_MINUTES, EPOCHS, HEAD_GIB = 512, 1536, 10, 100, 32
OTHERS_GIB = 4  # the system, Ray's own processes, MLflow's server
ON_HEAD = ("ray::ImplicitFunc", "ray::TrainController", "ray::SynchronizationActor")
ONE = """
name = "team"
base = "resnet50"
evaluators = ["clean"]
[axes]
size = ["small"]
epochs = [20]
"""


class StubTrial(RecipeTrial):
    """A trial that is over at once."""

    def step(self) -> dict[str, Any]:
        config = self._trial_config
        weights = Path(below(config["storage"], "trials", config["digest"], "weights.safetensors"))
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(bytes(1024))
        epoch = self.iteration + 1
        done = epoch == int(os.environ.get(REPORTS, "1"))
        return {
            "digest": config["digest"],
            "epoch": epoch,
            "epochs": [EPOCH | {"epoch": float(epoch)}],
            "outcome": "finished" if done else "training",
            "reason": "",
            "done": done,
            "weights": str(weights),
            "sha256": "0",
        }


def main() -> None:
    """Measure each number of trials and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--paper", action="store_true", help="project the costs of a cluster")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(" ".join(measure(options.trials[0], options.child)))
        return
    if options.paper:
        paper()
        return
    print(f"{'trials':>8}" + "".join(f"{column:>14}" for column in COLUMNS), flush=True)
    for trials in options.trials:
        figures = measured(trials).values()
        print(f"{trials:>8}" + "".join(f"{figure:>14}" for figure in figures), flush=True)


def measured(trials: int, *, reports: int = 1) -> dict[str, float]:
    """Return the figures of a number of trials, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.scale", "--child", folder]
        ended = subprocess.run(  # noqa: S603
            [*command, "--trials", str(trials)],
            env=os.environ | ENVIRONMENT | {REPORTS: str(reports)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return dict(zip(COLUMNS, map(float, ended.stdout.splitlines()[-1].split()), strict=True))


def measure(trials: int, results: Path) -> list[str]:
    """Return the figures of one number of trials, as they are printed."""
    seconds: dict[str, float] = {}
    with timed(seconds, "enumerate"):
        plan = build_plan(STUDY, DIGITS, seeds=trials // len(DECAYS))
    assert len(plan.trials) == trials
    before, calls = peak_mib(), counted_calls()
    through_ray(plan, results, seconds)
    called = calls.total() / trials
    from grid.report.build import write_report
    from grid.status import open_existing

    with timed(seconds, "look up"):
        tracker = open_existing(results, None, DIGITS)
        assert len(tracker.trials()) == trials
    with timed(seconds, "report"):
        write_report(tracker, STUDY, plan, DIGITS, results / "report")
    each = [f"{1000 * seconds[name] / trials:.1f}" for name in EACH]
    rest = [f"{seconds[name]:.1f}" for name in ONCE]
    return [*each, f"{called:.1f}", f"{peak_mib() - before:.0f}", *rest]


def counted_calls() -> Counter[str]:
    """Count the calls of MLflow's client from now on, by name."""
    from mlflow.tracking import MlflowClient

    calls: Counter[str] = Counter()
    look_up = MlflowClient.__getattribute__

    def counting(client: MlflowClient, name: str) -> Any:
        calls[name] += not name.startswith("_")
        return look_up(client, name)

    MlflowClient.__getattribute__ = counting
    return calls


def paper() -> None:
    """Measure unit costs, and print what a large study would ask of the cluster's head."""
    few, many, reporting = measured(100), measured(400), measured(100, reports=11)
    a_trial = many["of it driver"]
    a_report = (reporting["of it driver"] - few["of it driver"]) / 10
    kib = 1024 * (many["MiB"] - few["MiB"]) / 300
    team = team_mib()
    print(
        f"driver: {a_trial:.0f} ms and {kib:.0f} KiB a trial, {a_report:.1f} ms a report; "
        f"{many['calls']:.1f} MLflow calls a trial, one more an epoch\n"
        f"head: {team:.0f} MiB a team under way\n"
    )
    epochs = GPUS / EPOCH_MINUTES / 60
    trials = epochs / EPOCHS
    print(f"{GPUS} GPUs, {TRIALS} trials of {EPOCHS} epochs, {EPOCH_MINUTES} GPU-minutes each:")
    print(f"  {TRIALS / trials / 3600:.0f} hours, {epochs:.2f} epochs a second")
    print(f"  driver: {100 * (epochs * a_report + trials * a_trial) / 1000:.1f} % of a core")
    print(f"  MLflow: {epochs + trials * many['calls']:.2f} calls a second")
    print(f"{'GPUs a trial':>14}{'teams':>8}{'head GiB':>10}{'teams that fit':>16}")
    rest = (few["MiB"] + TRIALS * kib / 1024) / 1024 + OTHERS_GIB
    for gpus in (1, 4, 8):
        teams = GPUS // gpus if gpus > 1 else 0
        most = (HEAD_GIB - rest) * 1024 // team if teams else 0
        print(f"{gpus:>14}{teams:>8}{rest + teams * team / 1024:>10.1f}{most:>16.0f}")


def team_mib() -> float:
    """Return the memory of a team's processes on the head, by a study of one trial."""
    held: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder, "study.toml")
        study.write_text(ONE)
        command = [sys.executable, "-m", "grid.run", "--address", "local", "--workers", "2"]
        command += ["--study", str(study), "--results", f"{folder}/results"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:  # noqa: S603
            while run.poll() is None:
                for process in psutil.Process(run.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        title = process.cmdline()[0].partition(".")[0]
                        if title in ON_HEAD:
                            uss = process.memory_full_info().uss
                            held[title] = max(uss, held.get(title, 0))
                time.sleep(1)
        assert run.returncode == 0
    assert {*held} == {*ON_HEAD}, held
    return sum(held.values()) / 2**20


def through_ray(plan: Plan, results: Path, seconds: dict[str, float]) -> None:
    """Run the study, and again when all is done; what starting Ray takes stands apart."""
    from grid import launch
    from grid.cluster import connect
    from grid.options import RunOptions
    from grid.record import Recorder

    launch.RecipeTrial = StubTrial  # type: ignore[misc]

    def starting(address: str | None) -> None:
        with timed(seconds, "Ray up s", time.perf_counter):
            connect(address)

    launch.connect = starting
    asked = launch.Launch(
        study=STUDY,
        plan=plan,
        scale=DIGITS,
        options=RunOptions(results=results),
    )
    record = Recorder.recording

    @contextmanager
    def until_recorded(*arguments: Any) -> Iterator[None]:
        wall, driver = timed(seconds, "run", time.perf_counter), timed(seconds, "of it driver")
        with wall, driver, record(*arguments):
            yield

    Recorder.recording = until_recorded  # type: ignore[method-assign]
    finished = launch.run_study(asked)
    assert finished.trained == len(plan.trials), finished.failures
    with timed(seconds, "resume s", time.perf_counter):
        assert launch.run_study(asked).trained == 0


@contextmanager
def timed(
    seconds: dict[str, float], name: str, clock: Callable[[], float] = time.process_time
) -> Iterator[None]:
    """Keep how long a block takes."""
    began = clock()
    yield
    seconds[name] = clock() - began


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
