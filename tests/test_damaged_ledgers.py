"""Ledgers that are damaged, swapped or missing: the report goes on, the next run judges them."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from evaluators.ledger import from_parquet, scores_of, to_parquet
from grid.plan import build_plan
from grid.record import Recorder
from grid.report.build import write_report
from grid.report.verdicts import Verdicts
from grid.status import ProgressLine, open_tracker
from grid.study import load_study
from tests.made_up import MadeUpPool, record
from trainables.data.load import load_data
from trainables.scale import DIGITS

STATE = "damaged ledger: judged again by the next run"


def flipped(content, place):
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES = {
    "emptied": lambda content: b"",
    "truncated": lambda content: content[:-9],
    "a page flipped": lambda content: flipped(content, 20),
    "the footer flipped": lambda content: flipped(content, -40),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=("T6",), evaluators=["clean", "pgd"])
    return results, record(results, study, plan), study, plan


def ledger_of(tracker, trial, name="clean"):
    uri = tracker.trials()[trial.digest].artifact_uri
    return Path(url2pathname(urlsplit(uri).path), "ledgers", f"{name}.parquet")


def run_again(tracker, study, plan):
    """Run the study again with a pool that answers at once; return how many cells it judged."""
    data, line = load_data(DIGITS), ProgressLine()
    recorder = Recorder(tracker, plan, study=study.name, scale=DIGITS, data=data, line=line)
    assert recorder.trials_to_train() == []
    recorder.open_study()
    with recorder.recording(MadeUpPool()):
        pass
    return recorder.progress.cells_done


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_is_named_by_the_report_and_judged_by_the_next_run(
    recorded, tmp_path, damage
):
    _, tracker, study, plan = recorded
    path = ledger_of(tracker, plan.trials[0])
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert (tmp_path / "index.html").read_text().count(STATE) == 1
    assert (tmp_path / "tables.md").read_text().count(STATE) == 1
    assert run_again(tracker, study, plan) == 1
    assert path.read_bytes() == content
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert STATE not in (tmp_path / "tables.md").read_text()
    assert run_again(tracker, study, plan) == 0


def test_a_cell_that_is_judged_again_beside_a_report_is_not_forgotten(recorded, monkeypatch):
    results, tracker, _, plan = recorded
    digest = plan.trials[2].digest
    reader = open_tracker(results, None, DIGITS)
    verdicts = Verdicts(reader, reader.trials())
    content, download = tracker.ledger(verdicts.runs[digest], "clean"), reader.artifact
    again = to_parquet(from_parquet(content)[0], seconds=7.0, scores=scores_of(content))

    def judged_meanwhile(*arguments):
        monkeypatch.setattr(reader, "artifact", download)
        run = tracker.trials()[digest]
        cell = {"cell": run.cells["clean"], "identity": "{}", "ledger": again, "metrics": {}}
        tracker.record_cell(run, evaluator="clean", seconds=7.0, **cell)
        return download(*arguments)

    monkeypatch.setattr(reader, "artifact", judged_meanwhile)
    assert verdicts.ledger(digest, "clean").equals(from_parquet(content)[0])
    for run in (tracker.trials()[digest], verdicts.runs[digest]):
        assert (run.failed_cells, run.seconds["clean"]) == ({}, 7.0)


def test_swapped_and_missing_ledgers_are_judged_again(recorded, tmp_path):
    results, tracker, study, plan = recorded
    first, second = (ledger_of(tracker, trial) for trial in plan.trials[:2])
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert (tmp_path / "tables.md").read_text().count(STATE) == 2
    assert run_again(tracker, study, plan) == 2
    assert (first.read_bytes(), second.read_bytes()) == contents
    shutil.rmtree(first.parent)
    write_report(open_tracker(results, None, DIGITS), study, plan, DIGITS, tmp_path)
    assert run_again(tracker, study, plan) == 2
