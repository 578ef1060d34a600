"""AutoAttack, bounded: what it runs on which images, and what its interval covers."""

import re
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from benchmarks import bounded
from evaluators import answering, evaluator_named
from evaluators.autoattack import AutoAttack
from evaluators.autoattack_bounded import BoundedAutoAttack
from evaluators.base import Batch, judge_images, verdicts
from evaluators.intervals import compare, image_scores, notes_on_rest, rest_of
from evaluators.ledger import SPARED
from grid.plan import build_plan
from grid.report.tables import tables_of
from grid.run import main
from grid.study import load_study
from tests.tiny import trained_classifier
from trainables.data.base import Shard
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
IMAGES = 40
THRIFTY = replace(DIGITS, square_queries=20, autoattack_subset=IMAGES, autoattack_bound=0.2)
NAME = "autoattack-bounded"


def ledger_of(stages):
    """Return the verdicts of images with these stages; what is not broken survives."""
    images = torch.zeros(len(stages), 3, 2, 2)
    labels = torch.zeros(len(stages), dtype=torch.long)
    batch = Batch(images, labels, tuple(f"image {i:03}" for i in range(len(stages))))
    survived = torch.tensor([stage in (None, SPARED) for stage in stages])
    return verdicts(batch, NAME, labels, survived_B=survived, stage=stages)


def scores_of(stages):
    evaluator = BoundedAutoAttack(DIGITS)
    return {score.name: score for score in evaluator.summarize(ledger_of(stages))}


def test_the_last_attacks_run_on_the_slice_alone_and_there_verdicts_are_autoattacks(digits):
    classifier = trained_classifier()
    evaluator = BoundedAutoAttack(THRIFTY, radii=[8 / 255])
    ours_all = judge_images(evaluator, classifier, digits, device=CPU)
    exact = judge_images(AutoAttack(THRIFTY, radii=[8 / 255]), classifier, digits, device=CPU)
    pairs = list(zip(ours_all.to_pylist(), exact.to_pylist(), strict=True))
    spared = [(ours, theirs) for ours, theirs in pairs if ours["stage"] == SPARED]
    inside = [ours for ours, _ in pairs if ours["queries"] is not None]
    assert len(spared) > 5 and len(inside) > 2
    assert all(ours["survived"] for ours, _ in spared)
    for ours, theirs in pairs:
        assert ours["image_id"] == theirs["image_id"]
        if ours["stage"] != SPARED:
            assert ours["survived"] == theirs["survived"]
    parts = [Shard(0, 7), Shard(7, 30), Shard(30, IMAGES)]
    split = [judge_images(evaluator, classifier, digits, device=CPU, shard=s) for s in parts]
    by_image = [("image_id", "ascending")]
    assert pa.concat_tables(split).sort_by(by_image).equals(ours_all.sort_by(by_image))


def test_none_broken_of_40_leaves_at_most_7_points_of_the_survivors():
    # 1 - 0.05 ** (1 / 40) = 0.0722
    text = "0 of 40 survivors in the slice broken by the last attacks: at most 7.2 points of the 60"
    (note,) = notes_on_rest(ledger_of([None] * 40 + [SPARED] * 60))
    assert note == f"{NAME}: {text} that they spared"
    assert notes_on_rest(ledger_of([None] * 40)) == []
    # Of 100 images, 40 survive the slice's attacks and 60 were spared: up to 0.0722 * 60 of 100.
    score = scores_of([None] * 40 + [SPARED] * 60)[NAME]
    assert (score.value, score.n, score.high) == (1.0, 100, 1.0)
    assert score.low == pytest.approx(
        1 - ((1 - 0.9630) ** 2 + (0.6 * 0.0722) ** 2) ** 0.5, abs=1e-4
    )


def test_the_estimate_takes_the_slices_broken_share_from_those_that_were_spared():
    # APGD leaves 80 of 100; of the slice's 20 the last attacks break 2: 6 of the other 60 would go.
    stages = ["apgd-ce"] * 20 + ["fab-t", "apgd-t, other targets"] + [None] * 18 + [SPARED] * 60
    scores = scores_of(stages)
    assert scores[NAME].value == pytest.approx(0.72)
    assert scores[f"{NAME}/after-apgd-t"].value == 0.80
    assert f"{NAME}/after-fab-t" not in scores
    # Clopper-Pearson, one-sided, of 2 of 20: 0.0181 to 0.2826.
    low, estimate, high = rest_of(ledger_of(stages), NAME).hidden()
    assert (low, estimate, high) == pytest.approx((0.6 * 0.0181, 0.06, 0.6 * 0.2826), abs=1e-4)
    assert scores[NAME].low < 0.72 - (high - estimate)
    assert scores[NAME].high > 0.72 + (estimate - low)


def test_a_slice_without_survivors_says_nothing_of_the_others():
    score = scores_of(["apgd-ce"] * 10 + [SPARED] * 10)[NAME]
    assert (score.value, score.low) == (0.5, 0.0)


def test_a_comparison_is_widened_by_what_either_sides_spared_images_may_hide():
    ours = image_scores(ledger_of([None] * 40 + [SPARED] * 60), NAME)
    theirs = image_scores(ledger_of(["apgd-ce"] * 50 + [None] * 50), NAME)
    plain = compare([dict(ours)], [dict(theirs)])
    widened = compare([ours], [theirs])
    assert (plain.p, widened.p) == (pytest.approx(0, abs=1e-6), None)
    assert widened.difference == plain.difference == 0.5
    # Only the first may lose: its low end moves, and by 0.0722 * 60 of 100, at a right angle.
    reach = ((0.5 - plain.low) ** 2 + (0.6 * 0.0722) ** 2) ** 0.5
    assert (widened.low, widened.high) == (pytest.approx(0.5 - reach, abs=1e-4), plain.high)


def test_the_slice_is_the_smallest_that_leaves_the_bound():
    def in_slice(images, bound):
        return BoundedAutoAttack(replace(DIGITS, autoattack_bound=bound))._slice_size(images)

    # Of 5,000 images (1 - 0.05 ** (1 / 144)) * 4856 / 5000 = 0.0200, and with 143 it is 0.0201.
    assert in_slice(5000, 0.02) == 144
    assert in_slice(150, 0.05) == 42
    assert in_slice(1, 0.5) == 1


def test_a_tighter_bound_is_another_question(digits):
    identities = [
        BoundedAutoAttack(replace(DIGITS, autoattack_bound=bound)).identity(digits)
        for bound in (0.05, 0.01)
    ]
    assert identities[0]["slice"] < identities[1]["slice"]
    assert identities[0]["version"] == "bounded" != AutoAttack(DIGITS).identity(digits)["version"]


def test_at_imagenet_it_costs_less_than_a_quarter_and_only_digits_takes_it_for_autoattack():
    cheap, exact = (evaluator_named(name, IMAGENET) for name in (NAME, "autoattack"))
    ratio = cheap.cost(50_000, withstanding=0.35) / exact.cost(50_000, withstanding=0.35)
    assert 0.05 < ratio < 0.25
    assert answering("autoattack", DIGITS) == NAME
    assert answering("autoattack", IMAGENET) == "autoattack"
    assert answering("autoattack", replace(DIGITS, autoattack="exact")) == "autoattack"
    assert answering("pgd", DIGITS) == "pgd"


@pytest.mark.parametrize(
    ("words", "judge", "titles"),
    [
        ([], NAME, ["AutoAttack, bounded (digits)", "after APGD-T, 2 targets"]),
        (["--exact"], "autoattack", ["AutoAttack (digits)", "after APGD-T", "after FAB-T"]),
    ],
)
def test_the_digits_study_takes_the_bounded_evaluator_unless_exact_is_asked_for(
    words, judge, titles, capsys
):
    assert main(["--plan", "--all", "--tables", "T2", *words]) == 0
    judges = re.findall(r"autoattack[a-z-]*", capsys.readouterr().out)
    assert set(judges) == {judge}
    scale = replace(DIGITS, autoattack="exact") if words else DIGITS
    study = load_study("bai2021")
    plan = build_plan(study, scale, tables=["T2"])
    (table,) = tables_of(study, plan, {})
    columns = {c.title: c for c in table.shown if c.name.startswith("autoattack")}
    assert [t for t in columns if t not in ("Clean, same images", "after APGD-CE")] == titles
    assert (columns[titles[0]].name, columns[titles[0]].score) == ("autoattack", judge)
    assert table.published["DeiT-S", columns[titles[0]].name][0] == 35.5


@pytest.mark.slow
@pytest.mark.parametrize("adversarial", [False, True])
def test_the_interval_holds_what_all_of_autoattack_leaves(adversarial):
    scale = replace(DIGITS, autoattack_subset=60)
    for seed in range(2):
        sides = bounded.beside_exact(bounded.SHAPES[0], adversarial, seed, scale)
        assert all(side.covers for side in sides.values())
        passes = [side.passes for side in sides.values()]
        assert passes == sorted(passes)  # the narrower the bound, the more
        assert passes[0] < 1
