"""health: two cheap questions that tell whether the attacks on a model are to be believed."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from torch.nn import functional as F

from evaluators.base import Batch, Evaluator, verdicts
from evaluators.red_flags import HUGE_EPSILON
from trainables.data.base import Data
from trainables.networks import Classifier
from trainables.scale import Scale
from trainables.train.adversary import attacked, pgd_iterates, random_start
from trainables.train.exactness import image_numbers

HUGE_STEPS = 20
IMAGES = 50


class Health(Evaluator):
    """Two cheap questions that a sound attack surface answers in a known way.

    pgd-huge: does the answer survive 20 steps of PGD at epsilon 1/2? It must not.
    gradient: does the cross-entropy have a gradient at the image? It must.
    """

    name = "health"

    def __init__(self, scale: Scale) -> None:
        self.subset_size = min(IMAGES, scale.attack_subset)

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "epsilon": HUGE_EPSILON, "steps": HUGE_STEPS}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * (1 + 2 * (HUGE_STEPS + 1))

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        numbers_B = image_numbers(batch.ids)
        start = random_start(batch.images, numbers_B, epsilon=HUGE_EPSILON, key=(self.name,))
        with attacked(classifier):
            ((_, images_BCHW),) = pgd_iterates(
                classifier,
                batch.images,
                batch.labels,
                epsilon=HUGE_EPSILON,
                step_size=HUGE_EPSILON / 4,
                stops=(HUGE_STEPS,),
                start_BCHW=start,
            )
            with torch.no_grad():
                predicted = classifier(images_BCHW).argmax(dim=1)
            images = batch.images.detach().requires_grad_(True)
            logits = classifier(images)
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images)
        has_gradient = gradient.abs().amax(dim=(1, 2, 3)) > 0
        answers = logits.detach().argmax(dim=1)
        return pa.concat_tables(
            [
                verdicts(batch, "pgd-huge", predicted),
                verdicts(batch, "gradient", answers, survived_B=has_gradient),
            ]
        )
