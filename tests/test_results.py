"""A results folder: who may use it, its database, artifacts that move with it, its provenance."""

from __future__ import annotations

import fcntl
import platform
import shutil
import sqlite3
import threading
from importlib.metadata import version

import mlflow.artifacts
import pytest

from evaluators.ledger import LEDGER, judged_by, to_parquet
from evaluators.shards import ShardStore
from grid.plan import build_plan
from grid.report.build import write_report
from grid.report.tables import describe_provenance
from grid.run import main
from grid.status import open_tracker
from grid.study import load_study
from tests.driver import ended, start, study_of_one, trials
from tests.made_up import record
from trainables.data.base import Shard
from trainables.data.listing import EMBEDDED
from trainables.running import next_result, open_trial
from trainables.scale import CIFAR10, DIGITS
from trainables.store.results import (
    LOCK,
    SCHEMA_TAG,
    code_version,
    database_uri,
    is_in_use,
    joined,
    provenance,
    settle,
    sole_run,
)
from trainables.store.tracking import TrialRun

STRANGE = "of=a & b#c é"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder in which a study was opened, its run with an artifact of its own."""
    results = tmp_path_factory.mktemp("made") / "results"
    results.mkdir()
    open_tracker(results, None, DIGITS).open_study("s", "a study", classes=["zero", "one"])
    open_tracker(results, None, CIFAR10)
    return results


@pytest.fixture
def results(template, tmp_path):
    """The same folder somewhere else."""
    copy = tmp_path / "results"
    shutil.copytree(template, copy)
    with sole_run(copy):
        return copy


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def query(results, sql, *values):
    with sqlite3.connect(results / "mlflow.db") as database:
        return database.execute(sql, values).fetchall()


@pytest.mark.parametrize("name", ["renamed", STRANGE])
def test_artifacts_are_read_and_written_where_the_folder_lies_now(results, tmp_path, name):
    before = files(results)
    moved = tmp_path / name
    shutil.copytree(results, moved)
    with sole_run(moved):
        tracker = open_tracker(moved, None, DIGITS)
        parent = tracker.open_study("s", "a study", classes=["zero", "one", "two"])
    assert tracker.classes("s") == ["zero", "one", "two"]
    assert files(results) == before
    # As `mlflow ui` finds them.
    listed = mlflow.artifacts.list_artifacts(run_id=parent, tracking_uri=database_uri(moved))
    assert [artifact.path for artifact in listed] == ["classes.json"]
    assert (moved / "artifacts" / parent / "artifacts" / "classes.json").is_file()


def test_every_experiment_of_a_folder_that_moved_goes_with_it(results, tmp_path):
    moved = results.rename(tmp_path / "moved")
    settle(moved)
    rows = query(moved, "select name, artifact_location from experiments where experiment_id > 0")
    here = (moved / "artifacts").as_uri()
    assert sorted(rows) == [("robustness-cifar10", here), ("robustness-digits", here)]


def test_a_folder_that_a_run_holds_is_in_use_and_no_others(results):
    assert not is_in_use(results)
    with sole_run(results):
        assert is_in_use(results)
        with pytest.raises(ValueError, match="another run is using"), sole_run(results):
            pass
    assert not is_in_use(results)


def test_a_run_starts_while_another_command_looks_whether_the_folder_is_in_use(results):
    with sole_run(results):
        pass
    look = (results / LOCK).open()
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.2, look.close).start()
    with sole_run(results):
        assert look.closed


@pytest.mark.parametrize("options", [[], ["--status"]])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: b"", "no such table: experiments"),
        (lambda content: content[:100] + b"\1" * 4000 + content[4100:], ""),
        (lambda content: content[: len(content) // 2], ""),
        (lambda content: b"no database" * 1000, "file is not a database"),
    ],
    ids=["empty", "overwritten", "cut", "another"],
)
def test_a_database_that_is_not_sound_is_named(results, capsys, damage, problem, options):
    database = results / "mlflow.db"
    database.write_bytes(damage(database.read_bytes()))
    message = refusal(capsys, *options, "--results", str(results))
    assert f"mlflow.db is damaged ({problem}" in message
    assert message.count("\n") == 1


def test_a_database_that_was_being_made_when_its_run_was_killed_is_made_anew(tmp_path):
    half = tmp_path / ".mlflow.db"
    half.mkdir()
    (half / "mlflow.db").write_bytes(b"")
    open_tracker(tmp_path, None, DIGITS)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


@pytest.mark.parametrize("schema", ["99", None])
def test_results_of_another_version_are_refused_with_what_to_do(results, capsys, schema):
    query(results, "delete from experiment_tags where key = ?", SCHEMA_TAG)
    if schema:
        added = "insert into experiment_tags (key, value, experiment_id) values (?, ?, 1)"
        query(results, added, SCHEMA_TAG, schema)
    message = refusal(capsys, "--status", "--results", str(results))
    assert f"are of schema {schema}, and this version of the project (0.1.0) writes" in message
    assert "continue with the version that made them (0.1.0), or give --results" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("results", "address", "message"),
    [
        ("file/results", "", "results folder file/results is not writable"),
        ("a?b", "", "has a '?' or '%' in it"),
        ("results", "127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_places_that_cannot_be_are_refused(
    tmp_path, monkeypatch, results, address, message, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert message in refusal(capsys, "--results", results)


# Provenance: what trained and judged a result.


def test_a_process_says_its_versions_and_hardware():
    here = provenance("cpu")
    assert here["torch"] == version("torch")
    assert here["python"] == platform.python_version()
    assert here["device"] == "cpu"
    assert {"robustness-grid", "timm", "ray", "mlflow", "pyautoattack", "cpu"} <= here.keys()
    assert "gpu" not in here


def test_what_two_processes_did_in_turn_names_both_once(tmp_path):
    old, new = {"torch": "2.14", "cpu": "A"}, {"torch": "2.15", "cpu": "A"}
    both = {"torch": "2.14 then 2.15", "cpu": "A"}
    assert joined(old, new) == both
    assert joined(both, old) == both
    assert joined({}, new) == new
    store = ShardStore(tmp_path / "cell", 2)
    for index, versions in enumerate([old, new]):
        content = to_parquet(LEDGER.empty_table(), seconds=1.0, judged_by=versions)
        assert judged_by(content) == versions
        store.add(Shard(index, 2), content)
    assert judged_by(store.whole()) == both


def run_of(digest, trained, judged=None):
    judged = judged or {}
    fields = dict.fromkeys(("run_id", "reason", "artifact_uri", "recipe"), "")
    return TrialRun(
        **fields,
        digest=digest,
        outcome="finished",
        start_time=0,
        end_time=0,
        metrics={"epoch": 1.0},
        cells=dict.fromkeys(judged, "q"),
        trained=trained,
        judged=judged,
    )


def test_versions_that_are_mixed_are_said_with_how_many_trials_they_trained():
    same = {"torch": "2.14", "device": "cpu"}
    runs = [run_of("a", same), run_of("b", same | {"torch": "2.15"}), run_of("c", same)]
    said = describe_provenance(runs)
    assert said == "Trained with device cpu. Trained with torch 2.14 and 2.15: 2 and 1 trials."
    judged = {"clean": same, "pgd": same | {"device": "cuda"}}
    said = describe_provenance([run_of("a", same, judged)])
    assert said == (
        "Trained with torch 2.14, device cpu. "
        "Judged with torch 2.14. Judged with device cpu and cuda: 1 and 1 cells."
    )
    judged["pgd"] = same | {"attacks_in": "bf16"}
    mixed = "Judged with attacks in bf16 and float32: 1 and 1 cells."
    assert describe_provenance([run_of("a", same, judged)]).endswith(mixed)
    assert describe_provenance([run_of("a", same, {"clean": same})]).endswith(
        "Judged with the same."
    )
    assert describe_provenance([run_of("b", {})]) == "Trained with unknown versions."


def test_a_report_says_what_trained_the_trials_and_not_what_draws_it(tmp_path):
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=["T6"], evaluators=["clean"])
    tracker = record(tmp_path, study, plan)
    first, *others = tracker.trials().values()
    for run in (first, *others):
        tracker.tag_trained(run, {"torch": "1.13.7" if run is first else "1.12.0"})
        tracker.end_trial(run, outcome=run.outcome, reason=run.reason)
    page = write_report(tracker, study, plan, DIGITS, tmp_path / "report")
    for written in (page, page.parent / "tables.md"):
        assert "Trained with torch 1.12.0 and 1.13.7: 2 and 1 trials." in written.read_text()
        assert version("torch") not in written.read_text()


def test_a_trial_carries_what_trained_it_from_checkpoint_to_checkpoint(tmp_path, small):
    config = {"recipe": small().model_dump(mode="json"), "storage": str(tmp_path), "threads": 1}
    config |= {"device": "cpu", "compile": False, "numerics": "fast", "source": EMBEDDED}
    running = open_trial(config)
    running.trained = {"torch": "2.14"}
    result = next_result(running)
    while not result["done"]:
        result = next_result(running)
    with pytest.raises(RuntimeError, match=r"^node .* runs robustness-grid .* driver runs 0\.1: "):
        open_trial(config | {"code": "0.1"})
    again = next_result(open_trial(config | {"code": code_version()}))
    expected = joined({"torch": "2.14"}, provenance("cpu")) | {"numerics": "fast"}
    assert again["trained"] == result["trained"] == expected


# A study that was run, then copied, renamed and gone on with.


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "one.toml"
    path.write_text(study_of_one(epochs=10))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study):
    results = tmp_path_factory.mktemp("strange") / STRANGE
    return results, ended(start(study, results))


@pytest.mark.slow
def test_a_folder_of_any_name_holds_everything_and_its_provenance(finished):
    results, said = finished
    assert [path.name for path in results.parent.iterdir()] == [STRANGE]
    names = {path.name for path in results.iterdir()}
    assert names == {".lock", "artifacts", "mlflow.db", "report", "trials", "tune"}
    assert f"Report:    {results}/report/index.html\n" in said
    assert f"robustness-grid ui --results '{results}'" in said
    (trial,) = trials(results).values()
    assert trial.artifact_uri.startswith(results.as_uri())
    assert trial.trained == trial.judged["clean"] == provenance("cpu")


@pytest.mark.slow
def test_a_copy_is_all_done_without_the_original_and_so_is_its_new_name(
    finished, study, tmp_path, capsys
):
    original, _ = finished
    copy, hidden = tmp_path / "copy", original.with_name("hidden")
    shutil.copytree(original, copy)
    shutil.rmtree(copy / "report")
    original.rename(hidden)
    try:
        for results in (copy, copy.with_name("renamed")):
            if results != copy:
                copy.rename(results)
            assert main(["--study", str(study), "--results", str(results)]) == 0
            assert "1 done, 0 to train; 0 cells to judge" in capsys.readouterr().err
            page = (results / "report" / "index.html").read_text()
            assert "not run yet" not in page
            assert "not judged yet" not in page
        assert [path.name for path in original.parent.iterdir()] == ["hidden"]
        assert [path.name for path in tmp_path.iterdir()] == ["renamed"]
    finally:
        hidden.rename(original)


@pytest.mark.slow
def test_what_a_copy_lacks_is_computed_in_it_and_nothing_in_the_original(finished, study, tmp_path):
    original, _ = finished
    before = files(original)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    said = ended(start(study, copy, "--evaluators", "clean", "natural", "--seeds", "2"))
    assert "2 trials: 1 done, 1 to train" in said
    assert "Trained 1 and judged 3 cells" in said
    assert files(original) == before
    assert len(list(copy.glob("artifacts/*/artifacts/ledgers/*.parquet"))) == 4
