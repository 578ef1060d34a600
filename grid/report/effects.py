"""Which choice matters: the effect of each axis of a grid on each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from warnings import catch_warnings, simplefilter

import numpy as np
import pandas as pd
from numpy.linalg import matrix_rank
from statsmodels.formula.api import ols
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.anova import anova_lm
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

from evaluators import EVALUATORS, headlines
from evaluators.ledger import CONFIDENCE
from grid.plan import Plan
from grid.study import Study
from trainables.store.tracking import TrialRun

FEWEST_TRIALS = 8
CONTRAST = ["axis", "value", "reference", "difference", "low", "high"]
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
    scores = {score for digest in plan.grid if digest in runs for score in runs[digest].metrics}
    judged = [name for name in EVALUATORS if any(score.startswith(name) for score in scores)]
    effects = []
    for score in headlines(judged):
        frame = pd.DataFrame(
            {**labels, "score": runs[digest].metrics[score]}
            for digest, labels in plan.grid.items()
            if digest in runs and score in runs[digest].metrics
        )
        axes = [axis for axis in frame if axis != "score" and frame[axis].nunique() > 1]
        if len(frame) >= FEWEST_TRIALS and axes and np.ptp(frame["score"]) > 0:
            ordered = frame.assign(**{axis: _in_order(frame[axis], study) for axis in axes})
            differences = contrasts(ordered, axes)
            effects.append(Effects(score, len(frame), variance_shares(ordered, axes), differences))
    return effects


def _in_order(labels: pd.Series, study: Study) -> pd.Categorical:
    """Return an axis's labels in the order of the study, behind what is the base's own."""
    order = list(study.axes.get(str(labels.name), study.base))
    bases = [label for label in labels.unique() if label not in order]
    return pd.Categorical(labels, bases + [label for label in order if label in set(labels)])


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
    full = [
        pair
        for pair in combinations(axes, 2)
        if pd.crosstab(*(frame[axis] for axis in pair)).all(axis=None)
    ]
    levels = {axis: frame[axis].nunique() - 1 for axis in axes}
    needed = 1 + sum(levels.values()) + sum(levels[a] * levels[b] for a, b in full)
    pairs = full if len(frame) >= needed + SPARE_TRIALS else []
    designs = (_design(frame, axes, pairs), _design(frame, axes))
    estimable = (m for m in designs if len(m.exog) > m.exog.shape[1] == matrix_rank(m.exog))
    model = next(estimable, None)
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


def _design(frame: pd.DataFrame, axes: Sequence[str], pairs: Sequence[tuple[str, str]] = ()) -> OLS:
    terms = [*map(_term, axes), *(f"{_term(a)}:{_term(b)}" for a, b in pairs)]
    return ols(f"score ~ {' + '.join(terms)}", data=frame)


def contrasts(frame: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return what each value of each axis adds to its first one, by a linear model of the axes.

    Columns: axis, value, reference, difference, and low and high of its 95 % interval. Differences
    that the trials cannot tell from another axis's are left out.
    """
    design = _design(frame, axes)
    rank = matrix_rank(design.exog)
    if len(frame) <= rank:
        return pd.DataFrame(columns=CONTRAST)
    with catch_warnings():
        simplefilter("ignore", SingularMatrixWarning)
        model = design.fit()
    unit = pd.DataFrame(np.eye(len(design.exog_names)), design.exog_names)
    ends, rows = model.conf_int(1 - CONFIDENCE), []
    for axis in axes:
        reference, *values = frame[axis].astype("category").cat.categories
        for value in values:
            term = f"{_term(axis)}[T.{value}]"
            if matrix_rank(np.vstack([design.exog, unit.loc[term]])) == rank:
                rows.append((axis, value, reference, model.params[term], *ends.loc[term]))
    return pd.DataFrame(rows, columns=CONTRAST)
