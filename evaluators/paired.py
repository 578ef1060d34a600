"""Two models on the same images: the difference of a score, its interval, and McNemar's test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest, bootstrap

from evaluators.ledger import CONFIDENCE

RESAMPLES = 1000
ERRORS = "corruptions"  # the one score that is an error, a mean over questions


@dataclass(frozen=True)
class Paired:
    """A difference of shares over n images with its 95 % interval.

    The interval is a bootstrap of images; p is the exact McNemar test's, None where an image has
    more than one answer.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float | None


def image_scores(ledger: pa.Table, score: str) -> dict[str, float] | None:
    """Return what each image adds to a score; None for a score that is no mean over images."""
    if score == ERRORS:
        grouped = ledger.group_by("image_id").aggregate([("survived", "mean")])
        shares = pc.subtract(1.0, grouped["survived_mean"])
        return dict(zip(grouped["image_id"].to_pylist(), shares.to_pylist(), strict=True))
    rows = ledger.filter(pc.equal(ledger["question"], score))
    if not rows.num_rows:
        return None
    survived = rows["survived"].cast(pa.float64()).to_pylist()
    return dict(zip(rows["image_id"].to_pylist(), survived, strict=True))


def compare(
    ours: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]
) -> Paired | None:
    """Compare two models' image scores, a mapping per seed, on the images that all share.

    Returns ours minus reference; None where they share none.
    """
    shared = sorted(set.intersection(*(set(seed) for seed in (*ours, *reference))))
    if not shared:
        return None
    first, second = (
        np.array([[seed[image] for image in shared] for seed in seeds]).mean(axis=0)
        for seeds in (ours, reference)
    )
    difference = first - second
    low, high = _interval(difference)
    binary = len(ours) == len(reference) == 1 and set(np.unique([first, second])) <= {0.0, 1.0}
    p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum())) if binary else None
    return Paired(float(difference.mean()), low, high, len(shared), p)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of McNemar's test from the discordant pairs (McNemar 1947)."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _interval(difference_N: np.ndarray) -> tuple[float, float]:
    if np.ptp(difference_N) == 0:
        # Resampling sees no other image; as many as this may differ, by all there is, unseen.
        unseen = binomtest(0, len(difference_N)).proportion_ci(CONFIDENCE).high
        common = float(difference_N[0])
        return common - unseen * (1 + common), common + unseen * (1 - common)
    found = bootstrap(
        (difference_N,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
