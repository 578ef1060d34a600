"""corruptions: ImageNet-C, or its kinds generated from held-out images; c-bar: those of C-bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from evaluators import GENERATED_IMAGES, corrupted_images
from evaluators.base import Batch, Column, Evaluator, split_batches, verdicts
from evaluators.c_bar_kinds import C_BAR
from evaluators.calibration import severity_errors
from evaluators.corruption_kinds import IMAGENET_C, corrupt
from evaluators.intervals import mean_score
from evaluators.ledger import Score
from evaluators.shifts import Shift
from trainables.data.base import WHOLE, Data, Shard, Split, to_unit
from trainables.data.load import CorruptedSet
from trainables.data.registry import CORRUPTION_GROUPS, EXTRA_KINDS, KINDS, SEVERITIES, STORED_SETS
from trainables.layers import Classifier

SHARD_IMAGES = 5000  # of each stored set
GENERATION = 2  # raise it when generated images change: it is part of a cell's identity
GENERATED = "generated"  # the ledger's remark where a published set was not there
KEPT_BYTES = 2**28
BLOCK = 200  # images that are corrupted at once
SHOWN = ("gaussian_noise-3", "defocus_blur-3", "fog-3")  # of which the ledger keeps examples
# AlexNet's errors, by which Hendrycks and Dietterich (2019) normalise. Source: google-research/
# augmix, imagenet.py ("Raw AlexNet errors taken from github.com/hendrycks/robustness"); equal to
# those in bethgelab/game-of-noise, evaluation_utils.py.
ALEXNET_ERRORS = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948},
    **{"zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324},
    **{"brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056},
    **{"pixelate": 0.717840, "jpeg_compression": 0.606500},
}


class Corruptions(Evaluator):
    """Error on corrupted images: mean over 15 kinds, over 19, mCE, per group and per kind.

    ImageNet-C is read as stored, 224 px. Without a stored set the 15 kinds are generated from 100
    held-out images, kept for the process's next model, as JPEG where the scale has a `stored_jpeg`;
    there is no mCE of those.
    """

    name = "corruptions"
    columns = (
        Column(
            *("corruptions", "ImageNet-C error", "Corruptions error"),
            own_score="corruptions/mCE",
            error=True,
        ),
        Column("corruptions-19", "Error, 19 corruptions", own_score="corruptions-19", error=True),
        Column("corruptions/mCE", "ImageNet-C mCE", own_score="corruptions/mCE", error=True),
    )
    least_shard = SHARD_IMAGES

    def identity(self, source: Data) -> dict[str, Any]:
        jpeg = self.scale.stored_jpeg
        if images := _stored(source):
            title = images.stored.title
            if jpeg:
                raise ValueError(f"{title} is read as it is stored: leave out jpeg {jpeg}")
            return {"data": title, "images": images.ids_hash(), "kinds": images.kinds}
        return _identity_of_generated(self, source)

    def total(self, source: Data) -> int:
        return len(_stored(source) or _chosen(source))

    def asked_about(self, held_out: int) -> int:
        return corrupted_images(self.scale, held_out)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * len(KINDS) * len(SEVERITIES)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        stored = _stored(source)
        remark = "" if stored or source.data_set.generated else GENERATED
        jpeg = self.scale.stored_jpeg
        for question, split in stored.splits() if stored else _generated(source, KINDS, jpeg):
            for batch in split_batches(split, batch_size=batch_size, shard=shard):
                stage = (remark,) * len(batch.ids) if remark else None
                yield replace(batch, question=question, stage=stage)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        logits_BK, question = classifier(batch.images), batch.question
        shown = batch.images if question in SHOWN else None
        answer: dict[str, Any] = {"logits_BK": logits_BK, "tempered": False, "judged_BCHW": shown}
        return verdicts(batch, question, logits_BK.argmax(dim=1), **answer)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return errors, not accuracies, with Student's interval over the n images.

        After them: the calibration error at each severity, corruptions/severity-3/ece.
        """
        kinds, errors_NK = _errors(ledger)
        is_generated = pc.any(pc.equal(ledger["stage"], GENERATED)).as_py()
        is_published = not (is_generated or self.scale.data_set.generated)
        scores = [
            # Of mCE the most, where every answer is wrong, is above 1.
            mean_score(name, errors_NK @ weights, most=float(weights.sum()))
            for name, weights in _aggregates(kinds, with_mce=is_published).items()
        ]
        return scores + severity_errors(ledger)


class CBar(Shift):
    """Top-1 accuracy over the kinds of ImageNet-C-bar and their severities; c-bar/KIND: of one.

    The images are always generated, of 100 held-out ones; `imagenet-c-bar` reads the stored set.
    """

    name = "c-bar"
    declared = STORED_SETS["imagenet-c-bar"]
    columns = (Column("c-bar", "C-bar, generated"),)
    least_shard = SHARD_IMAGES

    def identity(self, source: Data) -> dict[str, Any]:
        return _identity_of_generated(self, source)

    def total(self, source: Data) -> int:
        return len(_chosen(source))

    def asked_about(self, held_out: int) -> int:
        return min(GENERATED_IMAGES, held_out)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        for part, split in _generated(source, self.declared.kinds, self.scale.stored_jpeg):
            for batch in split_batches(split, batch_size=batch_size, shard=shard):
                yield replace(batch, question=f"{self.name}/{part}")


def _stored(source: Data) -> CorruptedSet | None:
    located = source.counterpart("corruptions")
    return CorruptedSet(*located, source) if located else None


def _chosen(source: Data) -> Split:
    return source.held_out.subset(source.corrupted or GENERATED_IMAGES, seed=0)


def _identity_of_generated(evaluator: Evaluator, source: Data) -> dict[str, Any]:
    jpeg = evaluator.scale.stored_jpeg
    return {
        "data": source.data_set.stand_in(evaluator.name),
        "images": _chosen(source).ids_hash(),
        "generation": GENERATION,
        **({"jpeg": jpeg} if jpeg else {}),
    }


def _generated(source: Data, kinds: tuple[str, ...], jpeg: int) -> Iterable[tuple[str, Split]]:
    """Yield the corrupted images by 'kind-severity', kept for the next model if they are few."""
    total = _chosen(source).images.nbytes * len(kinds) * len(SEVERITIES)
    return (_kept if total <= KEPT_BYTES else _generate)(source, kinds, jpeg)


@lru_cache(maxsize=2)
def _kept(source: Data, kinds: tuple[str, ...], jpeg: int) -> tuple[tuple[str, Split], ...]:
    return tuple(_generate(source, kinds, jpeg))


def _generate(source: Data, kinds: tuple[str, ...], jpeg: int) -> Iterator[tuple[str, Split]]:
    split, known = _chosen(source), {**IMAGENET_C, **C_BAR}
    blocks = [*split.parts(batch_size=BLOCK)]
    for kind, severity in product(kinds, SEVERITIES):
        how: dict[str, Any] = {"kind": kind, "severity": severity, "jpeg": jpeg, "kinds": known}
        parts = [corrupt(to_unit(block.images[:]), block.ids, **how) for block in blocks]
        pixels = torch.cat([part.mul_(255).round_().byte() for part in parts])
        yield f"{kind}-{severity}", replace(split, images=pixels)


def _aggregates(kinds: Sequence[str], *, with_mce: bool) -> dict[str, np.ndarray]:
    """Return each score as weights over the kinds; a score that lacks a kind is left out."""
    sets = {"corruptions": KINDS, "corruptions-19": KINDS + EXTRA_KINDS}
    sets |= {f"corruptions/{group}": members for group, members in CORRUPTION_GROUPS.items()}
    sets |= {f"corruptions/{kind}": (kind,) for kind in kinds}
    weights = {
        name: np.array([(kind in members) / len(members) for kind in kinds])
        for name, members in sets.items()
        if set(members) <= set(kinds)
    }
    if with_mce and set(KINDS) <= set(kinds):
        relative = [1 / ALEXNET_ERRORS[k] if k in KINDS else 0.0 for k in kinds]
        weights["corruptions/mCE"] = np.array(relative) / len(KINDS)
    return weights


def _errors(ledger: pa.Table) -> tuple[list[str], np.ndarray]:
    """Return the kinds, and errors_NK over all severities of the images that have every kind."""
    kinds = pc.replace_substring_regex(ledger["question"], r"-\d$", "")
    wrong = pc.invert(ledger["survived"]).cast(pa.float64())
    rows = pa.table({"kind": kinds, "image": ledger["image_id"], "wrong": wrong})
    errors = rows.group_by(["image", "kind"]).aggregate([("wrong", "mean")]).to_pandas()
    names = pc.unique(kinds).to_pylist()
    table = errors.pivot_table(index="image", columns="kind", values="wrong_mean")
    return names, table[names].dropna().to_numpy()
