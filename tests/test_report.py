"""The report: cells beside published figures, tables by data, and every form of it."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

from evaluators import column_named
from evaluators.ledger import from_parquet
from grid.plan import build_plan
from grid.report.build import summary_text, write_ledgers, write_report
from grid.report.plots import draw
from grid.report.tables import describe_work, images_text, over_seeds, tables_of
from grid.report.verdicts import Verdicts, gallery
from grid.study import load_study
from tests.made_up import record
from tests.paper import STUDY
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.store.tracking import TrialRun

ENDS = {"": 0.5, "/low": 0.4, "/high": 0.6}


def trial_run(digest, outcome="finished", reason="", images=None, failed=None, **metrics):
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
        failed_cells=failed or {},
        images=images or {},
    )


def judged(digest, value):
    low, high = value - 0.01, value + 0.02
    metrics = {"clean": value, "clean__low": low, "clean__high": high, "clean__n": 597.0}
    return trial_run(digest, **metrics)


def fill(runs, *, table="T6", seeds=1):
    plan = build_plan(STUDY, DIGITS, tables=[table], seeds=seeds)
    by_digest = {run.digest: run for run in runs(plan)}
    return tables_of(STUDY, plan, by_digest)[0]


def row_digests(plan, seed=0):
    return [row.recipe.with_seed(seed).digest() for row in plan.tables[0].rows]


def test_a_column_takes_the_score_of_the_data_that_it_is_shown_for():
    column = column_named("stylized-cropped")
    scores = [column.at(scale).score for scale in ("imagenet", "digits")]
    assert scores == ["stylized-cropped", "stylized"]


def test_a_cell_has_our_value_and_interval_beside_the_published_one():
    table = fill(lambda plan: [judged(row_digests(plan)[0], 0.95)])
    cell = table.rows[0].cells[0]
    assert (cell.value, cell.low, cell.high) == pytest.approx((95.0, 94.0, 97.0))
    assert (cell.n, cell.published, cell.published_text()) == (597, 76.9, "76.9")
    assert cell.text() == "95.0 [94.0, 97.0]"


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ({"outcome": "collapsed", "reason": "at chance"}, "collapsed: at chance"),
        ({"outcome": "failed", "reason": "RuntimeError: no"}, "failed: RuntimeError: no"),
        ({"outcome": "stopped early", "reason": "asha: no"}, "stopped early: asha: no"),
        ({"outcome": "blocked", "reason": "blocked by deit"}, "blocked by deit"),
        ({"outcome": "training"}, "training"),
        ({"failed": {"clean": "RuntimeError: no"}}, "failed: RuntimeError: no"),
        ({}, "not judged yet"),
    ],
)
def test_a_cell_without_a_value_says_why(run, text):
    table = fill(lambda plan: [trial_run(row_digests(plan)[0], **run)])
    assert [row.cells[0].text() for row in table.rows] == [text, "not run yet", "not run yet"]


def test_seeds_widen_the_interval_over_images_by_students():
    values = (0.90, 0.94, 0.95)

    def runs(plan, seeds=3):
        return [judged(row_digests(plan, s)[0], v) for s, v in enumerate(values[:seeds])]

    cell = fill(runs, seeds=3).rows[0].cells[0]
    mean, deviation = 93.0, 2.6457513
    reach = 4.3027 * deviation / 3**0.5  # Student's t of two degrees of freedom
    assert (cell.value, cell.low, cell.high) == pytest.approx(
        # Their intervals over images reach from 1 below to 2 above.
        (mean, mean - math.hypot(reach, 1), mean + math.hypot(reach, 2)),
        abs=1e-3,
    )
    assert cell.n == 597
    assert fill(lambda plan: runs(plan, 2), seeds=3).rows[0].cells[0].text() == "not run yet"


def test_a_students_row_finds_its_trial_for_every_seed():
    table = fill(lambda plan: [judged(trial.digest, 0.9) for trial in plan], table="T9", seeds=2)
    assert [row.cells[0].state for row in table.rows] == ["done"] * 4


def test_a_study_without_tables_gets_one_of_all_its_trials_and_evaluators(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="mine"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n')
    study = load_study(str(path))
    plan = build_plan(study, DIGITS, evaluators=["clean", "autoattack", "tpa", "corruptions"])
    (table,) = tables_of(study, plan, {})
    assert (table.name, len(table.rows)) == ("mine", 2)
    assert [column.title for column in table.shown] == [
        *("Clean", "AutoAttack, bounded (digits)"),
        *("Corruptions error (digits)", "TPA, 1 patch (digits)", "TPA, 4 patches (digits)"),
        "Random patches",
        *("Clean, same images", "after APGD-CE", "after APGD-T, 2 targets"),
    ]


STUDYS = (
    *("Clean", "ImageNet-A", "ImageNet-A, among all 1,000", "ImageNet-C error"),
    *("Error, 19 corruptions", "ImageNet-C mCE", "Stylized", "Stylized, native size"),
)
COUNTERPARTS = ("Natural-adversarial", "Corruptions error", "Cue conflict")


@pytest.mark.parametrize(
    ("scale", "scores", "expected"),
    [
        (IMAGENET, (), STUDYS),
        (DIGITS, (), ["Clean", *(f"{c} (digits)" for c in COUNTERPARTS)]),
        # Stored sets are known by the scores that they alone give.
        (IMAGENET, ("corruptions", "corruptions/mCE"), [c for c in STUDYS if "19" not in c]),
        (IMAGENET, ("stylized",), [*STUDYS[:6], "Cue conflict (imagenet, generated)"]),
        (
            IMAGENET,
            ("corruptions",),
            [*STUDYS[:3], "Corruptions error (imagenet, generated)", *STUDYS[6:]],
        ),
    ],
)
def test_columns_are_those_whose_scores_the_data_have(scale, scores, expected):
    plan = build_plan(STUDY, scale, tables=["T5"])
    metrics = {name.replace("/", "__"): 0.5 for name in scores}
    runs = {plan.trials[0].digest: trial_run(plan.trials[0].digest, **metrics)}
    (table,) = tables_of(STUDY, plan, runs)
    assert [column.title for column in table.shown] == [*expected]


def test_no_published_figure_stands_beside_what_is_generated_at_imagenets_scale():
    plan = build_plan(STUDY, IMAGENET, tables=["T5"])
    published = {}
    for scores in ({}, {"corruptions__mCE": 0.5}):
        run = trial_run(plan.trials[0].digest, corruptions=0.5, **scores)
        (table,) = tables_of(STUDY, plan, {run.digest: run})
        published[bool(scores)] = {column for _, column in table.published}
    assert published[True] - published[False] == {"corruptions"}
    assert "natural" in published[False]


def test_a_table_says_how_many_images_were_trained_on_and_judged():
    plan = build_plan(STUDY, CIFAR10, tables=["T1"])
    counts = {"clean": 1000, "pgd-5": 500, "pgd-10": 500}
    metrics = {f"{name}{end}": value for name in counts for end, value in ENDS.items()}
    metrics |= {f"{name}/n": float(n) for name, n in counts.items()}
    images = {"train": 5_000, "held_out": 10_000}
    first, second = plan
    runs = {
        first.digest: trial_run(first.digest, images=images, **metrics),
        second.digest: trial_run(second.digest, **(metrics | {"pgd-10/n": 300.0})),
    }
    table = tables_of(STUDY, plan, runs)[0]
    assert table.judged_on[:5] == ["1,000", "", "", "500", "300 to 500"]
    assert images_text(runs.values(), CIFAR10) == (
        "Images trained on: 5,000 of CIFAR-10's 50,000 (held out: 10,000)."
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    plan = build_plan(STUDY, DIGITS, tables=("T1",))
    return record(tmp_path_factory.mktemp("results"), STUDY, plan), plan


def test_every_verdict_is_exported_once_with_whose_it_is(recorded, tmp_path):
    tracker, plan = recorded
    write_ledgers(tracker, plan, tmp_path)
    evaluators = {name for trial in plan for name in trial.evaluators}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.parquet" for name in evaluators}
    runs = tracker.trials()
    for name in evaluators:
        frame = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert "image" not in frame
        for trial in plan:
            rows = frame[frame["trial"] == trial.digest]
            assert set(rows["model"]) == {trial.name}
            ledger, _ = from_parquet(tracker.ledger(runs[trial.digest], name))
            expected = ledger.drop_columns(["image"]).to_pandas()
            rows = rows.drop(columns=["trial", "model"]).reset_index(drop=True)
            pd.testing.assert_frame_equal(rows, expected, check_dtype=False)


def test_text_from_a_study_is_shown_and_not_executed(recorded, tmp_path):
    tracker, plan = recorded
    study = STUDY.model_copy(update={"name": "my_study", "source": "a <b>notebook</b>"})
    planted = "<img src=x onerror=alert(1)>"
    tracker.open_study(study.name, "", classes=[f"{planted}{n}" for n in range(10)])
    run = next(iter(tracker.trials().values()))
    tracker.end_trial(run, outcome="failed", reason="<class 'X'> & others")
    try:
        page = write_report(tracker, study, plan, DIGITS, tmp_path).read_text()
    finally:
        tracker.end_trial(run, outcome="finished", reason="")
    assert planted not in page
    assert "&lt;img src=x onerror=alert(1)&gt;3" in page
    assert "“published” is the figure of a &lt;b&gt;notebook" in page
    assert page.count("<svg ") == page.count('role="img" aria-label="') > 0


def test_every_form_of_the_report_has_the_same_figures_and_counts(recorded, tmp_path):
    tracker, plan = recorded
    table = plan.tables[0].model_copy(update={"name": "T_1"})
    plan = dataclasses.replace(plan, tables=(table,))
    page = write_report(tracker, STUDY, plan, DIGITS, tmp_path).read_text()
    markdown = (tmp_path / "tables.md").read_text()
    latex = (tmp_path / "latex" / "T_1.tex").read_text()
    frame = pd.read_csv(tmp_path / "tables.csv")
    row = frame[(frame["score"] == "Clean") & frame["model"].str.startswith("DeiT-S ")].iloc[0]
    model = f"DeiT-S {row['digest'][:6]}"
    (trial,) = (trial for trial in plan if trial.digest == row["digest"])
    run = tracker._client.get_run(tracker.trials()[trial.digest].run_id)
    assert trial.name == row["model"] == run.info.run_name == model
    value = f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
    scores = pd.read_json(tmp_path / "scores.json", orient="split")
    score = scores[(scores["model"] == model) & (scores["score"] == "clean")].iloc[0]
    percents = [100 * score[part] for part in ("value", "low", "high")]
    assert percents == pytest.approx([row["value"], row["low"], row["high"]])
    assert (score["n"], score["digest"]) == (597, row["digest"])
    assert f"| {model} | {value} | 76.8 |" in markdown
    assert f">{model}</span>" in page
    assert f"<small>{model}</small>" in page  # of the gallery
    assert "DeiT-S & " + value.replace(" ", " & ", 1) + " & 76.8 & " in latex
    assert f'data-tip="Clean on n = 597 images">{row["value"]:.1f}</span>' in page
    assert set(frame["trained_images"]) == {1200}
    assert set(frame["held_out_images"]) == {597}
    for text in (page, markdown):
        assert "Images trained on: 1,200 (held out: 597)." in text
    assert "PGD-5<br><small>n = 64</small>" in page
    assert "| judged on, images | 597 |  | 30 |  | 30 |  | 64 |" in markdown
    assert r"images &  & 597 &  &  & 30 &" in latex
    assert r"\caption{T\_1: Vanilla models under attack, on scikit-learn's handwritten" in latex


def test_attacks_that_are_not_judged_yet_are_no_clean_bill(recorded, tmp_path):
    tracker, plan = recorded
    more = build_plan(STUDY, DIGITS, tables=("T1", "T2"), seeds=1)
    page = write_report(tracker, STUDY, more, DIGITS, tmp_path).read_text()
    markdown = (tmp_path / "tables.md").read_text()
    waiting = [trial for trial in more if trial.digest not in {done.digest for done in plan}]
    for trial in waiting:
        assert f"- not judged yet: {trial.name}: health, pgd, autoattack-bounded\n" in markdown
    standing = "2 models whose attacks were judged have a red flag; 7 not judged yet."
    assert (len(waiting), standing in markdown, standing in page) == (7, True, True)


def test_models_are_flagged_cleared_waited_for_or_have_nothing_to_attack(recorded):
    tracker, plan = recorded
    first, second = plan.trials
    runs = tracker.trials()
    del runs[first.digest].cells["autoattack-bounded"], runs[first.digest].cells["health"]
    health = Verdicts(tracker, runs).health(plan)
    assert health.waiting == {first.name: ["health", "autoattack-bounded"]}
    assert health.flags.keys() == {first.name, second.name}
    assert health.unchecked == ()
    without = dataclasses.replace(first, evaluators=("clean", "pgd"))
    assert Verdicts(tracker, runs).health([without]).unchecked == (first.name,)
    runs[first.digest].cells.clear()
    runs[first.digest].outcome = "collapsed"
    assert not Verdicts(tracker, runs).health([first]).waiting


def test_the_gallery_names_classes_as_people_do(recorded):
    tracker, plan = recorded
    verdicts = Verdicts(tracker, tracker.trials())
    assert tracker.classes("bai2021") == [str(digit) for digit in range(10)]
    wordnet = ["n01440764", "n01443537", *["n02085620"] * 8]
    for classes, names in ((wordnet, {"tench", "goldfish", "Chihuahua"}), ([], set("0123456789"))):
        examples = gallery(plan, verdicts, classes)
        shots = [
            shot for models in examples.values() for shots in models.values() for shot in shots
        ]
        assert {name for _, name in examples} | {shot.answer for shot in shots} <= names | {""}
        assert {"clean", "pgd-100"} <= {shot.title for shot in shots}


def test_a_summary_has_the_answer_and_as_many_trials_as_mlflow_takes(recorded, tmp_path):
    tracker, plan = recorded
    write_report(tracker, STUDY, plan, DIGITS, tmp_path)
    title, _, answer, _, head, _, *rows = (tmp_path / "summary.md").read_text().splitlines()
    link = "#/experiments/1/runs?viewStateShareKey=bai2021&workflowType=machine_learning"
    assert title == f"**[Compare the trials]({link}) of study bai2021**"
    assert " claims of the study, decided together: " in answer
    assert head == "| % | clean | pgd-100 | autoattack-small-bounded | autoattack-bounded |"
    runs = tracker.trials()
    assert len(rows) == len(plan.trials)
    for trial, row in zip(sorted(plan, key=lambda t: t.name), rows, strict=True):
        assert row.startswith(f"| {trial.name} | {100 * runs[trial.digest].metrics['clean']:.1f} |")
    many = [
        dataclasses.replace(trial, name=f"{trial.name} {n}") for n in range(99) for trial in plan
    ]
    text = summary_text(dataclasses.replace(plan, trials=tuple(many)), runs, answer, title)
    assert 4900 < len(text) <= 5000
    assert text.count("\n| ") > 20


def test_figures_of_very_many_models_show_the_first_and_say_so(recorded):
    tracker, plan = recorded
    verdicts = Verdicts(tracker, tracker.trials())
    verdicts.read_scores(plan)
    (table,) = tables_of(STUDY, plan, verdicts.runs)
    rows = [
        dataclasses.replace(row, label=f"{row.label} {n}") for n in range(7) for row in table.rows
    ]
    many = dataclasses.replace(table, rows=tuple(rows))
    plots = draw(plan, [many], verdicts, scale=DIGITS, judgements=[], effects=[])
    steps = next(plot for plot in plots if plot.name == "steps-T1")
    assert steps.caption.endswith(" The first 12 of 14 models.")
    assert ("ResNet-50 5" in steps.svg, "ResNet-50 6" in steps.svg) == (True, False)


def test_the_footer_says_when_how_long_and_by_which_command():
    runs = [trial_run(digest) for digest in "ab"]
    runs[0].start_time, runs[0].end_time = 1_000_000_000_000, 1_000_000_060_000
    runs[1].start_time, runs[1].end_time = 1_000_003_600_000, 0  # not over
    said = describe_work(runs, 7200, "python grid/run.py")
    assert said == (
        "2 trials, 2001-09-09 01:46 to 2001-09-09 02:46 UTC: "
        "2.0 h of training and judging. Command: python grid/run.py."
    )
    assert describe_work([], 0, "") == ""


def test_an_interval_over_trainings_stays_within_what_a_share_can_be():
    def metrics(score, *values):
        return [{score: v, f"{score}/low": v, f"{score}/high": v} for v in values]

    # Student's t of two degrees: 4.30 of a standard error of 4 / sqrt(3) around 4.
    of_pgd = over_seeds(metrics("pgd-5", 0.0, 0.04, 0.08), "pgd-5")
    assert of_pgd == pytest.approx((4, 0, 13.94), abs=0.01)
    assert over_seeds(metrics("clean", 0.92, 0.96, 1.0), "clean")[2] == 100
    assert over_seeds(metrics("corruptions/mCE", 0.92, 0.96, 1.0), "corruptions/mCE")[2] > 105
