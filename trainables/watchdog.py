"""A step that hangs ends its process: the stacks go to its log, and Ray starts it again."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

HUNG_SECONDS = 1800.0
BEAT_SECONDS = 1.0  # between two settings of the timer, each of which starts a thread
STDERR = 2


class _Timer:
    """The timer of this process: `faulthandler` has one, which needs no lock of Python's."""

    seconds = 0.0  # 0: it does not run
    set_at = 0.0

    def set(self) -> None:
        self.set_at = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=STDERR)


_timer = _Timer()


@contextmanager
def counting_steps(seconds: float) -> Iterator[None]:
    """End this process when meanwhile no `beat` comes for so many seconds."""
    _timer.seconds = seconds
    _timer.set()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _timer.seconds = 0.0


def beat() -> None:
    """Note that a step was done, where steps are counted."""
    if _timer.seconds and time.monotonic() - _timer.set_at >= BEAT_SECONDS:
        _timer.set()
