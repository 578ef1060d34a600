from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grid.plan import build_plan
from grid.report.plots import stages_plot
from grid.report.tables import (
    FilledCell,
    FilledRow,
    FilledTable,
    fill_tables,
    images_text,
    tables_of,
)
from grid.study import load_study
from tests.paper import STUDY, deit
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.store.tracking import TrialRun


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
    study = STUDY
    plan = build_plan(study, DIGITS, tables=tables, seeds=seeds)
    found = {run.digest: run for run in runs(plan)}
    return fill_tables(tables_of(study, plan, found), plan.seeds, found)[0]


def titles(table):
    return tuple(column.title for column in table.shown)


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


def test_seeds_widen_the_interval_over_images_by_students():
    values = (0.90, 0.94, 0.95)

    def runs(plan):
        return [judged(row_digests(plan, seed)[0], v) for seed, v in enumerate(values)]

    cell = fill(runs, seeds=3).rows[0].cells[0]
    mean, deviation = 93.0, 2.6457513
    reach = 4.3027 * deviation / 3**0.5  # Student's t of two degrees of freedom
    assert (cell.value, cell.low, cell.high) == pytest.approx(
        # Their intervals over images reach from 1 below to 2 above.
        (mean, mean - math.hypot(reach, 1), mean + math.hypot(reach, 2)),
        abs=1e-3,
    )
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
    (table,) = tables_of(study, build_plan(study, DIGITS), {})
    assert table.name == "mine"
    assert len(table.rows) == 2
    assert titles(table) == ("Clean", "PGD-5", "PGD-10", "PGD-50", "PGD-100")


def test_a_grids_table_shows_whatever_is_asked_of_it(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="mine"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n')
    study = load_study(str(path))
    plan = build_plan(study, DIGITS, evaluators=["clean", "autoattack", "tpa", "corruptions"])
    asked = {"clean", "autoattack", "tpa", "corruptions"}
    assert all(set(trial.evaluators) == asked for trial in plan)
    (table,) = tables_of(study, plan, {})
    assert titles(table) == (
        *("Clean", "Corruptions error (digits)", "TPA", "TPA, 1 patch", "Random patches"),
        "Clean, same images",
        *("after APGD-CE", "after APGD-T", "after FAB-T", "AutoAttack (digits)"),
    )


STUDYS = (
    *("Clean", "ImageNet-A", "ImageNet-A, among all 1,000", "ImageNet-C error"),
    *("Error, 19 corruptions", "ImageNet-C mCE", "Stylized", "Stylized, native size"),
)
COUNTERPARTS = ("Clean", "Natural-adversarial", "Corruptions error", "Cue conflict")


@pytest.mark.parametrize(
    ("scale", "scores", "expected"),
    [
        (IMAGENET, (), STUDYS),
        (DIGITS, (), [f"{c} (digits)" if c != "Clean" else c for c in COUNTERPARTS]),
        # Stored sets are known by the scores that they alone give.
        (IMAGENET, ("corruptions", "corruptions/mCE"), [c for c in STUDYS if "19" not in c]),
        (IMAGENET, ("stylized",), [*STUDYS[:6], "Cue conflict (imagenet)"]),
        (
            CIFAR10,
            ("corruptions", "corruptions-19"),
            [
                *("Clean", "Natural-adversarial (cifar10)", "Corruptions error (cifar10)"),
                *("Error, 19 corruptions", "Cue conflict (cifar10)"),
            ],
        ),
    ],
)
def test_columns_are_those_whose_scores_the_data_have(scale, scores, expected):
    study = STUDY
    plan = build_plan(study, scale, tables=["T5"])
    metrics = {name.replace("/", "__"): 0.5 for name in scores}
    runs = {plan.trials[0].digest: trial_run(plan.trials[0].digest, **metrics)}
    (table,) = tables_of(study, plan, runs)
    assert titles(table) == tuple(expected)


@pytest.mark.parametrize(
    ("scale", "scores", "shown"),
    [(IMAGENET, {"stylized": 0.1, "stylized-cropped": 0.2}, 20.0), (DIGITS, {"stylized": 0.1}, 10)],
)
def test_the_papers_stylized_figure_is_beside_the_cropped_images(scale, scores, shown):
    study = STUDY
    plan = build_plan(study, scale, tables=["T5"])
    digest = plan.tables[0].rows[0].recipe.digest()
    ends = ("", "/low", "/high", "/n")
    metrics = {f"{name}{end}": value for name, value in scores.items() for end in ends}
    runs = {digest: replace(trial_run(digest), metrics=metrics)}
    (table,) = fill_tables(tables_of(study, plan, runs), 1, runs)
    cells = [cell for cell in table.rows[0].cells if cell.published == 8.3]
    assert [cell.value for cell in cells] == [pytest.approx(shown)]


def test_a_table_names_the_images_trained_and_judged():
    study = STUDY
    plan = build_plan(study, CIFAR10, tables=["T1"])
    counts = {"clean": 1000, "pgd-5": 500, "pgd-10": 500, "autoattack": 200}
    ends = {"": 0.5, "/low": 0.4, "/high": 0.6}
    metrics = {f"{name}{end}": value for name in counts for end, value in ends.items()}
    metrics |= {f"{name}/n": float(n) for name, n in counts.items()}
    images = {"train": 5_000, "held_out": 1_000}
    first, second = plan
    runs = {
        first.digest: replace(trial_run(first.digest), metrics=metrics, images=images),
        second.digest: replace(trial_run(second.digest), metrics=metrics | {"pgd-10/n": 300.0}),
    }
    (table,) = fill_tables(tables_of(study, plan, runs), 1, runs)
    judged = dict(zip(table.columns, table.judged_on, strict=True))
    assert judged["Clean"] == "1,000"
    assert judged["PGD-5"] == "500 of 1,000"
    assert judged["PGD-10"] == "300 to 500 of 1,000"
    assert judged["AutoAttack (cifar10)"] == "200 of 1,000"
    assert judged["PGD-50"] == ""
    trained = {row.recipe.digest(): row.trained_on for row in table.rows}
    assert trained == {first.digest: "5,000 of CIFAR-10's 50,000", second.digest: ""}
    assert images_text(runs.values(), CIFAR10) == (
        "Images trained on: 5,000 of CIFAR-10's 50,000 (held out: 1,000 of CIFAR-10's 10,000)."
    )


def test_a_stored_sets_images_are_no_part_of_the_held_out_ones():
    study = STUDY
    plan = build_plan(study, IMAGENET, tables=["T5"])
    scores = ("natural", "natural-1000")
    metrics = {f"{s}{end}": 7500.0 for s in scores for end in ("", "/low", "/high", "/n")}
    images = {"train": 1_281_167, "held_out": 50_000}
    digest = plan.tables[0].rows[0].recipe.digest()
    runs = {digest: replace(trial_run(digest), metrics=metrics, images=images)}
    (table,) = fill_tables(tables_of(study, plan, runs), 1, runs)
    assert dict(zip(table.columns, table.judged_on, strict=True))["ImageNet-A"] == "7,500"
    assert table.rows[0].trained_on == "1,281,167"


def test_the_last_stage_of_autoattack_is_that_of_its_own_radius():
    def drawn(last):
        labels = ("Clean, same images", "after APGD-CE", "after APGD-T", "after FAB-T", *last)
        cells = tuple(FilledCell("done", 9.0, 8.0, 10.0) for _ in labels)
        rows = (FilledRow("a model", deit(), "", cells),)
        table = FilledTable("T", "a question", labels, rows, ("30 of 597",) * len(labels))
        return stages_plot(table, DIGITS)

    small, own = "AutoAttack, small radius (digits)", "AutoAttack (digits)"
    assert drawn([small]) is None
    assert drawn([small, own]) == drawn([own])


def test_a_students_row_finds_its_trial_for_every_seed():
    def runs(plan):
        return [judged(trial.digest, 0.9) for trial in plan]

    table = fill(runs, tables=("T9",), seeds=2)
    assert [row.cells[0].state for row in table.rows] == ["done"] * 4
