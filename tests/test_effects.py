from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f, f_oneway, ttest_rel

from grid.plan import build_plan
from grid.report.effects import (
    contrasts,
    grid_effects,
    strongest_interaction,
    variance_shares,
)
from grid.report.plots import effects_plot
from grid.study import load_study
from tests.test_report import trial_run
from trainables.scale import DIGITS


def planned(tmp_path, toml, *, seeds=1, **settings):
    path = tmp_path / "s.toml"
    path.write_text(toml)
    study = load_study(str(path)).model_copy(update={"settings": settings})
    return study, build_plan(study, DIGITS, seeds=seeds)


def frame_of(effect, *, noise=0.01, replicates=4):
    rng = np.random.default_rng(0)
    rows = [
        {"a": a, "b": b, "seed": str(s), "score": effect(a, b) + noise * rng.standard_normal()}
        for a, b, s in product(("x", "y"), ("u", "v"), range(replicates))
    ]
    return pd.DataFrame(rows)


def test_one_axis_alone_is_the_one_way_analysis_of_variance():
    frame = frame_of(lambda a, b: 0.1 * (a == "y"), noise=0.05)
    (share,) = variance_shares(frame, ["a"])
    groups = [frame["score"][frame["a"] == value] for value in ("x", "y")]
    between = sum(len(g) * (g.mean() - frame["score"].mean()) ** 2 for g in groups)
    total = ((frame["score"] - frame["score"].mean()) ** 2).sum()
    assert share.share == pytest.approx(between / total)
    assert share.p == pytest.approx(f_oneway(*groups).pvalue)


def test_an_interaction_is_told_from_main_effects():
    frame = frame_of(lambda a, b: 0.2 * ((a == "y") ^ (b == "v")))
    first, *others = variance_shares(frame, ["a", "b"])
    assert first.axis == "a x b"
    assert first.share > 0.95
    assert all(share.share < 0.05 for share in others)


def test_a_balanced_two_way_analysis_is_the_textbooks():
    frame = frame_of(lambda a, b: 0.1 * (a == "y") + 0.05 * ((a == "y") & (b == "v")), noise=0.05)
    scores = frame.pivot_table(index=["a", "b"], columns="seed", values="score").to_numpy()
    cells = scores.reshape(2, 2, 4)
    grand = cells.mean()
    squares = {
        "a": 8 * ((cells.mean(axis=(1, 2)) - grand) ** 2).sum(),
        "b": 8 * ((cells.mean(axis=(0, 2)) - grand) ** 2).sum(),
    }
    between = 4 * ((cells.mean(axis=2) - grand) ** 2).sum()
    squares["a x b"] = between - squares["a"] - squares["b"]
    total = ((cells - grand) ** 2).sum()
    residual = (total - between) / 12
    for share in variance_shares(frame, ["a", "b"]):
        assert share.share == pytest.approx(squares[share.axis] / total)
        assert share.p == pytest.approx(f.sf(squares[share.axis] / residual, 1, 12))


def test_the_strongest_interaction_is_told_by_its_means():
    frame = frame_of(lambda a, b: 0.2 * ((a == "y") ^ (b == "v")))
    found = strongest_interaction(frame, variance_shares(frame, ["a", "b"]))
    assert found.axis == "a x b"
    expected = {("x", "u"): 0, ("x", "v"): 0.2, ("y", "u"): 0.2, ("y", "v"): 0}
    assert found.means == {pair: pytest.approx(mean, abs=0.02) for pair, mean in expected.items()}
    additive = frame_of(lambda a, b: 0.2 * (a == "y"), noise=0.05)
    assert strongest_interaction(additive, variance_shares(additive, ["a", "b"])) is None


def test_a_contrast_is_a_paired_t_test():
    frame = frame_of(lambda a, b: 0.1 * (a == "y") + 0.3 * (b == "v"), noise=0.02)
    found = next(c for c in contrasts(frame, ["a", "b"]) if c.axis == "a")
    sides = [frame[frame["a"] == v].sort_values(["b", "seed"])["score"] for v in ("y", "x")]
    expected = ttest_rel(*sides).confidence_interval(0.95)
    assert (found.value, found.reference, found.pairs) == ("y", "x", 8)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.is_told_apart == (expected.low > 0)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}])
def test_a_grids_effects_are_read_from_its_runs(tmp_path, settings):
    study, plan = planned(
        tmp_path,
        'name="grid"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n'
        'optimizer=["sgd","adamw"]\naugmentation=["none","cutmix"]\n',
        **settings,
    )
    runs = {
        trial.digest: trial_run(trial.digest, clean=0.8 + 0.1 * (trial.recipe.activation == "gelu"))
        for trial in plan
    }
    (effects,) = grid_effects(study, plan, DIGITS, runs)
    assert (effects.score, effects.trials) == ("clean", 8)
    assert effects.shares[0].axis == "activation"
    assert effects.shares[0].share == pytest.approx(1)
    gelu = next(c for c in effects.contrasts if c.axis == "activation")
    assert (gelu.value, gelu.reference, gelu.pairs) == ("gelu", "relu", 4)
    assert gelu.difference == pytest.approx(0.1)
    # Four pairs that differ alike tell of no spread, and so of no interval.
    assert (gelu.low, gelu.high, gelu.is_told_apart) == (None, None, False)
    assert "pairs are too alike" in effects_plot(effects).caption


def test_too_few_trials_have_no_effects(tmp_path):
    study, plan = planned(
        tmp_path, 'name="pair"\nbase="resnet50"\n[axes]\nactivation=["relu","gelu"]\n'
    )
    runs = {t.digest: trial_run(t.digest, clean=0.5) for t in plan}
    assert grid_effects(study, plan, DIGITS, runs) == []


def test_an_empty_cell_takes_its_interaction_out_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = [
        {"a": a, "b": b, "c": c, "score": 0.1 * (c == "q") + 0.01 * rng.standard_normal()}
        for a, b, c, _ in product("xy", "uv", "pq", range(3))
        if (a, b) != ("x", "v")
    ]
    first, *others = variance_shares(pd.DataFrame(rows), ["a", "b", "c"])
    assert (first.axis, first.share) == ("c", pytest.approx(0.97, abs=0.02))
    assert {share.axis for share in others} == {"a", "b", "a x c", "b x c"}
    assert all(share.share < 0.02 for share in others)


def test_interactions_that_are_an_axis_in_disguise_are_left_out():
    half = pd.DataFrame(
        [
            {"a": a, "b": b, "c": "pq"[(a == "x") ^ (b == "u")], "score": 0.1 * (a == "x") + s / 99}
            for a, b, s in product("xy", "uv", range(3))
        ]
    )
    first, *others = variance_shares(half, ["a", "b", "c"])  # c is the interaction of a and b
    assert first.axis == "a"
    assert {share.axis for share in others} == {"b", "c"}


def test_axes_that_leave_nothing_to_judge_by_have_no_shares_but_contrasts(tmp_path):
    study, plan = planned(
        tmp_path,
        'name="each"\nbase="deit_small"\nmode="one-at-a-time"\n[axes]\nactivation=["relu","silu"]\n'
        'optimizer=["sgd"]\nscheduler=["step"]\nepochs=[50,60]\naugmentation=["none","cutmix"]\n',
    )
    runs = {t.digest: trial_run(t.digest, clean=n / 20) for n, t in enumerate(plan)}
    (effects,) = grid_effects(study, plan, DIGITS, runs)
    assert (effects.trials, effects.shares, effects.interaction) == (9, (), None)
    aliased = pd.DataFrame(
        [{"a": x, "b": x, "score": s} for x, s in zip("uvw" * 4, range(12), strict=True)]
    )
    assert variance_shares(aliased, ["a", "b"]) == []


def test_a_grids_effects_leave_its_teachers_out_and_name_them_by_their_base(tmp_path):
    study, plan = planned(
        tmp_path,
        'name="taught"\nbase="deit_small"\n[axes]\n'
        'teacher=["none","resnet50","resnet50_aligned"]\nactivation=["relu","gelu"]\n'
        'curriculum=["none","study"]\n',
        seeds=2,
    )
    runs = {t.digest: trial_run(t.digest, clean=n / 40) for n, t in enumerate(plan)}
    (effects,) = grid_effects(study, plan, DIGITS, runs)
    assert len(plan.trials) == 24 + 4
    assert effects.trials == 24
    compared = {(c.axis, c.value, c.reference, c.pairs) for c in effects.contrasts}
    assert compared == {
        ("teacher", "resnet50", "none", 8),
        ("teacher", "resnet50_aligned", "none", 8),
        ("activation", "gelu", "relu", 12),
        ("curriculum", "study", "none", 12),
    }
