"""Which choice matters: the effect of each axis of a grid on each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from evaluators import EVALUATORS, headline_of
from evaluators.ledger import CONFIDENCE
from grid.plan import Plan
from grid.study import Study
from trainables.store.tracking import TrialRun

FEWEST_TRIALS = 8
ROUNDING = 1e-9  # of differences of shares, each a multiple of one image
CONTRAST = ["axis", "value", "reference", "difference", "low", "high", "pairs"]
SPARE_TRIALS = 4  # interactions are fitted where the trials outnumber the terms by this many


@dataclass(frozen=True)
class Effects:
    """The effects of a grid's axes on one score over `trials` trials, in shares.

    shares: of the score's variance, by `axis` (or an interaction, 'a x b'), with the p of its F
    test, the largest first. contrasts: see `contrasts`.
    """

    score: str
    trials: int
    shares: pd.DataFrame
    contrasts: pd.DataFrame


def grid_effects(study: Study, plan: Plan, runs: Mapping[str, TrialRun]) -> list[Effects]:
    """Return the effects on each evaluator's headline score where eight trials or more have it."""
    seeds = {trial.digest: str(trial.recipe.seed) for trial in plan}
    scores = {score for digest in plan.grid if digest in runs for score in runs[digest].metrics}
    judged = [name for name in EVALUATORS if any(score.startswith(name) for score in scores)]
    effects = []
    for score in filter(None, map(headline_of, judged)):
        frame = pd.DataFrame(
            {**labels, "seed": seeds[digest], "score": runs[digest].metrics[score]}
            for digest, labels in plan.grid.items()
            if digest in runs and score in runs[digest].metrics
        )
        axes = frame.columns.drop(["seed", "score"], errors="ignore")
        varied = [axis for axis in axes if frame[axis].nunique() > 1]
        if len(frame) >= FEWEST_TRIALS and varied and np.ptp(frame["score"]) > 0:
            shares = variance_shares(frame, varied)
            differences = (
                fitted_contrasts(frame, {axis: _in_order(frame[axis], study) for axis in varied})
                if study.sample
                else contrasts(frame, varied)
            )
            effects.append(Effects(score, len(frame), shares, differences))
    return effects


def _in_order(labels: pd.Series, study: Study) -> list[str]:
    """Return an axis's labels in the order of the study, behind what is the base's own."""
    order = list(study.axes.get(str(labels.name), study.base))
    return sorted(labels.unique(), key=lambda label: order.index(label) if label in order else -1)


def leading(by_score: Sequence[Effects]) -> str:
    """Say in a sentence which axis explains the most of each score; '' where none is known."""
    sentences = [
        f"{first.axis} explains {100 * first.share:.0f} % of the variance of {effects.score} "
        f"(p {first.p:.2g}, {effects.trials} trials)"
        for effects in by_score
        for first in effects.shares.head(1).itertuples()
    ]
    return f"Of the axes of this grid {'; '.join(sentences)}." if sentences else ""


def variance_shares(frame: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return `axis`, `share` and `p` of an analysis of variance with type II sums of squares.

    Pairwise interactions are part of it where the trials are enough, and such, to tell them apart.
    Empty where no trial is left to judge the axes by, or where axes only vary together.
    """
    mains = [_term(axis) for axis in axes]
    full = [
        pair
        for pair in combinations(axes, 2)
        if pd.crosstab(*(frame[a] for a in pair)).all(axis=None)
    ]
    levels = {axis: frame[axis].nunique() - 1 for axis in axes}
    needed = 1 + sum(levels.values()) + sum(levels[a] * levels[b] for a, b in full)
    pairs = (
        [f"{_term(a)}:{_term(b)}" for a, b in full] if len(frame) >= needed + SPARE_TRIALS else []
    )
    designs = (ols("score ~ " + " + ".join(terms), data=frame) for terms in (mains + pairs, mains))
    model = next(filter(_is_estimable, designs), None)
    if model is None:
        return pd.DataFrame(columns=["axis", "share", "p"])
    table = anova_lm(model.fit(), typ=2).drop(index="Residual")
    total = float(((frame["score"] - frame["score"].mean()) ** 2).sum())
    names = table.index.str.replace(r'C\(Q\("([^"]+)"\)\)', r"\1", regex=True)
    names = names.str.replace(":", " x ")
    shares = {"axis": names, "share": table["sum_sq"] / total, "p": table["PR(>F)"]}
    return pd.DataFrame(shares).sort_values("share", ascending=False, ignore_index=True)


def _term(axis: str) -> str:
    """Return a column's categories in a formula; an axis may have a dot."""
    return f'C(Q("{axis}"))'


def _is_estimable(model: Any) -> bool:
    rows, columns = model.exog.shape
    return bool(rows > columns == np.linalg.matrix_rank(model.exog))


def contrasts(frame: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return each value of each axis minus its first one, over pairs of trials alike in all else.

    Columns: axis, value, reference, pairs, their mean difference, and low and high of its 95 %
    interval by Student's t; nan where all pairs differ alike.
    """
    rows = []
    for axis in axes:
        others = [column for column in (*axes, "seed") if column != axis]
        scores = frame.pivot_table("score", index=others, columns=axis, sort=False)
        reference, *values = frame[axis].unique()
        for value in values:
            differences = (scores[value] - scores[reference]).dropna()
            if len(differences) < 2:
                continue
            low = high = float("nan")
            if np.ptp(differences) >= ROUNDING:
                low, high = ttest_1samp(differences, 0).confidence_interval(CONFIDENCE)
            rows.append((axis, value, reference, differences.mean(), low, high, len(differences)))
    return pd.DataFrame(rows, columns=CONTRAST)


def fitted_contrasts(frame: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return `contrasts` of a linear model of the axes, as a sample has hardly a pair; pairs are 0.

    labels: of each axis, the reference first. Empty where the trials are too few for the model.
    """
    levels = {axis: pd.Categorical(frame[axis], order) for axis, order in labels.items()}
    design = ols("score ~ " + " + ".join(map(_term, labels)), data=frame.assign(**levels))
    if not _is_estimable(design):
        return pd.DataFrame(columns=CONTRAST)
    model = design.fit()
    intervals = model.conf_int(1 - CONFIDENCE)
    rows = []
    for axis, (reference, *values) in labels.items():
        for value in values:
            term = f"{_term(axis)}[T.{value}]"
            rows.append((axis, value, reference, model.params[term], *intervals.loc[term], 0))
    return pd.DataFrame(rows, columns=CONTRAST)
