"""What a trial costs the grid as trials grow in number: time and memory of each must not grow.

    python -m benchmarks.scale                      # 100 and 1,000 trials through Ray
    python -m benchmarks.scale --trials 100 1000 10000

The trainable is a stub that trains nothing and keeps a kilobyte of weights; all else is the real
path: enumerate, look up what is done, schedule through Ray Tune, record to MLflow, find all of it
done, report. Each number of trials has a process of its own. Times are in milliseconds a trial: of
the wall clock for the run, of the driver's processor time for all else. In seconds: a run when all
is done already, which needs no Ray, and what Ray's start takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


class StubTrial(RecipeTrial):
    """A trial that is over at once."""

    def step(self) -> dict[str, Any]:
        config = self._trial_config
        weights = Path(below(config["storage"], "trials", config["digest"], "weights.safetensors"))
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(bytes(1024))
        return {
            "digest": config["digest"],
            "epoch": 1,
            "epochs": [EPOCH],
            "outcome": "finished",
            "reason": "",
            "done": True,
            "weights": str(weights),
            "sha256": "0",
        }


def main() -> None:
    """Measure each number of trials and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(" ".join(measure(options.trials[0], options.child)))
        return
    columns = (*EACH, "MiB", *ONCE)
    print(f"{'trials':>8}" + "".join(f"{column:>14}" for column in columns), flush=True)
    for trials in options.trials:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.scale", "--child", folder]
            command += ["--trials", str(trials)]
            ended = subprocess.run(  # noqa: S603
                command,
                env=os.environ | ENVIRONMENT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        figures = ended.stdout.splitlines()[-1].split()
        print(f"{trials:>8}" + "".join(f"{figure:>14}" for figure in figures), flush=True)


def measure(trials: int, results: Path) -> list[str]:
    """Return the figures of one number of trials, as they are printed."""
    seconds: dict[str, float] = {}
    with timed(seconds, "enumerate"):
        plan = build_plan(STUDY, DIGITS, seeds=trials // len(DECAYS))
    assert len(plan.trials) == trials
    before = peak_mib()
    through_ray(plan, results, seconds)
    from grid.report.build import write_report
    from grid.status import open_existing

    with timed(seconds, "look up"):
        tracker = open_existing(results, None, DIGITS)
        assert len(tracker.trials()) == trials
    with timed(seconds, "report"):
        write_report(tracker, STUDY, plan, DIGITS, results / "report")
    each = [f"{1000 * seconds[name] / trials:.1f}" for name in EACH]
    rest = [f"{seconds[name]:.1f}" for name in ONCE]
    return [*each, f"{peak_mib() - before:.0f}", *rest]


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
