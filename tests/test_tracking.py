"""A trial's run in MLflow: whole however large it is, and one however often a call is repeated."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow.artifacts
import mlflow.pyfunc
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.servers import MlflowServer
from trainables.networks import build_classifier
from trainables.store.checkpoint import save_weights
from trainables.store.retries import patiently
from trainables.store.storage import NoRoomError
from trainables.store.tracking import SCHEMA, SCHEMA_TAG, SILENT_RENEWALS, Tracker

EPOCHS, KEYS, PARAMS = 300, 8, 250
DATASET = {"name": "d", "digest": "0", "source_type": "code", "source": "d"}


def tracker_in(folder):
    uri = f"sqlite:///{folder}/mlflow.db"
    return Tracker(uri, experiment="x", artifacts=folder / "artifacts")


@pytest.fixture
def tracker(tmp_path):
    return tracker_in(tmp_path)


def start_trial(tracker, study="s", recipe_json="{}", params=()):
    return tracker.start_trial(
        digest="abc",
        name="a trial",
        parent="",
        study=study,
        tables="T1",
        recipe_json=recipe_json,
        params=dict(params),
        dataset=DATASET,
    )


def metrics_of(epoch):
    return {"epoch": float(epoch)} | {f"metric-{k}": epoch + k / 10 for k in range(KEYS - 1)}


def assert_has_every_epoch(tracker, run):
    for number in range(KEYS - 1):
        expected = [(epoch, epoch + number / 10) for epoch in range(1, EPOCHS + 1)]
        assert tracker.history(run, f"metric-{number}") == expected


def test_two_commands_that_begin_together_share_one_experiment(tmp_path, monkeypatch):
    uri, both_looked = f"sqlite:///{tmp_path}/mlflow.db", threading.Barrier(2)
    Tracker(uri, experiment="other", artifacts=None)  # the database is there
    look, looked = MlflowClient.get_experiment_by_name, threading.local()

    def look_together(client, name):
        found = look(client, name)
        if not getattr(looked, "once", False):
            looked.once = True
            both_looked.wait(timeout=60)
        return found

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", look_together)
    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(Tracker, uri, experiment="x", artifacts=None) for _ in range(2)]
    first, second = (future.result() for future in opened)
    assert first.experiment_id == second.experiment_id


def server_tracker(folder, owner=""):
    return Tracker(f"sqlite:///{folder}/mlflow.db", experiment="x", artifacts=None, owner=owner)


def test_commands_that_look_for_a_trial_before_any_creates_it_share_one_run(tmp_path, monkeypatch):
    trackers, all_looked = [server_tracker(tmp_path) for _ in range(3)], threading.Barrier(3)
    look, looked = MlflowClient.search_runs, threading.local()

    def look_together(*arguments, **named):
        page = look(*arguments, **named)
        if not getattr(looked, "once", False):
            looked.once = True
            all_looked.wait(timeout=60)
        return page

    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(MlflowClient, "search_runs", look_together)
        runs = list(pool.map(start_trial, trackers))
    assert len({run.run_id for run in runs}) == 1
    assert [run.info.run_id for run in trackers[0]._search("")] == [runs[0].run_id]


def test_a_trial_is_one_commands_until_that_is_over(tmp_path):
    one, other = (server_tracker(tmp_path, owner) for owner in ("a:/one", "a:/other"))
    assert one.lease("abc") == ("", False)
    assert other.lease("abc") == ("a:/one", True)
    assert one.lease("abc") == ("", False)
    assert server_tracker(tmp_path, "a:/one").lease("abc") == ("", False)  # run again
    one.renew(over=True)
    other.renew()
    assert other.lease("abc") == ("", True)
    assert server_tracker(tmp_path, "a:/one").lease("abc") == ("a:/other", True)
    assert tracker_in(tmp_path).lease("abc") == ("", False)  # in a folder of its own


@pytest.mark.parametrize("is_dead", [True, False])
def test_the_lease_of_a_command_that_died_runs_out(tmp_path, is_dead):
    one, other = (server_tracker(tmp_path, owner) for owner in ("a:/one", "a:/other"))
    one.lease("abc")
    other.lease("abc")
    for _ in range(SILENT_RENEWALS):
        assert other.lease("abc") == ("a:/one", True)
        other.renew()
        if not is_dead:
            one.renew()
    assert other.lease("abc") == (("", True) if is_dead else ("a:/one", True))
    assert one.renew() == ({"abc"} if is_dead else set())
    assert one.lease("abc") == (("a:/other", True) if is_dead else ("", False))


def test_of_commands_that_want_the_same_trials_at_once_each_has_some_and_no_two_one(tmp_path):
    trackers = [server_tracker(tmp_path, str(number)) for number in range(4)]
    trackers[0].lease("first")

    def leased(tracker):
        return {digest for digest in map(str, range(10)) if not tracker.lease(digest)[0]}

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(leased, trackers))
    assert sum(map(len, shares)) == len(set.union(*shares)) == 10


def test_two_commands_that_judge_a_cell_at_once_leave_its_ledger_whole(tmp_path, monkeypatch):
    tags = {SCHEMA_TAG: str(SCHEMA)}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_experiment("x", (tmp_path / "artifacts").as_uri(), tags)
    one, other = server_tracker(tmp_path), server_tracker(tmp_path)
    run, log = start_trial(one), one._log
    cell = {"evaluator": "clean", "cell": "q", "identity": "{}", "metrics": {}}

    def log_later(*arguments, **named):
        other.record_cell(other.trials()["abc"], ledger=b"other", **cell)
        log(*arguments, **named)

    monkeypatch.setattr(one, "_log", log_later)
    one.record_cell(run, ledger=b"one", **cell)
    stored = other.trials()["abc"]
    assert other.ledger(stored, "clean") == b"one"
    one._store(run.artifact_uri, {"pgd.parquet": b"one"}, "ledgers")  # by an earlier version
    stored.ledgers["pgd"] = stored.ledgers["clean"]
    assert other.ledger(stored, "pgd") == b"one"


def test_a_trial_whose_run_a_user_deletes_gets_one_new_run(tmp_path):
    one, other = server_tracker(tmp_path), server_tracker(tmp_path)
    deleted = start_trial(one).run_id
    one._client.delete_run(deleted)
    again = start_trial(one).run_id
    assert again != deleted
    one._client.delete_run(again)
    one.renew(over=True)
    assert start_trial(other).run_id == start_trial(one).run_id not in (deleted, again)


@pytest.mark.parametrize("place", ["database", pytest.param("server", marks=pytest.mark.slow)])
def test_a_run_holds_more_than_mlflow_takes_at_once(place, tracker, tmp_path):
    server = MlflowServer(tmp_path / "server")
    try:
        if place == "server":
            server.start()
            tracker = Tracker(server.uri, experiment="large", artifacts=None)
        params = {f"parameter-{number}": number for number in range(PARAMS)}
        run = start_trial(tracker, params=params)
        tracker.log_epochs(run, [metrics_of(epoch) for epoch in range(1, EPOCHS + 1)])
        assert_has_every_epoch(tracker, run)
        assert tracker.trials()["abc"].logged_epochs == EPOCHS
        logged = tracker._client.get_run(run.run_id).data.params
        assert logged == {name: str(value) for name, value in params.items()}
    finally:
        server.kill()


class KilledError(BaseException):
    pass


def test_an_epoch_that_a_kill_cut_in_two_is_logged_again(tracker, monkeypatch):
    run = start_trial(tracker)
    entries = [metrics_of(epoch) for epoch in range(1, EPOCHS + 1)]
    store, calls = tracker._client._tracking_client.store, []
    log_batch = store.log_batch

    def killed_later(**arguments):
        if calls:
            raise KilledError
        calls.append(arguments)
        log_batch(**arguments)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(store, "log_batch", killed_later)
        tracker.log_epochs(run, entries)
    cut = tracker.trials()["abc"]
    assert 0 < cut.logged_epochs < EPOCHS
    tracker.log_epochs(cut, entries)
    assert_has_every_epoch(tracker, cut)


def test_a_run_killed_before_its_parameters_gets_them_from_the_next_start(tracker):
    tags = {"kind": "trial", "digest": "abc", "recipe": "{}", "outcome": "training"}
    tracker._client.create_run(tracker.experiment_id, tags=tags)
    for _ in range(2):
        run = start_trial(tracker, params={"epochs": 3})
        stored = tracker._client.get_run(run.run_id)
        assert stored.data.params == {"epochs": "3"}
        assert [entry.dataset.name for entry in stored.inputs.dataset_inputs] == ["d"]
        assert list(tracker.trials()) == ["abc"]


def test_a_lost_answer_makes_no_second_run(tmp_path, monkeypatch):
    said = []
    tracker = tracker_in(tmp_path)
    tracker._say = said.append
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    create_run, lost = tracker._client.create_run, []

    def losing_the_first_answer(*arguments, **named):
        run = create_run(*arguments, **named)
        if not lost:
            lost.append(run)
            raise requests.ConnectionError("the answer was lost")
        return run

    monkeypatch.setattr(tracker._client, "create_run", losing_the_first_answer)
    assert start_trial(tracker).run_id == lost[0].info.run_id
    assert len(tracker._search("")) == 1
    assert said == [
        "MLflow is away or busy: training goes on, what is to be written waits",
        "what waited is written",
    ]


def test_two_commands_on_one_server_make_one_run_of_a_trial_and_of_a_study(tracker, tmp_path):
    other = tracker_in(tmp_path)
    first = start_trial(tracker)
    tracker.log_epochs(first, [{"epoch": 1.0, "train/loss": 2.0}])
    tracker.end_trial(first, outcome="failed", reason="no disk")
    second = start_trial(other, "another")
    assert (second.run_id, second.logged_epochs, second.outcome) == (first.run_id, 1, "training")
    found = tracker.trials()["abc"]
    assert (found.studies, found.reason) == ({"s": "T1", "another": "T1"}, "")
    study = tracker.open_study("s", "a study")
    (tmp_path / "report").mkdir()
    tracker.close_study(study, tmp_path / "report", complete=True)
    assert other.open_study("s", "a study") == study
    assert [run.info.status for run in tracker._search("tags.kind = 'study'")] == ["RUNNING"]


def test_an_artifact_is_waited_for_but_not_where_it_is_refused(tracker, monkeypatch):
    tracker.open_study("s", "a study cut short")
    assert tracker.classes("s") == []
    tracker.open_study("s", "a study", classes=["cat", "dog"])
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    download, errors = mlflow.artifacts.download_artifacts, []

    def fail_first(**named):
        if errors:
            raise errors.pop()
        return download(**named)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail_first)
    errors.append(requests.ConnectionError("nobody there"))
    assert tracker.classes("s") == ["cat", "dog"]
    errors.append(MlflowException("no such bucket"))
    with pytest.raises(MlflowException, match="no such bucket"):
        tracker.classes("s")


def test_mlflow_loads_the_trained_classifier_and_refuses_damaged_weights(tracker, tmp_path, small):
    recipe = small()
    classifier = build_classifier(recipe).eval()
    path = tmp_path / "weights.safetensors"
    sha256 = save_weights(path, classifier, recipe.model_dump_json())
    run = start_trial(tracker, recipe_json=recipe.model_dump_json())
    tracker.store_weights(run, path.read_bytes(), sha256, image_size=32, classes=10)
    tracker.end_trial(run, outcome="finished", reason="")
    tags = tracker._client.get_run(run.run_id).data.tags
    (shown,) = json.loads(tags["mlflow.log-model.history"])
    assert (shown["run_id"], list(shown["flavors"])) == (run.run_id, ["python_function"])
    assert shown["artifact_path"]  # the table of runs names no model without one
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = classifier(images)
    loaded = mlflow.pyfunc.load_model(run.artifact_uri)
    assert torch.equal(torch.from_numpy(loaded.predict(images.numpy())), expected)
    other = small(seed=1)
    save_weights(path, build_classifier(other), other.model_dump_json())
    tracker.store_weights(run, path.read_bytes(), sha256, image_size=32, classes=10)
    with pytest.raises(ValueError, match=f"weights of trial {other.digest()}, not of trial"):
        mlflow.pyfunc.load_model(run.artifact_uri)


def answering(*answers):
    """Return a function that gives these answers in turn, and raises those that are errors."""
    coming = iter(answers)

    def call():
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NoRoomError("no room for a.pt"), "no room for a.pt"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room ([Errno 28] No space"),
        (
            MlflowException("database or disk is full\n[SQL: INSERT"),
            "no room (database or disk is full)",
        ),
        (MlflowException("(sqlite3.OperationalError) database is locked"), "MLflow is away"),
        (MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed"), "MLflow is away"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), "the storage is away"),
        (requests.HTTPError("503 Server Error: Service Unavailable"), "MLflow is away"),
    ],
)
def test_an_error_that_passes_is_waited_for_and_said_once(error, cause, monkeypatch):
    monkeypatch.setattr("trainables.store.retries.FIRST_WAIT_SECONDS", 0.01)
    said = []
    assert patiently(answering(error, error, "there"), say=said.append) == "there"
    waits, over = said
    assert waits.startswith(cause)
    assert over == "what waited is written"


def test_any_other_error_and_one_after_the_stop_are_raised():
    with pytest.raises(MlflowException, match="no such experiment"):
        patiently(answering(MlflowException("no such experiment")), say=pytest.fail)
    stop = threading.Event()
    stop.set()
    with pytest.raises(requests.ConnectionError, match="nobody there"):
        patiently(answering(requests.ConnectionError("nobody there")), say=pytest.fail, stop=stop)
