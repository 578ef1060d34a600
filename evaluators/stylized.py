"""stylized: does the classifier go by shape where the texture says otherwise?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from evaluators.base import Batch, Column, Evaluator, answers, split_batches
from evaluators.ledger import Score, share
from trainables.data.base import WHOLE, Data, Shard, Split, to_unit
from trainables.data.load import stored_split

if TYPE_CHECKING:
    from trainables.layers import Classifier

TEXTURE = "texture:"


class Stylized(Evaluator):
    """Top-1 accuracy by shape.

    Stylized-ImageNet: `stylized` at native size, `stylized-cropped` as the study's commands read
    it (Resize 256, CenterCrop 224). Without a stored set: the cue conflict of `mix_cues` on every
    held-out image, and `stylized/shape-bias`, the share of shape among the answers that are the
    shape's class or the texture's (Geirhos et al., ICLR 2019). Each answers among all classes, and
    as `stylized-present` and `stylized-cropped-present` among the data's where the head has others.
    """

    name = "stylized"
    # Beside the published figure stands the resized and cropped one, as the study's commands read
    # it: script/generation_to_ood.sh gives imagenet_robust.py no --already224.
    columns = (
        Column("stylized-cropped", "Stylized", "Cue conflict", "stylized", "stylized-cropped"),
        Column("stylized", "Stylized, native size", own_score="stylized-cropped"),
    )

    def identity(self, source: Data) -> dict[str, Any]:
        images = super().identity(source)
        if located := source.counterpart(self.name):
            return {"data": located[0].title, **images}
        title = source.data_set.stand_in("cue conflict")
        return {"data": title, **images, "texture": "Fourier amplitude"}

    def images(self, source: Data) -> Split:
        located = source.counterpart(self.name)
        return stored_split(*located, source) if located else source.held_out

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return held_out if self.scale.data_set.generated else 2 * held_out

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        located = source.counterpart(self.name)
        if located is None:
            for batch in _cue_conflicts(source, batch_size, shard):
                yield replace(batch, question=self.name)
            return
        for question, native in (("stylized", True), ("stylized-cropped", False)):
            split = stored_split(*located, source, native=native)
            for batch in split_batches(split, batch_size=batch_size, shard=shard):
                yield replace(batch, question=question)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        logits_BK, shown = classifier(batch.images), batch.images
        return answers(batch, batch.question, logits_BK, stage=batch.stage, judged_BCHW=shown)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        scores = super().summarize(ledger)
        for question in pc.unique(ledger["question"]).to_pylist():
            scores += _shape_bias(ledger.filter(pc.equal(ledger["question"], question)), question)
        return scores


def _shape_bias(ledger: pa.Table, question: str) -> list[Score]:
    """Return the share of shape among the answers by shape or texture; nothing without any."""
    textured = ledger.filter(pc.is_valid(ledger["stage"]))
    textures = pc.replace_substring(textured["stage"], TEXTURE, "").cast(pa.int32())
    shape = pc.sum(textured["survived"]).as_py() or 0
    texture = pc.sum(pc.equal(textured["predicted"], textures)).as_py() or 0
    bias = f"{question}/shape-bias"
    return [share(bias, shape, shape + texture)] if shape + texture else []


def _cue_conflicts(source: Data, batch_size: int, shard: Shard) -> Iterable[Batch]:
    held_out = source.held_out
    partners = texture_partners(held_out.ids, held_out.labels)
    textures = held_out.at(partners)
    places = shard.of(held_out.ids)
    for first in range(0, len(places), batch_size):
        part = places[first : first + batch_size]
        shape, texture = held_out.at(part), textures.at(part)
        yield Batch(
            mix_cues(to_unit(shape.images[:]), to_unit(texture.images[:])),
            shape.labels,
            shape.ids,
            stage=tuple(f"{TEXTURE}{label}" for label in texture.labels.tolist()),
        )


def texture_partners(ids: tuple[str, ...], labels: Tensor) -> np.ndarray:
    """Return for each image the index of one of another class, chosen by the image's id."""
    partners = np.empty(len(ids), dtype=np.int64)
    for label in set(labels.tolist()):
        others = np.flatnonzero(labels != label)
        if not len(others):
            raise ValueError("a cue conflict needs held-out images of two classes, and all are one")
        for place in np.flatnonzero(labels == label):
            number = int.from_bytes(hashlib.sha256(ids[place].encode()).digest()[:7], "big")
            partners[place] = others[number % len(others)]
    return partners


def mix_cues(shapes_BCHW: Tensor, textures_BCHW: Tensor) -> Tensor:
    """Give each image the Fourier amplitudes of another: its edges stay, its texture goes.

    The phases hold the shape (Oppenheim and Lim 1981); the amplitudes are all of the texture's
    second-order statistics, its mean and contrast included.
    """
    shape, texture = torch.fft.rfft2(shapes_BCHW), torch.fft.rfft2(textures_BCHW)
    mixed = torch.polar(texture.abs(), shape.angle())
    images_BCHW: Tensor = torch.fft.irfft2(mixed, s=shapes_BCHW.shape[2:])
    return images_BCHW.clamp(0, 1)
