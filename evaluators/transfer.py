"""transfer: a model's adversarial images, kept as bytes, so that every other can judge them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor, nn

from evaluators.base import Batch, Column, Evaluator, split_batches, verdicts
from evaluators.ledger import from_parquet
from evaluators.memory import images_at_once
from evaluators.pgd import FOLDED_ON
from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.train.adversary import attacked, folded, pgd_iterates
from trainables.train.exactness import image_numbers
from trainables.train.norms import random_start

TRANSFER = "transfer"
CLEAN = f"{TRANSFER}/clean"  # the question of the images as they are
STEPS = 10
IMAGES = 1000  # at most: one of 224 px takes about 0.1 MB in the ledger
SLACK = 1e-3  # of 1/255, for float32


class Transfer(Evaluator):
    """Does the answer withstand adversarial images: the model's own, or those of `sources`?

    Its own are those of PGD-10 at the scale's radius, brought to whole 255ths within the ball, and
    judged as the ledger keeps them: as PNG. Those of others are read from their ledgers, by one
    forward pass each: the question of a source is transfer/SOURCE. sources: the sha256 of ledgers
    by source; `read` returns one. A shard is then one of some sources. ValueError where a source's
    images are not the data's.
    """

    name = TRANSFER
    columns = (Column(TRANSFER, f"PGD-{STEPS}, whole 255ths"),)
    least_shard = 1

    def __init__(
        self,
        scale: Scale,
        *,
        sources: Mapping[str, str] | None = None,
        read: Callable[[str], bytes] | None = None,
    ) -> None:
        super().__init__(scale)
        self.subset_size = min(IMAGES, scale.attack_subset)
        self.epsilon, self._sources, self._read = float(scale.epsilon), sources or {}, read
        if scale.epsilon * 255 < 1:
            radius = f"within {255 * self.epsilon:g}/255 no other image has whole 255ths"
            raise ValueError(f"{radius}: {self.name} needs a radius of 1/255 or more")

    def identity(self, source: Data) -> dict[str, Any]:
        identity = {**super().identity(source), "epsilon": self.epsilon, "steps": STEPS}
        if self._sources:
            listed = repr(sorted(self._sources.items())).encode()
            identity["sources"] = hashlib.sha256(listed).hexdigest()
        return identity

    def total(self, source: Data) -> int:
        return len(self._sources) + 1 if self._sources else super().total(source)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * (2 + 2 * STEPS)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        if not self._sources:
            yield from super().batches(source, batch_size=batch_size, shard=shard)
            return
        names = ["clean", *sorted(self._sources)]
        for name in (names[place] for place in shard.of(names)):
            split = self.images(source) if name == "clean" else self._images_of(name, source)
            for batch in split_batches(split, batch_size=batch_size):
                yield replace(batch, question=f"{self.name}/{name}")

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        if batch.question:
            with torch.inference_mode():
                predicted = classifier(batch.images).argmax(dim=1)
            return verdicts(batch, batch.question, predicted)
        with attacked(classifier):
            victim = folded(classifier, batch.images[:FOLDED_ON]) or classifier
            at_once = images_at_once(victim, batch.images, most=len(batch.ids))
            rows = [self._kept(classifier, victim, part) for part in batch.parts(at_once)]
        return pa.concat_tables(rows)

    def _kept(self, classifier: Classifier, victim: nn.Module, batch: Batch) -> pa.Table:
        """Return the answers to a batch as it is and to its adversarial images, with these."""
        images, numbers_B, radius = batch.images, image_numbers(batch.ids), self.epsilon
        start = random_start(images, numbers_B, epsilon=radius, key=("pgd",))
        settings: Any = {"epsilon": radius, "stops": (STEPS,), "start_BCHW": start}
        ((_, points),) = pgd_iterates(victim, images, batch.labels, **settings)
        stored = whole_255ths(images, points, self.epsilon)
        with torch.no_grad():
            clean, predicted = (classifier(shown).argmax(dim=1) for shown in (images, stored))
        every = replace(batch, examples=frozenset(batch.ids))
        rows = verdicts(every, self.name, predicted, judged_BCHW=stored)
        return pa.concat_tables([verdicts(batch, CLEAN, clean), rows])

    def _images_of(self, name: str, source: Data) -> Split:
        """Return the images that a source's ledger keeps; ValueError where they are not these."""
        assert self._read is not None
        ledger, _ = from_parquet(self._read(name))
        ledger = ledger.filter(pc.is_valid(ledger["image"]))
        here = dict(zip(source.held_out.ids, source.held_out.labels.tolist(), strict=True))
        ids, labels = ledger["image_id"].to_pylist(), ledger["label"].to_pylist()
        for image_id, label in zip(ids, labels, strict=True):
            if here.get(image_id) != label:
                there = f"of label {here[image_id]}" if image_id in here else "unknown"
                raise ValueError(
                    f"the adversarial images of {name} are of other data or classes: {image_id} "
                    f"has label {label} there and is {there} here; judge both on one data set"
                )
        pixels = [np.array(Image.open(io.BytesIO(png))) for png in ledger["image"].to_pylist()]
        size = self.scale.image_size
        if odd := {p.shape[:2] for p in pixels} - {(size, size)}:
            raise ValueError(
                f"the adversarial images of {name} have {' x '.join(map(str, odd.pop()))} px, and "
                f"this model takes {size}: images of another size leave their ball when resized"
            )
        images = torch.from_numpy(np.stack(pixels)).view(len(ids), size, size, -1)
        return Split(images=images.permute(0, 3, 1, 2), labels=torch.tensor(labels), ids=tuple(ids))


def received(sources: Iterable[str]) -> str:
    """Return the name of the cell of a model's answers to the images of these trials."""
    listed = " ".join(sorted(sources)).encode()
    return f"{TRANSFER}.of-{hashlib.sha256(listed).hexdigest()[:8]}"


def whole_255ths(images_BCHW: Tensor, points_BCHW: Tensor, epsilon: float) -> Tensor:
    """Return the points at the nearest whole 255ths within max-norm epsilon, at least 1/255."""
    middle, radius = 255 * images_BCHW, 255 * epsilon + SLACK
    low = (middle - radius).ceil_().clamp_(min=0)
    high = (middle + radius).floor_().clamp_(max=255)
    return (255 * points_BCHW).round().clamp(low, high).div(255)
