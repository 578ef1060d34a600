"""Where a study stands, from a real MLflow database."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import pytest

from grid import status
from grid.plan import build_plan
from grid.report.tables import tables_of
from grid.status import (
    Progress,
    ProgressLine,
    describe_status,
    open_existing,
    open_tracker,
    print_status,
)
from grid.study import load_study
from tests.golden import FOLDER as GOLDEN
from trainables.scale import DIGITS
from trainables.store.results import database_uri, sole_run
from trainables.store.tracking import Tracker


def start(tracker, trial):
    return tracker.start_trial(
        digest=trial.digest,
        name=trial.name,
        parent="",
        study="bai2021",
        tables="T1",
        recipe_json=trial.recipe.model_dump_json(),
        params={},
        dataset={"name": "digits", "digest": "0", "source_type": "code", "source": "digits"},
    )


def test_status_counts_outcomes_and_cells_and_says_what_is_under_way(tmp_path):
    plan = build_plan(load_study("bai2021"), DIGITS, tables=["T1"], evaluators=["clean", "pgd"])
    first, second, *rest = plan.trials
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(uri, experiment="status", artifacts=tmp_path / "artifacts")
    done, going = start(tracker, first), start(tracker, second)
    tracker.log_epochs(done, [{"epoch": 1.0, "train/seconds": 60.0}])
    tracker.end_trial(done, outcome="finished", reason="")
    tracker.record_cell(
        done,
        evaluator="clean",
        cell="q",
        identity="{}",
        ledger=b"",
        metrics={"clean": 0.9},
        seconds=10.0,
    )
    tracker.log_epochs(going, [{"epoch": 3.0, "train/seconds": 10.0}])
    said = describe_status(tracker, plan, now=going.start_time / 1000 + 600).splitlines()
    waiting = f", {len(rest)} waiting" if rest else ""
    assert said[0] == f"{len(plan.trials)} trials: 1 finished, 1 training{waiting}"
    assert said[1] == f"1 of {2 * len(plan.trials)} cells judged; 80 s of training and judging"
    expected = f"training: {second.name}: epoch 3/{second.recipe.epochs}, begun 10 min ago"
    assert said[2] == expected
    for live, state in [(False, "stopped"), (None, "training or stopped")]:
        tracker.live = live
        said = describe_status(tracker, plan, now=going.start_time / 1000 + 600).splitlines()
        assert f"1 {state}" in said[0]
        assert said[2] == expected.replace("training", state)


def test_status_is_watched_as_long_as_a_run_uses_the_results(tmp_path, monkeypatch, capsys):
    plan = build_plan(load_study("bai2021"), DIGITS, tables=["T6"])
    tracker = open_tracker(tmp_path, None, DIGITS)
    with ExitStack() as run:
        run.enter_context(sole_run(tmp_path))

        def end(seconds):
            tracker.end_trial(start(tracker, plan.trials[0]), outcome="finished", reason="")
            run.close()

        monkeypatch.setattr(time, "sleep", end)
        print_status(tmp_path, None, DIGITS, plan, watch=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 trials: 3 waiting"
    assert said[2] == "3 trials: 1 finished, 2 waiting"
    print_status(tmp_path, None, DIGITS, plan, watch=False)
    assert capsys.readouterr().out.splitlines() == said[2:]


def test_the_time_left_of_a_recorded_run_is_about_the_truth():
    """A run of five trials on two cores, with a load of 30 beside it, until its last shards."""
    recorded = json.loads((GOLDEN / "progress.json").read_text())
    ratios = []
    for row in recorded["rows"]:
        now, began, total, done, seconds, *judged, _ = row
        progress = Progress(5, 17, 50, total, done, training_seconds=seconds, began=began)
        if now >= began + 0.1 * (recorded["end"] - began):
            left = progress.seconds_left(tuple(judged), now)
            ratios.append(left / (recorded["end"] - now))
    assert len(ratios) == 25
    assert all(1 / 2 < ratio < 2 for ratio in ratios)
    assert sum(2 / 3 < ratio < 4 / 3 for ratio in ratios) > len(ratios) / 2


def test_the_time_left_is_that_of_the_work_left_by_as_many_as_work():
    progress = Progress(trials=4, cells=4, epochs=40, cost_total=40.0, started=0.0)
    assert progress.seconds_left((0.0, 100.0), 19.0) is None
    # Processes took 20 s to start. Two trials have worked for 10 s each, at 2 s for a cost of 1.
    progress.trained(5.0, 10.0, 30.0)
    progress.trained(5.0, 10.0, 30.0)
    # 60 s of training and 40 of judging are left, by two at once.
    assert progress.seconds_left((0.0, 40.0), 30.0) == pytest.approx(50)
    # What a run before has trained, 500 s, says nothing of the pace.
    progress.trained(10.0, 500.0, 30.0)
    assert progress.seconds_left((0.0, 40.0), 30.0) == pytest.approx(40)
    progress.trained(10.0, 20.0, 50.0)
    progress.trained(10.0, 20.0, 50.0)
    # 60 s of training are done, and 10 of judging; 30 of judging are left. 70 s took 30.
    assert progress.seconds_left((10.0, 30.0), 50.0) == pytest.approx(30 * 30 / 70)
    only_judges = Progress(trials=0, cells=2, epochs=0, cost_total=0.0)
    assert only_judges.seconds_left((1.0, 29.0), 5.0) == pytest.approx(29)
    assert only_judges.seconds_left((16.0, 14.0), 12.0) == pytest.approx(14 * 8 / 16)


def test_the_line_of_a_run_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    progress = Progress(trials=999, cells=9999, epochs=99999, cost_total=1.0)
    counts = progress.line((0.0, 0.0), 0.0)
    progress.running["a"] = "resnet50 relu sgd step none 100ep seed0, adversarially trained"
    monkeypatch.setattr(status, "QUIET_SECONDS", 0.0)
    ProgressLine().show(progress.line((0.0, 0.0), 0.0))
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(counts)
    assert len(shown) <= 77
    assert shown.endswith("…")


def test_a_trial_without_a_run_that_trains_it_says_where_it_stopped(tmp_path):
    plan = build_plan(load_study("bai2021"), DIGITS, tables=["T6"])
    tracker = open_tracker(tmp_path, None, DIGITS)
    run = start(tracker, plan.trials[0])
    tracker.log_epochs(run, [{"epoch": 6.0}])

    def state(mlflow=None):
        found = open_existing(tmp_path, mlflow, DIGITS).trials()
        table = tables_of(load_study("bai2021"), plan, found)[0]
        row = next(row for row in table.rows if row.recipe.digest() == run.digest)
        return found[run.digest].state, row.cells[0].state

    assert state() == ("stopped at epoch 6",) * 2
    assert state(database_uri(tmp_path)) == ("training or stopped at epoch 6",) * 2
    with sole_run(tmp_path):
        assert state() == ("training",) * 2
