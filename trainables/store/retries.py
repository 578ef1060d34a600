"""Failures that are tried again: after which wait, how often, and which of them never."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable
from typing import TypeVar

import requests

from trainables.store.storage import STORE_AWAY

MAX_FAILURES = 3  # in a row, without getting any further
FIRST_WAIT_SECONDS = 2.0
FACTOR = 4.0
LONGEST_WAIT_SECONDS = 15.0  # for a server or a disk
# A program that is wrong, or cannot do what its options say, fails at every try. RuntimeError is
# not among them: torch raises it for a device that failed and for a worker that is gone, too.
OWN_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(NotImplementedError, TypeError, ValueError, pickle.UnpicklingError),
)
# MLflow's server is away, its database is locked, or another client wrote the same row.
AWAY = re.compile(
    r"failed with exception|error code 5\d\d|too many 5\d\d|5\d\d Server Error|database is locked"
    r"|UNIQUE constraint|duplicate key|Duplicate entry",
    re.IGNORECASE,
)
CUT_OFF = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
NO_ROOM = re.compile(r"no room|disk is full|No space left|quota exceeded", re.IGNORECASE)
Answer = TypeVar("Answer")


class NodeLeavesError(RuntimeError):
    """A trial has saved what it did and leaves its node, which is about to be taken away."""


def wait_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return FIRST_WAIT_SECONDS * float(FACTOR ** (failures - 1))


def patiently(
    call: Callable[[], Answer], *, say: Callable[[str], None], stop: threading.Event | None = None
) -> Answer:
    """Call until the server answers and its disk has room, or until `stop` is set.

    `say` gets the cause of the wait, and later its end. Any other error is raised.
    """
    stop, wait, failed = stop or threading.Event(), FIRST_WAIT_SECONDS, False
    while True:
        try:
            answer = call()
        except Exception as error:
            cause = _passing_cause(error)
            if not cause or stop.is_set():
                raise
            if not failed:
                say(f"{cause}: training goes on, what is to be written waits")
            failed = True
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        else:
            if failed:
                say("what waited is written")
            return answer


def _passing_cause(error: Exception) -> str:
    """Return why a call failed where time may mend it, else ''."""
    for line in str(error).splitlines():  # a database goes on with its query
        if NO_ROOM.search(line):
            return line if line.startswith("no room") else f"no room ({line})"
    if STORE_AWAY.search(str(error)):
        return "the storage is away or busy"
    away = isinstance(error, CUT_OFF) or AWAY.search(str(error))
    return "MLflow is away or busy" if away else ""
