"""The ledger of verdicts that evaluators fill, as a file, and the scores read from it.

Nothing here imports torch, so that what only reads ledgers need not have it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

# One row per image and question. `survived`: the model's answer is still the true label.
# `stage`: which attack broke it. `queries`: forward passes of this image by a black-box attack.
# `confidence`, `label_confidence`: the probability of the predicted class, and of the label;
# `tempered`: the logarithms of the label's at each of TEMPERATURES, then of the prediction's.
# `radius`: the one that a certificate reaches, 0 where it abstains.
# `image`: the judged image as PNG, for a few example images of some questions.
LEDGER = pa.schema(
    [
        ("image_id", pa.string()),
        ("question", pa.string()),
        ("label", pa.int32()),
        ("predicted", pa.int32()),
        ("survived", pa.bool_()),
        ("stage", pa.string()),
        ("queries", pa.int64()),
        ("confidence", pa.float32()),
        ("label_confidence", pa.float32()),
        ("tempered", pa.list_(pa.float16())),
        ("radius", pa.float32()),
        ("image", pa.binary()),
    ]
)
CONFIDENCES = ("confidence", "label_confidence", "tempered")
TEMPERATURES = tuple(2.0 ** (sixth / 6) for sixth in range(-12, 13))  # logits are divided by one
CONFIDENCE = 0.95
# Remarks in `stage` of an evaluator that runs its last attacks on a random slice of the images
# alone: on an image outside it that survived the first ones, and what breaks one inside it.
SPARED = "not attacked further"
OTHER_TARGETS = "apgd-t, other targets"
OF_SLICE = (OTHER_TARGETS, "fab-t", "square")
SECONDS = b"seconds"
JUDGED_BY = b"judged_by"
SCORES = b"scores"


@dataclass(frozen=True)
class Score:
    """An aggregate of n verdicts: a share in [0, 1] with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int


def to_parquet(
    ledger: pa.Table,
    *,
    seconds: float,
    judged_by: Mapping[str, str] | None = None,
    scores: Iterable[Score] = (),
) -> bytes:
    """Return a ledger as a Parquet file that also says how long its verdicts took.

    judged_by: the provenance of its verdicts, where it is known. scores: those of a whole ledger.
    """
    buffer = io.BytesIO()
    notes = {
        SECONDS: repr(seconds),
        JUDGED_BY: json.dumps(dict(judged_by or {})),
        SCORES: json.dumps([astuple(score) for score in scores]),
    }
    marked = ledger.replace_schema_metadata(notes)
    pq.write_table(marked, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def from_parquet(content: bytes) -> tuple[pa.Table, float]:
    """Read what `to_parquet` wrote; ValueError where it is damaged."""
    try:
        # One thread: a report reads thousands of small ledgers.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        ledger = file.read(use_threads=False)
        ledger.validate(full=True)
        for name in (*CONFIDENCES, "radius"):  # an older ledger has none
            if name not in ledger.schema.names:
                nulls = pa.nulls(len(ledger), LEDGER.field(name).type)
                ledger = ledger.add_column(LEDGER.get_field_index(name), name, nulls)
        seconds = float(ledger.schema.metadata[SECONDS])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is no whole ledger: {error}") from None
    ledger = ledger.replace_schema_metadata(None)
    if not ledger.schema.equals(LEDGER):
        raise ValueError(f"it is no ledger: its columns are {ledger.schema.names}")
    return ledger, seconds


def judged_by(content: bytes) -> dict[str, str]:
    """Return the provenance that `to_parquet` was given; nothing of a ledger without any."""
    noted = pq.read_schema(pa.BufferReader(content)).metadata or {}
    return dict(json.loads(noted.get(JUDGED_BY, b"{}")))


def scores_of(content: bytes) -> list[Score]:
    """Return the scores that `to_parquet` was given; ValueError where it is no ledger."""
    try:
        noted = pq.read_schema(pa.BufferReader(content)).metadata[SCORES]
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"it is no whole ledger: {error}") from None
    return [Score(*parts) for parts in json.loads(noted)]


def in_order(ledger: pa.Table) -> pa.Table:
    """Return a ledger's rows by question, as they are asked, and image id: however it was cut."""
    rank = pc.index_in(ledger["question"], pc.unique(ledger["question"]))
    keys = pa.table({"rank": rank, "image_id": ledger["image_id"]})
    by = [("rank", "ascending"), ("image_id", "ascending")]
    return ledger.take(pc.sort_indices(keys, sort_keys=by)).combine_chunks()


def by_question(ledger: pa.Table) -> dict[str, pa.Table]:
    """Return each question's rows, in the order in which the questions are asked."""
    questions = pc.unique(ledger["question"]).to_pylist()
    return {q: ledger.filter(pc.equal(ledger["question"], q)) for q in questions}


def survival_scores(ledger: pa.Table) -> list[Score]:
    """Return, per question, the share of images that survived, with its Wilson interval."""
    return [
        share(question, pc.sum(rows["survived"]).as_py(), len(rows))
        for question, rows in by_question(ledger).items()
    ]


def share(name: str, count: int, n: int) -> Score:
    """Return count / n with its Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Score(name, count / n, float(interval.low), float(interval.high), n)


def scores_as_metrics(scores: Iterable[Score]) -> dict[str, float]:
    """Return scores by the keys under which the report reads them: name, name/low, /high, /n."""
    parts = {"": "value", "/low": "low", "/high": "high", "/n": "n"}
    return {
        f"{score.name}{end}": float(getattr(score, part))
        for score in scores
        for end, part in parts.items()
    }
