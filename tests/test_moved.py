"""A study that was run in a strangely named folder, then copied, renamed and gone on with."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from grid.run import main
from tests.driver import SECONDS, study_of_one
from trainables.store.provenance import provenance
from trainables.store.results import database_uri

ROOT = Path(__file__).parents[1]
STRANGE = "100% of?a=1#b %2F é"
pytestmark = pytest.mark.slow


def run(results, study, *arguments):
    command = [sys.executable, "grid/run.py", "--study", str(study), "--results", str(results)]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def tree(folder):
    """Every file's content and every folder below one,."""
    return {
        path.relative_to(folder): path.is_file() and hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
    }


def query(results, sql):
    with sqlite3.connect(results / "mlflow.db") as database:
        return database.execute(sql).fetchall()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "one.toml"
    path.write_text(study_of_one(epochs=10))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study):
    results = tmp_path_factory.mktemp("strange") / STRANGE
    ended = run(results, study)
    assert ended.returncode == 0, ended.stderr
    return results, ended


def test_a_folder_of_any_name_holds_everything_and_its_links_lead_there(finished):
    results, ended = finished
    assert [path.name for path in results.parent.iterdir()] == [STRANGE]
    names = {path.name for path in results.iterdir()}
    assert names == {".lock", "artifacts", "mlflow.db", "report", "trials", "tune"}
    assert f"Report:    {results}/report/index.html\n" in ended.stdout
    assert f"--backend-store-uri '{database_uri(results)}'" in ended.stdout
    (kept,) = query(results, "select artifact_uri from runs r join tags using (run_uuid) "
                    "where key = 'kind' and value = 'trial'")  # fmt: skip
    assert kept[0].startswith(results.as_uri())


def test_its_run_says_what_trained_and_judged_it_and_so_does_its_report(finished):
    results, _ = finished
    trained = query(results, "select key, value from tags where key like 'trained.%'")
    here = provenance("cpu")
    assert {key.removeprefix("trained."): value for key, value in trained} == here
    said = (results / "report" / "tables.md").read_text()
    assert f"Trained with robustness-grid {here['robustness-grid']}" in said
    assert said.rstrip().endswith("device cpu. Judged with the same.")


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


def test_what_a_copy_lacks_is_computed_in_it_and_nothing_in_the_original(finished, study, tmp_path):
    original, _ = finished
    before = tree(original)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    ended = run(copy, study, "--evaluators", "clean", "natural", "--seeds", "2")
    assert ended.returncode == 0, ended.stderr
    assert "2 trials: 1 done, 1 to train" in ended.stderr
    assert "Trained 1 and judged 3 cells" in ended.stdout
    assert tree(original) == before
    assert len(list(copy.glob("artifacts/*/artifacts/ledgers/*.parquet"))) == 4
    assert query(
        copy, "select count(*) from runs where artifact_uri not like '%/copy/artifacts/%'"
    ) == [(0,)]
