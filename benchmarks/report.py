"""`--report` of the full grid's 1,536 trials: seconds and memory of the real command.

    python -m benchmarks.report [FOLDER]

The trials are made up and recorded by the project's own recorder, which takes a quarter of an
hour; a FOLDER that holds them already is used as it is. Aim: 30 s and 1 GiB.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grid.plan import build_plan
from grid.studies import load_study
from tests.made_up import record
from trainables.scale import DIGITS


def main(folder: Path) -> None:
    """Fill the folder if it is empty, and time the command on it."""
    study = load_study("full")
    plan = build_plan(study, DIGITS)
    if not (folder / "mlflow.db").exists():
        record(folder, study, plan, collapsed=2)
    began = time.monotonic()
    command = ["grid/run.py", "--study", "full", "--results", str(folder), "--report"]
    subprocess.run([sys.executable, *command], check=True)  # noqa: S603
    seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(plan.trials)} trials: {seconds:.0f} s, "
        f"of a core {used.ru_utime + used.ru_stime:.0f} s; "
        f"{used.ru_maxrss / 2**20:.2f} GiB; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as empty:
            main(Path(empty))
