"""What tests that start the real command share."""

from __future__ import annotations

import time

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


def wait_until(process, condition):
    """Wait for something that a started process, if one is named, is to bring about."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def wait_for_checkpoint(results, driver):
    """Wait until a trial of a started command has kept its first checkpoint."""
    wait_until(driver, lambda: list(results.glob("trials/*/epoch-*.pt")))
