"""`--report` of the full grid's 1,536 trials: seconds and memory of the real command.

    python -m benchmarks.report [FOLDER]

The trials are made up and recorded by the project's own recorder, which takes six to fifteen
minutes; a FOLDER that holds them already is used as it is. Aim: 30 s and 1 GiB.
"""

from __future__ import annotations

import multiprocessing
import os
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
    if not (folder / "mlflow.db").exists():
        # In a process of its own: a process begins with the memory of the one that starts it.
        recorder = multiprocessing.get_context("spawn").Process(target=fill, args=(folder,))
        recorder.start()
        recorder.join()
        if recorder.exitcode:
            raise SystemExit("the trials could not be recorded")
    began = time.monotonic()
    command = ["grid/run.py", "--study", "full", "--results", str(folder), "--report"]
    process = subprocess.Popen([sys.executable, *command])  # noqa: S603
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"the report ended with {os.waitstatus_to_exitcode(status)}")
    print(
        f"{len(build_plan(load_study('full'), DIGITS).trials)} trials: {seconds:.0f} s, "
        f"of a core {used.ru_utime + used.ru_stime:.0f} s; "
        f"{used.ru_maxrss / 2**20:.2f} GiB; load {os.getloadavg()[0]:.1f}"
    )


def fill(folder: Path) -> None:
    """Record the full grid's trials."""
    study = load_study("full")
    record(folder, study, build_plan(study, DIGITS), collapsed=2)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as empty:
            main(Path(empty))
