"""The real command on the real Ray and MLflow: run, run again, stop, kill, and go on."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import mlflow.pyfunc
import pyarrow.parquet as pq
import pytest

from evaluators import evaluate
from evaluators.__main__ import main as judge
from evaluators.ledger import from_parquet, scores_of, survival_scores
from evaluators.transfer import received
from grid.run import main
from tests.driver import ended, start, trials, wait_for_checkpoint
from tests.test_notebook import executed
from trainables.data.load import load_data
from trainables.scale import DIGITS
from trainables.store.checkpoint import classifier_of, recipe_of

# Long enough to be stopped in the middle.
STUDY = """
name = "pair"
base = "resnet50"
evaluators = ["clean", "pgd", "transfer"]
[axes]
size = ["small", "base"]
augmentation = ["randaug+cutmix"]
"""
TRIALS = 2


def query(results, sql):
    with sqlite3.connect(results / "mlflow.db") as database:
        return database.execute(sql).fetchall()


def artifacts_of(run):
    return Path(run.artifact_uri.removeprefix("file://"))


def weights_by_digest(results):
    return {digest: run.weights_sha256 for digest, run in trials(results).items()}


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
    """The results of a study that ran undisturbed, and what the command printed."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    return results, ended(start(study, results))


def test_the_command_says_where_the_report_and_the_ui_are(finished):
    results, said = finished
    assert f"Trained {TRIALS} and judged {4 * TRIALS} cells" in said
    assert str(results / "report" / "index.html") in said
    assert re.search(rf"MLflow UI: /.* ui --results {results}\n +http://127.0.0.1:5000/#/", said)
    names = {path.name for path in results.iterdir()}
    assert names == {".lock", "artifacts", "mlflow.db", "report", "trials", "tune"}


def test_mlflow_holds_parent_children_metrics_inputs_and_artifacts(finished):
    results, _ = finished
    runs = trials(results)
    assert len(runs) == TRIALS
    for digest, run in runs.items():
        assert (run.outcome, run.logged_epochs, set(run.cells)) == (
            "finished",
            10,
            {"clean", "pgd", "transfer", received(runs)},
        )
        assert run.metrics["clean"] > 0.8
        folder = artifacts_of(run)
        weights = folder / "weights.safetensors"
        assert recipe_of(weights.read_bytes(), weights).digest() == digest
        for name in ("clean", "pgd"):
            content = (folder / "ledgers" / f"{name}.parquet").read_bytes()
            scores = scores_of(content)
            assert scores == survival_scores(from_parquet(content)[0])
            for score in scores:
                assert run.metrics[score.name] == score.value
                assert score.low <= score.value <= score.high > score.low
        # Intervals and counts are in the ledgers: what the UI shows of a run stays short.
        assert len(run.metrics) <= 20
    parents = query(results, "select distinct value from tags where key='mlflow.parentRunId'")
    assert len(parents) == 1
    assert query(results, "select count(*) from inputs") == [(TRIALS,)]
    per_epoch = query(
        results, "select step, count(*) from metrics where key='train/loss' group by 1"
    )
    assert per_epoch == [(epoch, TRIALS) for epoch in range(1, 11)]


def test_the_report_is_one_file_with_every_value_and_lies_with_the_studys_run(finished):
    results, _ = finished
    page = (results / "report" / "index.html").read_text()
    assert "not run yet" not in page
    fetched = re.findall(r'(?:src|href)="([^"]*)"', page)
    ui = "http://127.0.0.1:5000/#/experiments/"
    assert all(address.startswith(("#", "data:", ui)) for address in fetched)
    assert len([address for address in fetched if address.startswith(ui)]) == TRIALS + 1
    assert {"clean", "pgd-100"} <= set(re.findall('<img [^>]* alt="([^"]*)"', page))
    for run in trials(results).values():
        assert f"{100 * run.metrics['clean']:.1f}" in page
    assert "| published |" in (results / "report" / "tables.md").read_text()
    names = {path.name for path in results.glob("artifacts/*/artifacts/report/**/*")}
    assert {"index.html", "tables.csv", "pair.tex", "tables.md", "scatter.svg"} <= names
    assert {"clean.parquet", "pgd.parquet"} <= names


def test_the_notebook_that_reads_a_study_runs_on_its_report(finished):
    results, _ = finished
    notebook = executed("read_a_study", results.parent)
    shown = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    clean = [100 * run.metrics["clean"] for run in trials(results).values()]
    assert f"of {len(load_data(DIGITS).held_out.ids)}" in shown
    assert re.search(rf"difference [+-]{abs(clean[0] - clean[1]):.1f} points", shown)


def test_mlflow_loads_a_trial_without_a_pickle_and_it_answers_as_it_did(finished):
    results, _ = finished
    held_out = load_data(DIGITS).held_out
    for run in trials(results).values():
        names = {path.name for path in artifacts_of(run).iterdir()}
        assert {"MLmodel", "recipe.json"} <= names
        assert not {name for name in names if name.endswith(("pkl", "pickle", "pt", "pth"))}
        model = mlflow.pyfunc.load_model(run.artifact_uri)
        logits = model.predict((held_out.images.float() / 255).numpy())
        right = int((logits.argmax(axis=1) == held_out.labels.numpy()).sum())
        assert right / 597 == pytest.approx(run.metrics["clean"], abs=1e-9)
        assert model.predict(model.input_example).shape == (1, 10)


def test_the_grid_the_command_and_the_api_give_one_ledger_bit_for_bit(finished, tmp_path):
    results, _ = finished
    digits = load_data(DIGITS)
    attacked = replace(digits, held_out=digits.held_out.subset(DIGITS.attack_subset, seed=0))
    for digest, run in trials(results).items():
        folder = artifacts_of(run)
        weights = folder / "weights.safetensors"
        options = ["--weights", str(weights), "--ledger", str(tmp_path)]
        assert judge([*options, "--evaluators", "clean", "pgd"]) == 0
        classifier = classifier_of(weights, digest)
        for name, data in (("clean", digits), ("pgd", attacked)):
            of_grid = pq.read_table(folder / "ledgers" / f"{name}.parquet")
            ledger = evaluate(classifier, data, name, progress=False).ledger
            assert ledger.num_rows == {"clean": 597, "pgd": 4 * 64}[name]
            # Which four images are kept as pictures follows from all images that there are.
            pictures = [] if name == "clean" else ["image"]
            assert ledger.drop_columns(pictures).equals(of_grid.drop_columns(pictures))
            assert pq.read_table(tmp_path / f"{name}.parquet").equals(of_grid)


def test_a_second_run_trains_nothing_and_writes_nothing_twice(finished, study):
    results, _ = finished
    before = stored(results)
    said = ended(start(study, results))
    assert "2 done, 0 to train; 0 cells to judge" in said
    assert "Trained 0 and judged 0 cells" in said
    assert stored(results) == before


def run_here(study, results, *arguments):
    return main(["--study", str(study), "--results", str(results), *arguments])


def test_the_report_is_rebuilt_from_mlflow_alone(finished, study):
    results, _ = finished
    page = results / "report" / "index.html"
    before = page.read_bytes()
    page.unlink()
    assert run_here(study, results, "--report") == 0
    assert page.read_bytes() == before


def test_interrupted_then_killed_it_ends_as_if_undisturbed(finished, study, tmp_path):
    undisturbed, _ = finished
    results = tmp_path / "results"
    driver = start(study, results)
    wait_for_checkpoint(results, driver)
    driver.send_signal(signal.SIGINT)
    said = ended(driver, code=130)
    assert f"Stopped. Continue with: {sys.executable} grid/run.py" in said
    assert "Traceback" not in said

    driver = start(study, results)
    wait_for_checkpoint(results, driver, beside=set(results.glob("trials/*/epoch-*.pt")))
    driver.kill()
    ended(driver, code=-9)
    assert [run.outcome for run in trials(results).values()].count("finished") < TRIALS

    ended(start(study, results))
    assert weights_by_digest(results) == weights_by_digest(undisturbed)
    assert query(results, "select count(*) from runs") == [(TRIALS + 1,)]
    rows = "select t.value, m.key, m.step, m.value from metrics m join tags t using (run_uuid) "
    rows += "where t.key = 'digest' and m.key not like '%/seconds' order by 1, 2, 3"
    assert query(results, rows) == query(undisturbed, rows)


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
        if path != weights[0]:  # of the first trial the copy to be judged is sound
            path.write_bytes(path.read_bytes()[:-1])
    said = ended(start(study, results))
    assert "Trained 1 and judged 2 cells" in said
    assert "are damaged or missing: they are made again" in said
    assert weights_by_digest(results) == weights_by_digest(undisturbed)
    assert [path.read_bytes() for path in weights] == contents
    assert run_here(study, results) == 0


def test_another_study_takes_over_the_trials_that_it_shares(finished, study, tmp_path, capsys):
    results, _ = finished
    other = tmp_path / "other.toml"
    other.write_text(study.read_text().replace('name = "pair"', 'name = "other"'))
    assert run_here(other, results) == 0
    assert "2 done, 0 to train; 0 cells to judge" in capsys.readouterr().err
    served = [run.studies for run in trials(results).values()]
    assert served == [{"pair": "pair", "other": "other"}] * TRIALS
