"""What is written to MLflow is what a later command reads, from a real database."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from evaluators.ledger import LEDGER, Score, to_parquet
from grid.report.verdicts import Verdicts
from trainables.store.storage import WEIGHTS
from trainables.store.tracking import Tracker, TrialRun, fetch_content

DATASET = {"name": "digits", "digest": "0", "source_type": "code", "source": "digits"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("tracking")


def opened(results) -> Tracker:
    uri = f"sqlite:///{results}/mlflow.db"
    return Tracker(uri, experiment="tracking", artifacts=results / "artifacts")


@pytest.fixture(scope="module")
def tracker(results) -> Tracker:
    return opened(results)


@pytest.fixture
def trial(tracker, request) -> TrialRun:
    """Return the run of a trial whose digest is the test's name."""
    return start(tracker, request.node.name)


def start(tracker, digest, *, tables="T2", study="bai2021") -> TrialRun:
    return tracker.start_trial(
        digest=digest,
        name=digest,
        parent="",
        study=study,
        tables=tables,
        recipe_json="{}",
        params={},
        dataset=DATASET,
    )


def found_again(results, run) -> TrialRun:
    return opened(results).trials()[run.digest]


def epochs(*numbers):
    return [{"epoch": float(n), "train/loss": 10.0 - n, "train/seconds": 2.0} for n in numbers]


def test_epochs_are_logged_once_at_their_own_step(tracker, results, trial):
    tracker.log_epochs(trial, epochs(1, 2))
    tracker.log_epochs(found_again(results, trial), epochs(1, 2, 3))
    assert tracker.history(trial, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]
    again = found_again(results, trial)
    assert again.logged_epochs == 3
    assert tracker.seconds(again) == 6.0


def test_a_judged_cell_adds_its_seconds_and_its_scores(tracker, results, trial):
    tracker.log_epochs(trial, epochs(1))
    scores = [Score("clean", 0.5, 0.4, 0.7, 60)]
    ledger = to_parquet(LEDGER.empty_table(), seconds=5.0, scores=scores)
    cell = {"cell": "q1", "identity": "{}", "ledger": ledger, "metrics": {"clean": 0.5}}
    tracker.record_cell(trial, evaluator="clean", seconds=5.0, **cell)
    again = found_again(results, trial)
    assert (again.cells, again.metrics["clean"]) == ({"clean": "q1"}, 0.5)
    assert tracker.seconds(again) == tracker.seconds(trial) == 7.0
    assert tracker.ledger(again, "clean") == ledger
    assert "clean/low" not in again.metrics
    Verdicts(tracker, {again.digest: again}).read_scores([again])
    names = ("clean", "clean/low", "clean/high", "clean/n")
    assert [again.metrics[name] for name in names] == [0.5, 0.4, 0.7, 60]


def test_weights_along_the_way_are_a_model_at_its_step_and_their_scores_leave_the_last_alone(
    tracker, results, trial
):
    final = {"clean": 0.9}
    cell = {"cell": "q1", "identity": "{}", "ledger": b"rows"}
    tracker.record_cell(trial, evaluator="clean", metrics=final, **cell)
    tracker.log_checkpoint(trial, 10, b"weights", image_size=16, classes=10)
    tracker.record_cell(trial, evaluator="clean.epoch-10", epoch=10, metrics={"clean": 0.4}, **cell)
    again = found_again(results, trial)
    assert again.metrics["clean"] == 0.9
    assert tracker.history(again, "checkpoint/clean") == [(10, 0.4)]
    (model,) = MlflowClient(tracker.uri).get_run(trial.run_id).outputs.model_outputs
    assert (model.model_id, model.step) == (again.checkpoints[10], 10)
    logged = MlflowClient(tracker.uri).get_logged_model(model.model_id)
    assert [(m.key, m.value, m.step) for m in logged.metrics] == [("checkpoint/clean", 0.4, 10)]
    place = tracker.place_of(again, 10)
    assert fetch_content(tracker.uri, place, WEIGHTS) == b"weights"
    assert tracker.place_of(again, 0) == again.artifact_uri


def test_a_cell_whose_ledger_was_not_stored_is_not_done(tracker, results, trial):
    kept = results / "artifacts" / trial.run_id / "artifacts"
    kept.mkdir(parents=True)
    (kept / "ledgers").write_text("in the way")
    with pytest.raises((OSError, MlflowException)):
        tracker.record_cell(trial, evaluator="pgd", cell="q", identity="{}", ledger=b"", metrics={})
    assert found_again(results, trial).cells == {}


def test_a_cell_that_failed_is_done_once_it_has_an_answer(tracker, results, trial):
    tracker.fail_cell(trial, "pgd", "no memory")
    assert found_again(results, trial).failed_cells == {"pgd": "no memory"}
    tracker.record_cell(trial, evaluator="pgd", cell="q", identity="{}", ledger=b"", metrics={})
    again = found_again(results, trial)
    assert (again.cells, again.failed_cells) == ({"pgd": "q"}, {})


def test_a_trial_is_in_training_until_its_end_is_written_and_when_it_goes_on(
    tracker, results, trial
):
    tracker._tag(trial, {"outcome": "finished"})  # killed before its end
    assert found_again(results, trial).outcome == "training"
    for outcome, reason in (("failed", "a node was lost"), ("finished", "")):
        tracker.end_trial(trial, outcome=outcome, reason=reason)
        again = found_again(results, trial)
        assert (again.outcome, again.reason) == (outcome, reason)
        tracker.continue_trial(again)
        assert found_again(results, trial).outcome == "training"


def test_a_trial_serves_the_tables_of_every_command_in_their_order(tracker, results, trial):
    start(tracker, trial.digest, tables="T10 T1")
    assert found_again(results, trial).studies == {"bai2021": "T1 T2 T10"}
    start(tracker, trial.digest, study="own", tables="T3")
    assert found_again(results, trial).studies == {"bai2021": "T1 T2 T10", "own": "T3"}


def test_the_ui_says_of_which_command_and_commit_a_run_is_and_notes_a_studys_summary(
    tracker, trial, tmp_path
):
    client = MlflowClient(tracker.uri)
    tags = client.get_run(trial.run_id).data.tags
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"] == Path(sys.argv[0]).name
    study = tracker.open_study("noted", "", command="python grid/run.py --minutes 5")
    tracker.open_study("noted", "", command="python grid/run.py")
    assert (tracker.command("noted"), tracker.command("another")) == ("python grid/run.py", "")
    (tmp_path / "summary.md").write_text("who is ahead" + " and by how much" * 400)
    tracker.close_study(study, tmp_path, complete=True)
    note = client.get_experiment(tracker.experiment_id).tags["mlflow.note.content"]
    assert (note[:12], len(note)) == ("who is ahead", 5000)
