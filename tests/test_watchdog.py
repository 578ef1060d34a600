"""The watchdog on real processes: one that works, one that is stuck, one that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 120
BEGIN = """
import time
from trainables.watchdog import beat, counting_steps, start_watchdog
start_watchdog(3.0)
"""


def start(program):
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_one_that_rests_or_does_its_steps_is_left_alone_and_one_that_is_stuck_killed():
    program = """
time.sleep(4)
print("rested")
with counting_steps():
    for _ in range(10):
        time.sleep(0.4)
        beat()
    print("stepped", flush=True)
    time.sleep(1000)
"""
    said, errors = (process := start(program)).communicate(timeout=SECONDS)
    assert said.split() == ["rested", "stepped"]
    assert process.returncode == -signal.SIGKILL
    assert 'File "<string>", line' in errors, "the stack of what was stuck is told"


def test_one_that_is_stopped_at_rest_is_killed():
    process = start("print('resting', flush=True)\ntime.sleep(1000)")
    assert process.stdout.readline() == "resting\n"
    os.kill(process.pid, signal.SIGSTOP)
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL


def test_the_watchdog_ends_with_what_it_watches():
    process = start("")
    # Its standard error is the watchdog's too: it comes to an end when both have ended.
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
