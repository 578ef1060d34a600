"""What an evaluator is, how it judges a classifier, and the simplest one: clean."""

from __future__ import annotations

import hashlib
import io
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluators.ledger import (
    CONFIDENCES,
    LEDGER,
    TEMPERATURES,
    Score,
    in_order,
    survival_scores,
    to_parquet,
)
from trainables.data.base import WHOLE, Data, Shard, Split, to_unit
from trainables.data.load import stored_split
from trainables.data.registry import FOLDER, data_set_named
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.store.results import provenance
from trainables.train.exactness import exact

EXAMPLES = 4
PRESENT = "-present"  # ends the name of a question that is answered among the classes present
FORWARD_SHARD = 10_000  # images that one forward pass each answers for
SUBSET_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Images float32 in [0, 1] (B, 3, H, W), labels int64 (B,), and the images' ids.

    Some evaluators set the question, or a remark on each image for the ledger's `stage`. Where the
    model's head is wider than the classes present, `candidates` are their labels. The ledger keeps
    the `examples`, by their ids, as pictures.
    """

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    question: str = ""
    stage: tuple[str | None, ...] | None = None
    candidates: tuple[int, ...] | None = None
    examples: frozenset[str] = frozenset()

    def parts(self, images: int) -> Iterator[Batch]:
        """Yield the batch in parts of at most `images` images, in order."""
        for first in range(0, len(self.ids), images):
            part = slice(first, first + images)
            cut: dict[str, Any] = {n: getattr(self, n)[part] for n in ("images", "labels", "ids")}
            yield replace(self, **cut, stage=self.stage and self.stage[part])


@dataclass(frozen=True)
class Column:
    """A column of a table: one score of an evaluator, by its name on the study's own data.

    A score's name begins with its evaluator's: pgd-100. On other data the column is the score
    `counterpart_score` ("": the same) of a `counterpart` of that title, if there is one, under a
    `heading`. `own_score`: a score that only the study's own data give, without which the column
    is that of its counterpart, or none. `stands_in`: the counterpart takes the place of a published
    set at the published data's own scale. `error`: less is better. `lacks`: the title of the set
    of images that the data have not. `by_image`: a mean over images, so that claims can be of it.
    """

    name: str
    label: str
    counterpart: str = ""
    counterpart_score: str = ""
    own_score: str = ""
    heading: str = ""
    evaluator: str = ""
    stands_in: bool = False
    error: bool = False
    lacks: str = ""
    by_image: bool = True

    @property
    def score(self) -> str:
        """Return the name of the score on the data that the column is shown for."""
        return (self.heading and self.counterpart_score) or self.name

    @property
    def title(self) -> str:
        """Return the column's honest name."""
        return self.heading or self.label

    def answered_by(self, other: Column) -> Column:
        """Return the column filled from another's score, under the title of that one."""
        return replace(
            self, counterpart_score=other.score, heading=other.title, evaluator=other.evaluator
        )

    def at(self, scale: str, scores: Collection[str] = ()) -> Column | None:
        """Return the column as a scale shows it; None where its score does not exist there.

        scores: those of the models judged so far, which tell what data they were judged on.
        """
        data_set = data_set_named(scale)
        is_own = not data_set.generated
        if self.own_score and {self.own_score, self.evaluator} & {*scores}:
            is_own = self.own_score in scores
        if is_own or not (self.counterpart or self.own_score):
            return self
        if not self.counterpart:
            return None
        shown = FOLDER if data_set.name.startswith(f"{FOLDER}-") else data_set.name
        heading = replace(data_set, name=shown).stand_in(self.counterpart)
        return replace(self, heading=heading, stands_in=not data_set.generated)


class Evaluator(ABC):
    """A question asked of a classifier: here of the held-out images, or of a subset of them.

    `columns` are the scores that tables may show. `least_shard`: shards are multiples of so many
    images; `subset_size`: how many are drawn by a fixed seed (None: all are asked about).
    `takes_radii`: it can be set up with `radii`, in place of the scale's, and holds them by
    question.
    """

    name: str
    columns: tuple[Column, ...] = ()
    takes_radii = False
    radii: dict[str, float]
    least_shard = FORWARD_SHARD
    subset_size: int | None = None

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def images(self, source: Data) -> Split:
        """Return the images that the question is about."""
        if self.subset_size is None:
            return source.held_out
        return source.held_out.subset(self.subset_size, seed=SUBSET_SEED)

    def listed(self, source: Data) -> Split:
        """Return a split that has the ids of `images`; its pixels may be other ones."""
        return self.images(source)

    def identity(self, source: Data) -> dict[str, Any]:
        """Return all that verdicts depend on beside the model; equal ones are one question."""
        return {"images": self.listed(source).ids_hash()}

    def stored(self, source: Data, *, native: bool | None = None) -> Split | None:
        """Return the set that is stored beside the data for this question; None: generate it."""
        located = source.counterpart(self.name)
        return stored_split(*located, source, native=native) if located else None

    def identity_of_set(self, source: Data, stand_in: str, **how: str) -> dict[str, Any]:
        """Return the identity of a stored set, or of the counterpart that is made in its place."""
        images = Evaluator.identity(self, source)
        if located := source.counterpart(self.name):
            return {"data": located[0].title, **images}
        return {"data": source.data_set.stand_in(stand_in), **images, **how}

    def total(self, source: Data) -> int:
        """Return how many images there are; each is judged in one shard."""
        return len(self.listed(source))

    def asked_about(self, held_out: int) -> int:
        """Return how many of so many held-out images the question is about."""
        return held_out if self.subset_size is None else min(self.subset_size, held_out)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count the forward passes of one image each; a pass with a gradient counts two.

        withstanding: the share of images that no attack breaks.
        """
        return self.asked_about(held_out)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        """Yield the batches of a shard."""
        return split_batches(self.images(source), batch_size=batch_size, shard=shard)

    @abstractmethod
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        """Return the verdicts on a batch; never aggregates."""

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the scores of a ledger; never sees a model."""
        return survival_scores(ledger)


def device_named(name: str | None) -> torch.device:
    """Return a device that computes: the one named, or the first GPU, or the CPU; ValueError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device says in its own way that it is not there
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def cell_digest(evaluator: Evaluator, source: Data) -> str:
    """Return 12 hex digits that name an evaluator's question on a data set."""
    identity = {"name": evaluator.name, **evaluator.identity(source)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def split_batches(split: Split, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
    """Yield a split's images, or a shard of them, in order, as float32 in [0, 1]."""
    for part in split.parts(batch_size=batch_size, shard=shard):
        yield Batch(to_unit(part.images[:]), part.labels, part.ids)


def judge_images(
    evaluator: Evaluator,
    classifier: Classifier,
    source: Data,
    *,
    device: torch.device,
    batch_size: int = 200,
    shard: Shard = WHOLE,
) -> pa.Table:
    """Ask an evaluator's question of a classifier; return the ledger in its own order.

    A head that is wider than the data is matched with it. Out of memory halves the batch and goes
    on at the same image.
    """
    exact(device)
    classifier.to(device).eval()
    present = match_head(classifier, source, device)
    examples = frozenset(source.held_out.subset(EXAMPLES, seed=0).ids)
    parts: list[pa.Table] = []
    batches = evaluator.batches(source, batch_size=batch_size, shard=shard)
    with closing(one_ahead(batches)) as ready:
        for batch in ready:
            candidates = batch.candidates or present
            shown = replace(batch, examples=examples & set(batch.ids), candidates=candidates)
            parts += _judge_in_memory(evaluator, classifier, shown, device)
    return in_order(pa.concat_tables(parts))


def judged_shard(
    evaluator: Evaluator,
    classifier: Classifier,
    source: Data,
    device: torch.device,
    shard: Shard,
    *,
    batch_size: int = 200,
) -> bytes:
    """Return the ledger of `judge_images` as Parquet, with its seconds and what judged it."""
    began = time.monotonic()
    ledger = judge_images(
        evaluator, classifier, source, device=device, batch_size=batch_size, shard=shard
    )
    judged_by = provenance(str(device))
    if precision := evaluator.identity(source).get("attacks_in"):
        judged_by["attacks_in"] = precision
    return to_parquet(ledger, seconds=time.monotonic() - began, judged_by=judged_by)


@torch.no_grad()
def match_head(
    classifier: Classifier, source: Data, device: torch.device
) -> tuple[int, ...] | None:
    """Let a classifier's first logits be those of the data's classes, in order.

    Returns their labels where the head has other classes, too. ValueError where none can be theirs.
    """
    classifier.columns = None
    image = to_unit(source.held_out.images[:1]).to(device)
    columns = source.columns_of_head(classifier(image).shape[1])
    if columns is None:
        return None
    classifier.columns = torch.tensor(columns, device=device)
    return tuple(range(len(source.class_names)))


def one_ahead(batches: Iterable[Batch]) -> Generator[Batch]:
    """Yield batches in order, each made in a thread while the one before is in use."""
    source = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield batch


def _judge_in_memory(
    evaluator: Evaluator, classifier: Classifier, batch: Batch, device: torch.device
) -> list[pa.Table]:
    try:
        images, labels = batch.images.to(device), batch.labels.to(device)
        return [evaluator.judge(classifier, replace(batch, images=images, labels=labels))]
    except torch.OutOfMemoryError:
        if len(batch.ids) == 1:
            raise
    halves = batch.parts((len(batch.ids) + 1) // 2)
    return [t for half in halves for t in _judge_in_memory(evaluator, classifier, half, device)]


def verdicts(
    batch: Batch,
    question: str,
    predicted_B: Tensor,
    *,
    survived_B: Tensor | None = None,
    stage: Sequence[str | None] | None = None,
    queries: Sequence[int | None] | None = None,
    logits_BK: Tensor | None = None,
    tempered: bool = True,
    radius_B: Tensor | None = None,
    judged_BCHW: Tensor | None = None,
) -> pa.Table:
    """Return a batch's rows of the ledger for one question.

    An image survives when it is predicted as its label, unless `survived_B` says otherwise. `stage`
    is the batch's, unless stated. `logits_BK`: those of the answer, whose confidences are kept, at
    every temperature where `tempered`.
    `judged_BCHW`: the images as the classifier saw them, of which the ledger keeps the examples.
    """
    count = len(batch.ids)
    labels, predicted = batch.labels.cpu(), predicted_B.cpu()
    survived = labels == predicted if survived_B is None else survived_B.cpu()
    pictures = [
        _png(judged_BCHW[place]) if judged_BCHW is not None and image_id in batch.examples else None
        for place, image_id in enumerate(batch.ids)
    ]
    rows = {
        "image_id": batch.ids,
        "question": [question] * count,
        "label": labels.numpy(),
        "predicted": predicted.numpy(),
        "survived": survived.numpy(),
        "stage": stage or batch.stage or [None] * count,
        "queries": queries or [None] * count,
        **_confidences(logits_BK, batch.labels, predicted_B, tempered),
        "radius": [None] * count if radius_B is None else radius_B.tolist(),
        "image": pictures,
    }
    return pa.Table.from_pydict(rows, schema=LEDGER)


def answers(
    batch: Batch, question: str, logits_BK: Tensor, *, judged_BCHW: Tensor | None = None
) -> pa.Table:
    """Return the rows of a question, answered among all classes.

    Where there are candidates, those of `question`-present follow, answered among these alone.
    """
    free_B = logits_BK.argmax(dim=1)
    rows = [verdicts(batch, question, free_B, logits_BK=logits_BK, judged_BCHW=judged_BCHW)]
    if batch.candidates:
        rows.append(answers_among(batch, f"{question}{PRESENT}", logits_BK))
    return pa.concat_tables(rows)


def answers_among(batch: Batch, question: str, logits_BK: Tensor) -> pa.Table:
    """Return the rows of a question, answered among the batch's candidates."""
    others_K = torch.ones(logits_BK.shape[1], dtype=torch.bool, device=logits_BK.device)
    others_K[list(batch.candidates or ())] = False
    among_BK = logits_BK.masked_fill(others_K, -torch.inf)
    return verdicts(batch, question, among_BK.argmax(dim=1), logits_BK=among_BK)


def _confidences(
    logits_BK: Tensor | None, labels_B: Tensor, predicted_B: Tensor, tempered: bool
) -> dict[str, Any]:
    """Return the ledger's columns of confidence; without logits there are none."""
    if logits_BK is None:
        return {name: [None] * len(labels_B) for name in CONFIDENCES}
    at = TEMPERATURES if tempered else (1.0,)
    # An image of no class has the label -1, and the probability of the first stands for its own.
    asked_B2 = torch.stack([labels_B.to(predicted_B).clamp(min=0), predicted_B], dim=1)
    logs = [F.log_softmax(logits_BK.float() / t, dim=1).gather(1, asked_B2) for t in at]
    half = torch.finfo(torch.float16)
    logs_B2T = torch.stack(logs, dim=2).clamp(min=half.min).half().cpu()
    label_B, confidence_B = logs_B2T[..., at.index(1.0)].float().exp().unbind(1)
    return {
        "confidence": confidence_B.numpy(),
        "label_confidence": label_B.numpy(),
        "tempered": list(logs_B2T.flatten(1).numpy()) if tempered else [None] * len(labels_B),
    }


def _png(image_CHW: Tensor) -> bytes:
    pixels = image_CHW.detach().mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] != 3 else pixels).save(buffer, "png")
    return buffer.getvalue()


class Clean(Evaluator):
    """Top-1 accuracy on every held-out image.

    `clean` answers among all classes of the head, `clean-present` among the data's, where it has
    others.
    """

    name = "clean"
    columns: tuple[Column, ...] = (
        Column("clean", "Clean"),
        Column("clean-present", "Clean, among classes present", own_score="clean-present"),
    )

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        question, logits_BK = batch.question or self.name, classifier(batch.images)
        return answers(batch, question, logits_BK, judged_BCHW=batch.images)
