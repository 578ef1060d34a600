"""The real command on the real Ray and MLflow: run, run again, stop, kill, and go on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grid.run import main
from tests.driver import SECONDS, wait_for_checkpoint
from trainables.data.load import load_data
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.store.checkpoint import recipe_json_of
from trainables.store.results import sole_run
from trainables.store.tracking import Tracker

ROOT = Path(__file__).parents[1]
# Long enough to be stopped in the middle.
STUDY = """
name = "pair"
base = "resnet50"
evaluators = ["clean", "pgd"]
[axes]
size = ["small", "base"]
augmentation = ["randaug+cutmix"]
"""
TRIALS = 2


def options(results, study, *arguments):
    return ["--study", str(study), "--results", str(results), *arguments]


def command(results, study, *arguments):
    return [sys.executable, "grid/run.py", *options(results, study, *arguments)]


def run(results, study, *arguments):
    return subprocess.run(
        command(results, study, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def start(results, study):
    return subprocess.Popen(
        command(results, study),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def tracker(results):
    uri = f"sqlite:///{results}/mlflow.db"
    return Tracker(uri, experiment="robustness-digits", artifacts=results / "artifacts")


def query(results, sql):
    with sqlite3.connect(results / "mlflow.db") as database:
        return database.execute(sql).fetchall()


def weights_by_digest(results):
    return dict(
        query(
            results,
            "select d.value, w.value from tags d join tags w using (run_uuid) "
            "where d.key = 'digest' and w.key = 'weights_sha256'",
        )
    )


def stored(results):
    """Everything that a second run could double: runs, metric rows, cells, artifacts."""
    return (
        sorted(query(results, "select run_uuid, status from runs")),
        sorted(query(results, "select run_uuid, key, step, value from metrics")),
        sorted(p.relative_to(results) for p in (results / "artifacts").rglob("*.parquet")),
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "pair.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, study):
    """A study that ran undisturbed."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    ended = run(results, study)
    assert ended.returncode == 0, ended.stderr
    return results, ended


def test_the_command_says_where_the_report_and_the_ui_are(finished):
    results, ended = finished
    assert f"Trained {TRIALS} and judged {2 * TRIALS} cells" in ended.stdout
    assert str(results / "report" / "index.html") in ended.stdout
    assert f"mlflow ui --backend-store-uri sqlite:///{results}/mlflow.db" in ended.stdout


def test_everything_lies_in_the_results(finished):
    results, _ = finished
    names = {path.name for path in results.iterdir()}
    assert names == {".lock", "artifacts", "mlflow.db", "report", "trials", "tune"}


def test_mlflow_holds_parent_children_metrics_inputs_and_artifacts(finished):
    results, _ = finished
    runs = tracker(results).trials()
    assert len(runs) == TRIALS
    for found in runs.values():
        assert found.outcome == "finished"
        assert found.logged_epochs == 10
        assert set(found.cells) == {"clean", "pgd"}
        assert found.metrics["clean"] > 0.8
        assert found.metrics["clean/low"] < found.metrics["clean"] < found.metrics["clean/high"]
        assert found.metrics["clean/n"] == 597
        folder = Path(found.artifact_uri.removeprefix("file://"))
        recipe = Recipe.model_validate_json(recipe_json_of(folder / "weights.safetensors"))
        assert recipe.digest() == found.digest
        assert (folder / "recipe.json").exists()
        assert {p.stem for p in (folder / "ledgers").iterdir()} == {"clean", "pgd"}
    parents = {
        v for (v,) in query(results, "select value from tags where key='mlflow.parentRunId'")
    }
    assert len(parents) == 1
    assert query(results, "select count(*) from inputs") == [(TRIALS,)]
    per_epoch = query(
        results, "select step, count(*) from metrics where key='train/loss' group by 1"
    )
    assert per_epoch == [(epoch, TRIALS) for epoch in range(1, 11)]


def test_scores_are_what_the_ledgers_say(finished):
    import pyarrow.parquet as pq

    from evaluators.ledger import survival_scores

    results, _ = finished
    for found in tracker(results).trials().values():
        folder = Path(found.artifact_uri.removeprefix("file://")) / "ledgers"
        for path in folder.iterdir():
            for score in survival_scores(pq.read_table(path)):
                assert found.metrics[score.name] == pytest.approx(score.value)


def test_the_report_is_one_file_with_every_value(finished):
    results, _ = finished
    page = (results / "report" / "index.html").read_text()
    assert "not run yet" not in page
    fetched = re.findall(r'(?:src|href)="([^"]*)"', page)
    ui = "http://127.0.0.1:5000/#/experiments/"
    assert all(address.startswith(("#", "data:", ui)) for address in fetched)
    assert len([address for address in fetched if address.startswith(ui)]) == TRIALS + 1
    assert {"clean", "PGD-100"} <= set(re.findall('<img [^>]* alt="([^"]*)"', page))
    for found in tracker(results).trials().values():
        assert f"{100 * found.metrics['clean']:.1f}" in page
    assert "| paper |" in (results / "report" / "tables.md").read_text()


def test_the_report_lies_with_the_studys_run(finished):
    results, _ = finished
    kept = {path.name for path in results.glob("artifacts/*/artifacts/report/**/*")}
    assert {"index.html", "tables.csv", "tables.tex", "tables.md", "scatter.svg"} <= kept
    assert {"clean.parquet", "pgd.parquet"} <= kept


def test_mlflow_loads_a_trial_without_a_pickle_and_it_answers_as_it_did(finished):
    import mlflow.pyfunc

    results, _ = finished
    held_out = load_data(DIGITS).held_out
    for found in tracker(results).trials().values():
        names = {path.name for path in Path(found.artifact_uri.removeprefix("file://")).iterdir()}
        assert "MLmodel" in names
        assert not {name for name in names if name.endswith(("pkl", "pickle", "pt", "pth"))}
        model = mlflow.pyfunc.load_model(found.artifact_uri)
        logits = model.predict((held_out.images.float() / 255).numpy())
        right = int((logits.argmax(axis=1) == held_out.labels.numpy()).sum())
        assert right / 597 == pytest.approx(found.metrics["clean"], abs=1e-9)
        assert model.predict(model.input_example).shape == (1, 10)


def test_a_second_run_trains_nothing_and_writes_nothing_twice(finished, study):
    results, _ = finished
    before = stored(results)
    again = run(results, study)
    assert again.returncode == 0, again.stderr
    assert "2 done, 0 to train; 0 cells to judge" in again.stderr
    assert "Trained 0 and judged 0 cells" in again.stdout
    assert stored(results) == before


def test_the_report_is_rebuilt_from_mlflow_alone(finished, study):
    results, _ = finished
    page = results / "report" / "index.html"
    before = page.read_bytes()
    page.unlink()
    assert main(options(results, study, "--report")) == 0
    assert page.read_bytes() == before


def test_interrupted_then_killed_it_ends_as_if_undisturbed(finished, study, tmp_path):
    undisturbed, _ = finished
    results = tmp_path / "results"
    driver = start(results, study)
    wait_for_checkpoint(results, driver)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 130, said
    assert "Stopped. Continue with: python grid/run.py" in said
    assert "Traceback" not in said

    driver = start(results, study)
    seen = set(results.glob("trials/*/epoch-*.pt"))
    while not set(results.glob("trials/*/epoch-*.pt")) - seen:
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=SECONDS)
    assert len(weights_by_digest(results)) < TRIALS

    ended = run(results, study)
    assert ended.returncode == 0, ended.stderr
    assert weights_by_digest(results) == weights_by_digest(undisturbed)
    assert len(tracker(results).trials()) == TRIALS == len(query(results, "select 1 from runs")) - 1
    rows = "select t.value, m.key, m.step, m.value from metrics m join tags t using (run_uuid) "
    rows += "where t.key = 'digest' and m.key not like '%/seconds' order by 1, 2, 3"
    assert query(results, rows) == query(undisturbed, rows)


def refusal(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


def test_a_trial_too_big_for_the_machine_is_refused_before_any_compute(study, tmp_path, capsys):
    results = tmp_path / "results"
    told = refusal(
        capsys, options(results, study, "--cpus-per-worker", "512", "--address", "local")
    )
    assert "a trial needs 512 CPUs and 0 GPUs, but Ray has" in told
    assert not (results / "mlflow.db").exists()


def test_one_run_at_a_time_uses_a_results_folder(study, tmp_path, capsys):
    results = tmp_path / "results"
    with sole_run(results):
        assert "another run is using" in refusal(capsys, options(results, study))


def test_what_is_damaged_in_a_finished_study_is_mended_by_the_same_command(
    finished, study, tmp_path
):
    undisturbed, _ = finished
    results = tmp_path / "results"
    shutil.copytree(undisturbed, results)
    weights = sorted((results / "artifacts").rglob("weights.safetensors"))
    ledgers = [path.parent / "ledgers" / "clean.parquet" for path in weights]
    contents = [path.read_bytes() for path in weights]
    ledgers[0].unlink()
    ledgers[1].write_bytes(ledgers[1].read_bytes()[:-1])
    for path in (*weights, *(results / "trials").rglob("weights.safetensors")):
        if path != weights[0]:  # of the first trial one copy is sound, of the second none
            path.write_bytes(path.read_bytes()[:-1])
    ended = run(results, study)
    assert ended.returncode == 0, ended.stderr
    assert "Trained 1 and judged 2 cells" in ended.stdout
    assert "are damaged or missing: it is trained again" in ended.stderr
    assert weights_by_digest(results) == weights_by_digest(undisturbed)
    assert [path.read_bytes() for path in weights] == contents
    assert main(options(results, study)) == 0


def test_another_study_takes_over_the_trials_that_it_shares(finished, study, tmp_path, capsys):
    results, _ = finished
    other = tmp_path / "other.toml"
    other.write_text(study.read_text().replace('name = "pair"', 'name = "other"'))
    assert main(options(results, other)) == 0
    assert "2 done, 0 to train; 0 cells to judge" in capsys.readouterr().err
    served = [trial.studies for trial in tracker(results).trials().values()]
    assert served == [{"pair": "pair", "other": "other"}] * TRIALS
