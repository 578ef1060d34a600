"""A server that is away, an answer that is lost, a run that is deleted."""

from __future__ import annotations

import errno
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow.artifacts
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.driver import SECONDS, wait_for_checkpoint
from tests.servers import MlflowServer
from trainables.store.patience import PatientClient, patiently
from trainables.store.storage import NoRoomError
from trainables.store.tracking import Tracker

ROOT = Path(__file__).parents[1]
STUDY = """
name = "away"
base = "resnet50"
evaluators = ["clean"]
[set]
size = "small"
"""
ROWS = (
    "select t.value, m.key, m.step from metrics m join tags t using (run_uuid) "
    "where t.key = 'digest' and m.key = 'train/loss' order by 1, 2, 3"
)


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def standing_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("standing"))
    server.start()
    yield server
    server.kill()


def rows(database):
    with sqlite3.connect(database) as opened:
        return opened.execute(ROWS).fetchall()


@pytest.mark.slow
def test_a_study_outlives_its_server_and_writes_nothing_twice(server, tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    command = [sys.executable, "grid/run.py", "--study", str(study), "--mlflow", server.uri]
    driver = subprocess.Popen(
        [*command, "--results", str(tmp_path / "results")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    wait_for_checkpoint(tmp_path / "results", driver)
    server.kill()
    while not list(tmp_path.glob("results/trials/*/weights.safetensors")):
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    server.start()
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 0, said
    assert "MLflow does not answer: training goes on" in said
    assert "MLflow answers again" in said
    assert "Trained 1 and judged 1 cells" in said
    found = rows(server.folder / "mlflow.db")
    assert [step for _, _, step in found] == list(range(1, 11))


def tracker_in(folder, **options):
    uri = f"sqlite:///{folder}/mlflow.db"
    return Tracker(uri, experiment="x", artifacts=folder / "artifacts", **options)


def start_trial(tracker, study="s"):
    return tracker.start_trial(
        digest="abc",
        name="a trial",
        parent="",
        study=study,
        tables="T1",
        recipe_json="{}",
        params={},
        dataset={"name": "d", "digest": "d", "source_type": "code", "source": "s"},
    )


class LosingAnswers(MlflowClient):
    """Does what it is asked, but its first answer is lost on the way."""

    lost = False

    def create_run(self, *arguments, **named):
        run = super().create_run(*arguments, **named)
        if not self.lost:
            self.lost = True
            raise requests.ConnectionError("the answer was lost")
        return run


@pytest.mark.parametrize("shared", [True, False])
def test_a_lost_answer_makes_no_second_run(tmp_path, shared):
    tracker = tracker_in(tmp_path, shared=shared)
    said = []
    tracker._client = PatientClient(LosingAnswers(tracker.uri), said.append)
    run = start_trial(tracker)
    assert list(tracker.trials()) == ["abc"]
    assert tracker.trials()["abc"].run_id == run.run_id
    assert said == [
        "MLflow does not answer: training goes on, what is to be written waits",
        "MLflow answers again",
    ]


def test_two_commands_on_one_server_make_one_run_of_a_trial(tmp_path):
    one, other = tracker_in(tmp_path), tracker_in(tmp_path)
    assert other.trials() == {}
    first = start_trial(one)
    one.log_epochs(first, [{"epoch": 1.0, "train/loss": 2.0}])
    one.end_trial(first, outcome="failed", reason="no disk")
    second = start_trial(other, "another")
    assert second.run_id == first.run_id
    assert one.trials()["abc"].studies == {"s": "T1", "another": "T1"}
    assert (second.logged_epochs, second.outcome) == (1, "training")
    assert len(one._search("tags.kind = 'trial'")) == 1
    assert one.trials()["abc"].reason == ""


def test_who_alone_writes_looks_for_no_run_before_it_makes_one(tmp_path):
    asked = []

    class Listening(MlflowClient):
        def search_runs(self, *arguments, **named):
            asked.append(arguments[1])
            return super().search_runs(*arguments, **named)

    for shared, looked_for in ((False, []), (True, ["tags.digest = 'abc'"])):
        tracker = tracker_in(tmp_path, shared=shared)
        tracker._client = PatientClient(Listening(tracker.uri), pytest.fail)
        start_trial(tracker)
        assert asked == looked_for


def test_two_commands_on_one_server_make_one_run_of_a_study(tmp_path):
    one, other = tracker_in(tmp_path), tracker_in(tmp_path)
    study = one.open_study("s", "a study")
    (tmp_path / "report").mkdir()
    one.close_study(study, tmp_path / "report", complete=True)
    assert other.open_study("s", "a study") == study
    assert one._search("tags.kind = 'study'")[0].info.status == "RUNNING"


def test_a_study_whose_classes_were_never_written_has_none(standing_server, tmp_path):
    at_server = Tracker(standing_server.uri, experiment="x", artifacts=None)
    for tracker in (tracker_in(tmp_path), at_server):
        tracker.open_study("s", "a study cut short")
        assert tracker.classes("s") == []
        tracker.open_study("s", "a study", classes=["cat", "dog"])
        assert tracker.classes("s") == ["cat", "dog"]


def test_a_studys_classes_are_waited_for_but_not_where_they_are_refused(
    tmp_path, monkeypatch, caplog
):
    tracker = tracker_in(tmp_path)
    tracker.open_study("s", "a study", classes=["cat", "dog"])
    download, errors = mlflow.artifacts.download_artifacts, []

    def fail_first(**named):
        if errors:
            raise errors.pop()
        return download(**named)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail_first)
    errors.append(requests.ConnectionError("nobody there"))
    assert tracker.classes("s") == ["cat", "dog"]
    assert "MLflow answers again" in caplog.text
    errors.append(MlflowException("no such bucket"))
    with pytest.raises(MlflowException, match="no such bucket"):
        tracker.classes("s")


def test_a_request_is_sent_once_and_asked_again_by_patience_alone(standing_server):
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
    told = [sys.executable, "-c", code.replace("ADDRESS", repr(standing_server.uri))]
    said = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1", "True"]


def test_a_deleted_run_is_noticed(tmp_path):
    tracker = tracker_in(tmp_path)
    run = start_trial(tracker)
    MlflowClient(tracker.uri).delete_run(run.run_id)
    with pytest.raises(ValueError, match="deleted in MLflow meanwhile: give the same command"):
        tracker.log_epochs(run, [{"epoch": 1.0, "train/loss": 2.0}])
    with pytest.raises(ValueError, match="deleted in MLflow meanwhile"):
        tracker.end_trial(run, outcome="finished", reason="")


def test_who_gives_up_is_told_what_was_waited_for():
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()

    def ask():
        raise requests.ConnectionError("nobody there")

    with pytest.raises(requests.ConnectionError, match="nobody there"):
        patiently(ask, say=lambda _: None, given_up=stop)


def answering(*answers):
    """Return what gives these answers in turn, and raises those that are errors."""
    coming = iter(answers)

    def ask():
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoRoomError("no room for a.pt"), "no room for a.pt: "),
        (OSError(errno.ENOSPC, "No space left on device"), "no room ([Errno 28]"),
        (MlflowException("database or disk is full"), "no room (database"),
        (MlflowException("(sqlite3.OperationalError) database is locked"), "MLflow does not"),
        (requests.HTTPError("503 Server Error: Service Unavailable"), "MLflow does not"),
    ],
)
def test_what_time_mends_is_waited_for_and_said_once(error, said, monkeypatch):
    monkeypatch.setattr("trainables.store.patience.FIRST_WAIT_SECONDS", 0.01)
    heard = []
    assert patiently(answering(error, error, "there"), say=heard.append) == "there"
    waits, over = heard
    assert waits.startswith(said)
    assert over.endswith("again")


def test_an_error_that_is_no_absence_is_raised_at_once():
    def ask():
        raise MlflowException("no such experiment")

    with pytest.raises(MlflowException, match="no such experiment"):
        patiently(ask, say=lambda _: None)


def test_who_collides_with_another_writer_asks_again():
    collision = MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
    heard = []
    answer = patiently(answering(collision, collision, "the other's row"), say=heard.append)
    assert answer == "the other's row"
    assert heard == []


def test_a_collision_without_end_is_raised():
    def ask():
        raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")

    with pytest.raises(MlflowException, match="UNIQUE constraint"):
        patiently(ask, say=lambda _: None)
