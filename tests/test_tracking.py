"""What a trial's run holds in MLflow, whole however much it is and wherever a run was stopped."""

from __future__ import annotations

import sqlite3

import pytest

from grid.plan import build_plan
from grid.record import Recorder
from grid.status import ProgressLine, open_tracker
from grid.study import load_study
from tests.servers import MlflowServer
from trainables.data.load import load_data
from trainables.scale import DIGITS
from trainables.store.tracking import Tracker

EPOCHS, KEYS, PARAMS = 300, 8, 250
DATASET = {"name": "d", "digest": "0", "source_type": "code", "source": "d"}


def metrics_of(epoch):
    return {"epoch": float(epoch)} | {f"metric-{k}": epoch + k / 10 for k in range(KEYS - 1)}


def start_trial(tracker, params=()):
    return tracker.start_trial(
        digest="abc",
        name="a trial",
        parent="",
        study="s",
        tables="T1",
        recipe_json="{}",
        params=dict(params),
        dataset=DATASET,
    )


def assert_holds_everything(tracker):
    params = {f"parameter-{number}": number for number in range(PARAMS)}
    run = start_trial(tracker, params)
    tracker.tag_trained(run, {f"library-{number}": "1" for number in range(PARAMS)})
    tracker.log_epochs(run, [metrics_of(epoch) for epoch in range(1, EPOCHS + 1)])
    for number in range(KEYS - 1):
        expected = [(epoch, epoch + number / 10) for epoch in range(1, EPOCHS + 1)]
        assert tracker.history(run, f"metric-{number}") == expected
    found = tracker.trials()["abc"]
    assert found.logged_epochs == EPOCHS
    assert len(found.trained) == PARAMS
    logged = tracker._client.get_run(run.run_id).data.params
    assert logged == {name: str(value) for name, value in params.items()}


def test_a_database_holds_more_than_mlflow_takes_at_once(tmp_path):
    assert_holds_everything(open_tracker(tmp_path, None, DIGITS))


@pytest.mark.slow
def test_a_server_holds_more_than_mlflow_takes_at_once(tmp_path):
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        assert_holds_everything(Tracker(server.uri, experiment="large", artifacts=None))
    finally:
        server.kill()


class KilledError(BaseException):
    pass


def test_an_epoch_that_a_kill_cut_in_two_is_logged_again(tmp_path):
    tracker = open_tracker(tmp_path, None, DIGITS)
    run = start_trial(tracker)
    entries = [metrics_of(epoch) for epoch in range(1, EPOCHS + 1)]
    store = tracker._client._client._tracking_client.store
    log_batch, calls = store.log_batch, []

    def killed_later(**arguments):
        if calls:
            raise KilledError
        calls.append(arguments)
        log_batch(**arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(store, "log_batch", killed_later)
        tracker.log_epochs(run, entries)
    found = tracker.trials()["abc"]
    assert 0 < found.logged_epochs < EPOCHS
    tracker.log_epochs(found, entries)
    for number in range(KEYS - 1):
        expected = [(epoch, epoch + number / 10) for epoch in range(1, EPOCHS + 1)]
        assert tracker.history(run, f"metric-{number}") == expected


@pytest.mark.parametrize("outcome", ["training", "finished"])
def test_a_run_killed_before_its_parameters_is_completed_by_the_next_start(tmp_path, outcome):
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=["T6"], evaluators=["clean"])
    tracker = open_tracker(tmp_path, None, DIGITS)
    trial = plan.trials[0]
    tags = {"kind": "trial", "digest": trial.digest, "recipe": trial.recipe.model_dump_json()}
    tags |= {"outcome": outcome}
    made = tracker._client.create_run(
        tracker.experiment_id, run_name=trial.name, tags=tags, made=lambda: None, shared=False
    )
    if outcome == "finished":
        tracker._client.set_terminated(made.info.run_id)
    recorder = Recorder(
        open_tracker(tmp_path, None, DIGITS),
        plan,
        study=study.name,
        scale=DIGITS,
        data=load_data(DIGITS),
        line=ProgressLine(),
    )
    recorder.enrol()
    run = tracker._client.get_run(made.info.run_id)
    assert run.data.params["model"] == trial.recipe.model
    assert run.data.params["epochs"] == str(trial.recipe.epochs)
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["digits"]
    recorder.enrol()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from inputs").fetchall() == [(1,)]
        assert database.execute("select count(*) from runs").fetchall() == [(1,)]
