"""What a report leaves for other programs: every verdict by evaluator, and the classes' names."""

from __future__ import annotations

import dataclasses
import re

import pandas as pd
import pytest

from evaluators.ledger import from_parquet
from grid.plan import build_plan
from grid.report.build import write_report
from grid.report.export import write_exports, write_ledgers
from grid.report.gallery import gallery
from grid.report.tables import FilledTable, fill_tables, tables_of
from grid.report.verdicts import Verdicts
from grid.study import load_study
from tests.made_up import record
from trainables.scale import DIGITS
from trainables.store.tracking import _trial_run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=("T1",))
    return record(tmp_path_factory.mktemp("results"), study, plan), plan


def test_every_verdict_is_there_once_with_whose_it_is(recorded, tmp_path):
    tracker, plan = recorded
    write_ledgers(tracker, plan, tmp_path)
    asked = {name for trial in plan for name in trial.evaluators}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.parquet" for name in asked}
    runs = tracker.trials()
    for name in asked:
        frame = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert "image" not in frame
        for trial in plan:
            own = frame[frame["trial"] == trial.digest].drop(columns=["trial", "model"])
            kept, _ = from_parquet(tracker.ledger(runs[trial.digest], name))
            expected = kept.drop_columns(["image"]).to_pandas()
            pd.testing.assert_frame_equal(own.reset_index(drop=True), expected, check_dtype=False)
            assert set(frame[frame["trial"] == trial.digest]["model"]) == {trial.recipe.describe()}


def test_a_file_is_written_anew_when_its_cells_are_others(recorded, tmp_path):
    tracker, plan = recorded
    write_ledgers(tracker, plan, tmp_path)
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_ledgers(tracker, plan, tmp_path)
    assert first == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "pgd.parquet").write_bytes(b"PAR1 damaged PAR1")
    write_ledgers(tracker, plan, tmp_path)
    assert len(pd.read_parquet(tmp_path / "pgd.parquet"))
    fewer = dataclasses.replace(plan, trials=plan.trials[:1])
    write_ledgers(tracker, fewer, tmp_path)
    frame = pd.read_parquet(tmp_path / "clean.parquet")
    assert set(frame["trial"]) == {plan.trials[0].digest}


def test_what_a_study_is_told_is_shown_and_not_obeyed(recorded, tmp_path):
    tracker, plan = recorded
    study = dataclasses.replace(load_study("bai2021"), name="my_study")
    planted = "<img src=x onerror=alert(1)>"
    tracker.open_study(study.name, "", classes=[f"{planted}{n}" for n in range(10)])
    run = next(iter(tracker.trials().values()))
    tracker.end_trial(run, outcome="failed", reason="<class 'X'> & others")
    try:
        page = write_report(tracker, study, plan, DIGITS, tmp_path).read_text()
    finally:
        tracker.end_trial(run, outcome="finished", reason="")
    assert planted not in page
    assert "&lt;img src=x onerror=alert(1)&gt;3" in page
    assert page.count("<svg ") == page.count('<svg role="img" aria-label="')


def test_attacks_that_are_not_judged_yet_are_no_clean_bill(recorded, tmp_path):
    tracker, plan = recorded
    more = build_plan(load_study("bai2021"), DIGITS, tables=("T1", "T2"))
    page = write_report(tracker, load_study("bai2021"), more, DIGITS, tmp_path).read_text()
    told = (tmp_path / "tables.md").read_text()
    waiting = [trial for trial in more if trial.digest not in {own.digest for own in plan}]
    for trial in waiting:
        assert f"- not judged yet: {trial.name}: health, pgd, autoattack\n" in told
    standing = "2 models whose attacks were judged have a red flag; 7 not judged yet."
    assert (len(waiting), standing in told, standing in page) == (7, True, True)


def test_every_form_of_the_report_names_the_images_trained_and_judged(recorded, tmp_path):
    tracker, plan = recorded
    page = write_report(tracker, load_study("bai2021"), plan, DIGITS, tmp_path).read_text()
    assert page.count("<td>1,200</td>") == 2
    assert "PGD-5<br><small>n = 64 of 597</small>" in page
    told = (tmp_path / "tables.md").read_text()
    for text in (page, told):
        assert "Images trained on: 1,200 (held out: 597)." in text
    assert "| judged on, images |  | 597 |  | 64 of 597 |  |" in told
    frame = pd.read_csv(tmp_path / "tables.csv")
    assert set(frame["trained_images"]) == {1200}
    assert set(frame["held_out_images"]) == {597}
    assert set(frame[frame["score"] == "PGD-5"]["n"]) == {64}
    assert r"judged on, images &  & 597 & 64 of 597 &" in (tmp_path / "tables.tex").read_text()


def test_models_are_flagged_cleared_waited_for_or_have_nothing_to_attack(recorded):
    tracker, plan = recorded
    first, second = plan.trials
    runs = tracker.trials()
    del runs[first.digest].cells["autoattack"], runs[first.digest].cells["health"]
    found = Verdicts(tracker, runs).health(plan)
    assert found.waiting == {first.name: ["health", "autoattack"]}
    assert found.flags.keys() == {first.name, second.name}
    assert found.unchecked == ()
    without = dataclasses.replace(first, evaluators=("clean", "pgd"))
    assert Verdicts(tracker, runs).health([without]).unchecked == (first.name,)
    runs[first.digest].cells.clear()
    runs[first.digest].outcome = "collapsed"
    assert not Verdicts(tracker, runs).health([first]).waiting
    unread = Verdicts(tracker, {}).health([second])
    assert unread.standing == (
        "0 of 0 models whose attacks were judged have a red flag; 1 not judged yet."
    )


def test_a_studys_name_does_not_break_its_latex(tmp_path):
    table = FilledTable("my_study", "Every trial of the study", ("Clean",), (), ("597",))
    write_exports([table], DIGITS, tmp_path)
    latex = (tmp_path / "tables.tex").read_text()
    assert r"\caption{my\_study: Every trial of the study, on scikit-learn's handwritten" in latex


def test_a_study_that_was_never_opened_can_be_reported(recorded, tmp_path):
    tracker, plan = recorded
    other = dataclasses.replace(load_study("bai2021"), name="never-opened")
    page = write_report(tracker, other, plan, DIGITS, tmp_path).read_text()
    assert re.search(r"<h3>digits/\d+, class \d</h3>", page)


def test_a_cell_that_failed_says_why_until_it_is_judged(recorded):
    tracker, plan = recorded
    run = tracker.trials()[plan.trials[0].digest]
    asked = {"evaluator": "clean", "cell": run.cells["clean"], "asked": "{}", "metrics": {}}
    tracker.fail_cell(run, "clean", "RuntimeError: no")
    runs = tracker.trials()
    scores = runs[run.digest].metrics
    del scores["clean"]
    filled = fill_tables(tables_of(load_study("bai2021"), plan, runs), plan.seeds, runs)[0]
    row = next(row for row in filled.rows if row.recipe.digest() == run.digest)
    assert row.cells[0].text() == "failed: RuntimeError: no"
    tracker.record_cell(run, ledger=tracker.ledger(run, "clean"), **asked)
    assert tracker.trials()[run.digest].failed_cells == {}


def test_a_trial_is_found_in_every_study_that_it_serves(recorded):
    tracker, plan = recorded
    run = tracker.trials()[plan.trials[0].digest]
    tracker.enrol(run, "mine", "mine")
    tracker.enrol(run, "bai2021", "T10 T5")
    runs = tracker.trials()
    assert runs.pop(run.digest).studies == {"mine": "mine", "bai2021": "T1 T5 T10"}
    assert {tuple(other.studies.items()) for other in runs.values()} == {(("bai2021", "T1"),)}
    query = "tags.kind = 'trial' and tags.`study.mine` LIKE '%'"
    assert [found.digest for found in map(_trial_run, tracker._search(query))] == [run.digest]


def test_the_gallery_names_classes_as_people_do(recorded):
    tracker, plan = recorded
    verdicts = Verdicts(tracker, tracker.trials())
    assert tracker.classes("bai2021") == [str(digit) for digit in range(10)]
    assert tracker.classes("another") == []
    wordnet = ["n01440764", "n01443537", *["n02085620"] * 8]
    examples = gallery(plan, verdicts, wordnet)
    assert examples
    said = {shot.said for example in examples for strip in example.strips for shot in strip.shots}
    assert said | {e.name for e in examples} <= {"tench", "goldfish", "Chihuahua", ""}
