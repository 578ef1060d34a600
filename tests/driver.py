"""What tests that start the real command share."""

from __future__ import annotations

import time

SECONDS = 400


def wait_for_checkpoint(results, driver):
    """Wait until a trial of a started command has kept its first checkpoint."""
    deadline = time.monotonic() + SECONDS
    while not list(results.glob("trials/*/epoch-*.pt")):
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)
