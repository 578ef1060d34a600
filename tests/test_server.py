"""A real MLflow server: writers at once, users and passwords, an outage, an absent server."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from grid.run import main
from tests.driver import ROOT, ended, start, study_of_one, wait_for_checkpoint, wait_until
from tests.servers import MlflowServer, free_port, postgresql
from trainables.store.tracking import SCHEMA, Tracker, check_address, client_settings

WRITERS, EPOCHS = 8, 30
CREDENTIALS = """[mlflow]
mlflow_tracking_username = admin
mlflow_tracking_password = a long password
"""
STEPS = (
    "select m.step from metrics m join tags t using (run_uuid) "
    "where t.key = 'digest' and m.key = 'train/loss' order by 1"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_study_outlives_its_server_and_writes_nothing_twice(server, tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(study_of_one(epochs=100))
    driver = start(study, tmp_path / "results", "--mlflow", server.uri)
    wait_for_checkpoint(tmp_path / "results", driver)
    server.kill()
    wait_until(driver, lambda: list(tmp_path.glob("results/trials/*/weights.safetensors")))
    time.sleep(2)
    server.start()
    said = ended(driver)
    assert "MLflow is away or busy: training goes on" in said
    assert "what waited is written" in said
    assert "Trained 1 and judged 1 cells" in said
    with sqlite3.connect(server.folder / "mlflow.db") as database:
        assert database.execute(STEPS).fetchall() == [(step,) for step in range(1, 11)]


def test_what_is_read_of_a_server_leaves_no_copy_behind(server, tmp_path, monkeypatch):
    tracker = Tracker(server.uri, experiment="copies", artifacts=None)
    run = start_trial(tracker, "copied")
    tracker.record_cell(run, evaluator="clean", cell="q", identity="{}", ledger=b"1", metrics={})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tracker.ledger(tracker.trials()["copied"], "clean") == b"1"
    assert list(tmp_path.iterdir()) == []


def start_trial(tracker, digest):
    return tracker.start_trial(
        digest=digest,
        name=f"trial {digest}",
        parent="",
        study="crowd",
        tables="T1",
        recipe_json="{}",
        params={f"parameter-{index}": index for index in range(20)},
        dataset={"name": "d", "digest": "0", "source_type": "code", "source": "d"},
    )


def write(uri, number):
    tracker = Tracker(uri, experiment="crowd", artifacts=None)
    run = start_trial(tracker, f"digest-{number}")
    for epoch in range(1, EPOCHS + 1):
        tracker.log_epochs(run, [{"epoch": float(epoch), "loss": number + epoch / 100}])
    tracker.record_cell(
        run,
        evaluator="clean",
        cell="q",
        identity="{}",
        ledger=b"%d" % number,
        metrics={"clean": 1.0},
    )
    tracker.end_trial(run, outcome="finished", reason="")


@pytest.mark.slow
def test_eight_processes_that_log_at_once_lose_nothing(server):
    tracker = Tracker(server.uri, experiment="crowd", artifacts=None)
    spawn = get_context("spawn")
    writers = [spawn.Process(target=write, args=(server.uri, n)) for n in range(WRITERS)]
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


@pytest.mark.slow
def test_eight_commands_on_the_same_hundred_trials_make_one_run_of_each_on_postgresql(tmp_path):
    with postgresql() as database:
        server = MlflowServer(tmp_path, database)
        server.start()
        try:
            with ThreadPoolExecutor(WRITERS) as pool:
                written = list(pool.map(start_hundred, [server.uri] * WRITERS))
            runs = Tracker(server.uri, experiment="crowd", artifacts=None)._search("")
        finally:
            server.kill()
    assert len(runs) == 100
    expected = {run.data.tags["digest"]: run.info.run_id for run in runs}
    assert [runs for runs, _ in written] == [expected] * WRITERS
    assert sorted(digest for _, leased in written for digest in leased) == sorted(expected)


def start_hundred(uri):
    """Start trials, with a lease or without, and return their runs and the leases."""
    tracker = Tracker(uri, experiment="crowd", artifacts=None)
    digests = [f"{number:012x}" for number in range(100)]
    leased = [digest for digest in digests if not tracker.lease(digest)[0]]
    return {digest: start_trial(tracker, digest).run_id for digest in digests}, leased


@pytest.mark.slow
def test_two_commands_on_one_study_train_and_judge_each_trial_once(server, tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(study_of_one(epochs=80))  # no other test of this server trains it
    drivers = [
        start(study, tmp_path / name, "--mlflow", server.uri, "--seeds", "2", "--address", "local")
        for name in ("one", "other")
    ]
    said = [ended(driver) for driver in drivers]
    counts = [re.search(r"Trained (\d) and judged (\d) cells", text).groups() for text in said]
    sums = [sum(map(int, of_both)) for of_both in zip(*counts, strict=True)]
    assert sums == [2, 2], said
    assert sum("trials of this plan: these wait" in text for text in said) >= 1
    assert [text.count("is trained again") for text in said] == [0, 0]


def test_a_trial_with_a_cell_takes_eight_calls_of_the_server(server, tmp_path, monkeypatch):
    tags = {"robustness-grid.schema": str(SCHEMA)}
    client, place = MlflowClient(server.uri), tmp_path.as_uri()
    client.create_experiment("few", artifact_location=place, tags=tags)
    tracker = Tracker(server.uri, experiment="few", artifacts=None)
    tracker.open_study("s", "")  # the first to claim makes the place for claims
    tracker.lease("1" * 12)  # the first lease reads the others
    send, paths = requests.Session.request, []

    def count(session, method, url, **named):
        paths.append(url.removeprefix(server.uri).partition("?")[0])
        return send(session, method, url, **named)

    monkeypatch.setattr(requests.Session, "request", count)
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # as the command does
    assert tracker.lease("0" * 12) == ("", False)
    run = start_trial(tracker, "0" * 12)
    tracker.tag_trained(run, {"torch": "2"})
    tracker.log_epochs(run, [{"epoch": float(e), "loss": 1.0} for e in range(1, 101)], later=True)
    tracker.store_weights(run, b"weights", "0", image_size=32, classes=10)
    tracker.end_trial(run, outcome="finished", reason="")
    answer = {"cell": "q", "identity": "{}", "ledger": b"l", "metrics": {"clean": 1.0}}
    tracker.record_cell(run, evaluator="clean", **answer)
    monkeypatch.undo()
    assert len(paths) == 8, paths
    stored = tracker.trials()["0" * 12]
    assert (stored.outcome, stored.logged_epochs, stored.weights_sha256) == ("finished", 100, "0")
    assert (stored.trained, stored.studies) == ({"torch": "2"}, {"crowd": "T1"})


def test_a_run_outlives_the_deletion_of_the_place_for_claims(server):
    client = MlflowClient(server.uri)
    tracker = Tracker(server.uri, experiment="swept", artifacts=None)
    run = start_trial(tracker, "0" * 12)
    client.delete_experiment(client.get_experiment_by_name("swept claims").experiment_id)
    with pytest.raises(MlflowException):
        start_trial(tracker, "1" * 12)
    again = Tracker(server.uri, experiment="swept", artifacts=None)  # the next command restores it
    assert start_trial(again, "0" * 12).run_id == run.run_id
    assert start_trial(again, "1" * 12).run_id in {r.run_id for r in again.trials().values()}


def test_a_request_is_sent_once_and_called_again_by_patience_alone(server):
    code = (
        "import os; from grid.run import ENVIRONMENT; os.environ.update(ENVIRONMENT)\n"
        "from mlflow.tracking import MlflowClient\n"
        "import urllib3.connectionpool as pool\n"
        "sent, send = [], pool.HTTPConnectionPool._make_request\n"
        "def lost(self, *arguments, **named):\n"
        "    sent.append(arguments[2])\n"
        "    raise ConnectionResetError('the answer was lost')\n"
        "client = MlflowClient(ADDRESS); client.search_experiments()\n"
        "pool.HTTPConnectionPool._make_request = lost\n"
        "try: client.create_run('0')\n"
        "except Exception as error: print(len(sent), 'failed with exception' in str(error))\n"
    )
    command = [sys.executable, "-c", code.replace("ADDRESS", repr(server.uri))]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1", "True"]


@pytest.fixture
def guarded(tmp_path):
    """Return the address of the server that cluster.yaml starts where there are credentials."""
    home, port = tmp_path / "home", str(free_port())
    (home / "grid" / "bin").mkdir(parents=True)
    for name in ("mlflow", "python"):
        script = home / "grid" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent / name} "$@"\n')
        script.chmod(0o755)
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text(CREDENTIALS)
    (home / ".bashrc").write_text(f"export GRID_STORAGE=file://{tmp_path}/bucket\n")
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    (command,) = [c for c in commands if "mlflow server" in c]
    command = command.replace("5000", port)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
    subprocess.run(["bash", "-c", command], check=True, env=environment | {"HOME": str(home)})
    try:
        uri = f"http://127.0.0.1:{port}"
        wait_until(None, lambda: _answers(uri))
        yield uri
    finally:
        # Not before it answers: a process has no command line while it becomes another program.
        started = psutil.process_iter(["cmdline"])
        for process in [p for p in started if str(home) in str(p.info["cmdline"])]:
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.mark.slow
def test_the_server_of_a_cluster_is_started_again_and_leaves_its_database(guarded, tmp_path):
    def processes(words):
        started = psutil.process_iter(["cmdline"])
        lines = {process: " ".join(process.info["cmdline"] or ()) for process in started}
        return [p for p, line in lines.items() if str(tmp_path) in line and words in line]

    (*_, server) = processes("mlflow server --app-name")
    for one in [*server.children(recursive=True), server]:
        one.kill()
    wait_until(None, lambda: not _answers(guarded))
    wait_until(None, lambda: _answers(guarded))
    for supervisor in processes("trainables.store.snapshot"):
        supervisor.terminate()
    wait_until(None, (copy := tmp_path / "bucket" / "mlflow.db").exists)
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("select count(*) from experiments").fetchone() == (1,)


def _answers(uri):
    try:
        return requests.get(f"{uri}/health", timeout=2).text == "OK"
    except requests.RequestException:
        return False


@pytest.mark.slow
def test_a_server_with_users_lets_in_who_gives_the_password(guarded, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
    with pytest.raises(SystemExit) as refused:
        main(["--mlflow", guarded, "--results", str(tmp_path / "results")])
    assert refused.value.code == 2
    assert "error code 401" in (message := capsys.readouterr().err)
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in message
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a long password")
    settings = client_settings()
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_USERNAME"):
        check_address(guarded)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    check_address(guarded)
    assert Tracker(guarded, experiment="own", artifacts=None).trials() == {}


def test_an_absent_server_is_refused_before_any_compute(tmp_path, capsys):
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        SystemExit, match="2"
    ):  # first: it has MLflow's client not ask again and again
        main(["--mlflow", uri, "--results", str(tmp_path / "results")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python grid/run.py: MLflow at {uri} cannot be used")
    with pytest.raises(ValueError, match=f"MLflow at {uri} cannot be used"):
        check_address(uri)
