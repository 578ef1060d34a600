"""Simulated studies in which nothing is so: how often claims are decided wrongly."""

from __future__ import annotations

import pytest

from benchmarks.decisions import KINDS, compared, family_wise_error, headline_study
from evaluators.intervals import Paired
from grid.plan import build_plan
from grid.report.claims import Judgement
from grid.study import load_study
from grid.table import Claim
from trainables.scale import DIGITS

SINGLE, SEVERAL, *_, TEN_POINTS, _ = KINDS


@pytest.mark.parametrize(("kind", "studies"), [(SINGLE, 60), (SEVERAL, 20), (TEN_POINTS, 200)])
def test_at_most_one_study_in_twenty_decides_a_claim_wrongly(kind, studies):
    error, uncorrected = family_wise_error(kind, studies, seed=1)
    assert error <= 0.05
    assert uncorrected > 0.2  # of 22 claims, each by itself


def test_the_headline_study_trains_what_the_headline_claims_compare(tmp_path):
    path = tmp_path / "headline.toml"
    path.write_text(headline_study())
    study = load_study(str(path))
    assert len(study.claims) == 5
    assert all(claim.headline for claim in study.claims)
    plan = build_plan(study, DIGITS)
    assert [len(table.rows) for table in plan.tables] == [2, 2, 2]
    assert len(plan.trials) == 3 * 7 + 2 * 3  # cleanly trained, and adversarially


def test_two_runs_agree_where_they_decide_alike():
    claim = Claim(says="a leads", test="ahead", row="T/a", of="T/b", column="clean")
    paired = Paired(0.1, 0.05, 0.15, 100, None)
    yes = Judgement(claim, "reproduced", "t", paired, single="reproduced")
    undecided = Judgement(claim, "too little data to say", "t", single="reproduced")
    lines = list(compared([yes, yes], [yes, undecided]))
    assert lines[0] == "reproduced, by itself reproduced, +10.0 +5.0 +15.0: a leads"
    assert lines[-1] == "1 of 2 headline verdicts agree"
