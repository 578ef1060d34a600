"""stylized and cue-conflict: does the classifier go by shape where the texture says otherwise?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from evaluators.base import Batch, Clean, Column, split_batches, verdicts
from evaluators.ledger import Score, by_question, share
from evaluators.shifts import grouped
from trainables.data.base import WHOLE, Data, Shard, Split, to_unit
from trainables.data.registry import SIXTEEN_CLASSES, STORED_SETS
from trainables.layers import Classifier
from trainables.train.exactness import seed_of

TEXTURE = "texture:"
SIXTEEN = "cue-conflict-16"
BIAS = f"{SIXTEEN}/shape-bias"


class Stylized(Clean):
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
        return self.identity_of_set(source, "cue conflict", texture="Fourier amplitude")

    def images(self, source: Data) -> Split:
        return self.stored(source) or source.held_out

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return held_out if self.scale.data_set.generated else 2 * held_out

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        for question, native in (("stylized", True), ("stylized-cropped", False)):
            split = self.stored(source, native=native)
            if split is None:
                yield from _cue_conflicts(source, batch_size, shard)
                return
            for batch in split_batches(split, batch_size=batch_size, shard=shard):
                yield replace(batch, question=question)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        scores = super().summarize(ledger)
        for question, rows in by_question(ledger.filter(pc.is_valid(ledger["stage"]))).items():
            textures = pc.replace_substring(rows["stage"], TEXTURE, "").cast(pa.int32())
            shape = pc.sum(rows["survived"]).as_py()
            texture = pc.sum(pc.equal(rows["predicted"], textures)).as_py()
            if shape + texture:
                scores.append(share(f"{question}/shape-bias", shape, shape + texture))
        return scores


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
            partners[place] = others[seed_of(ids[place]) % len(others)]
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


class CueConflict(Stylized):
    """The shape bias: the share of shape among the answers by shape or texture.

    `cue-conflict-16`, the accuracy by shape, and its shape bias are of the 1,280 stimuli of Geirhos
    et al. (ICLR 2019), as their authors compute them: a category's probability is the average over
    its classes of ImageNet, and the bias leaves out images whose shape and texture agree. They need
    a head of ImageNet's 1,000 classes. Without the stimuli: the cue conflict of `stylized`. Source:
    README.md and code/probabilities_to_decision.py of rgeirhos/texture-vs-shape.
    """

    name = "cue-conflict"
    columns = (
        Column(SIXTEEN, "Cue conflict, 16 classes", "Cue conflict", "cue-conflict", SIXTEEN),
        Column(BIAS, "Shape bias", "Shape bias", "cue-conflict/shape-bias", SIXTEEN),
    )

    def cost(self, held_out: int, *, withstanding: float) -> float:
        name = self.scale.data_set.counterpart(self.name)
        is_stored = name and not self.scale.data_set.generated
        return STORED_SETS[name].images if is_stored else held_out

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        split = self.stored(source)
        if split is None:
            yield from super().batches(source, batch_size=batch_size, shard=shard)
            return
        for batch in split_batches(split, batch_size=batch_size, shard=shard):
            yield replace(batch, question=SIXTEEN, stage=tuple(map(_conflict, batch.ids)))

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        if batch.question != SIXTEEN:
            return super().judge(classifier, batch)
        known = STORED_SETS[self.name]
        return verdicts(batch, SIXTEEN, grouped(classifier, classifier(batch.images), known))


def _conflict(image_id: str) -> str | None:
    """Return the remark on a stimulus, such as cat/cat7-elephant1; None where its cues agree."""
    cues = re.search(r"/(?:.*_)?([a-z]+)\d+-([a-z]+)\d+$", image_id)
    if not cues or cues[2] not in SIXTEEN_CLASSES:
        raise ValueError(f"stimulus {image_id} does not name shape and texture: cat/cat7-elephant1")
    return None if cues[1] == cues[2] else f"{TEXTURE}{list(SIXTEEN_CLASSES).index(cues[2])}"
