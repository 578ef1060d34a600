"""Plug-ins of other packages as evaluators: a class of theirs, or one function.

Functions get fixed blocks of images and a generator that follows from the block's ids, so that no
verdict depends on how images are cut into shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from evaluators.base import Batch, Column, Evaluator, verdicts
from evaluators.intervals import image_scores, of_mean
from evaluators.ledger import Score, share
from evaluators.pgd import at_radius
from trainables.data.base import WHOLE, Data, Shard, Split, to_unit
from trainables.data.registry import SEVERITIES
from trainables.plugins import described, load, origin
from trainables.scale import Scale
from trainables.train.adversary import attacked

if TYPE_CHECKING:
    from trainables.layers import Classifier

ATTACKED_AT_ONCE = 32  # images of a block
CORRUPTED_AT_ONCE = 200
CORRUPTED_SHARD = 25 * CORRUPTED_AT_ONCE
PASSES = 40  # of an attack that does not state its own: those of PGD-20
SHOWN_SEVERITY = 3


class PlugIn(Evaluator):
    """What every evaluator of a plug-in has: the package and version are part of its question."""

    entry: EntryPoint

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "plug-in": origin(self.entry)}


class PluggedFunction(PlugIn):
    """A question that one function of a plug-in makes of each block of images."""

    function: Callable[..., Any]
    block: int

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "block": self.block}

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        """Yield the shard's blocks, whatever the batch size."""
        split = self.images(source)
        for places in shard.blocks(split.ids, self.block):
            part: Split = split.at(places)
            yield Batch(to_unit(part.images[:]), part.labels, part.ids)

    def seed(self, batch: Batch) -> int:
        """Return the seed of all that is drawn for a block."""
        ids = "\n".join((self.name, batch.question, *batch.ids))
        return int.from_bytes(hashlib.sha256(ids.encode()).digest()[:7], "big")

    def checked(self, returned: Any, images_BCHW: Tensor) -> Tensor:
        """Return what the function made of images; ValueError names it if these are no images."""
        name, shape = described(self.entry), tuple(images_BCHW.shape)
        if not isinstance(returned, Tensor):
            raise ValueError(f"{name} returned {type(returned).__name__}, not a tensor of images")
        if returned.shape != shape or not returned.is_floating_point():
            form = f"{returned.dtype} {tuple(returned.shape)}"
            raise ValueError(f"{name} returned {form}, not float images {shape}")
        changed_BCHW = returned.detach().to(images_BCHW)
        if not changed_BCHW.isfinite().all():
            raise ValueError(f"{name} returned pixels that are not finite")
        return changed_BCHW


class PluggedAttack(PluggedFunction):
    """Does the answer withstand an attack (model, images, labels, epsilon, generator) -> images?

    What it returns is projected into the max-norm ball of each radius, and into [0, 1]. The model
    is in eval mode with frozen weights. `passes` of the function: the forward passes of one image
    that a plan counts, two for one with a gradient. Out of memory halves a block, and each half
    has a seed of its own.
    """

    takes_radii = True
    least_shard = block = ATTACKED_AT_ONCE

    def __init__(self, scale: Scale, *, radii: Sequence[Fraction] = ()) -> None:
        super().__init__(scale)
        radii = radii or [scale.epsilon]
        self.radii = {self.name + at_radius(r, radii): float(r) for r in radii}
        self.subset_size = scale.attack_subset

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "epsilons": self.radii}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        each = 1 + float(getattr(self.function, "passes", PASSES))
        return len(self.radii) * self.asked_about(held_out) * each

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        rows = []
        with attacked(classifier):
            for question, epsilon in self.radii.items():
                inside_BCHW = self._attacked(classifier, batch, epsilon)
                with torch.no_grad():
                    predicted = classifier(inside_BCHW).argmax(dim=1)
                rows.append(verdicts(batch, question, predicted, judged_BCHW=inside_BCHW))
        return pa.concat_tables(rows)

    def _attacked(self, classifier: Classifier, batch: Batch, epsilon: float) -> Tensor:
        """Return the attacked images; torch's global generators start from the seed, too."""
        images_BCHW, device, seed = batch.images, batch.images.device, self.seed(batch)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            returned = self.function(
                classifier, images_BCHW.clone(), batch.labels.clone(), epsilon, generator
            )
        low_BCHW = (images_BCHW - epsilon).clamp_(min=0)
        high_BCHW = (images_BCHW + epsilon).clamp_(max=1)
        return torch.clamp(self.checked(returned, images_BCHW), low_BCHW, high_BCHW)


class PluggedCorruption(PluggedFunction):
    """Error under a corruption (images, severity, generator) -> images at five severities.

    Images are corrupted on the CPU, so that every device judges the same ones, and cut to [0, 1].
    """

    least_shard, block = CORRUPTED_SHARD, CORRUPTED_AT_ONCE

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * len(SEVERITIES)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterator[Batch]:
        for batch in super().batches(source, batch_size=batch_size, shard=shard):
            for severity in SEVERITIES:
                asked = replace(batch, question=f"{self.name}-{severity}")
                generator = torch.Generator().manual_seed(self.seed(asked))
                returned = self.function(batch.images.clone(), severity, generator)
                yield replace(asked, images=self.checked(returned, batch.images).clamp(0, 1))

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        predicted = classifier(batch.images).argmax(dim=1)
        is_shown = batch.question == f"{self.name}-{SHOWN_SEVERITY}"
        shown = batch.images if is_shown else None
        return verdicts(batch, batch.question, predicted, judged_BCHW=shown)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the mean error over severities, with Student's interval, and that of each."""
        errors_N = np.array(list((image_scores(ledger, self.name) or {}).values()))
        low, high = of_mean(errors_N, least=0, most=1)
        scores = [Score(self.name, float(errors_N.mean()), low, high, len(errors_N))]
        for question in pc.unique(ledger["question"]).to_pylist():
            rows = ledger.filter(pc.equal(ledger["question"], question))
            wrong = len(rows) - (pc.sum(rows["survived"]).as_py() or 0)
            scores.append(share(question, wrong, len(rows)))
        return scores


@cache
def class_of(plug_in: EntryPoint) -> type[Evaluator]:
    """Return the evaluator that a plug-in brings; ValueError where it brings none."""
    loaded, kind = load(plug_in), plug_in.group.rpartition(".")[2]
    fields: dict[str, Any] = {"entry": plug_in, "name": plug_in.name}
    if kind == "evaluators":
        if not (isinstance(loaded, type) and issubclass(loaded, Evaluator)):
            raise ValueError(f"{described(plug_in)} is {loaded!r}, not a class of Evaluator")
        if loaded.name != plug_in.name:
            raise ValueError(
                f"{described(plug_in)} calls itself {loaded.name!r}: one name for both"
            )
        return type(plug_in.name, (PlugIn, loaded), fields)
    if not callable(loaded):
        raise ValueError(f"{described(plug_in)} is {loaded!r}, not a function")
    base = PluggedAttack if kind == "attacks" else PluggedCorruption
    title = plug_in.name if kind == "attacks" else f"{plug_in.name} error"
    fields |= {"function": staticmethod(loaded), "columns": (Column(plug_in.name, title),)}
    return cast(type[Evaluator], type(plug_in.name, (base,), fields))
