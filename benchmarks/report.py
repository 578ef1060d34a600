"""`--report` of the full grid's 1,536 trials: seconds and memory of the real command.

    python -m benchmarks.report [FOLDER]
    python -m benchmarks.report --study paper --tables T6      # few trials: only that it works

The trials are made up and recorded by the project's own recorder, which takes six to fifteen
minutes; a FOLDER that holds them already is used as it is. Aim: 30 s and 1 GiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from grid.plan import Plan, build_plan
from grid.run import ENVIRONMENT
from grid.studies import load_study
from tests.made_up import record
from trainables.scale import DIGITS


def main() -> None:
    """Report on the trials of a folder that is kept, or of one for the time being."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--study", default="full", metavar="NAME|FILE")
    parser.add_argument("--tables", nargs="+", metavar="T")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as empty:
        measure(options.folder or Path(empty), options.study, options.tables)


def measure(folder: Path, study: str, tables: Sequence[str] | None) -> None:
    """Fill the folder if it is empty, and time the command on it."""
    if not (folder / "mlflow.db").exists():
        # In a process of its own: a process begins with the memory of the one that starts it.
        spawn = multiprocessing.get_context("spawn")
        recorder = spawn.Process(target=fill, args=(folder, study, tables))
        recorder.start()
        recorder.join()
        if recorder.exitcode:
            raise SystemExit("the trials could not be recorded")
    began = time.monotonic()
    command = ["grid/run.py", "--study", study, "--results", str(folder), "--report"]
    command += ["--tables", *tables] if tables else []
    process = subprocess.Popen([sys.executable, *command])  # noqa: S603
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"the report ended with {os.waitstatus_to_exitcode(status)}")
    print(
        f"{len(plan_of(study, tables).trials)} trials: {seconds:.0f} s, "
        f"of a core {used.ru_utime + used.ru_stime:.0f} s; "
        f"{used.ru_maxrss / 2**20:.2f} GiB; load {os.getloadavg()[0]:.1f}"
    )


def fill(folder: Path, study: str, tables: Sequence[str] | None) -> None:
    """Record the trials."""
    record(folder, load_study(study), plan_of(study, tables), collapsed=2)


def plan_of(study: str, tables: Sequence[str] | None) -> Plan:
    """Return the trials of a study, or of some of its tables, at scale digits."""
    return build_plan(load_study(study), DIGITS, tables=tables)


if __name__ == "__main__":
    main()
