"""What a trial with a cell costs on MLflow's server over PostgreSQL: `python -m benchmarks.server`.

Server and database are on loopback, artifacts in a folder that client and server share. Each trial
is written as a command does that shares the server with others: its lease, its run, 100 epochs of
five metrics, its weights, its end, a ledger. Calls are counted by address; wall clock is beside
that of a bare call of the same server, one before each trial.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import requests
from mlflow import MlflowClient

from grid.run import ENVIRONMENT
from tests.servers import MlflowServer, postgresql
from trainables.store.tracking import SCHEMA, SCHEMA_TAG, Tracker

EXPERIMENT = "benchmark"
EPOCHS = 100
METRICS = ("train/loss", "train/accuracy", "train/rate", "train/seconds", "held_out/accuracy")


def write_trial(tracker: Tracker, digest: str) -> None:
    """Write a whole trial and one cell, as the recorder does."""
    assert tracker.lease(digest) == ("", False)
    run = tracker.start_trial(
        digest=digest,
        name="ResNet-50",
        parent="",
        study="s",
        tables="T1",
        recipe_json="{}",
        params={f"field-{number}": number for number in range(40)},
        dataset={"name": "d", "digest": "1", "source_type": "code", "source": "s", "profile": "{}"},
    )
    tracker.tag_trained(run, {"torch": "2"})
    epochs = [dict.fromkeys(METRICS, 0.5) | {"epoch": float(e)} for e in range(1, EPOCHS + 1)]
    tracker.log_epochs(run, epochs, later=True)
    tracker.store_weights(run, b"weights", "0", image_size=32, classes=10)
    tracker.end_trial(run, outcome="finished", reason="")
    answer: dict[str, Any] = {
        "cell": "q",
        "identity": "{}",
        "ledger": b"l",
        "metrics": {"clean": 1},
    }
    tracker.record_cell(run, evaluator="clean", **answer)


def measure(uri: str, folder: Path, trials: int) -> tuple[list[float], list[float], Counter[str]]:
    """Return the seconds of trials and of bare calls, and the calls of all trials by address."""
    client = MlflowClient(uri)
    made = client.create_experiment(EXPERIMENT, folder.as_uri(), {SCHEMA_TAG: str(SCHEMA)})
    tracker = Tracker(uri, experiment=EXPERIMENT, artifacts=None)
    tracker.open_study("s", "")
    write_trial(tracker, "f" * 12)  # the first imports, and makes the place for leases
    calls: Counter[str] = Counter()
    send = requests.Session.request

    def count(session: requests.Session, method: str, url: str, **named: Any) -> requests.Response:
        calls[f"{method} {url.removeprefix(uri).partition('?')[0]}"] += 1
        return send(session, method, url, **named)

    written, bare = [], []
    for number in range(trials):
        began = time.perf_counter()
        client.get_experiment(made)
        bare.append(time.perf_counter() - began)
        requests.Session.request = count  # type: ignore[method-assign,assignment]
        began = time.perf_counter()
        write_trial(tracker, f"{number:012x}")
        written.append(time.perf_counter() - began)
        requests.Session.request = send  # type: ignore[method-assign]
    return written, bare, calls


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return the processor time that processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Print the calls, the seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    trials = parser.parse_args().trials
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder, postgresql() as database:
        server = MlflowServer(Path(folder), database)
        server.start()
        processes = [psutil.Process(), psutil.Process(server.pid)]
        processes += processes[1].children(recursive=True)
        try:
            before = cpu_seconds(processes)
            written, bare, calls = measure(server.uri, Path(folder, "runs"), trials)
            spent = cpu_seconds(processes) - before
        finally:
            server.kill()
    for title, seconds in (("a trial", written), ("a bare call", bare)):
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{title}: {middle:.3f} [{low:.3f}, {high:.3f}] s, n = {trials}")
    print(f"processor time of client and server: {spent / trials:.3f} s, with a bare call")
    ratio = statistics.median(w / b for w, b in zip(written, bare, strict=True))
    each = ", ".join(f"{calls[name] / trials:g} {name}" for name in sorted(calls))
    print(f"{calls.total() / trials:g} calls a trial ({each}), as long as {ratio:.1f} bare ones")


if __name__ == "__main__":
    main()
