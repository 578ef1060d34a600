"""Which choice matters: the effect of each axis of a grid on each score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from evaluators.ledger import CONFIDENCE
from grid.axes import axis_value
from grid.plan import Plan, enumerate_trials
from grid.study import Study
from trainables.recipe import Recipe
from trainables.scale import Scale
from trainables.store.tracking import TrialRun

SCORES = (
    *("clean", "pgd-100", "autoattack", "tpa"),
    *("natural", "corruptions", "stylized-cropped", "stylized"),
)
FEWEST_TRIALS = 8
ROUNDING = 1e-9  # of differences of shares, each a multiple of one image
SPARE_TRIALS = 4  # interactions are fitted where the trials outnumber the terms by this many


@dataclass(frozen=True)
class Share:
    """How much of a score's variance an axis, or an interaction 'a x b', explains; p of its F."""

    axis: str
    share: float
    p: float


@dataclass(frozen=True)
class Contrast:
    """A value of an axis minus its first one, over pairs of trials alike in all else.

    In shares, with the 95 % interval of Student's t over the pairs; pairs that all differ alike
    tell of none.
    """

    axis: str
    value: str
    reference: str
    difference: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_told_apart(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Interaction:
    """Two axes 'a x b' whose effects do not add up: the mean score by the values of both."""

    axis: str
    means: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Effects:
    """The effects of a grid's axes on one score over `trials` trials.

    interaction: the significant one that explains the most, if there is one.
    """

    score: str
    trials: int
    shares: tuple[Share, ...]
    contrasts: tuple[Contrast, ...]
    interaction: Interaction | None = None


def grid_effects(
    study: Study, plan: Plan, scale: Scale, runs: Mapping[str, TrialRun]
) -> list[Effects]:
    """Return the effects on every score that at least eight trials of a study's grid have."""
    axes, recipes = list(study.axes or {}), _grid(study, plan, scale)
    effects = []
    for score in SCORES:
        rows = [
            {axis: axis_value(recipe, axis, study.library) for axis in axes}
            | {"seed": str(recipe.seed), "score": runs[digest].metrics[score]}
            for digest, recipe in recipes.items()
            if digest in runs and score in runs[digest].metrics
        ]
        frame = pd.DataFrame(rows)
        varied = [axis for axis in axes if len(rows) and frame[axis].nunique() > 1]
        if len(rows) >= FEWEST_TRIALS and varied and np.ptp(frame["score"]) > 0:
            shares = tuple(variance_shares(frame, varied))
            effects.append(
                Effects(
                    score,
                    len(rows),
                    shares,
                    tuple(contrasts(frame, varied)),
                    strongest_interaction(frame, shares),
                )
            )
    return effects


def _grid(study: Study, plan: Plan, scale: Scale) -> dict[str, Recipe]:
    """Return what the axes span of a plan, in the order of their values.

    By a trial's digest its recipe as the study states it, before the scale shrinks it.
    """
    if study.base is None:
        return {}
    planned = {trial.digest for trial in plan}
    spanned, _ = enumerate_trials(
        study.base,
        study.axes or {},
        mode=study.mode,
        settings=study.settings,
        library=study.library,
    )
    seeded = [r.with_seed(s) if s else r for r in spanned for s in range(plan.seeds)]
    by_digest = ((scale.shrink(recipe).digest(), recipe) for recipe in seeded)
    return {digest: recipe for digest, recipe in by_digest if digest in planned}


def leading(by_score: Sequence[Effects]) -> str:
    """Say in a sentence which axis explains the most of each score; '' where none is known."""
    first = [(effects.shares[0], effects) for effects in by_score if effects.shares]
    sentences = [
        f"{share.axis} explains {100 * share.share:.0f} % of the variance of {effects.score} "
        f"(p {share.p:.2g}, {effects.trials} trials)"
        for share, effects in first
    ]
    return f"Of the axes of this grid {'; '.join(sentences)}." if sentences else ""


def variance_shares(frame: pd.DataFrame, axes: Sequence[str]) -> list[Share]:
    """Return the largest shares first: an analysis of variance, type II sums of squares.

    Pairwise interactions are part of it where the trials are enough, and such, to tell them apart.
    Nothing where no trial is left to judge the axes by, or where axes only vary together.
    """
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    mains = [f"C({axis})" for axis in axes]
    full = [
        pair
        for pair in combinations(axes, 2)
        if pd.crosstab(*(frame[a] for a in pair)).all(axis=None)
    ]
    levels = {axis: frame[axis].nunique() - 1 for axis in axes}
    needed = 1 + sum(levels.values()) + sum(levels[a] * levels[b] for a, b in full)
    pairs = [f"C({a}):C({b})" for a, b in full] if len(frame) >= needed + SPARE_TRIALS else []
    designs = (ols("score ~ " + " + ".join(terms), data=frame) for terms in (mains + pairs, mains))
    model = next(filter(_is_estimable, designs), None)
    if model is None:
        return []
    table = anova_lm(model.fit(), typ=2)
    total = float(((frame["score"] - frame["score"].mean()) ** 2).sum())
    shares = [
        Share(_readable(str(term)), float(row["sum_sq"]) / total, float(row["PR(>F)"]))
        for term, row in table.iterrows()
        if term != "Residual"
    ]
    return sorted(shares, key=lambda share: -share.share)


def _is_estimable(model: Any) -> bool:
    rows, columns = model.exog.shape
    return bool(rows > columns == np.linalg.matrix_rank(model.exog))


def strongest_interaction(frame: pd.DataFrame, shares: Sequence[Share]) -> Interaction | None:
    """Return the first interaction of `shares`, the largest first, whose p is below 0.05."""
    for share in shares:
        if " x " in share.axis and share.p < 1 - CONFIDENCE:
            means = frame.groupby(share.axis.split(" x "), sort=False)["score"].mean()
            return Interaction(share.axis, {pair: float(mean) for pair, mean in means.items()})
    return None


def _readable(term: str) -> str:
    return term.replace("C(", "").replace(")", "").replace(":", " x ")


def contrasts(frame: pd.DataFrame, axes: Sequence[str]) -> list[Contrast]:
    """Return each value of each axis against the axis's first, over pairs alike in all else."""
    compared = []
    for axis in axes:
        others = [column for column in (*axes, "seed") if column != axis]
        scores: defaultdict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        for row in frame.to_dict("records"):
            scores[tuple(row[other] for other in others)][row[axis]] = row["score"]
        reference, *values = frame[axis].unique()
        for value in values:
            differences = [
                alike[value] - alike[reference]
                for alike in scores.values()
                if value in alike and reference in alike
            ]
            if len(differences) > 1:
                compared.append(_contrast(axis, value, reference, differences))
    return compared


def _contrast(axis: str, value: str, reference: str, differences: list[float]) -> Contrast:
    mean, pairs = float(np.mean(differences)), len(differences)
    if np.ptp(differences) < ROUNDING:
        return Contrast(axis, value, reference, mean, None, None, pairs)
    low, high = ttest_1samp(differences, 0).confidence_interval(CONFIDENCE)
    return Contrast(axis, value, reference, mean, float(low), float(high), pairs)
