"""The planner's wall clock beside the real one's: calibrate, plan, run, compare.

    python -m benchmarks.planner                     # the whole digits study
    python -m benchmarks.planner --tables T6 --evaluators clean pgd

The target is a prediction within 25 % of the real time. The arguments are those of the command; run
it on a quiet machine, for the calibration is a minute's look at it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grid.forecast import Calibration, forecast
from grid.passes import HELD_OUT
from grid.plan import build_plan
from grid.run import _parser
from grid.schedule import Machines, simulate
from grid.studies import load_study
from trainables.scale import DIGITS

CALIBRATION = "calibration-digits-cpu.json"


def main() -> None:
    """Measure and print predicted, real, and their ratio."""
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as results:
        calibrating = run(["--calibrate", *arguments], results)
        predicted = prediction(arguments, Path(results) / CALIBRATION)
        real = run([*arguments, "--address", "local"], results)
    print(f"calibration {calibrating:.0f} s; predicted {predicted:.0f} s, real {real:.0f} s")
    print(f"ratio {predicted / real:.2f} (target 0.75 to 1.25)")


def run(arguments: list[str], results: str) -> float:
    """Return how long the command takes, from nothing to its end."""
    command = [sys.executable, "grid/run.py", "--results", results, *arguments]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return time.perf_counter() - began


def prediction(arguments: list[str], calibration: Path) -> float:
    """Return the seconds that `--plan` says, unrounded."""
    options = _parser().parse_args(arguments)
    plan = build_plan(
        load_study(options.study),
        DIGITS,
        tables=options.tables,
        seeds=options.seeds,
        evaluators=options.evaluators,
    )
    throughput = Calibration.load(calibration).throughput
    found = forecast(plan, DIGITS, throughput, held_out=HELD_OUT["digits"])
    lanes = len(os.sched_getaffinity(0))
    machines = Machines(lanes=lanes, evaluators=lanes)
    return simulate(found.jobs(), machines).makespan + throughput.start_up


if __name__ == "__main__":
    main()
