"""A results folder: who may use it, its database, and artifacts that move with it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow.artifacts
import pytest

from grid.run import main
from grid.status import open_existing, open_tracker
from trainables.scale import CIFAR10, DIGITS
from trainables.store.results import database_uri, is_in_use, settle, sole_run
from trainables.store.tracking import SCHEMA, SCHEMA_TAG

ROOT = Path(__file__).parents[1]
STRANGE = "100% of?a=1&b#c %2F é"


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
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
    """The same folder somewhere else, and nothing at its old place."""
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
    written = moved / "artifacts" / parent / "artifacts" / "classes.json"
    assert json.loads(written.read_text()) == ["zero", "one", "two"]
    assert files(results) == before
    assert {path.name for path in tmp_path.iterdir()} == {"results", name}
    # As `mlflow ui` finds them.
    uri = database_uri(moved)
    where = mlflow.artifacts.download_artifacts(
        run_id=parent, artifact_path="classes.json", tracking_uri=uri
    )
    assert json.loads(Path(where).read_text()) == ["zero", "one", "two"]


def test_every_experiment_of_a_folder_that_moved_goes_with_it(results, tmp_path):
    moved = results.rename(tmp_path / "moved")
    settle(moved)
    kept = query(moved, "select name, artifact_location from experiments where experiment_id > 0")
    here = (moved / "artifacts").as_uri()
    assert sorted(kept) == [("robustness-cifar10", here), ("robustness-digits", here)]


def test_a_folder_that_a_run_holds_is_in_use_and_no_others(results):
    assert not is_in_use(results)
    with sole_run(results):
        assert is_in_use(results)
        with pytest.raises(ValueError, match="another run is using"), sole_run(results):
            pass
    assert not is_in_use(results)


@pytest.mark.parametrize("asked", [[], ["--status"], ["--report"]])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: b"", "mlflow.db is empty"),
        (lambda content: content[:100] + b"\1" * 4000 + content[4100:], "mlflow.db is damaged"),
        (lambda content: content[: len(content) // 2], "mlflow.db is damaged"),
        (lambda content: b"no database" * 1000, "mlflow.db is damaged (file is not a database)"),
    ],
    ids=["empty", "overwritten", "cut", "another"],
)
def test_a_database_that_is_not_sound_is_named(results, capsys, damage, problem, asked):
    database = results / "mlflow.db"
    database.write_bytes(damage(database.read_bytes()))
    message = refusal(capsys, *asked, "--results", str(results))
    assert problem in message
    assert message.count("\n") == 1


def test_a_database_that_was_being_made_when_its_run_was_killed_is_made_anew(tmp_path):
    half = tmp_path / ".mlflow.db"
    half.mkdir()
    (half / "mlflow.db").write_bytes(b"")
    open_tracker(tmp_path, None, DIGITS)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db"}


def test_results_of_another_version_are_refused_with_what_to_do(results, capsys):
    query(results, "update experiment_tags set value = '99' where key = ?", SCHEMA_TAG)
    message = refusal(capsys, "--status", "--results", str(results))
    assert "were made by a later version of this project (0.1.0), whose schema is 99" in message
    query(results, "delete from experiment_tags where key = ?", SCHEMA_TAG)
    message = refusal(capsys, "--status", "--results", str(results))
    assert "were made by an earlier version of this project" in message
    assert "give --results (or --mlflow) another place" in message
    assert message.count("\n") == 1


def test_an_experiment_made_by_hand_that_nothing_is_in_is_taken(tmp_path):
    tracker = open_tracker(tmp_path, None, DIGITS)
    query(tmp_path, "delete from experiment_tags")
    tracker = open_existing(tmp_path, None, DIGITS)
    tracker.open_study("s", "a study")
    assert open_existing(tmp_path, None, DIGITS).trials() == {}
    assert query(tmp_path, "select value from experiment_tags where key = ?", SCHEMA_TAG) == [
        (str(SCHEMA),)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "file/results"], "results folder file/results is not writable"),
        (["--results", "/proc/results"], "results folder /proc/results is not writable"),
        (["--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["--address", "127.0.0.1:99999"], "no Ray cluster answers at 127.0.0.1:99999"),
        (["--address", "http://..:1"], "no Ray cluster answers at http://..:1"),
        (["--address", "nonsense"], "it wants HOST:PORT"),
    ],
)
def test_places_that_cannot_be_are_refused_before_the_heavy_imports(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    if arguments[1] == "/proc/results" and not Path("/proc").is_dir():
        pytest.skip("no /proc here, which nobody can write")
    option, value = arguments
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if option == "--address":
        arguments, environment = [], environment | {"RAY_ADDRESS": value}
    code = (
        "import sys\nfrom grid.run import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as ended: assert ended.code == 2\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert message in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
