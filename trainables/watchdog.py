"""A watchdog: a small process that kills this one when it stands still.

It is a process of its own, so that it also sees one that is stopped, or stuck in native code. Who
started what was killed sees a process that died, on whatever node, and starts it again.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HUNG_SECONDS = 1800.0
BEAT_SECONDS = 1.0
STDERR = 2


class _Watchdog:
    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.stepping = False
        self._beaten_at = time.monotonic()
        faulthandler.register(signal.SIGUSR1, file=STDERR)
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(limit)]
        self._process = subprocess.Popen(  # noqa: S603 - this very file
            command, stdin=subprocess.PIPE, start_new_session=True
        )
        threading.Thread(target=self._beat_at_rest, name="watchdog", daemon=True).start()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def beat(self) -> None:
        if time.monotonic() - self._beaten_at >= BEAT_SECONDS:
            self.tell()

    def tell(self) -> None:
        self._beaten_at = time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), b"+")

    def _beat_at_rest(self) -> None:
        while self.lives:
            time.sleep(BEAT_SECONDS)
            if not self.stepping:
                self.tell()


_watchdog: _Watchdog | None = None


def start_watchdog(limit: float) -> None:
    """Have this process killed when it is stopped, or stuck, for `limit` seconds."""
    global _watchdog  # noqa: PLW0603 - a process has one
    if _watchdog is None or not _watchdog.lives or _watchdog.limit != limit:
        _watchdog = _Watchdog(limit)


@contextmanager
def counting_steps() -> Iterator[None]:
    """Have only a `beat` count as a sign of life meanwhile."""
    if _watchdog is None:
        yield
        return
    _watchdog.tell()
    _watchdog.stepping = True
    try:
        yield
    finally:
        _watchdog.stepping = False


def beat() -> None:
    """Tell the watchdog, if there is one, that a step was done."""
    if _watchdog is not None:
        _watchdog.beat()


def _watch(process: int, limit: float) -> None:
    while select.select([0], [], [], limit)[0]:
        if not os.read(0, 4096):
            return
    for last_word in (signal.SIGUSR1, signal.SIGKILL):
        # Its parent: no other process can have got its number.
        if os.getppid() == process:
            os.kill(process, last_word)
            time.sleep(1)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]))
