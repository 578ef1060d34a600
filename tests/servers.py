"""Real servers on loopback: MLflow, which tests may kill and start again, and S3.

MLflow's migrations take seconds: they run once, and the tests' other databases are copies.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from tests.driver import wait_until

# Its jobs, which nobody asks for here, would be ten processes more.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
SQLITE = "sqlite:///"


@functools.cache
def migrated() -> bytes:
    """Return the content of an empty database, as MLflow makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"{SQLITE}{path}").search_experiments(max_results=1)
        return path.read_bytes()


def migrate(path: Path) -> None:
    """Put an empty database where none is."""
    if path.parent.is_dir() and not path.exists():
        path.write_bytes(migrated())


def migrate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow's clients in this process find their new databases migrated."""
    migrated()
    make = MlflowClient.__init__

    def find(self: MlflowClient, uri: str | None = None, *rest: Any, **named: Any) -> None:
        if uri and uri.startswith(SQLITE) and "%" not in uri and "?" not in uri:
            migrate(Path(uri.removeprefix(SQLITE)))
        make(self, uri, *rest, **named)

    monkeypatch.setattr(MlflowClient, "__init__", find)


@contextmanager
def file_server(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files by their paths, with the headers that Hugging Face's hub has beside them."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            path = self.path.partition("?")[0]
            content = files.get(path, b"")
            self.send_response(200 if path in files else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if path not in files:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return content

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MlflowServer:
    """`mlflow server` on a free port: artifacts in a folder, database there unless it is named."""

    def __init__(self, folder: Path, database: str = "") -> None:
        self.folder, self._database = folder, database
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._database:
            migrate(self.folder / "mlflow.db")
        store = ["--backend-store-uri", self._database or f"{SQLITE}{self.folder}/mlflow.db"]
        store += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                 "--port", str(self.port), *store],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | QUIET,
            )  # fmt: skip
        try:
            wait_until(self._process, self._answers)
        except AssertionError:
            self.kill()
            raise

    @property
    def pid(self) -> int | None:
        return self._process and self._process.pid

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=2).text == "OK"
        except requests.RequestException:
            return False


@contextmanager
def postgresql() -> Iterator[str]:
    """Yield the URI of an empty database of a PostgreSQL server, which refuses to run as root."""
    pytest.importorskip("psycopg", reason="needs pip install '.[cluster]'")
    places = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    initdb = shutil.which("initdb", path=os.pathsep.join(places))
    if initdb is None:
        pytest.skip("needs PostgreSQL")
    bin_, port = Path(initdb).resolve().parent, free_port()
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        run = functools.partial(
            subprocess.run, check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder
        )
        run([initdb, "-D", f"{folder}/data", "-A", "trust", "-U", "grid"])
        control = [bin_ / "pg_ctl", "-D", f"{folder}/data", "-w"]
        options = f"-h 127.0.0.1 -p {port} -k {folder}"
        run([*control, "-l", f"{folder}/log", "-o", options, "start"])
        try:
            yield f"postgresql+psycopg://grid@127.0.0.1:{port}/postgres"
        finally:
            run([*control, "-m", "immediate", "stop"])


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Return the URI of a bucket on a server that speaks S3."""
    moto = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="grid")
        yield f"s3://grid?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()
