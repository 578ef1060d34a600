"""A small study run by the real command, to be disturbed, and what it must come to all the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.driver import study_of_one
from tests.servers import MlflowServer
from trainables.store.tracking import Tracker, fetch_artifact

ROOT = Path(__file__).parents[2]
SECONDS = 600
RUNS = 4
ALONE = """
name = "chaos"
base = "resnet50"
evaluators = ["clean", "pgd"]
[axes]
size = ["small"]
epochs = [60]
augmentation = ["none", "randaug+cutmix"]
"""
TOGETHER = study_of_one(epochs=100)
TRIAL, WORKER, EVALUATOR = "ResourceTrainable", "TrainWorker", "EvaluatorActor"
TEAM, CONTROLLER = "ImplicitFunc", "TrainController"
ROWS = (
    "select t.value, m.key, m.step, m.value from metrics m join tags t using (run_uuid) "
    "where t.key = 'digest' and m.key not like '%/seconds' order by 1, 2, 3, 4"
)
# A ledger's file, and so its sha256, also says how long its verdicts took.
TAGS = (
    "select d.value, t.key, t.value from tags d join tags t using (run_uuid) where "
    "d.key = 'digest' and t.key != 'mlflow.parentRunId' and t.key not like 'ledger.%' order by 1, 2"
)
STATUSES = "select name, status from runs order by 1, 2"


@dataclass
class Disturbed:
    """A study in a folder of its own, and the run of the command that works on it."""

    folder: Path
    workers: int = 1
    server: MlflowServer | None = None
    outage: float = 0
    driver: subprocess.Popen[bytes] | None = None
    family: dict[int, psutil.Process] = field(default_factory=dict)
    runs: int = 0

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def database(self) -> Path:
        return (self.server.folder if self.server else self.results) / "mlflow.db"

    def start(self) -> None:
        """Start the command, unless it runs."""
        if self.driver and self.driver.poll() is None:
            return
        self.runs += 1
        study = self.folder / "study.toml"
        study.write_text(ALONE if self.workers == 1 else TOGETHER)
        command = [sys.executable, "grid/run.py", "--study", str(study), "--address", "local"]
        command += ["--results", str(self.results), "--hung-after", "30"]
        command += ["--workers", str(self.workers)]
        command += ["--mlflow", self.server.uri] if self.server else []
        with (self.folder / "said.txt").open("ab") as said:
            self.driver = subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True
            )

    def finish(self) -> bool:
        """Run the command until it says that all is done; False where it never does."""
        while self.runs <= RUNS:
            self.start()
            if self.ended() == 0:
                return True
        return False

    def ended(self) -> int | None:
        """Wait for the command's end; return its exit status, None where it does not end."""
        assert self.driver is not None
        self.processes("")
        try:
            return self.driver.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.driver.kill()
            self.driver.wait()
            return None

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes below the driver that have a word in their title."""
        assert self.driver is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.driver.pid).children(recursive=True)
            self.family |= {process.pid: process for process in below}
            return [process for process in below if title in _title(process)]
        return []

    def wait_for(self, what: Callable[[], object]) -> bool:
        """Wait until `what()` is true; False where the command ends before."""
        assert self.driver is not None
        deadline = time.monotonic() + SECONDS
        while self.driver.poll() is None and time.monotonic() < deadline:
            if what():
                return True
            time.sleep(0.1)
        return False

    def is_under_way(self) -> bool:
        """Tell whether this run of the command has said what there is to do."""
        return self.said().count("cells to judge") >= self.runs

    def checkpoints(self) -> list[Path]:
        return sorted(self.results.glob("trials/*/epoch-*.pt"))

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def close(self) -> None:
        """End every process that was seen below a driver, and the server."""
        if self.driver and self.driver.poll() is None:
            self.processes("")
            os.kill(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.server:
            self.server.kill()

    def outcome(self) -> dict[str, object]:
        """Return all that a fault could lose or double, but for what was measured in seconds."""
        uri = self.server.uri if self.server else f"sqlite:///{self.database}"
        tracker = Tracker(uri, experiment="robustness-digits", artifacts=None)
        trials = tracker.trials().values()
        return {
            "weights": {run.digest: _sha256(uri, run.artifact_uri) for run in trials},
            "ledgers": {
                (run.digest, name): pq.read_table(
                    fetch_artifact(uri, run.artifact_uri, f"ledgers/{name}.parquet")
                ).to_pydict()
                for run in trials
                for name in run.cells
            },
            "scores and metric steps": _rows(self.database, ROWS),
            "tags": _rows(self.database, TAGS),
            "runs": _rows(self.database, STATUSES),
            "tables": (self.results / "report" / "tables.md").read_text(),
        }


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()[:1]])
    except psutil.Error:
        return ""


def _sha256(uri: str, artifact_uri: str) -> str:
    content = fetch_artifact(uri, artifact_uri, "weights.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def _rows(database: Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return opened.execute(query).fetchall()
