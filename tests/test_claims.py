"""The paper's claims: what they refer to, and what decides them."""

from __future__ import annotations

import math

import pytest
import torch

from evaluators.base import Batch, verdicts
from evaluators.intervals import Paired
from evaluators.ledger import scores_as_metrics, share, to_parquet
from grid.plan import build_plan
from grid.report.claims import Judgement, answer, decide, judge_claims
from grid.report.plots import claims_plot
from grid.report.tables import tables_of
from grid.report.verdicts import Verdicts
from grid.study import Claim
from tests.made_up import record
from tests.paper import STUDY
from tests.test_report import trial_run
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.store.tracking import Tracker


def judge(plan, runs):
    return judge_claims(
        STUDY.claims, tables_of(STUDY, plan, runs), plan.seeds, Verdicts(None, runs), runs
    )


ERROR = "corruptions"
CNN_RECIPE = "DeiT-S, CNN recipe (M-SGD, no strong augmentation)"
REPRODUCED, FAILED, OPEN = "reproduced", "not reproduced", "too little data to say"


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("ahead", 0.01, 0.2, REPRODUCED),
        ("ahead", 0.0, 0.2, OPEN),
        ("ahead", -0.2, -0.01, FAILED),
        ("behind", -0.2, -0.01, REPRODUCED),
        ("behind", -0.2, 0.01, OPEN),
        ("behind", 0.01, 0.2, FAILED),
        ("level", -0.04, 0.04, REPRODUCED),
        ("level", -0.06, 0.04, OPEN),
        ("level", 0.06, 0.2, FAILED),
        ("level", -0.2, -0.06, FAILED),
        ("no gain", -0.5, 0.04, REPRODUCED),
        ("no gain", -0.5, 0.06, OPEN),
        ("no gain", 0.06, 0.1, FAILED),
        ("none survive", 0.0, 0.04, REPRODUCED),
        ("none survive", 0.02, 0.2, OPEN),
        ("none survive", 0.06, 0.2, FAILED),
    ],
)
def test_a_claim_is_decided_by_its_interval(kind, low, high, verdict):
    assert decide(kind, low, high) == verdict


def test_every_table_has_a_claim_that_can_be_read_by_itself():
    assert {claim.row[0] for claim in STUDY.claims} == {table.name for table in STUDY.tables}
    assert len({claim.says for claim in STUDY.claims}) == len(STUDY.claims)
    assert not any(claim.says.startswith(("So ", "Nor ", "Neither ")) for claim in STUDY.claims)


def test_every_claim_holds_in_the_papers_own_figures():
    figures = {(t.name, *cell): f[0] for t in STUDY.tables for cell, f in t.published.items()}
    tables = set()
    for claim in STUDY.claims:
        ours = figures.get((*claim.row, claim.column))
        theirs = 0 if claim.test == "none survive" else figures.get((*claim.of, claim.column))
        if ours is not None and theirs is not None:
            difference = (ours - theirs) / 100
            assert decide(claim.test, difference, difference) == REPRODUCED, claim.says
            tables.add(claim.row[0])
    assert tables == {"T1", "T2", "T5", "T7", "T8", "T9"}


@pytest.mark.parametrize("scale", [DIGITS, IMAGENET, CIFAR10])
def test_every_claim_has_its_columns_at_every_scale(scale):
    plan = build_plan(STUDY, scale)
    tables = tables_of(STUDY, plan, {})
    columns = {(table.name, column.name): column for table in tables for column in table.shown}
    for claim in STUDY.claims:
        assert claim.test == "collapses" or (claim.row[0], claim.column) in columns
    stylized = "stylized-cropped" if scale is IMAGENET else "stylized"
    assert columns["T5", "stylized-cropped"].score == stylized


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Runs of some tables' trials in a real database, without verdicts, and their plan."""
    results = tmp_path_factory.mktemp("claims")
    plan = build_plan(STUDY, DIGITS, tables=["T2", "T3", "T4", "T6", "T11"])
    tracker = Tracker(
        f"sqlite:///{results}/mlflow.db", experiment="claims", artifacts=results / "artifacts"
    )
    parent = tracker.open_study("bai2021", "hand-made verdicts")
    runs = {
        trial.digest: tracker.start_trial(
            digest=trial.digest,
            name=trial.name,
            parent=parent,
            study="bai2021",
            tables="T2 T3 T4 T6 T11",
            recipe_json=trial.recipe.model_dump_json(),
            params={},
            dataset={"name": "digits", "digest": "0", "source_type": "code", "source": "digits"},
        )
        for trial in plan
    }
    return tracker, plan, runs


def judge_by_hand(models, column, survivors):
    """Judge the claims about a column where so many of a row's 100 images survive, the first."""
    tracker, plan, runs = models
    tables = tables_of(STUDY, plan, runs)
    score = next(c for table in tables for c in table.shown if c.name == column)
    batch = Batch(torch.zeros(100, 3, 1, 1), torch.zeros(100).long(), tuple(map(str, range(100))))
    for table in tables:
        for row in table.rows:
            if (count := survivors.get((table.name, row.label))) is not None:
                predicted = (torch.arange(100) >= count).long()
                ledger = to_parquet(verdicts(batch, score.score, predicted), seconds=1.0)
                tracker.record_cell(
                    runs[row.recipe.digest()],
                    evaluator=score.evaluator,
                    cell="by hand",
                    asked="{}",
                    ledger=ledger,
                    metrics={},
                )
    found = judge_claims(STUDY.claims, tables, 1, Verdicts(tracker, runs), runs)
    return [judgement for judgement in found if judgement.claim.column == column]


@pytest.mark.parametrize(
    ("kind", "row", "reference", "column", "holds", "fails"),
    [
        ("ahead", ("T3", "DeiT-S"), ("T3", "ResNet-50"), "tpa", (70, 40), (40, 70)),
        ("ahead", ("T4", "randaug+cutmix"), ("T3", "DeiT-S"), "tpa", (70, 40), (40, 70)),
        ("behind", ("T2", CNN_RECIPE), ("T2", "DeiT-S"), "pgd-100", (20, 60), (60, 20)),
        ("behind", ("T2", CNN_RECIPE), ("T2", "DeiT-S"), "clean", (60, 90), (90, 60)),
        (
            *("level", ("T2", "ResNet-50 GELU"), ("T2", "DeiT-S"), "autoattack"),
            *((50, 50), (80, 50)),
        ),
        (
            *("no gain", ("T2", "ResNet-50 with AdamW"), ("T2", "ResNet-50 ReLU"), "pgd-100"),
            *((30, 40), (70, 40)),
        ),
        # Of an error the model that survives less has the higher one.
        ("behind", ("T6", "cosine, SGD"), ("T6", "step, SGD"), ERROR, (70, 40), (40, 70)),
        ("ahead", ("T6", "cosine, AdamW"), ("T6", "cosine, SGD"), ERROR, (40, 70), (70, 40)),
        *(
            (
                *("behind", ("T11", f"{resnet}-Best, 300 epochs"), ("T11", "DeiT-S, 300 epochs")),
                *("natural", (40, 70), (70, 40)),
            )
            for resnet in ("ResNet-101", "ResNet-200")
        ),
    ],
)
def test_each_kind_of_claim_is_decided_by_verdicts(
    models, kind, row, reference, column, holds, fails
):
    for (ours, theirs), verdict in ((holds, REPRODUCED), (fails, FAILED)):
        judged = judge_by_hand(models, column, {row: ours, reference: theirs})
        found = next(
            j for j in judged if (j.claim.row, j.claim.of, j.claim.test) == (row, reference, kind)
        )
        assert (found.verdict, found.paired.n) == (verdict, 100)
        sign = -1 if column == ERROR else 1
        assert found.paired.difference == pytest.approx(sign * (ours - theirs) / 100)


@pytest.mark.parametrize(
    ("gains", "verdict", "mean", "reach", "images"),
    [
        # Student's t of three degrees of freedom is 3.1824; the spread of 10 to 40 is 12.910.
        ((10, 20, 30, 40), REPRODUCED, 0.25, 3.1824 * 0.12910 / 2, (0.0856, 0.0927)),
        ((-10, -20, -30, -40), FAILED, -0.25, 3.1824 * 0.12910 / 2, (0.0927, 0.0856)),
        ((10, 20, 30, -40), OPEN, 0.05, 3.1824 * 0.31091 / 2, (0.0855, 0.0928)),
    ],
)
def test_cutmix_is_judged_over_the_four_pairs_with_and_without_it(
    models, gains, verdict, mean, reach, images
):
    without = ("none", "randaug", "mixup", "randaug+mixup")
    having = ("cutmix", "randaug+cutmix", "mixup+cutmix", "randaug+mixup+cutmix")
    survivors = {("T4", label): 50 for label in without}
    survivors |= {("T4", w): 50 + gain for w, gain in zip(having, gains, strict=True)}
    judged = judge_by_hand(models, "tpa", survivors)
    (found,) = (j for j in judged if j.claim.also)
    assert (found.verdict, found.paired.n, found.paired.p) == (verdict, 100, None)
    assert found.paired.difference == pytest.approx(mean)
    # `images`: how far the ends of the four intervals over images lie, on average; of 10 images
    # gained and none lost the lower end lies hypot(0.1 - 0.0490, 0.0362) away.
    assert found.paired.low == pytest.approx(mean - math.hypot(reach, images[0]), abs=1e-4)
    assert found.paired.high == pytest.approx(mean + math.hypot(reach, images[1]), abs=1e-4)
    assert found.test.startswith("mean of 4 pairs, cutmix minus none and randaug+cutmix minus")


@pytest.mark.parametrize(
    ("survivors", "n", "verdict"),
    [(0, 30, OPEN), (1, 30, OPEN), (4, 30, FAILED), (0, 100, REPRODUCED)],
)
def test_one_model_is_judged_by_the_interval_that_its_table_shows(survivors, n, verdict):
    plan = build_plan(STUDY, DIGITS, tables=["T1"], evaluators=["autoattack"], seeds=2)
    own = share("autoattack", survivors, n)
    metrics = {name.replace("/", "__"): value for name, value in scores_as_metrics([own]).items()}
    runs = {trial.digest: trial_run(trial.digest, **metrics) for trial in plan}
    (resnet, _) = judge(plan, runs)
    assert (resnet.verdict, resnet.published) == (verdict, 0.0)
    # Two seeds that agree do not make more images.
    assert (resnet.paired.n, resnet.paired.p) == (n, None)
    assert (resnet.paired.low, resnet.paired.high) == pytest.approx((own.low, own.high))


def test_a_claim_about_a_collapsed_model_says_so():
    plan = build_plan(STUDY, DIGITS, tables=["T2"])
    rows = {row.label: row.recipe.digest() for row in plan.tables[0].rows}
    runs = {digest: trial_run(digest) for digest in rows.values()}
    for label, outcome, verdict in [
        ("ResNet-50 with AdamW", "collapsed", "cannot be judged"),
        ("ResNet-50 with AdamW", "failed", "not judged yet"),
    ]:
        runs[rows[label]] = trial_run(rows[label], outcome)
        judged = judge(plan, runs)
        found = next(judgement for judgement in judged if judgement.claim.row[1] == label)
        assert (found.verdict, found.outcome) == (verdict, f"{label} {outcome}")
        assert found.outcome in claims_plot(judged).svg
        assert "not judged yet" in answer(STUDY, judged)


@pytest.mark.slow
def test_every_claim_of_a_whole_study_is_judged(tmp_path):
    study = STUDY
    plan = build_plan(study, DIGITS)
    tracker = record(tmp_path, study, plan)
    runs = tracker.trials()
    tables = tables_of(study, plan, runs)
    judged = judge_claims(STUDY.claims, tables, plan.seeds, Verdicts(tracker, runs), runs)
    assert [judgement.claim for judgement in judged] == list(STUDY.claims)
    for judgement in judged:
        assert judgement.verdict in (REPRODUCED, FAILED, OPEN)
        assert bool(judgement.paired) != bool(judgement.outcome)
        ahead = judgement.claim.test in ("ahead", "behind") and judgement.verdict == REPRODUCED
        if ahead and judgement.paired.p is not None:
            assert judgement.paired.p < 0.05
    collapses = [j for j in judged if j.claim.test == "collapses"]
    assert {(j.verdict, j.outcome) for j in collapses} == {(FAILED, "0 of 1 collapsed")}
    drawn = claims_plot(judged).svg
    assert drawn.count("0 of 1 collapsed") == len(collapses)
    assert f"Of {len(STUDY.claims)} claims of the study" in answer(STUDY, judged)


def test_a_collapse_is_claimed_of_every_seed():
    plan = build_plan(STUDY, DIGITS, tables=["T2"], seeds=2)
    claim = next(c for c in STUDY.claims if c.test == "collapses")
    row = next(r for r in plan.tables[0].rows if r.label == claim.row[1])
    digests = [row.recipe.with_seed(seed).digest() for seed in range(2)]
    for outcomes, expected in [
        (("collapsed", "collapsed"), (REPRODUCED, "2 of 2 collapsed")),
        (("finished", "finished"), (FAILED, "0 of 2 collapsed")),
        (("collapsed", "finished"), (OPEN, "1 of 2 collapsed")),
        (("collapsed", "training"), ("not judged yet", "")),
    ]:
        runs = {d: trial_run(d, o) for d, o in zip(digests, outcomes, strict=True)}
        judged = judge(plan, runs)
        found = next(judgement for judgement in judged if judgement.claim == claim)
        assert (found.verdict, found.outcome) == expected


def test_the_answer_says_who_is_ahead_whatever_the_sign_of_the_difference():
    def said(sign, difference, low, high):
        claim = Claim(
            says="s", test="ahead", row="T5/a", of="T5/b", column="c", headline="h", sign=sign
        )
        paired = Paired(difference, low, high, 9, None)
        return answer(STUDY, [Judgement(claim, OPEN, "t", paired)])

    assert "Here the transformer is ahead h (+10.0 points [+5.0, +15.0], n = 9)" in said(
        1, 0.1, 0.05, 0.15
    )
    assert "ahead h (+10.0 points [+5.0, +15.0], n = 9)" in said(-1, -0.1, -0.15, -0.05)
    assert "behind h (-10.0 points" in said(-1, 0.1, 0.05, 0.15)
    assert "not to be told apart h (+0.0 points [-5.0" in said(-1, 0.0, -0.05, 0.05)
