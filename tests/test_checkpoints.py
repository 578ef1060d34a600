"""Weights along the way, through the real command: logged, judged while training goes on, drawn."""

from __future__ import annotations

import pytest

from tests.driver import ended, start, study_of_one, trials
from trainables.store.results import database_uri
from trainables.store.tracking import Tracker

pytestmark = pytest.mark.slow


def test_a_study_judges_its_models_along_their_training(tmp_path):
    results, study = tmp_path / "results", tmp_path / "one.toml"
    along = 'checkpoints = "every 10 epochs"\n[axes]'
    study.write_text(study_of_one(epochs=30).replace("[axes]", along))
    said = ended(start(study, results, "--address", "local"))
    assert "Trained 1 and judged 3 cells" in said
    (run,) = trials(results).values()
    assert run.checkpoints.keys() == {1, 2}
    assert run.cells.keys() == {"clean", "clean.epoch-1", "clean.epoch-2"}
    tracker = Tracker(
        database_uri(results), experiment="robustness-digits", artifacts=results / "artifacts"
    )
    curve = dict(tracker.history(run, "checkpoint/clean"))
    assert curve.keys() == {1, 2}
    # The last weights' score is that of the held-out images, whatever came along the way.
    assert run.metrics["clean"] == pytest.approx(run.metrics["held_out/accuracy"])
    assert "along their training" in (results / "report" / "index.html").read_text()
    moved = results.rename(tmp_path / "moved")
    again = ended(start(study, moved, "--address", "local"))
    assert "Trained 0 and judged 0 cells" in again
