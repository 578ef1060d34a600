"""Is a model as often right as it is sure? Scores of the confidences that a ledger keeps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

from evaluators.base import Clean, Column
from evaluators.ledger import CONFIDENCE, TEMPERATURES, Score, by_question

BINS = 15  # of Guo et al. (ICML 2017), section 2
RESAMPLES = 400
PERCENTILES = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
SCALES = np.linspace(0, 2, 81)  # of an error, from none to twice the one observed


def calibration_scores(ledger: pa.Table) -> list[Score]:
    """Return the scores of each question whose answers have confidences, NAME/ece and its like.

    ece: expected calibration error over 15 bins of equal width (Guo et al., ICML 2017), and
    ece-adaptive over 15 of equally many images (Nixon et al., CVPRW 2019). brier: of the predicted
    class (Brier 1950). nll: in nats. aurc: the mean error of the surest images, over all coverages
    (Geifman and El-Yaniv, NeurIPS 2017). temperature: the one of least nll; the scores ending in
    -scaled are at it, fitted on the other half of the images.
    """
    return [
        Score(f"{question}/{name}", float(value), float(low), float(high), len(rows))
        for question, rows in by_question(ledger).items()
        if not rows["tempered"].null_count  # a part, of an older version's shards, has none
        for name, (value, low, high) in _scores(rows)
    ]


class Calibration(Clean):
    """Whether the held-out images' answers are as often right as they are sure."""

    name = "calibration"
    columns = (
        Column("calibration/aurc", "Risk over coverage (AURC)", error=True, by_image=False),
        Column("calibration/ece-scaled", "ECE, temperature scaled", error=True, by_image=False),
        Column("calibration/ece", "Calibration error (ECE)", error=True, by_image=False),
    )

    def summarize(self, ledger: pa.Table) -> list[Score]:
        return calibration_scores(ledger)


def _scores(rows: pa.Table) -> Iterator[tuple[str, tuple[float, float, float]]]:
    n, right = len(rows), rows["survived"].to_numpy().astype(np.float32)
    logs = rows["tempered"].combine_chunks().flatten().to_numpy().reshape(n, 2, -1)
    label_NT, confidence_NT = -logs[:, 0].astype(np.float32), np.exp(logs[:, 1].astype(np.float32))
    confidence = confidence_NT[:, TEMPERATURES.index(1.0)]
    yield "ece", _calibration_error(confidence, right, _equal_width(confidence))
    ranks = rankdata(confidence, "ordinal") - 1
    yield "ece-adaptive", _calibration_error(confidence, right, (ranks * BINS / n).astype(int))
    weights_RN = np.ones((1 + RESAMPLES, n), np.float32)  # the images themselves first
    rng = np.random.default_rng(0)
    for weights_N in weights_RN[1:]:
        weights_N[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    yield "brier", _resampled(weights_RN @ (confidence - right) ** 2 / n)
    yield "nll", _resampled(weights_RN @ label_NT[:, TEMPERATURES.index(1.0)] / n)
    yield "aurc", _resampled(_risk(weights_RN, confidence, right))
    chosen = np.array(TEMPERATURES)[(weights_RN @ label_NT).argmin(axis=1)]
    yield "temperature", _resampled(chosen)
    if n > 1:
        fitted = [label_NT[half::2].sum(axis=0).argmin() for half in (1, 0)]
        place = np.arange(n), np.resize(fitted, n)
        yield "nll-scaled", _resampled(weights_RN @ label_NT[place] / n)
        scaled = confidence_NT[place]
        yield "ece-scaled", _calibration_error(scaled, right, _equal_width(scaled))


def _equal_width(confidence: np.ndarray) -> np.ndarray:
    bins: np.ndarray = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return bins


def _calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: np.ndarray
) -> tuple[float, float, float]:
    """Return the error over bins, with its interval.

    The error is never below its noise, so a bootstrap of a well calibrated model is all above the
    truth. The interval holds the multiples of the observed gaps under which an error like the
    observed one is drawn (400 simulations each of 300 to 5,000 images: it holds the truth in 90 to
    96 %).
    """
    n, gaps = len(right), confidence - right
    mean_B = np.bincount(bins, gaps, BINS) / n
    square_B = np.bincount(bins, gaps**2, BINS) / n
    noise_B = np.sqrt(np.maximum(square_B - mean_B**2, 0) / n)
    observed = float(np.abs(mean_B).sum())
    draws_DB = noise_B * np.random.default_rng(0).standard_normal((1000, BINS))
    errors_SD = np.abs(SCALES[:, None, None] * mean_B + draws_DB).sum(axis=-1)
    tail = (1 - CONFIDENCE) / 2
    above = (errors_SD >= observed).mean(axis=1) > tail
    below = (errors_SD <= observed).mean(axis=1) > tail
    held = SCALES[above & below] if (above & below).any() else np.ones(1)
    return observed, min(held[0], 1.0) * observed, min(max(held[-1], 1.0) * observed, 1.0)


def _risk(weights_RN: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the area under each resample's curve of risk against coverage."""
    order = np.argsort(-confidence, kind="stable")
    wrong_N = 1 - right[order]
    areas = []
    for weights_N in weights_RN:
        drawn_N = weights_N[order]
        risk_N = (drawn_N * wrong_N).cumsum() / np.maximum(drawn_N.cumsum(), 1)
        areas.append((drawn_N * risk_N).mean())
    return np.array(areas)


def _resampled(values_R: np.ndarray) -> tuple[float, float, float]:
    """Return the first value, and the percentiles of the others."""
    low, high = np.percentile(values_R[1:], PERCENTILES)
    return values_R[0], min(low, values_R[0]), max(high, values_R[0])
