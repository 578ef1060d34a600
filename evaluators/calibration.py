"""Is a model as often right as it is sure? Scores of the confidences that a ledger keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import rankdata

from evaluators.base import Clean, Column
from evaluators.ledger import CONFIDENCE, TEMPERATURES, Score, by_question
from trainables.data.registry import EXTRA_KINDS, KINDS

LEAST = np.finfo(np.float32).tiny  # of a label's confidence, so that its loss is at most 87.3
BINS = 15  # of Guo et al. (ICML 2017), section 2
RESAMPLES = 400
PERCENTILES = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
Figure = tuple[str, tuple[float, float, float]]  # a name, its value and interval
SCALES = np.linspace(0, 2, 81)  # of an error, from none to twice the one observed


def calibration_scores(ledger: pa.Table) -> list[Score]:
    """Return the scores of each question whose answers have confidences, NAME/ece and its like.

    ece: expected calibration error over 15 bins of equal width (Guo et al., ICML 2017), and
    ece-adaptive over 15 of equally many images (Nixon et al., CVPRW 2019). brier: of the predicted
    class (Brier 1950). nll: in nats. aurc: the mean error of the surest images, over all coverages
    (Geifman and El-Yaniv, NeurIPS 2017). temperature: the one of least nll; the scores ending in
    -scaled are at it, fitted on the other half of the images. Of corruptions: those without a
    temperature, corruptions/severity-3/ece and its like, each over all kinds.
    """
    # A part, of an older version's shards, has none.
    whole = {q: rows for q, rows in by_question(ledger).items() if not rows["tempered"].null_count}
    whole |= _by_severity(ledger)
    return [_score(q, rows, figure) for q, rows in whole.items() for figure in _scores(rows)]


def severity_errors(ledger: pa.Table) -> list[Score]:
    """Return the calibration error at each severity of corruptions."""
    return [_score(q, rows, next(_scores(rows))) for q, rows in _by_severity(ledger).items()]


def _by_severity(ledger: pa.Table) -> dict[str, pa.Table]:
    kinds = rf"^({'|'.join((*KINDS, *EXTRA_KINDS))})-\d$"
    rows = ledger.filter(pc.match_substring_regex(ledger["question"], kinds))
    if rows["confidence"].null_count:
        return {}
    names = pc.replace_substring_regex(rows["question"], ".*-", "corruptions/severity-")
    return by_question(rows.set_column(rows.schema.get_field_index("question"), "question", names))


def _score(question: str, rows: pa.Table, figure: Figure) -> Score:
    name, (value, low, high) = figure
    images = pc.count_distinct(rows["image_id"]).as_py()
    return Score(f"{question}/{name}", float(value), float(low), float(high), images)


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


def _scores(rows: pa.Table) -> Iterator[Figure]:
    """Yield the scores of answers, one or several for each image, with intervals over images.

    What is kept at one temperature only has no scores at others. An answer whose logits are not
    finite has no confidence: it counts as none.
    """
    n, right = len(rows), rows["survived"].to_numpy().astype(np.float32)
    image_N = rows["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    count = int(image_N.max()) + 1
    confidence, label = (
        np.nan_to_num(rows[name].to_numpy()) for name in ("confidence", "label_confidence")
    )
    nll_N, is_tempered = -np.log(np.maximum(label, LEAST)), not rows["tempered"].null_count
    if is_tempered:
        logs = rows["tempered"].combine_chunks().flatten().to_numpy().reshape(n, 2, -1)
        logs = np.nan_to_num(logs, nan=math.log(LEAST), neginf=-math.inf)
        label_NT, logs_NT = -logs[:, 0].astype(np.float32), logs[:, 1].astype(np.float32)
        confidence_NT, nll_N = np.exp(logs_NT), label_NT[:, TEMPERATURES.index(1.0)]
        confidence = confidence_NT[:, TEMPERATURES.index(1.0)]
    yield "ece", _calibration_error(confidence, right, _equal_width(confidence), image_N)
    ranks = rankdata(confidence, "ordinal") - 1
    bins = (ranks * BINS / n).astype(int)
    yield "ece-adaptive", _calibration_error(confidence, right, bins, image_N)
    weights_RN = np.ones((1 + RESAMPLES, count), np.float32)  # the images themselves first
    rng = np.random.default_rng(0)
    for weights_N in weights_RN[1:]:
        weights_N[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    for name, values_N in (("brier", (confidence - right) ** 2), ("nll", nll_N)):
        by_image = np.bincount(image_N, values_N, count).astype(np.float32)
        yield name, _resampled(weights_RN @ by_image / n)
    yield "aurc", _resampled(_risk(weights_RN, image_N, confidence, right))
    if not is_tempered:
        return
    chosen = np.array(TEMPERATURES)[(weights_RN @ label_NT).argmin(axis=1)]
    yield "temperature", _resampled(chosen)
    if n > 1:
        fitted = [label_NT[half::2].sum(axis=0).argmin() for half in (1, 0)]
        place = np.arange(n), np.resize(fitted, n)
        yield "nll-scaled", _resampled(weights_RN @ label_NT[place] / n)
        scaled = confidence_NT[place]
        yield "ece-scaled", _calibration_error(scaled, right, _equal_width(scaled), image_N)


def _equal_width(confidence: np.ndarray) -> np.ndarray:
    bins: np.ndarray = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return bins


def _calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: np.ndarray, image_N: np.ndarray
) -> tuple[float, float, float]:
    """Return the error over bins, with its interval.

    The error is never below its noise, so a bootstrap of a well calibrated model is all above the
    truth. The interval holds the multiples of the observed gaps under which an error like the
    observed one is drawn (400 simulations each of 300 to 5,000 images: it holds the truth in 90 to
    96 %).
    """
    n, gaps, count = len(right), confidence - right, int(image_N.max()) + 1
    mean_B = np.bincount(bins, gaps, BINS) / n
    sums_NB = np.bincount(image_N * BINS + bins, gaps, count * BINS).reshape(count, BINS)
    square_B = ((sums_NB * (count / n)) ** 2).mean(axis=0)
    noise_B = np.sqrt(np.maximum(square_B - mean_B**2, 0) / count)
    observed = float(np.abs(mean_B).sum())
    draws_DB = noise_B * np.random.default_rng(0).standard_normal((1000, BINS))
    errors_SD = np.abs(SCALES[:, None, None] * mean_B + draws_DB).sum(axis=-1)
    tail = (1 - CONFIDENCE) / 2
    above = (errors_SD >= observed).mean(axis=1) > tail
    below = (errors_SD <= observed).mean(axis=1) > tail
    held = SCALES[above & below] if (above & below).any() else np.ones(1)
    return observed, min(held[0], 1.0) * observed, min(max(held[-1], 1.0) * observed, 1.0)


def _risk(
    weights_RN: np.ndarray, image_N: np.ndarray, confidence: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Return the area under each resample's curve of risk against coverage."""
    order = np.argsort(-confidence, kind="stable")
    images = image_N[order]
    wrong_N = 1 - right[order]
    areas = []
    for weights_N in weights_RN:
        drawn_N = weights_N[images]
        risk_N = (drawn_N * wrong_N).cumsum() / np.maximum(drawn_N.cumsum(), 1)
        areas.append((drawn_N * risk_N).mean())
    return np.array(areas)


def _resampled(values_R: np.ndarray) -> tuple[float, float, float]:
    """Return the first value, and the percentiles of the others."""
    low, high = np.percentile(values_R[1:], PERCENTILES)
    return values_R[0], min(low, values_R[0]), max(high, values_R[0])


def detection_scores(name: str, known: np.ndarray, foreign: np.ndarray) -> list[Score]:
    """Return how well confidences tell images of known classes from foreign ones.

    NAME/auroc: the share of pairs in which the known one's is higher (a tie counts half).
    NAME/fpr95: the share of foreign images at or above the threshold that 95 % of the known ones
    reach. Source: Hendrycks and Gimpel (ICLR 2017). Intervals: percentiles of 400 resamples of
    both.
    """
    known, foreign = np.nan_to_num(known), np.nan_to_num(foreign)
    rng, values = np.random.default_rng(0), _detection(known, foreign)
    draws_R2 = [
        _detection(rng.choice(known, len(known)), rng.choice(foreign, len(foreign)))
        for _ in range(RESAMPLES)
    ]
    lows, highs = np.percentile(draws_R2, PERCENTILES, axis=0).tolist()
    rows = zip(("auroc", "fpr95"), values, lows, highs, strict=True)
    n = len(known) + len(foreign)
    return [Score(f"{name}/{end}", value, low, high, n) for end, value, low, high in rows]


def _detection(known: np.ndarray, foreign: np.ndarray) -> tuple[float, float]:
    ordered, n = np.sort(known), len(known)
    places = [np.searchsorted(ordered, foreign, side) for side in ("left", "right")]
    threshold = ordered[n - math.ceil(0.95 * n)]
    return 1 - float(np.mean(places)) / n, float((foreign >= threshold).mean())
