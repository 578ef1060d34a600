from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f, t

from grid.plan import build_plan
from grid.report.effects import contrasts, grid_effects, variance_shares
from grid.study import load_study
from tests.test_report import trial_run
from trainables.scale import DIGITS


def planned(tmp_path, toml, *, seeds=1, **settings):
    path = tmp_path / "s.toml"
    path.write_text(f'name="s"\n{toml}')
    study = load_study(str(path)).model_copy(update={"settings": settings})
    return study, build_plan(study, DIGITS, seeds=seeds)


def frame_of(effect, *, noise=0.01, replicates=4):
    rng = np.random.default_rng(0)
    rows = [
        {"a": a, "b": b, "seed": str(s), "score": effect(a, b) + noise * rng.standard_normal()}
        for a, b, s in product(("x", "y"), ("u", "v"), range(replicates))
    ]
    return pd.DataFrame(rows)


def test_a_balanced_two_way_analysis_is_the_textbooks():
    frame = frame_of(lambda a, b: 0.1 * (a == "y") + 0.05 * ((a == "y") & (b == "v")), noise=0.05)
    cells = frame.pivot_table(index=["a", "b"], columns="seed", values="score").to_numpy()
    cells = cells.reshape(2, 2, 4)
    grand = cells.mean()
    squares = {
        "a": 8 * ((cells.mean(axis=(1, 2)) - grand) ** 2).sum(),
        "b": 8 * ((cells.mean(axis=(0, 2)) - grand) ** 2).sum(),
    }
    between = 4 * ((cells.mean(axis=2) - grand) ** 2).sum()
    squares["a x b"] = between - squares["a"] - squares["b"]
    total = ((cells - grand) ** 2).sum()
    residual = (total - between) / 12
    shares = variance_shares(frame, ["a", "b"])
    assert list(shares["share"]) == sorted(shares["share"], reverse=True)
    for row in shares.itertuples():
        assert row.share == pytest.approx(squares[row.axis] / total)
        assert row.p == pytest.approx(f.sf(squares[row.axis] / residual, 1, 12))


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}])
def test_a_grids_effects_are_read_from_its_runs(tmp_path, settings):
    study, plan = planned(
        tmp_path,
        'base="resnet50"\n[axes]\nactivation=["relu","gelu"]\n'
        'optimizer=["sgd","adamw"]\naugmentation=["none","cutmix"]\n',
        **settings,
    )
    runs = {
        trial.digest: trial_run(trial.digest, tpa=0.8 + 0.1 * (trial.recipe.activation == "gelu"))
        for trial in plan
    }
    (effects,) = grid_effects(study, plan, runs)
    assert (effects.score, effects.trials) == ("tpa", 8)
    assert tuple(effects.shares.loc[0, ["axis", "share"]]) == ("activation", pytest.approx(1))
    gelu = next(row for row in effects.contrasts.itertuples() if row.axis == "activation")
    assert (gelu.value, gelu.reference) == ("gelu", "relu")
    # Without noise the interval is the difference.
    assert (gelu.difference, gelu.low, gelu.high) == pytest.approx((0.1, 0.1, 0.1))
    some = dict(list(runs.items())[:7])
    assert grid_effects(study, plan, some) == []


def test_an_empty_cell_takes_its_interaction_out_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = [
        {"a": a, "b": b, "c": c, "score": 0.1 * (c == "q") + 0.01 * rng.standard_normal()}
        for a, b, c, _ in product("xy", "uv", "pq", range(3))
        if (a, b) != ("x", "v")
    ]
    shares = variance_shares(pd.DataFrame(rows), ["a", "b", "c"])
    assert tuple(shares.loc[0, ["axis", "share"]]) == ("c", pytest.approx(0.97, abs=0.02))
    assert set(shares["axis"][1:]) == {"a", "b", "a x c", "b x c"}
    assert (shares["share"][1:] < 0.02).all()


def test_interactions_that_are_an_axis_in_disguise_are_left_out():
    half = pd.DataFrame(
        [
            {"a": a, "b": b, "c": "pq"[(a == "x") ^ (b == "u")], "score": 0.1 * (a == "x") + s / 99}
            for a, b, s in product("xy", "uv", range(3))
        ]
    )
    # c is the interaction of a and b.
    assert set(variance_shares(half, ["a", "b", "c"])["axis"]) == {"a", "b", "c"}
    assert len(variance_shares(half.assign(b=half["a"]), ["a", "b"])) == 0


def test_a_grids_effects_leave_its_teachers_out_and_name_them_by_their_base(tmp_path):
    study, plan = planned(
        tmp_path,
        'base="deit_small"\n[axes]\n'
        'teacher=["none","resnet50","resnet50_aligned"]\nactivation=["relu","gelu"]\n'
        'curriculum=["none","study"]\n',
        seeds=2,
    )
    runs = {t.digest: trial_run(t.digest, clean=n / 40) for n, t in enumerate(plan)}
    (effects,) = grid_effects(study, plan, runs)
    assert len(plan.trials) == 24 + 4
    assert effects.trials == 24
    compared = effects.contrasts[["axis", "value", "reference"]]
    assert set(compared.itertuples(index=False, name=None)) == {
        ("teacher", "resnet50", "none"),
        ("teacher", "resnet50_aligned", "none"),
        ("activation", "gelu", "relu"),
        ("curriculum", "study", "none"),
    }


def test_a_samples_effects_are_those_of_a_linear_model_of_its_axes(tmp_path):
    study, plan = planned(
        tmp_path,
        'base="adversarial_deit_small"\nsample=16\n[axes]\nactivation=["relu","gelu","silu"]\n'
        '"adversary.steps"=[1,2,3]\nlabel_smoothing=[0.0,0.1,0.2,0.3]\nclip_grad=[1.0,2.0]\n',
    )
    noise = np.random.default_rng(0).normal(0, 0.001, 16)

    def score(recipe):
        return 0.5 + 0.1 * (recipe.activation == "gelu") - 0.05 * (recipe.adversary.steps == 3)

    runs = {
        trial.digest: trial_run(trial.digest, clean=score(trial.recipe) + wobble)
        for trial, wobble in zip(plan, noise, strict=True)
    }
    (effects,) = grid_effects(study, plan, runs)
    assert effects.trials == 16
    assert set(effects.shares["axis"][:2]) == {"activation", "adversary.steps"}
    rows = {(row.axis, row.value, row.reference): row for row in effects.contrasts.itertuples()}
    assert len(rows) == 2 + 2 + 3 + 1
    true = {("activation", "gelu", "relu"): 0.1, ("adversary.steps", "3", "1"): -0.05}
    for which, difference in true.items():
        assert rows[which].difference == pytest.approx(difference, abs=0.005)
        assert rows[which].low < difference < rows[which].high


def test_a_contrast_of_a_balanced_design_is_the_mean_difference():
    frame = frame_of(lambda a, b: 0.1 * (a == "y") + 0.3 * (b == "v"), noise=0.02)
    (row,) = (row for row in contrasts(frame, ["a", "b"]).itertuples() if row.axis == "a")
    means = frame.groupby("a")["score"].mean()
    assert (row.value, row.reference) == ("y", "x")
    assert row.difference == pytest.approx(means["y"] - means["x"])
    # 16 trials less 3 terms; the textbook's standard error of a difference of two means of 8.
    residual = frame["score"] - frame.groupby("a")["score"].transform("mean")
    residual -= frame.groupby("b")["score"].transform("mean") - frame["score"].mean()
    half = t.ppf(0.975, 13) * np.sqrt((residual**2).sum() / 13 * (1 / 8 + 1 / 8))
    assert (row.high - row.low) / 2 == pytest.approx(half)


def test_only_the_contrasts_that_the_trials_can_tell_apart_are_there():
    # b varies with a alone, so that neither has a difference of its own; c's is 0.1.
    rows = [
        {"a": a, "b": b, "c": c, "score": 0.1 * (c == "q") + 0.001 * n}
        for (a, b), c, n in product(("xu", "yv"), "pq", range(3))
    ]
    (row,) = contrasts(pd.DataFrame(rows), ["a", "b", "c"]).itertuples()
    assert (row.axis, row.value, row.reference) == ("c", "q", "p")
    assert row.difference == pytest.approx(0.1)
    assert contrasts(pd.DataFrame(rows[:1] + rows[6:7]), ["a"]).empty
