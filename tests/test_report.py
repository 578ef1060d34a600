from __future__ import annotations

import pytest
from scipy.stats import t as student

from grid.plan import build_plan
from grid.report.plots import stages_plot
from grid.report.tables import FilledCell, FilledRow, FilledTable, fill_tables
from grid.studies import deit, load_study, paper
from trainables.scale import DIGITS
from trainables.tracking import TrialRun


def trial_run(digest, outcome="finished", reason="", **metrics):
    return TrialRun(
        run_id=f"run-{digest}",
        digest=digest,
        outcome=outcome,
        reason=reason,
        artifact_uri="",
        start_time=0,
        end_time=1,
        recipe="",
        metrics={key.replace("__", "/"): value for key, value in metrics.items()},
    )


def judged(digest, value):
    low, high = value - 0.01, value + 0.02
    metrics = {"clean": value, "clean__low": low, "clean__high": high, "clean__n": 597.0}
    return trial_run(digest, **metrics)


def fill(runs, *, tables=("T6",), seeds=1):
    study = paper()
    plan = build_plan(study, DIGITS, tables=tables, seeds=seeds)
    found = {run.digest: run for run in runs(plan)}
    return fill_tables(study, plan, found)[0]


def row_digests(plan, seed=0):
    return [row.recipe.with_seed(seed).digest() for row in plan.tables[0].rows]


def test_a_cell_has_our_value_and_interval_beside_the_published_one():
    table = fill(lambda plan: [judged(row_digests(plan)[0], 0.95)])
    cell = table.rows[0].cells[0]
    assert (cell.value, cell.low, cell.high) == pytest.approx((95.0, 94.0, 97.0))
    assert (cell.n, cell.published, cell.published_text()) == (597, 76.9, "76.9")
    assert cell.text() == "95.0 [94.0, 97.0]"


def test_cells_without_a_value_say_why():
    def runs(plan):
        first, second, third = row_digests(plan)
        return [
            trial_run(first, "collapsed", "PGD-10 accuracy was at chance"),
            trial_run(second, "failed", "RuntimeError: no"),
            trial_run(third, "blocked", "blocked by deit_small"),
        ]

    states = [row.cells[0].text() for row in fill(runs).rows]
    assert states == [
        "collapsed: PGD-10 accuracy was at chance",
        "failed: RuntimeError: no",
        "blocked by deit_small",
    ]


def test_a_trial_under_way_or_not_judged_is_shown_as_such():
    def runs(plan):
        first, second, _ = row_digests(plan)
        return [trial_run(first, "training"), trial_run(second)]

    assert [r.cells[0].state for r in fill(runs).rows][:2] == ["training", "not judged yet"]


def test_seeds_are_replicates_with_students_interval():
    values = (0.90, 0.94, 0.95)

    def runs(plan):
        return [judged(row_digests(plan, seed)[0], v) for seed, v in enumerate(values)]

    cell = fill(runs, seeds=3).rows[0].cells[0]
    mean, deviation = 93.0, 2.6457513
    reach = student.ppf(0.975, 2) * deviation / 3**0.5
    assert (cell.value, cell.low, cell.high) == pytest.approx((mean, mean - reach, mean + reach))
    assert cell.n == 597


def test_seeds_that_agree_keep_the_interval_of_their_images():
    def runs(plan):
        return [judged(row_digests(plan, seed)[0], 0.90) for seed in range(2)]

    cell = fill(runs, seeds=2).rows[0].cells[0]
    assert (cell.value, cell.low, cell.high) == pytest.approx((90.0, 89.0, 92.0))


def test_a_row_waits_for_all_its_seeds():
    cell = fill(lambda plan: [judged(row_digests(plan)[0], 0.9)], seeds=2).rows[0].cells[0]
    assert cell.text() == "not run yet"


def test_a_study_without_tables_gets_one_of_all_its_trials(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="mine"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n')
    study = load_study(str(path))
    (table,) = fill_tables(study, build_plan(study, DIGITS), {})
    assert table.name == "mine"
    assert len(table.rows) == 2
    assert table.columns == ("Clean", "PGD-5", "PGD-10", "PGD-50", "PGD-100")


def test_a_grids_table_shows_whatever_is_asked_of_it(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="mine"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n')
    study = load_study(str(path))
    plan = build_plan(study, DIGITS, evaluators=["clean", "autoattack", "tpa", "corruptions"])
    asked = {"clean", "autoattack", "tpa", "corruptions"}
    assert all(set(trial.evaluators) == asked for trial in plan)
    (table,) = fill_tables(study, plan, {})
    assert table.columns == (
        *("Clean", "Corruptions error (digits)", "TPA", "TPA, 1 patch", "Random patches"),
        "Clean, same images",
        *("after APGD-CE", "after APGD-T", "after FAB-T", "AutoAttack (digits)"),
    )


def test_the_last_stage_of_autoattack_is_that_of_its_own_radius():
    def drawn(last):
        labels = ("Clean, same images", "after APGD-CE", "after APGD-T", "after FAB-T", *last)
        cells = tuple(FilledCell("done", 9.0, 8.0, 10.0) for _ in labels)
        rows = (FilledRow("a model", deit(), "", cells),)
        return stages_plot(FilledTable("T", "a question", labels, rows), DIGITS)

    small, own = "AutoAttack, small radius (digits)", "AutoAttack (digits)"
    assert drawn([small]) is None
    assert drawn([small, own]) == drawn([own])


def test_a_students_row_finds_its_trial_for_every_seed():
    def runs(plan):
        return [judged(trial.digest, 0.9) for trial in plan]

    table = fill(runs, tables=("T9",), seeds=2)
    assert [row.cells[0].state for row in table.rows] == ["done"] * 4
