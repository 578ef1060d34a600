"""The signals that stop a run as Ctrl-C does: it ends cleanly and says how to continue."""

from __future__ import annotations

import signal

STOPPING = (signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too; one that is ignored stays so (nohup)."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
