"""The paper's claims: what they refer to, and what decides them."""

from __future__ import annotations

import pytest

from evaluators.ledger import share
from evaluators.paired import Paired
from grid.plan import build_plan
from grid.report.claims import CLAIMS, Claim, Judgement, answer, decide, judge_claims
from grid.report.plots import claims_plot
from grid.report.tables import tables_of
from grid.report.verdicts import Verdicts
from grid.studies import paper
from tests.made_up import record
from tests.test_report import trial_run
from trainables.scale import DIGITS
from trainables.tracking import scores_as_metrics


def judge(plan, runs):
    return judge_claims(tables_of(paper(), plan, runs), plan.seeds, Verdicts(None, runs), runs)


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


def test_every_table_has_a_claim_and_every_claim_its_rows_and_column():
    tables = {table.name: table for table in paper().tables}
    rows = {(table.name, row.label) for table in tables.values() for row in table.rows}
    assert {claim.row[0] for claim in CLAIMS} == set(tables)
    for claim in CLAIMS:
        assert claim.row in rows
        alone = claim.kind in ("collapses", "none survive")
        assert claim.reference == ("", "") if alone else claim.reference in rows
        for table, _ in {claim.row, claim.reference} - {("", "")}:
            columns = [column.label for column in tables[table].columns]
            assert claim.kind == "collapses" or claim.column in columns
    assert len({claim.statement for claim in CLAIMS}) == len(CLAIMS)
    # Each is read by itself, below its table.
    assert not any(claim.statement.startswith(("So ", "Nor ", "Neither ")) for claim in CLAIMS)


@pytest.mark.parametrize(("survivors", "verdict"), [(0, OPEN), (1, OPEN), (4, FAILED)])
def test_one_model_is_judged_by_the_interval_that_its_table_shows(survivors, verdict):
    plan = build_plan(paper(), DIGITS, tables=["T1"], evaluators=["autoattack"], seeds=2)
    own = share("autoattack", survivors, 30)
    metrics = {name.replace("/", "__"): value for name, value in scores_as_metrics([own]).items()}
    runs = {trial.digest: trial_run(trial.digest, **metrics) for trial in plan}
    (resnet, _) = judge(plan, runs)
    assert (resnet.verdict, resnet.published) == (verdict, 0.0)
    # Two seeds that agree do not make thirty images more.
    assert (resnet.paired.n, resnet.paired.p) == (30, None)
    assert (resnet.paired.low, resnet.paired.high) == pytest.approx((own.low, own.high))


def test_a_claim_about_a_collapsed_model_says_so():
    plan = build_plan(paper(), DIGITS, tables=["T2"])
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
        assert "not judged yet" in answer(judged)


@pytest.mark.slow
def test_every_claim_of_a_whole_study_is_judged(tmp_path):
    study = paper()
    plan = build_plan(study, DIGITS)
    tracker = record(tmp_path, study, plan)
    runs = tracker.trials()
    tables = tables_of(study, plan, runs)
    judged = judge_claims(tables, plan.seeds, Verdicts(tracker, runs), runs)
    assert [judgement.claim for judgement in judged] == list(CLAIMS)
    for judgement in judged:
        assert judgement.verdict in (REPRODUCED, FAILED, OPEN)
        assert bool(judgement.paired) != bool(judgement.outcome)
        ahead = judgement.claim.kind in ("ahead", "behind") and judgement.verdict == REPRODUCED
        if ahead and judgement.paired.p is not None:
            assert judgement.paired.p < 0.05
    collapses = [j for j in judged if j.claim.kind == "collapses"]
    assert {(j.verdict, j.outcome) for j in collapses} == {(FAILED, "0 of 1 collapsed")}
    drawn = claims_plot(judged).svg
    assert drawn.count("0 of 1 collapsed") == len(collapses)
    assert f"Of {len(CLAIMS)} claims of the paper" in answer(judged)


def test_a_collapse_is_claimed_of_every_seed():
    plan = build_plan(paper(), DIGITS, tables=["T2"], seeds=2)
    claim = next(c for c in CLAIMS if c.kind == "collapses")
    row = next(r for r in plan.tables[0].rows if r.label == claim.row[1])
    digests = [row.recipe.with_seed(seed).digest() for seed in range(2)]
    for outcomes, expected in [
        (("collapsed", "collapsed"), (REPRODUCED, "2 of 2 collapsed")),
        (("collapsed", "finished"), (OPEN, "1 of 2 collapsed")),
        (("collapsed", "training"), ("not judged yet", "")),
    ]:
        runs = {d: trial_run(d, o) for d, o in zip(digests, outcomes, strict=True)}
        judged = judge(plan, runs)
        found = next(judgement for judgement in judged if judgement.claim == claim)
        assert (found.verdict, found.outcome) == expected


def test_the_answer_says_who_is_ahead_whatever_the_sign_of_the_difference():
    def judged(sign, difference, low, high):
        claim = Claim("s", "ahead", ("T5", "a"), ("T5", "b"), "c", headline="h", sign=sign)
        return Judgement(claim, OPEN, "t", Paired(difference, low, high, 9, None))

    assert "ahead h (+10.0 points [+5.0, +15.0], n = 9)" in answer([judged(1, 0.1, 0.05, 0.15)])
    assert "ahead h (+10.0 points [+5.0, +15.0], n = 9)" in answer([judged(-1, -0.1, -0.15, -0.05)])
    assert "behind h (-10.0 points" in answer([judged(-1, 0.1, 0.05, 0.15)])
    assert "not to be told apart h (+0.0 points [-5.0" in answer([judged(-1, 0.0, -0.05, 0.05)])
