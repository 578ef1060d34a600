"""Published sets that nothing stands in for: an evaluator of each that the registry has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import starmap
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from evaluators import set_images
from evaluators.base import (
    FORWARD_SHARD,
    Batch,
    Column,
    Evaluator,
    answers,
    answers_among,
    split_batches,
    verdicts,
)
from evaluators.calibration import detection_scores
from evaluators.intervals import mean_score
from evaluators.ledger import Score, by_question, share
from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.data.load import CorruptedSet, reassessed
from trainables.data.registry import IMAGENET_CLASSES, SEVERITIES, STORED_SETS, StoredSet, places_of

if TYPE_CHECKING:
    from trainables.layers import Classifier


class Shift(Evaluator):
    """Top-1 accuracy on a published set.

    A set of some of the classes is answered among these, as its authors do, and as NAME-1000 among
    all. Sources: hendrycks/natural-adv-examples, and hendrycks/imagenet-r @3131cac, eval.py. Where
    classes are groups of ImageNet's, answers are `grouped`; where an image has several labels, each
    is right. Of a set with kinds: the mean over them and their severities. NAME/KIND: of a kind or
    part. Of foreign images: `detection_scores` against the held-out ones, by the greatest
    probability.
    """

    declared = StoredSet("", "", "")  # of natural, which has one at each scale

    def images(self, source: Data) -> Split:
        if kinds := self._kinds(source):
            return next(kinds.splits())[1]
        if split := self.stored(source):
            return split
        known = STORED_SETS[self.name]
        origin = f" ({known.source})" if known.source else ""
        remedy = f"--stored {self.name}=DIR reads it, at scales that have it"
        if self.name == "imagenet-c-bar":
            remedy += "; the evaluator c-bar generates its kinds"
        raise ValueError(f"{self.name} needs {known.title}{origin}: {remedy}")

    def identity(self, source: Data) -> dict[str, Any]:
        identity = self.identity_of_set(source, self.name)
        if self.declared.foreign:
            identity["known"] = source.held_out.ids_hash()
        if (located := source.counterpart(self.name)) and self.declared.labels:
            with (located[1] / self.declared.labels).open("rb") as labels:
                identity["labels"] = hashlib.file_digest(labels, "sha256").hexdigest()[:12]
        return identity

    def total(self, source: Data) -> int:
        known = len(source.held_out) if self.declared.foreign else 0
        return max(super().total(source), known)  # a shard takes its part of both

    def asked_about(self, held_out: int) -> int:
        return set_images(self.name, self.scale, held_out)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        parts = len(self.declared.kinds) * len(SEVERITIES) or 1 + self.declared.foreign
        return self.asked_about(held_out) * parts

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        kinds, located = self._kinds(source), source.counterpart(self.name)
        parts = kinds.splits() if kinds else iter([("", self.images(source))])
        if self.declared.foreign:
            parts = iter([("known", source.held_out), ("foreign", self.images(source))])
        some = located is not None and not (located[0].complete or located[0].groups)
        whole = f"{self.name}-1000" if some else ""
        for part, split in parts:
            present = tuple(sorted(set(split.labels.tolist()))) if some else None
            question = f"{self.name}/{part}" if part else whole
            for batch in split_batches(split, batch_size=batch_size, shard=shard):
                # The places that are right, as remarks.
                right = reassessed(*located, batch.ids) if located and located[0].labels else ()
                stage = tuple(" ".join(map(str, places)) for places in right) or None
                yield replace(batch, candidates=present, question=question, stage=stage)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        logits_BK, question = classifier(batch.images), batch.question or self.name
        if self.declared.groups:
            return verdicts(batch, question, grouped(classifier, logits_BK, self.declared))
        if self.declared.labels:
            answers_BK = in_imagenets_order(classifier, logits_BK, self.declared)
            pairs = zip(answers_BK.argmax(dim=1).tolist(), batch.stage or (), strict=True)
            right_B = torch.tensor([str(answer) in f"{labels}".split() for answer, labels in pairs])
            return verdicts(batch, question, logits_BK.argmax(dim=1), survived_B=right_B)
        if not batch.question:
            return answers(batch, self.name, logits_BK)
        if self.declared.kinds or self.declared.foreign:
            predicted_B = logits_BK.argmax(dim=1)
            return verdicts(batch, question, predicted_B, logits_BK=logits_BK, tempered=False)
        free = verdicts(batch, batch.question, logits_BK.argmax(dim=1), logits_BK=logits_BK)
        return pa.concat_tables([answers_among(batch, self.name, logits_BK), free])

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return accuracies; over severities with Student's interval over the n images."""
        if self.declared.foreign:
            parts = {q: rows["confidence"].to_numpy() for q, rows in by_question(ledger).items()}
            if len(parts) < 2:  # while the shards of one are still to come
                return []
            known, foreign = (parts[f"{self.name}/{part}"] for part in ("known", "foreign"))
            return detection_scores(self.name, known, foreign)
        if not (self.declared.kinds or self.declared.parts):
            return super().summarize(ledger)
        # The kind is in the question, NAME/KIND-SEVERITY, and the part in the id, PART/CLASS/FILE.
        column, end = ("question", r"-\d$") if self.declared.kinds else ("image_id", "/.*")
        kinds = pc.replace_substring_regex(ledger[column], end, "")
        names = kinds if self.declared.kinds else pc.binary_join_element_wise(self.name, kinds, "/")
        place = ledger.schema.get_field_index("question")
        by_kind = by_question(ledger.set_column(place, "question", names))
        return [_over_parts(self.name, ledger), *starmap(_over_parts, by_kind.items())]

    def _kinds(self, source: Data) -> CorruptedSet | None:
        located = source.counterpart(self.name)
        return CorruptedSet(*located, source) if located and located[0].kinds else None


def _over_parts(name: str, rows: pa.Table) -> Score:
    images = rows.group_by("image_id").aggregate([("survived", "mean")])["survived_mean"]
    if len(images) == len(rows):
        return share(name, pc.sum(rows["survived"]).as_py(), len(rows))
    return mean_score(name, images.to_numpy(), most=1)


def in_imagenets_order(classifier: Classifier, logits_BK: Tensor, known: StoredSet) -> Tensor:
    """Return the logits of ImageNet's 1,000 classes in its order; ValueError on another head."""
    if logits_BK.shape[1] != IMAGENET_CLASSES:
        raise ValueError(
            f"{known.name} needs a model of ImageNet's {IMAGENET_CLASSES} classes,"
            f" and this one answers among {logits_BK.shape[1]}"
        )
    columns = classifier.columns
    return logits_BK if columns is None else logits_BK[:, columns.argsort()]


def grouped(classifier: Classifier, logits_BK: Tensor, known: StoredSet) -> Tensor:
    """Answer among a set's groups of ImageNet's classes, -1 where the likeliest is of none."""
    logits_BK = in_imagenets_order(classifier, logits_BK, known)
    members_KG = _members(known.name).to(logits_BK.device)
    if known.averaged:
        means_BG = logits_BK.float().softmax(dim=1) @ (members_KG / members_KG.sum(dim=0))
        return means_BG.argmax(dim=1)
    places_B = logits_BK.argmax(dim=1)
    groups_K = torch.where(members_KG.any(dim=1), members_KG.argmax(dim=1), -1)
    return groups_K[places_B]


@cache
def _members(name: str) -> Tensor:
    """Return 1 where a class of ImageNet is of a group: (1000, groups)."""
    groups = STORED_SETS[name].groups
    members_KG = torch.zeros(IMAGENET_CLASSES, len(groups))
    for group, ranges in enumerate(groups.values()):
        members_KG[places_of(ranges), group] = 1
    return members_KG


def __getattr__(name: str) -> type[Shift]:
    """Return the evaluator of a stored set, by the set's name."""
    if name not in STORED_SETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    known = STORED_SETS[name]
    free = Column(f"{name}-1000", f"{known.title}, among all 1,000")
    columns = (Column(name, known.title), *([] if known.complete or known.groups else [free]))
    if known.foreign:
        auroc = Column(f"{name}/auroc", "OOD detection, AUROC", by_image=False)
        columns = (replace(auroc, name=f"{name}/fpr95", label="OOD, FPR95", error=True), auroc)
    least = FORWARD_SHARD // (len(known.kinds) or 1)
    stated = {"name": name, "columns": columns, "declared": known, "least_shard": least}
    return type(name, (Shift,), stated)
