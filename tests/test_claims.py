"""The paper's claims: what they refer to, and what decides them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom

from evaluators.base import Batch, verdicts
from evaluators.intervals import Paired
from evaluators.ledger import share
from grid.plan import build_plan
from grid.report.claims import SUPPORTS, Judgement, answer, decide, judge_claims
from grid.report.plots import claims_plot
from grid.report.tables import tables_of
from grid.report.verdicts import Verdicts
from grid.table import Claim
from tests.paper import STUDY
from tests.test_report import trial_run
from trainables.scale import CIFAR10, DIGITS, IMAGENET


def judge(plan, runs):
    tables = tables_of(STUDY, plan, runs)
    return judge_claims(STUDY.claims, tables, Verdicts(None, runs))


ERROR = "corruptions"
TABLES = ["T2", "T3", "T4", "T6", "T11"]
CNN_RECIPE = "DeiT-S, CNN recipe (M-SGD, no strong augmentation)"
REPRODUCED, FAILED, OPEN = "reproduced", "not reproduced", "too little data to say"


@pytest.mark.parametrize(
    ("kind", "low", "high", "decision"),
    [
        ("ahead", 0.01, 0.2, REPRODUCED),
        ("ahead", 0.0, 0.2, OPEN),
        ("ahead", -0.2, -0.01, FAILED),
        ("behind", 0.01, 0.2, REPRODUCED),
        ("behind", -0.01, 0.2, OPEN),
        ("behind", -0.2, -0.01, FAILED),
        ("level", -0.04, 0.04, REPRODUCED),
        ("level", -0.06, 0.04, OPEN),
        ("level", 0.06, 0.2, FAILED),
        ("level", -0.2, -0.06, FAILED),
        ("no gain", -0.04, 0.5, REPRODUCED),
        ("no gain", -0.06, 0.5, OPEN),
        ("no gain", -0.1, -0.06, FAILED),
        ("none survive", -0.04, 0.0, REPRODUCED),
        ("none survive", -0.2, -0.02, OPEN),
        ("none survive", -0.2, -0.06, FAILED),
    ],
)
def test_a_claim_is_decided_by_its_interval(kind, low, high, decision):
    assert decide(Paired(low, low, high, 9, None), SUPPORTS[kind]) == decision


@pytest.mark.parametrize(
    ("kind", "low", "high", "decision"),
    [
        ("ahead", 0.01, 0.09, REPRODUCED),  # a lead, if a small one
        ("ahead", -0.05, 0.09, FAILED),  # none of ten points
        ("ahead", -0.05, 0.11, OPEN),
        ("level", -0.09, 0.09, REPRODUCED),
        ("level", -0.11, 0.09, OPEN),
        ("no gain", -0.09, 0.5, REPRODUCED),
        ("none survive", -0.09, 0.0, OPEN),  # the floor is five points, whatever is to be told
    ],
)
def test_a_run_that_is_to_tell_ten_points_takes_less_for_level(kind, low, high, decision):
    alone = kind == "none survive"
    claim = Claim(says="", test=kind, row="T/a", column="clean", **({} if alone else {"of": "T/b"}))
    judgement = Judgement(claim, OPEN, "", least=0.10)
    assert decide(Paired(low, low, high, 9, None), judgement.supports, 0.10) == decision


def test_a_lead_that_is_surely_small_is_refuted_but_not_where_all_models_fail(plan):
    places = [("T3", "DeiT-S"), ("T3", "ResNet-50")]
    (apart, *_) = judge_by_hand(plan, "tpa", dict(zip(places, (50, 50), strict=True)), least=0.10)
    assert (apart.single, apart.decision) == (FAILED, FAILED)
    # 12 claims in all, of which each lead is tested on one side of its two hypotheses.
    assert apart.corrected == pytest.approx(12 * apart.p / 2)
    assert apart.test.endswith("; not told from none, a lead surely below 10 points counts as none")
    (open_, *_) = judge_by_hand(plan, "tpa", dict(zip(places, (50, 50), strict=True)))
    assert open_.single == OPEN
    (floor, *_) = judge_by_hand(plan, "tpa", dict(zip(places, (0, 0), strict=True)), least=0.10)
    assert (floor.single, floor.decision) == ("saturated", "saturated")
    assert "both at 0 of 100" in floor.outcome


def test_what_is_detectable_is_what_the_interval_at_the_corrected_level_tells(plan):
    survivors = {("T3", "DeiT-S"): 60, ("T3", "ResNet-50"): 40}
    (judged, *_) = judge_by_hand(plan, "tpa", survivors)
    # 20 of 100 images discordant, all gained: the standard error is sqrt(0.2 * 0.8) / 10 = 0.04;
    # of 17 claims the quantiles are 2.98 and 0.84.
    assert judged.detectable == pytest.approx((2.98 + 0.84) * 0.04, rel=0.15)
    assert judged.decision == REPRODUCED


def test_every_claim_holds_in_the_papers_own_figures():
    plan = build_plan(STUDY, IMAGENET)
    judged = [j for j in judge(plan, {}) if j.published is not None]
    for judgement in judged:
        least, most = judgement.supports
        assert least < judgement.published / 100 < most, judgement.claim.says
    tables = {judgement.claim.row[0] for judgement in judged}
    assert tables == {"T1", "T2", "T3", "T5", "T7", "T8", "T9"}


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
def plan():
    return build_plan(STUDY, DIGITS, tables=TABLES, seeds=1)


def judge_by_hand(plan, column, survivors, **settings):
    """Judge the claims about a column where so many of a row's 100 images survive, the first."""
    tables = tables_of(STUDY, plan, {})
    score = next(c for table in tables for c in table.shown if c.name == column)
    question = "fog-3" if score.score == ERROR else score.score
    batch = Batch(torch.zeros(100, 3, 1, 1), torch.zeros(100).long(), tuple(map(str, range(100))))
    ledgers = {
        (row.recipe.digest(), score.evaluator): verdicts(
            batch, question, (torch.arange(100) >= survivors[table.name, row.label]).long()
        )
        for table in tables
        for row in table.rows
        if (table.name, row.label) in survivors
    }
    stored = Verdicts(None, {})
    stored.ledger = lambda *cell: ledgers.get(cell)
    judged = judge_claims(STUDY.claims, tables, stored, **settings)
    return [judgement for judgement in judged if judgement.claim.column == column]


@pytest.mark.parametrize(
    ("kind", "row", "reference", "column", "holds", "fails"),
    [
        ("ahead", ("T3", "DeiT-S"), ("T3", "ResNet-50"), "tpa", (70, 40), (40, 70)),
        ("behind", ("T2", CNN_RECIPE), ("T2", "DeiT-S"), "clean", (60, 90), (90, 60)),
        (
            *("level", ("T2", "DeiT-S"), ("T2", "ResNet-50 GELU"), "autoattack"),
            *((50, 50), (80, 50)),
        ),
        (
            *("no gain", ("T2", "ResNet-50 with AdamW"), ("T2", "ResNet-50 ReLU"), "pgd-100"),
            *((30, 40), (70, 40)),
        ),
        # Of an error the model that survives less has the higher one.
        ("behind", ("T6", "cosine, SGD"), ("T6", "step, SGD"), ERROR, (70, 40), (40, 70)),
    ],
)
def test_each_kind_of_claim_is_decided_by_verdicts(
    plan, kind, row, reference, column, holds, fails
):
    for (ours, theirs), decision in ((holds, REPRODUCED), (fails, FAILED)):
        judged = judge_by_hand(plan, column, {row: ours, reference: theirs})
        found = next(
            j for j in judged if (j.claim.row, j.claim.of, j.claim.test) == (row, reference, kind)
        )
        assert (found.single, found.paired.n) == (decision, 100)
        favoured = {"behind": -1, "no gain": -1}.get(kind, 1) * (-1 if column == ERROR else 1)
        assert found.paired.difference == pytest.approx(favoured * (ours - theirs) / 100)
        assert found.row_sign == favoured


@pytest.mark.parametrize(
    ("gains", "decision", "mean", "reach", "images"),
    [
        # Student's t of three degrees of freedom is 3.1824; the spread of 10 to 40 is 12.910.
        ((10, 20, 30, 40), REPRODUCED, 0.25, 3.1824 * 0.12910 / 2, (0.0856, 0.0927)),
        ((-10, -20, -30, -40), FAILED, -0.25, 3.1824 * 0.12910 / 2, (0.0927, 0.0856)),
        ((10, 20, 30, -40), OPEN, 0.05, 3.1824 * 0.31091 / 2, (0.0855, 0.0928)),
    ],
)
def test_cutmix_is_judged_over_the_four_pairs_with_and_without_it(
    plan, gains, decision, mean, reach, images
):
    without = ("none", "randaug", "mixup", "randaug+mixup")
    having = ("cutmix", "randaug+cutmix", "mixup+cutmix", "randaug+mixup+cutmix")
    survivors = {("T4", label): 50 for label in without}
    survivors |= {("T4", w): 50 + gain for w, gain in zip(having, gains, strict=True)}
    judged = judge_by_hand(plan, "tpa", survivors)
    (found,) = (j for j in judged if j.claim.also)
    assert (found.single, found.paired.n, found.paired.p) == (decision, 100, None)
    assert found.paired.difference == pytest.approx(mean)
    # `images`: how far the ends of the four intervals over images lie, on average; of 10 images
    # gained and none lost the lower end lies hypot(0.1 - 0.0490, 0.0362) away.
    assert found.paired.low == pytest.approx(mean - math.hypot(reach, images[0]), abs=1e-4)
    assert found.paired.high == pytest.approx(mean + math.hypot(reach, images[1]), abs=1e-4)
    assert found.test.startswith("mean of 4 pairs, cutmix minus none and randaug+cutmix minus")


@pytest.mark.parametrize(
    ("survivors", "n", "decision"),
    [(0, 30, OPEN), (1, 30, OPEN), (4, 30, FAILED), (0, 100, REPRODUCED)],
)
def test_one_model_is_judged_by_the_interval_that_its_table_shows(survivors, n, decision):
    plan = build_plan(STUDY, DIGITS, tables=["T1"], evaluators=["autoattack"], seeds=2)
    own = share("autoattack-bounded", survivors, n)
    batch = Batch(torch.zeros(n, 3, 1, 1), torch.zeros(n).long(), tuple(map(str, range(n))))
    ledger = verdicts(batch, "autoattack-bounded", (torch.arange(n) >= survivors).long())
    stored = Verdicts(None, {})
    stored.ledger = lambda *cell: ledger
    (resnet, _) = judge_claims(STUDY.claims, tables_of(STUDY, plan, {}), stored)
    assert (resnet.single, resnet.published) == (decision, 0.0)
    assert resnet.trainings == "over 2 trainings of each row"
    # Two seeds that agree do not make more images.
    assert (resnet.paired.n, resnet.paired.p) == (n, None)
    # The difference is 0 minus what survives: less survival supports the claim.
    assert (resnet.paired.low, resnet.paired.high) == pytest.approx((-own.high, -own.low))
    assert resnet.supports == (-0.05, math.inf)


def test_a_claim_about_a_collapsed_model_says_so():
    plan = build_plan(STUDY, DIGITS, tables=["T2"])
    rows = {row.label: row.recipe.digest() for row in plan.tables[0].rows}
    runs = {digest: trial_run(digest) for digest in rows.values()}
    for label, outcome, decision in [
        ("ResNet-50 with AdamW", "collapsed", "cannot be judged"),
        ("ResNet-50 with AdamW", "failed", "not judged yet"),
    ]:
        runs[rows[label]] = trial_run(rows[label], outcome)
        judged = judge(plan, runs)
        found = next(judgement for judgement in judged if judgement.claim.row[1] == label)
        assert (found.decision, found.outcome) == (decision, f"{label} {outcome}")
        assert f" {outcome} -->" in claims_plot("claims", judged).svg
        assert "not judged yet" in answer(STUDY, judged)


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
        assert (found.decision, found.outcome) == expected


def test_the_answer_says_who_is_ahead_whatever_the_sign_of_the_difference():
    def said(sign, difference, low, high):
        claim = Claim(says="s", test="ahead", row="T5/a", of="T5/b", column="c", headline="h")
        paired = Paired(difference, low, high, 9, None)
        return answer(STUDY, [Judgement(claim, OPEN, "t", paired, row_sign=sign)])

    ahead = "the transformer is ahead h (+10.0 points [+5.0, +15.0], n = 9)"
    assert f"Here, each comparison by itself, {ahead}" in said(1, 0.1, 0.05, 0.15)
    assert "ahead h (+10.0 points [+5.0, +15.0], n = 9)" in said(-1, -0.1, -0.15, -0.05)
    assert "behind h (-10.0 points" in said(-1, 0.1, 0.05, 0.15)
    assert "not to be told apart h (+0.0 points [-5.0" in said(-1, 0.0, -0.05, 0.05)


def test_a_claim_compares_as_many_trainings_of_each_row_and_says_how_many(plan):
    """Of T3 and T4 at their default seeds: ResNet-50, which is T4's "none", has three."""
    seeded = build_plan(STUDY, DIGITS, tables=["T3", "T4"])
    survivors = {("T3", "DeiT-S"): 70, ("T3", "ResNet-50"): 40}
    survivors |= {("T4", row.label): 60 for row in plan.tables[2].rows}
    single = judge_by_hand(plan, "tpa", survivors)
    default = judge_by_hand(seeded, "tpa", survivors)
    headline, best, cutmix = (j.claim.headline != "" for j in default)
    assert (headline, best, cutmix) == (True, False, False)
    assert [j.trainings for j in single] == ["in this one training"] * 3
    assert [j.trainings for j in default[1:]] == ["in this one training"] * 2
    assert default[0].trainings == f"over {DIGITS.headline_seeds} trainings of each row"
    # The headline waits for the other trainings; the others are judged by the first.
    assert [j.single for j in default] == ["not judged yet", FAILED, OPEN]


def test_a_floor_is_no_finding_and_a_difference_that_is_decided_there_is_one(plan):
    def of(column, survivors):
        return {
            (j.claim.test, *j.claim.row): (j.single, j.decision, j.outcome)
            for j in judge_by_hand(plan, column, survivors)
            if j.paired
        }

    deit, relu = ("T2", "DeiT-S"), ("T2", "ResNet-50 ReLU")
    gelu, adamw = ("T2", "ResNet-50 GELU"), ("T2", "ResNet-50 with AdamW")
    floor = "both at 0 of 100, the floor: a weaker attack or easier images would help, not more "
    saturated = ("saturated", "saturated", floor + "images")
    judged = of("autoattack", {deit: 0, gelu: 0, relu: 0})
    assert judged == {("level", *deit): saturated, ("ahead", *gelu): saturated}
    judged = of("autoattack", {deit: 5, gelu: 6, relu: 6})  # 6 of 100 is no floor
    assert [single for single, _, _ in judged.values()] == [OPEN, OPEN]
    assert of("pgd-100", {adamw: 2, relu: 4})["no gain", *adamw][:2] == ("saturated", "saturated")
    # A difference in spite of the floor: 0 of 100 and 100 of 100 are not at one end.
    assert of("pgd-100", {adamw: 0, relu: 100})["no gain", *adamw][1] == REPRODUCED
    ceiling = of("clean", {("T2", CNN_RECIPE): 98, deit: 97})["behind", "T2", CNN_RECIPE]
    assert ceiling[0] == "saturated"
    assert ceiling[2].startswith("at 97 and 98 of 100, the ceiling: a stronger attack or harder")


def test_an_error_is_at_its_ceiling_where_models_err_on_all_but_a_few(plan):
    few = {("T6", "cosine, SGD"): 97, ("T6", "step, SGD"): 98}
    (judged,) = (j for j in judge_by_hand(plan, ERROR, few) if j.paired)
    assert (judged.decision, "the ceiling" in judged.outcome) == ("saturated", True)


def test_a_table_marks_a_column_in_which_all_rows_are_saturated(plan):
    tables = tables_of(STUDY, plan, {})
    (t3,) = (table for table in tables if table.name == "T3")

    def marks(survivors):
        batch = Batch(torch.zeros(50, 3, 1, 1), torch.zeros(50).long(), tuple(map(str, range(50))))
        ledgers = {
            row.recipe.digest(): verdicts(batch, "tpa", (torch.arange(50) >= count).long())
            for row, count in zip(t3.rows, survivors, strict=False)
        }
        stored = Verdicts(None, {})
        stored.ledger = lambda digest, _: ledgers.get(digest)
        return [mark for mark in stored.saturations(t3) if mark]

    assert marks([0, 2]) == ["saturated, at the floor"]
    assert marks([0, 3]) == marks([0]) == []


def test_holms_correction_is_over_all_claims_that_a_difference_decides(plan):
    row, other = ("T2", "ResNet-50 GELU"), ("T2", "ResNet-50 ReLU")
    judged = judge_by_hand(plan, "autoattack", {row: 58, other: 50})
    (found,) = (j for j in judged if j.paired)
    # 8 of 100 gained, none lost: of the latter at most m = 1 - (p / 2)^(1 / 100) at 1 - p, of the
    # former at least 0.08 - (0.08^2 - m^2)^0.5, of which 8 and more have a chance of p / 2.
    most = 1 - (found.p / 2) ** 0.01
    least = 0.08 - (0.08**2 - most**2) ** 0.5
    assert binom.sf(7, 100, least) == pytest.approx(found.p / 2, rel=1e-3)
    assert 0.005 < found.p < 0.0078  # the exact McNemar's is 2 / 2^8
    # Of T2 five, of T3 one, of T4 two, of T6 and T11 two each.
    assert found.corrected == pytest.approx(12 * found.p)
    assert (found.single, found.decision) == (REPRODUCED, OPEN)
    (found,) = (j for j in judge_by_hand(plan, "autoattack", {row: 65, other: 50}) if j.paired)
    assert (found.single, found.decision) == (REPRODUCED, REPRODUCED)


def test_p_is_of_the_test_that_the_interval_makes(plan):
    """By each test: its interval at 1 - p ends where the claim's support does."""
    places = [("T2", "DeiT-S"), ("T2", "ResNet-50 GELU"), ("T2", "ResNet-50 ReLU")]
    judged = judge_by_hand(plan, "autoattack", dict(zip(places, (53, 60, 50), strict=True)))
    level, ahead = (j for j in judged if j.paired)
    low, high = level.paired.at(1 - level.p)
    assert level.paired.difference == pytest.approx(-0.07)
    assert high == pytest.approx(-0.05, abs=1e-5) and low < -0.05
    assert ahead.paired.at(1 - ahead.p)[0] == pytest.approx(0, abs=1e-5)
    assert {level.single, level.decision} == {OPEN}
