"""Two models on the same images: the difference of a score, its interval, and McNemar's test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from evaluators.intervals import of_gained_and_lost, of_mean, reach_over_trainings, with_trainings
from trainables.data.registry import EXTRA_KINDS

ERRORS = "corruptions"  # the one score that is an error, a mean over questions


@dataclass(frozen=True)
class Paired:
    """A difference of shares over n images with its 95 % interval.

    p is that of the exact McNemar test; None where an image has more than one answer.
    """

    difference: float
    low: float
    high: float
    n: int
    p: float | None


def image_scores(ledger: pa.Table, score: str) -> dict[str, float] | None:
    """Return what each image adds to a score; None for a score that is no mean over images."""
    if score == ERRORS:
        kinds = pc.replace_substring_regex(ledger["question"], r"-\d$", "")
        fifteen = pc.invert(pc.is_in(kinds, pa.array(EXTRA_KINDS)))
        grouped = ledger.filter(fifteen).group_by("image_id").aggregate([("survived", "mean")])
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
    ours_SN, reference_SN = (
        np.array([[seed[image] for image in shared] for seed in seeds])
        for seeds in (ours, reference)
    )
    ours_N, reference_N = ours_SN.mean(axis=0), reference_SN.mean(axis=0)
    difference, p = float((ours_N - reference_N).mean()), None
    if np.isin(np.concatenate([ours_SN, reference_SN]), (0, 1)).all():
        # Of several seeds: the mean over all pairs of a training of ours and one of theirs.
        gained = float((ours_N * (1 - reference_N)).sum())
        lost = float(((1 - ours_N) * reference_N).sum())
        over_images = of_gained_and_lost(gained, lost, len(shared))
        if len(ours) == len(reference) == 1:
            p = mcnemar(int(gained), int(lost))
    else:
        over_images = of_mean(ours_N - reference_N, least=-1, most=1)
    reach = reach_over_trainings(ours_SN.mean(axis=1), reference_SN.mean(axis=1))
    low, high = with_trainings(difference, over_images, reach)
    return Paired(difference, low, high, len(shared), p)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of McNemar's test from the discordant pairs (McNemar 1947)."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
