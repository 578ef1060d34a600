"""A step that hangs ends its process: the stacks go to its log, and Ray starts it again."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

HUNG_SECONDS = 1800.0
BEAT_SECONDS = 1.0  # between two settings of the timer, each of which starts a thread
STDERR = 2
_timer = {"seconds": 0.0, "set at": 0.0}  # of this process; 0 seconds: it does not run


@contextmanager
def counting_steps(seconds: float) -> Iterator[None]:
    """End this process when meanwhile no `beat` comes for so many seconds."""
    _timer["seconds"] = seconds
    beat()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _timer.update({"seconds": 0.0, "set at": 0.0})


def beat() -> None:
    """Note that a step was done, where steps are counted."""
    now = time.monotonic()
    if _timer["seconds"] and now - _timer["set at"] >= BEAT_SECONDS:
        _timer["set at"] = now
        # `faulthandler` needs no lock of Python's.
        faulthandler.dump_traceback_later(_timer["seconds"], exit=True, file=STDERR)
