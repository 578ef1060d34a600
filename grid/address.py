"""Where Ray is: the address asked for, of RAY_ADDRESS, or of the cluster that was joined here."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LOCAL = "local"
STARTED_HERE = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where `ray start` writes it
CONNECT_SECONDS = 2


def found_address(asked: str | None) -> str | None:
    """Return the address of the cluster to use, or None to start Ray on this machine alone.

    That is the one asked for, RAY_ADDRESS, or the one that `ray start` joined here. ValueError
    when what was asked for does not answer.
    """
    address = asked or os.environ.get("RAY_ADDRESS") or None
    if address == LOCAL:
        return None
    if address in (None, "auto"):
        # Whoever else may write in /tmp could name a cluster of theirs, which runs what it likes.
        trusted = STARTED_HERE.exists() and STARTED_HERE.stat().st_uid in (0, os.getuid())
        started = STARTED_HERE.read_text().strip() if trusted else ""
        if _answers(started):
            return started
        if address is None:
            return None
        raise ValueError(
            "no Ray cluster was started on this machine; run `ray start`, or --address"
        )
    assert address is not None
    if not _answers(address):
        raise ValueError(
            f"no Ray cluster answers at {address}; it wants HOST:PORT, as 10.0.0.5:6379"
        )
    return address


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return False
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            return True
    except (OSError, OverflowError, UnicodeError):  # nobody there; a port or a host that cannot be
        return False
