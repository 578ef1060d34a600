"""What a report leaves for other programs: every verdict by evaluator, and the classes' names."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from evaluators.ledger import from_parquet
from grid.plan import build_plan
from grid.report.export import write_ledgers
from grid.report.gallery import gallery
from grid.report.verdicts import Verdicts
from grid.studies import load_study
from tests.made_up import record
from trainables.scale import DIGITS


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    study = load_study("paper")
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


def test_the_gallery_names_classes_as_people_do(recorded):
    tracker, plan = recorded
    verdicts = Verdicts(tracker, tracker.trials())
    assert tracker.classes("paper") == [str(digit) for digit in range(10)]
    assert tracker.classes("another") == []
    wordnet = ["n01440764", "n01443537", *["n02085620"] * 8]
    examples = gallery(plan, verdicts, wordnet)
    assert examples
    said = {shot.said for example in examples for strip in example.strips for shot in strip.shots}
    assert said | {e.name for e in examples} <= {"tench", "goldfish", "Chihuahua", ""}
