"""What trained and judged a result, as runs carry it and a report says it."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest

from evaluators.ledger import LEDGER, judged_by, to_parquet
from evaluators.shards import ShardStore
from grid.plan import build_plan
from grid.report.provenance import describe_provenance
from grid.study import load_study
from tests.made_up import record
from trainables.data.base import Shard
from trainables.data.listing import EMBEDDED
from trainables.running import next_result, open_trial
from trainables.scale import DIGITS
from trainables.store.provenance import joined, provenance
from trainables.store.tracking import TrialRun


def run(digest, trained, judged=None):
    judged = judged or {}
    return TrialRun(
        run_id="",
        digest=digest,
        outcome="finished",
        reason="",
        artifact_uri="",
        start_time=0,
        end_time=0,
        recipe="{}",
        metrics={"epoch": 1.0},
        cells=dict.fromkeys(judged, "q"),
        trained=trained,
        judged=judged,
    )


def test_a_process_says_its_versions_and_hardware():
    here = provenance("cpu")
    assert here["torch"] == version("torch")
    assert here["python"] == platform.python_version()
    assert here["device"] == "cpu"
    assert {"robustness-grid", "timm", "ray", "mlflow", "pyautoattack", "cpu"} <= here.keys()
    assert "gpu" not in here


def test_what_two_processes_did_in_turn_names_both_once():
    old, new = {"torch": "2.14", "cpu": "A"}, {"torch": "2.15", "cpu": "A"}
    both = {"torch": "2.14 then 2.15", "cpu": "A"}
    assert joined(old, new) == both
    assert joined(both, old) == both
    assert joined({}, new) == new


def test_versions_that_are_mixed_are_said_with_how_many_trials_they_trained():
    same = {"torch": "2.14", "device": "cpu"}
    runs = [run("a", same), run("b", same | {"torch": "2.15"}), run("c", same)]
    said = describe_provenance(runs)
    assert said == "Trained with device cpu. Trained with torch 2.14 and 2.15: 2 and 1 trials."
    judged = {"clean": same, "pgd": same | {"device": "cuda"}}
    said = describe_provenance([run("a", same, judged)])
    assert said == (
        "Trained with torch 2.14, device cpu. "
        "Judged with torch 2.14. Judged with device cpu and cuda: 1 and 1 cells."
    )
    assert describe_provenance([run("a", same, {"clean": same})]).endswith("Judged with the same.")


def test_trials_of_unknown_versions_are_counted_as_such():
    runs = [run("a", {"torch": "2.14"}), run("b", {})]
    said = describe_provenance(runs)
    assert said == "Trained with torch 2.14 and unknown: 1 and 1 trials."
    assert describe_provenance([run("b", {})]) == "Trained with unknown versions."


def test_a_report_says_what_trained_the_trials_and_not_what_draws_it(tmp_path):
    from grid.report.build import write_report

    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=["T6"], evaluators=["clean"])
    tracker = record(tmp_path, study, plan)
    first, *others = tracker.trials().values()
    tracker.tag_trained(first, {"torch": "1.13.7"})
    for other in others:
        tracker.tag_trained(other, {"torch": "1.12.0"})
    page = write_report(tracker, study, plan, DIGITS, tmp_path / "report")
    for written in (page, page.parent / "tables.md"):
        assert "Trained with torch 1.12.0 and 1.13.7: 2 and 1 trials." in written.read_text()
        assert version("torch") not in written.read_text()


def test_a_cells_shards_from_two_processes_name_both(tmp_path):
    store = ShardStore(tmp_path / "cell", 2)
    for index, torch in enumerate(["2.14", "2.15"]):
        content = to_parquet(LEDGER.empty_table(), seconds=1.0, judged_by={"torch": torch})
        assert judged_by(content) == {"torch": torch}
        store.add(Shard(index, 2), content)
    assert store.judged_by() == {"torch": "2.14 then 2.15"}


@pytest.mark.parametrize("earlier", [{}, {"torch": "2.14"}])
def test_a_trial_carries_what_trained_it_from_checkpoint_to_checkpoint(tmp_path, small, earlier):
    config = {
        "recipe": small().model_dump(mode="json"),
        "storage": str(tmp_path),
        "threads": 1,
        "device": "cpu",
        "compile": False,
        "source": EMBEDDED,
    }
    running = open_trial(config)
    running.trained = dict(earlier)
    result = next_result(running)
    while not result["done"]:
        result = next_result(running)
    again = next_result(open_trial(config))
    assert again["trained"] == result["trained"] == joined(earlier, provenance("cpu"))
