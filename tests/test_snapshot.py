"""Results that outlive their machine: copies of a database in use, a study brought home from S3."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from mlflow import MlflowClient

from grid.run import main
from tests.driver import ROOT, ended, start, study_of_one, trials, wait_until
from tests.servers import s3_bucket
from trainables.store.results import SCHEMA_TAG
from trainables.store.snapshot import pull, snapshot
from trainables.store.storage import below, read_file, write_file
from trainables.store.tracking import SCHEMA

# A server that notes each of its starts in its database, which it keeps open, and ends.
SERVER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("create table if not exists starts (number)")
database.execute("insert into starts values (1)")
database.commit()
"""


def starts(database):
    with closing(sqlite3.connect(database)) as opened:
        return opened.execute("select count(*) from starts").fetchone()[0]


def served(database, place):
    command = [sys.executable, "-m", "trainables.store.snapshot", str(database), str(place)]
    return subprocess.Popen(
        [*command, sys.executable, "-c", SERVER, str(database)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_server_that_ends_is_started_again_and_its_database_outlives_the_machine(tmp_path):
    first, second, place = tmp_path / "head.db", tmp_path / "next.db", tmp_path / "place"
    server = served(first, place)
    wait_until(server, lambda: first.exists() and first.stat().st_size and starts(first) >= 2)
    server.terminate()
    assert "the server ended with status 0: started again" in ended(server)
    copied = starts(place / "mlflow.db")
    assert copied == starts(first) >= 2
    server = served(second, place)
    wait_until(server, lambda: second.exists() and starts(second) > copied)
    server.terminate()
    ended(server)


def test_a_database_is_copied_whole_while_a_writer_has_it_open(tmp_path):
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("pragma journal_mode = wal")
        writer.execute("create table starts (number)")
        writer.execute("insert into starts values (1)")
        writer.commit()
        writer.execute("insert into starts values (2)")  # not committed
        snapshot(path, str(tmp_path / "place"))
    assert starts(tmp_path / "place" / "mlflow.db") == 1


@pytest.fixture
def bucket(monkeypatch):
    """A bucket that MLflow reaches, too."""
    with s3_bucket() as uri:
        host = uri.partition("endpoint_override=")[2].partition("&")[0]
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}")
        yield uri


@pytest.mark.slow
def test_a_study_on_object_storage_is_brought_home_and_continued(bucket, tmp_path, capsys):
    study, place = tmp_path / "study.toml", below(bucket, "study")
    study.write_text(study_of_one(epochs=20))
    database, home = tmp_path / "head.db", tmp_path / "home"
    MlflowClient(f"sqlite:///{database}").create_experiment(
        "robustness-digits",
        artifact_location="s3://grid/study/artifacts/1",
        tags={"robustness-grid.schema": str(SCHEMA)},
    )
    cluster = ("--mlflow", f"sqlite:///{database}", "--storage", place, "--address", "local")
    assert "Trained 1 and judged 1 cells" in ended(start(study, tmp_path / "head", *cluster))
    snapshot(database, place)
    assert read_file(below(place, "mlflow.db"))
    write_file(below(place, "design.json"), b"{}")
    pulling = ["--pull", place, "--results", str(home)]
    assert main(pulling) == 0
    (run,) = trials(home).values()
    assert run.artifact_uri.startswith(home.as_uri())
    assert (home / "design.json").read_bytes() == b"{}"
    further = start(study, home, "--address", "local", "--evaluators", "clean", "pgd")
    assert "Trained 0 and judged 1 cells" in ended(further)
    with pytest.raises(SystemExit, match="2"):
        main(pulling)
    assert f"{home} holds results already" in capsys.readouterr().err


def test_a_study_that_was_moved_to_another_bucket_comes_home(bucket, tmp_path):
    database, home = tmp_path / "mlflow.db", tmp_path / "home"
    client = MlflowClient(f"sqlite:///{database}")
    place = "s3://elsewhere/artifacts/study/artifacts"
    ours = client.create_experiment("ours", f"{place}/1", tags={SCHEMA_TAG: str(SCHEMA)})
    run = client.create_run(ours).info.run_id
    other = client.create_experiment("another's", "s3://elsewhere/other/artifacts/2")
    bucket = bucket.replace("s3://grid", "s3://grid/moved/")
    snapshot(database, bucket)
    write_file(below(bucket, "artifacts", "1", run, "artifacts", "a.txt"), b"a")
    pull(bucket, home)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    here = (home / "artifacts" / "1").as_uri()
    assert client.get_run(run).info.artifact_uri == f"{here}/{run}/artifacts"
    assert (home / "artifacts" / "1" / run / "artifacts" / "a.txt").read_bytes() == b"a"
    assert client.get_experiment(other).artifact_location == "s3://elsewhere/other/artifacts/2"


def test_a_place_without_a_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--pull", str(tmp_path), "--results", str(tmp_path / "home")])
    assert f"{tmp_path} holds no mlflow.db" in capsys.readouterr().err
