"""What can go wrong with a study that runs: each fault is done to real processes and files.

The clock is not set, for it is everybody's: files get the times they would have if it had jumped.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import psutil

from tests.chaos.study import CONTROLLER, EVALUATOR, TEAM, TRIAL, WORKER, Disturbed
from tests.disks import fill

DECADE = 10 * 365 * 86400
Fault = Callable[[Disturbed, random.Random], bool]


def _kill(title: str) -> Fault:
    """Return the fault that kills one of the processes with a title."""

    def inject(study: Disturbed, chance: random.Random) -> bool:
        if not study.wait_for(lambda: study.processes(title)):
            return False
        time.sleep(chance.uniform(0, 3))
        found = study.processes(title)
        if found:
            victim = chance.choice(found)
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                return False
        return bool(found)

    return inject


def _kill_driver(study: Disturbed, chance: random.Random) -> bool:
    return _signal_driver(study, signal.SIGKILL) is not None


def _terminate_driver(study: Disturbed, chance: random.Random) -> bool:
    status = _signal_driver(study, signal.SIGTERM)
    assert status in (None, 130), f"SIGTERM ended the command with {status}"
    return status is not None


def _signal_driver(study: Disturbed, number: int) -> int | None:
    assert study.driver is not None
    if study.driver.poll() is not None:
        return None
    study.processes("")
    study.driver.send_signal(number)
    return study.ended()


def _kill_server(study: Disturbed, chance: random.Random) -> bool:
    assert study.server is not None
    study.server.kill()
    time.sleep(study.outage or chance.uniform(1, 20))
    study.server.start()
    return True


def _fill_disk(study: Disturbed, chance: random.Random) -> bool:
    said = study.said().count("no room")
    filler = fill(study.results)
    noticed = study.wait_for(lambda: study.said().count("no room") > said)
    time.sleep(chance.uniform(0, 5))
    filler.unlink()
    return noticed


def _truncate(study: Disturbed, chance: random.Random) -> bool:
    """Cut the newest checkpoints of a study whose driver is killed."""
    if not _kill_driver(study, chance) or not study.checkpoints():
        return False
    for folder in {path.parent for path in study.checkpoints()}:
        newest = max(folder.glob("epoch-*.pt"))
        os.truncate(newest, chance.randrange(newest.stat().st_size))
    return True


def _jump(study: Disturbed, chance: random.Random) -> bool:
    """Give the files of a study whose driver is killed times of another decade."""
    if not _kill_driver(study, chance):
        return False
    for path in study.results.rglob("*"):
        when = time.time() + chance.choice((-DECADE, DECADE))
        os.utime(path, (when, when))
    return True


FAULTS: dict[str, Fault] = {
    "trial actor killed": _kill(TRIAL),
    "evaluator killed": _kill(EVALUATOR),
    "raylet killed": _kill("raylet"),
    "driver killed": _kill_driver,
    "driver terminated": _terminate_driver,
    "disk full": _fill_disk,
    "checkpoint truncated": _truncate,
    "clock jumped": _jump,
    "MLflow server killed": _kill_server,
    "Train worker killed": _kill(WORKER),
    "Train controller killed": _kill(CONTROLLER),
    "team's trial killed": _kill(TEAM),
}
FILLED = ("disk full",)
ON_SERVER = ("MLflow server killed",)
ON_TEAM = (
    "Train worker killed",
    "Train controller killed",
    "team's trial killed",
)
