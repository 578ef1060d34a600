"""pgd: does the answer withstand projected gradient descent at the scale's radius?"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from evaluators import PGD_STEPS
from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, verdicts
from evaluators.memory import images_at_once
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.recipe import Protocol
from trainables.scale import Scale
from trainables.train.adversary import (
    attacked,
    folded,
    half_precision,
    in_bf16,
    pgd_iterates,
)
from trainables.train.exactness import image_numbers, uniform
from trainables.train.norms import random_start

FOLDED_ON = 16  # images whose logits a folded model must keep
PLAIN_SHARE = 0.5  # of the attacks as published start at the image: a normal draw is below 0


class PGD(BallAttack):
    """PGD of several lengths as one trajectory with step epsilon/4 and a random start.

    The iterate of each length in `steps` is scored, in float32. Step max(epsilon/4, epsilon/n) is
    epsilon/4 for all n >= 4: 1/255 at the study's 4/255. Source: STUDY section 3.
    """

    name = "pgd"
    columns: tuple[Column, ...] = tuple(Column(f"pgd-{n}", f"PGD-{n}") for n in PGD_STEPS)
    protocol: Protocol = "corrected"
    may_be_bf16 = True

    def __init__(
        self, scale: Scale, *, radii: Sequence[Fraction] = (), steps: Sequence[int] = PGD_STEPS
    ) -> None:
        super().__init__(scale, radii=radii)
        self.steps = sorted(steps)

    def identity(self, source: Data) -> dict[str, Any]:
        epsilons = list(self.radii.values())
        return {
            **super().identity(source),
            "epsilon": epsilons[0] if len(epsilons) == 1 else epsilons,
            "steps": self.steps,
            "protocol": self.protocol,
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        each = len(self.radii) * (len(self.steps) + 2 * self.steps[-1])
        return self.asked_about(held_out) * each

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        half = half_precision(batch.images.device, enabled=self.protocol == "as-published")
        rows = []
        with attacked(classifier), half:
            victim = folded(classifier, batch.images[:FOLDED_ON]) or classifier
            at_once = images_at_once(victim, batch.images, most=len(batch.ids))
            function = in_bf16(victim) if self.is_bf16 else victim
            for name, epsilon in self.radii.items():
                for part in batch.parts(at_once):
                    start, pair = self._start(part, epsilon), (part.images, part.labels)
                    how: dict[str, Any] = {"epsilon": epsilon, "norm": self.norm}
                    for steps, images_BCHW in pgd_iterates(
                        function, *pair, stops=self.steps, start_BCHW=start, **how
                    ):
                        with torch.no_grad():
                            predicted = classifier(images_BCHW).argmax(dim=1)
                        shown = images_BCHW if steps == self.steps[-1] else None
                        question = f"{self.name}-{steps}{name.removeprefix(self.name)}"
                        rows.append(verdicts(part, question, predicted, judged_BCHW=shown))
        return pa.concat_tables(rows)

    def _start(self, batch: Batch, epsilon: float) -> Tensor:
        numbers_B = image_numbers(batch.ids)
        how: dict[str, Any] = {"epsilon": epsilon, "key": ("pgd",), "norm": self.norm}
        return random_start(batch.images, numbers_B, **how)


class PublishedPGD(PGD):
    """PGD as the study's code runs it: half of the images start at random, in half precision.

    The study draws the start once for a batch. Here it is drawn for each image with the same chance
    of one half, so that a verdict does not depend on how images are batched. Source: the study's
    models/attacker.py and engine_accum.py.
    """

    name = "pgd-as-published"
    columns = tuple(Column(f"pgd-as-published-{n}", f"PGD-{n} as published") for n in PGD_STEPS)
    protocol: Protocol = "as-published"
    may_be_bf16 = False  # it has a half precision of its own

    def _start(self, batch: Batch, epsilon: float) -> Tensor:
        draws_B = uniform(image_numbers(batch.ids), (), key=("pgd", "plain"))
        plain_B = (draws_B < PLAIN_SHARE).to(batch.images.device)
        return torch.where(plain_B.view(-1, 1, 1, 1), batch.images, super()._start(batch, epsilon))
