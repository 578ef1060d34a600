"""The command on a cluster, from a laptop: a tunnel, a Ray job with this project, and its log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).parents[1]
TUNNEL_SECONDS = 60
# Beside what .gitignore names.
LEFT_HERE = [".venv", "results", "__pycache__"]
# What the client of Ray's jobs raises where the head is gone or refuses; requests' are OSErrors.
UNANSWERED = (RayError, ClientError, OSError, RuntimeError)


def run_on(cluster: Path, arguments: Sequence[str]) -> int:
    """Run `grid/run.py` with some arguments as a job of a cluster, and follow its log.

    A job with the same arguments that still runs is followed, not started again. Returns 0 or 1;
    KeyboardInterrupt and a lost tunnel leave the job running. ValueError when the cluster does not
    answer, or lets nobody in without its token.
    """
    if not cluster.is_file():
        raise ValueError(f"--on wants a cluster file, and {cluster} is none")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _tunnel(cluster) as address:
        client, job = _job(address, cluster, arguments)
        print(f"job {job} on {cluster}; Ctrl-C leaves it running", file=sys.stderr)
        status = _status_at_its_end(client, job)
    if status and status.is_terminal():
        return 0 if status == JobStatus.SUCCEEDED else 1
    print(
        f"The head of {cluster} does not answer any more; job {job} needs nobody to follow it, "
        "and the same command returns to it.",
        file=sys.stderr,
    )
    return 1


@contextmanager
def _tunnel(cluster: Path) -> Iterator[str]:
    """Forward a free local port to the dashboard, which listens on the head's loopback."""
    port = _free_port()
    command = ["ray", "dashboard", "--no-config-cache", "--port", str(port), str(cluster)]
    # In a session of its own, so that Ctrl-C is this process's to answer.
    with subprocess.Popen(  # noqa: S603
        command,
        # ssh would put a terminal into raw mode, in which Ctrl-C is a letter like others.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as tunnel:
        try:
            _wait_until_open(tunnel, port, cluster)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(tunnel.pid, signal.SIGTERM)  # ssh, below it, would stay


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_open(tunnel: subprocess.Popen[str], port: int, cluster: Path) -> None:
    deadline = time.monotonic() + TUNNEL_SECONDS
    while tunnel.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    said = (tunnel.communicate()[0] if tunnel.poll() is not None else "").strip().splitlines()
    raise ValueError(
        f"no tunnel to the head of {cluster}: {said[-1] if said else 'it does not answer'}; "
        f"is it up? ray up {cluster}"
    )


def _job(address: str, cluster: Path, arguments: Sequence[str]) -> tuple[JobSubmissionClient, str]:
    """Return a client of the cluster and its job with these arguments, started if there is none."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        client = JobSubmissionClient(address)
        return client, _running(client, arguments) or _submit(client, arguments)
    except AuthenticationError:
        raise ValueError(
            f"the head of {cluster} lets in who has its token, and refuses this run: the token "
            "that it was brought up with must be that of ~/.ray/auth_token or RAY_AUTH_TOKEN here"
        ) from None
    except UNANSWERED as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the head of {cluster} takes no jobs: {cause}") from None


def _name(arguments: Sequence[str]) -> str:
    return "grid-" + hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]


def _running(client: JobSubmissionClient, arguments: Sequence[str]) -> str | None:
    """Return the job with these arguments that has not ended."""
    for job in client.list_jobs():
        name = str(job.submission_id)
        if name.startswith(_name(arguments)) and not JobStatus(job.status).is_terminal():
            return name
    return None


def _submit(client: JobSubmissionClient, arguments: Sequence[str]) -> str:
    runtime: dict[str, Any] = {"working_dir": str(ROOT), "excludes": LEFT_HERE}
    return str(
        client.submit_job(
            entrypoint=shlex.join(["python", "grid/run.py", *arguments]),
            submission_id=f"{_name(arguments)}-{time.time_ns()}",
            runtime_env=runtime,
        )
    )


def _status_at_its_end(client: JobSubmissionClient, job: str) -> JobStatus | None:
    """Follow a job's log to its end and return its status, None where the head is lost."""
    try:
        asyncio.run(_follow(client, job))
        return client.get_job_status(job)
    except UNANSWERED:
        return None


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
