"""The command on a cluster, from a laptop: a tunnel, a Ray job with this project, and its log."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).parents[1]
TUNNEL_SECONDS = 60
# Beside what .gitignore names.
LEFT_HERE = [".venv", "results", "__pycache__"]


def run_on(cluster: Path, arguments: Sequence[str]) -> int:
    """Run `grid/run.py` with some arguments as a job of a cluster, and follow its log.

    A job with the same arguments that still runs is followed, not started again. Returns 0 or 1;
    KeyboardInterrupt leaves the job running. ValueError when the cluster does not answer.
    """
    if not cluster.is_file():
        raise ValueError(f"--on wants a cluster file, and {cluster} is none")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with _tunnel(cluster) as address:
        client = _client(address, cluster)
        job = _running(client, arguments) or _submit(client, arguments)
        print(f"job {job} on {cluster}; Ctrl-C leaves it running", file=sys.stderr)
        asyncio.run(_follow(client, job))
        return 0 if client.get_job_status(job) == JobStatus.SUCCEEDED else 1


@contextmanager
def _tunnel(cluster: Path) -> Iterator[str]:
    """Forward a free local port to the dashboard, which listens on the head's loopback."""
    port = _free_port()
    command = ["ray", "dashboard", "--no-config-cache", "--port", str(port), str(cluster)]
    # In a session of its own, so that Ctrl-C is this process's to answer.
    tunnel = subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        _wait_until_open(tunnel, port, cluster)
        yield f"http://127.0.0.1:{port}"
    finally:
        tunnel.terminate()
        tunnel.wait()


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


def _client(address: str, cluster: Path) -> JobSubmissionClient:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
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


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
