"""Plug-ins of other packages as evaluators: a class of theirs, or one function.

A function gets fixed blocks of images, and a generator that follows from the ids of the block: no
verdict depends on how images are cut into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, Evaluator, verdicts
from evaluators.intervals import image_scores, mean_score
from evaluators.ledger import Score, survival_scores
from trainables.data.base import WHOLE, Data, Shard, to_unit
from trainables.data.registry import SEVERITIES
from trainables.layers import Classifier
from trainables.plugins import described, load, origin
from trainables.train.adversary import attacked
from trainables.train.exactness import seed_of

PASSES = 40  # forward passes of an image that a plan counts: those of PGD-20


class PlugIn(Evaluator):
    """An evaluator of another package, whose version is part of the question."""

    plug_in: EntryPoint

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "plug-in": origin(self.plug_in)}


class PlugInFunction(PlugIn):
    """A question that a function makes of blocks of so many images."""

    function: Callable[..., Any]
    block: int

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "block": self.block}

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yield a shard's blocks, whatever the batch size."""
        split = self.images(source)
        for places in shard.blocks(split.ids, self.block):
            part = split.at(places)
            yield Batch(to_unit(part.images[:]), part.labels, part.ids)

    def returned(self, batch: Batch, *arguments: Any) -> Tensor:
        """Call the function on a block with the block's generator, which is on its device.

        ValueError names the plug-in if it does not return images.
        """
        seed = seed_of("\n".join((self.name, batch.question, *batch.ids)))
        generator = torch.Generator(batch.images.device).manual_seed(seed)
        images, shape, form = self.function(*arguments, generator), batch.images.shape, ""
        if isinstance(images, Tensor):
            if images.is_floating_point() and images.shape == shape and images.isfinite().all():
                return images.detach().to(batch.images)
            form = f" {images.dtype} {tuple(images.shape)}"
        wanted = f"finite float images {tuple(shape)}"
        said = f"it returned {type(images).__name__}{form}"
        raise ValueError(f"{described(self.plug_in)} must return {wanted}: {said}")


class Attack(PlugInFunction, BallAttack):
    """Does the answer withstand an attack (model, images, labels, epsilon, generator) -> images?

    What it returns is cut to the max-norm ball of each radius and to [0, 1]. The model is in eval
    mode with frozen weights. Out of memory halves a block, and each half has a seed of its own.
    """

    least_shard = block = 32

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "epsilons": self.radii}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return len(self.radii) * self.asked_about(held_out) * (1 + PASSES)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        rows, images_BCHW = [], batch.images
        with attacked(classifier):
            for question, epsilon in self.radii.items():
                copies = images_BCHW.clone(), batch.labels.clone()  # which it may change
                changed_BCHW = self.returned(batch, classifier, *copies, epsilon)
                inside_BCHW = self.ball.ball(images_BCHW, epsilon)(changed_BCHW)
                with torch.no_grad():
                    predicted = classifier(inside_BCHW).argmax(dim=1)
                rows.append(verdicts(batch, question, predicted, judged_BCHW=inside_BCHW))
        return pa.concat_tables(rows)


class Corruption(PlugInFunction):
    """Error under a corruption (images, severity, generator) -> images at five severities.

    Images are corrupted on the CPU, the same on every device, and cut to [0, 1].
    """

    block = 200
    least_shard = 25 * block

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * len(SEVERITIES)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        for block in super().batches(source, batch_size=batch_size, shard=shard):
            for severity in SEVERITIES:
                batch = replace(block, question=f"{self.name}-{severity}")
                corrupted_BCHW = self.returned(batch, block.images.clone(), severity)
                yield replace(batch, images=corrupted_BCHW.clamp(0, 1))

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        predicted = classifier(batch.images).argmax(dim=1)
        return verdicts(batch, batch.question, predicted, judged_BCHW=batch.images)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the mean error over severities, with Student's interval, and that at each."""
        errors_N = np.array([*(image_scores(ledger, self.name) or {}).values()])
        scores = [mean_score(self.name, errors_N, most=1)]
        for s in survival_scores(ledger):
            name = f"{self.name}/severity-{s.name[-1]}"
            scores.append(Score(name, 1 - s.value, 1 - s.high, 1 - s.low, s.n))
        return scores


def class_of(plug_in: EntryPoint) -> type[Evaluator]:
    """Return the evaluator that a plug-in brings; ValueError where it brings none."""
    loaded, kind = load(plug_in), plug_in.group.rpartition(".")[2]
    fields: dict[str, Any] = {"plug_in": plug_in, "name": plug_in.name}
    if kind == "evaluators":
        is_evaluator = isinstance(loaded, type) and issubclass(loaded, Evaluator)
        if not is_evaluator or getattr(loaded, "name", "") != plug_in.name:
            raise ValueError(f"{described(plug_in)} is no Evaluator with name = {plug_in.name!r}")
        return type(plug_in.name, (PlugIn, loaded), fields)
    if not callable(loaded):
        raise ValueError(f"{described(plug_in)} is no function")
    base, title = (Attack, "") if kind == "attacks" else (Corruption, " error")
    columns = (Column(plug_in.name, plug_in.name + title, error=bool(title)),)
    fields |= {"function": staticmethod(loaded), "columns": columns}
    return type(plug_in.name, (base,), fields)
