"""What a trial costs beyond its own training, once the actors are up.

    python -m benchmarks.overhead [--trials N]

Runs N small trials through the real command's path and prints (wall x lanes - work) / trials.
No cells are asked, so that evaluators do not share the cores; the wall starts when the first
trial after the two that pay for imports does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from trainables.tracking import Tracker

STUDY = 'name = "overhead"\nbase = "resnet50"\nevaluators = []\n[set]\nsize = "small"\n'
LANES = 2


def main() -> None:
    """Measure and print the overhead per trial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        study, results = Path(folder) / "study.toml", Path(folder) / "results"
        study.write_text(STUDY + "epochs = 17\n")
        command = [sys.executable, "grid/run.py", "--study", str(study), "--seeds", str(trials)]
        subprocess.run([*command, "--results", str(results)], check=True)  # noqa: S603
        tracker = Tracker(
            f"sqlite:///{results}/mlflow.db",
            experiment="robustness-digits",
            artifacts=results / "artifacts",
        )
        runs = sorted(tracker.trials().values(), key=lambda run: run.start_time)
        # The first trial of each lane pays for its actor's imports.
        counted = runs[LANES:]
        wall = (max(run.end_time for run in counted) - counted[0].start_time) / 1000
        work = sum(tracker.seconds(run) for run in counted)
        overhead = (wall * LANES - work) / len(counted)
        print(f"{len(counted)} trials, {wall:.1f} s wall on {LANES} lanes, {work:.1f} s of work")
        print(f"overhead: {overhead:.2f} s a trial (target 0.5)")


if __name__ == "__main__":
    main()
