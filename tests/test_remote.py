"""The command with --on, beside a `ray dashboard` of the tests' own: refused, left and cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grid.remote import run_on
from tests.driver import SECONDS, wait_until

ROOT = Path(__file__).parents[1]
RAY = f"""#!{sys.executable}
import asyncio, json, os, subprocess, sys
import ray
from aiohttp import web

port = int(sys.argv[sys.argv.index("--port") + 1])
ssh = subprocess.Popen(["sleep", "1000"])
seen = {{"pids": [os.getpid(), ssh.pid], "stdin": os.readlink("/proc/self/fd/0")}}


async def answer(request):
    refused = os.environ.get("FAKE_REFUSAL")
    if refused:
        return web.Response(status=int(refused), text="no")
    if request.path.endswith("/logs/tail"):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("a line of the log\\n")
        await asyncio.sleep(1000)
    if request.path == "/api/version":
        return web.json_response({{"version": "4", "ray_version": ray.__version__}})
    if request.path == "/api/jobs/":
        started = {{"job_id": "j", "submission_id": "grid-1"}}
        return web.json_response([] if request.method == "GET" else started)
    return web.Response()


with open(os.environ["FAKE_SEEN"], "w") as file:
    json.dump(seen, file)
app = web.Application()
app.router.add_route("*", "/{{path:.*}}", answer)
web.run_app(app, host="127.0.0.1", port=port, print=None, shutdown_timeout=0.1)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster file, and a `ray` on the path whose tunnel ends in a server of its own."""
    (tmp_path / "ray").write_text(RAY)
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SEEN", str(tmp_path / "seen.json"))
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: none")
    return path


def seen(cluster):
    return json.loads((cluster.parent / "seen.json").read_text())


def are_gone(pids):
    gone = (not psutil.pid_exists(p) or psutil.Process(p).status() == "zombie" for p in pids)
    return all(gone)


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_missing_or_wrong_token_is_refused_with_words_on_it(cluster, monkeypatch, status):
    monkeypatch.setenv("FAKE_REFUSAL", status)
    with pytest.raises(ValueError, match=r"its token.*RAY_AUTH_TOKEN here"):
        run_on(cluster, [])
    assert are_gone(seen(cluster)["pids"])


def test_a_head_that_is_ill_is_refused_in_words(cluster, monkeypatch):
    monkeypatch.setenv("FAKE_REFUSAL", "502")
    with pytest.raises(ValueError, match=r"takes no jobs: 502 Server Error"):
        run_on(cluster, [])


@pytest.fixture
def following(cluster):
    """The command once it follows the log of its job."""
    command = [sys.executable, "grid/run.py", "--on", str(cluster)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        try:
            heard = ""
            while "a line of the log" not in heard:
                line = driver.stdout.readline()
                assert line, heard
                heard += line
            yield driver
        finally:
            driver.kill()


def test_ctrl_c_leaves_the_job_says_how_to_return_and_ends_the_tunnel(cluster, following):
    following.send_signal(signal.SIGINT)
    said = following.communicate(timeout=SECONDS)[0]
    assert following.returncode == 130
    assert f"Return with: python grid/run.py --on {cluster}" in said
    assert seen(cluster)["stdin"] == "/dev/null"
    wait_until(None, lambda: are_gone(seen(cluster)["pids"]))


def test_a_tunnel_that_is_lost_leaves_the_job_and_says_how_to_return(cluster, following):
    os.kill(seen(cluster)["pids"][0], signal.SIGKILL)
    said = following.communicate(timeout=SECONDS)[0]
    assert following.returncode == 1
    assert "Traceback" not in said
    assert "the same command returns to it" in said
    wait_until(None, lambda: are_gone(seen(cluster)["pids"]))
