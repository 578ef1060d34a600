"""Ledgers that are damaged, swapped or missing: the report goes on, the next run judges them."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from grid.plan import build_plan
from grid.record import Recorder
from grid.report.build import write_report
from grid.status import ProgressLine, open_tracker
from grid.study import load_study
from tests.made_up import MadeUpPool, record
from trainables.data.load import load_data
from trainables.scale import DIGITS

STATE = "damaged ledger: judged again by the next run"
FLIPPED_AT = (0, 20, -40, -1)  # the start, a page, the footer, the end


def flipped(content, place):
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    **{
        f"flipped at {place}": lambda path, place=place: path.write_bytes(
            flipped(path.read_bytes(), place)
        )
        for place in FLIPPED_AT
    },
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
    DAMAGES[damage](path)
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert (tmp_path / "index.html").read_text().count(STATE) == 1
    assert (tmp_path / "tables.md").read_text().count(STATE) == 1
    assert run_again(tracker, study, plan) == 1
    assert path.read_bytes() == content
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert STATE not in (tmp_path / "tables.md").read_text()
    assert run_again(tracker, study, plan) == 0


def test_swapped_ledgers_are_judged_again_both(recorded, tmp_path):
    _, tracker, study, plan = recorded
    first, second = (ledger_of(tracker, trial) for trial in plan.trials[:2])
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert (tmp_path / "tables.md").read_text().count(STATE) == 2
    assert run_again(tracker, study, plan) == 2
    assert (first.read_bytes(), second.read_bytes()) == contents


def test_a_run_whose_ledgers_are_all_gone_is_judged_anew(recorded, tmp_path):
    results, tracker, study, plan = recorded
    for trial in plan.trials[:2]:
        shutil.rmtree(ledger_of(tracker, trial).parent)
    write_report(open_tracker(results, None, DIGITS), study, plan, DIGITS, tmp_path)
    assert run_again(tracker, study, plan) == 4
