"""A real MLflow server: many writers at once, users and passwords, versions that will not do."""

from __future__ import annotations

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import psutil
import pytest
import requests
import yaml

from grid.run import main
from tests.driver import wait_until
from tests.servers import MlflowServer, free_port
from trainables.store.tracking import Credentials, Tracker, check_address

ROOT = Path(__file__).parents[1]
WRITERS, EPOCHS = 8, 30
CREDENTIALS = """[mlflow]
mlflow_tracking_username = admin
mlflow_tracking_password = a long password
"""


def write(uri, number):
    tracker = Tracker(uri, experiment="crowd", artifacts=None)
    run = tracker.start_trial(
        digest=f"digest-{number}",
        name=f"trial {number}",
        parent="",
        study="crowd",
        tables="",
        recipe_json="{}",
        params={f"parameter-{index}": index for index in range(20)},
        dataset={"name": "d", "digest": "0", "source_type": "code", "source": "d"},
    )
    for epoch in range(1, EPOCHS + 1):
        tracker.log_epochs(run, [{"epoch": float(epoch), "loss": number + epoch / 100}])
    tracker.record_cell(
        run, evaluator="clean", cell="q", asked="{}", ledger=b"%d" % number, metrics={"clean": 1.0}
    )
    tracker.end_trial(run, outcome="finished", reason="")


@pytest.mark.slow
def test_eight_processes_that_log_at_once_lose_nothing(tmp_path):
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        tracker = Tracker(server.uri, experiment="crowd", artifacts=None)
        writers = [
            get_context("spawn").Process(target=write, args=(server.uri, number))
            for number in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * WRITERS
        runs = tracker.trials()
        assert len(runs) == WRITERS
        for number in range(WRITERS):
            run = runs[f"digest-{number}"]
            assert run.outcome == "finished"
            assert tracker.ledger(run, "clean") == b"%d" % number
            losses = [(epoch, number + epoch / 100) for epoch in range(1, EPOCHS + 1)]
            assert tracker.history(run, "loss") == losses
    finally:
        server.kill()


@pytest.fixture
def guarded(tmp_path):
    """Return the address of the server that cluster.yaml starts where there are credentials."""
    home, port = tmp_path / "home", str(free_port())
    (home / "grid" / "bin").mkdir(parents=True)
    (home / "grid" / "bin" / "mlflow").symlink_to(Path(sys.executable).parent / "mlflow")
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text(CREDENTIALS)
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    (command,) = [c for c in commands if "mlflow server" in c]
    command = command.replace("5000", port).replace("/shared/artifacts", f"{home}/artifacts")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
    subprocess.run(["bash", "-c", command], check=True, env=environment | {"HOME": str(home)})
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until(None, lambda: _answers(uri))
        yield uri
    finally:
        # Not before it answers: a process has no command line while it becomes another program.
        started = psutil.process_iter(["cmdline"])
        for server in [p for p in started if str(home) in str(p.info["cmdline"])]:
            for process in [*server.children(recursive=True), server]:
                process.kill()


def _answers(uri):
    try:
        return requests.get(f"{uri}/health", timeout=2).text == "OK"
    except requests.RequestException:
        return False


@pytest.mark.slow
def test_a_server_with_users_lets_in_who_gives_the_password(guarded, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD, and refuses those given"):
        check_address(guarded)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
    with pytest.raises(SystemExit) as refused:
        main(["--mlflow", guarded, "--results", str(tmp_path / "results")])
    assert refused.value.code == 2
    assert "refuses those given here" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a long password")
    sent = Credentials.of_environment()
    assert "password" not in repr(sent)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    sent.use()
    check_address(guarded)
    assert Tracker(guarded, experiment="own", artifacts=None).trials() == {}


class OldServer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"2.9.2" if self.path == "/version" else b"OK")

    def log_message(self, *arguments):
        pass


def test_a_server_of_another_version_is_refused():
    with HTTPServer(("127.0.0.1", 0), OldServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match=r"is of version 2\.9\.2, not (<4,>=3\.5|>=3\.5,<4)"):
            check_address(uri)
        server.shutdown()


def test_a_password_in_the_address_is_refused():
    with pytest.raises(ValueError, match="give its user and password as MLFLOW_TRACKING_USERNAME"):
        check_address("http://admin:secret@127.0.0.1:5000")
