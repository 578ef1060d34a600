"""What tests that start the real command share."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from trainables.store.tracking import Tracker

ROOT = Path(__file__).parents[1]
SECONDS = 900


def study_of_one(evaluator="clean", *, epochs):
    """Return a study file of one small ResNet; at scale digits it trains a tenth of the epochs."""
    return f"""
name = "one"
base = "resnet50"
evaluators = ["{evaluator}"]
[axes]
size = ["small"]
epochs = [{epochs}]
"""


def start(study, results, *arguments, env=None):
    """Start the real command on a study file, in a session of its own."""
    command = [sys.executable, "grid/run.py", "--study", str(study), "--results", str(results)]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )


def ended(driver, code=0):
    """Wait for a started command to end with an exit status; return all that it printed."""
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == code, said
    return said


def trials(results, scale="digits"):
    """Return the trials that a results folder's database holds of a scale, by digest."""
    uri = f"sqlite:///{results}/mlflow.db"
    return Tracker(
        uri, experiment=f"robustness-{scale}", artifacts=Path(results, "artifacts")
    ).trials()


def wait_until(process, condition):
    """Wait for something that a started process, if one is named, is to bring about."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def wait_for_checkpoint(results, driver, *, beside=frozenset()):
    """Wait until a started command has stored a checkpoint, beside those named."""
    wait_until(driver, lambda: set(results.glob("trials/*/epoch-*.pt")) - beside)
