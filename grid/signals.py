"""The signals that stop a run as Ctrl-C does: it ends cleanly and says how to continue."""

from __future__ import annotations

import errno
import os
import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too; one that is ignored stays so (nohup)."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    for stream in (1, 2):
        try:
            os.get_terminal_size(stream)
        except OSError as error:
            # The terminal is gone: what is still to be said must not fail the run's end.
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    raise KeyboardInterrupt
