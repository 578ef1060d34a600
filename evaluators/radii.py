"""radii: at which radius does each image break? Robust accuracy as a curve, and its area."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, verdicts
from evaluators.intervals import CLEAN_RADIUS, image_scores, mean_score
from evaluators.ledger import Score, survival_scores
from evaluators.memory import images_at_once
from evaluators.pgd import FOLDED_ON
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.train.adversary import attacked, folded, pgd_iterates
from trainables.train.exactness import image_numbers
from trainables.train.norms import random_start

GRID = 16  # radii by default, up to twice the scale's own
STEPS = (10, 20)  # of PGD at a radius: after each it is seen whether the image is broken


class Radii(BallAttack):
    """The smallest of several radii at which PGD breaks an image, found by bisection.

    A search goes on from where it was: within a smaller radius from the example that broke the
    image, within a larger one from that which did not. An example also breaks its image at every
    radius that holds it. Each radius is a question, radii@4/255, clean images radii@0. The score
    `radii` is the area under the curve of accuracy by radius (trapezoids), 1 if nothing breaks.
    """

    name = "radii"
    always_named = True
    columns: tuple[Column, ...] = (Column("radii", "Area under accuracy by radius"),)

    def standard_radii(self, standard: Fraction) -> list[Fraction]:
        return [2 * standard * step / GRID for step in range(1, GRID + 1)]

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "epsilons": self.radii, "steps": STEPS}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        searches = len(self.radii).bit_length()
        return self.asked_about(held_out) * (1 + searches * (2 * STEPS[-1] + len(STEPS)))

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        with attacked(classifier):
            victim = folded(classifier, batch.images[:FOLDED_ON]) or classifier
            at_once = images_at_once(victim, batch.images, most=len(batch.ids))
            rows = [self._verdicts(classifier, victim, p) for p in batch.parts(at_once)]
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the area, then the accuracy at each radius."""
        areas_N = np.array([*(image_scores(ledger, self.name) or {}).values()])
        return [mean_score(self.name, areas_N, most=1), *survival_scores(ledger)]

    def _verdicts(self, classifier: Classifier, victim: nn.Module, batch: Batch) -> pa.Table:
        smallest_B, answers_B = self._search(classifier, victim, batch)
        rows = []
        for place, question in enumerate([f"{self.name}{CLEAN_RADIUS}", *self.radii]):
            broken_B = smallest_B <= place
            stages = [
                ("pgd" if s else "clean") if s <= place else None for s in smallest_B.tolist()
            ]
            predicted_B = torch.where(broken_B, answers_B, batch.labels)
            rows.append(verdicts(batch, question, predicted_B, stage=stages))
        return pa.concat_tables(rows)

    def _search(
        self, classifier: Classifier, victim: nn.Module, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the place of each image's smallest radius, and the wrong answer there.

        0 is the place of images that are wrong as they are, the one after the last that of images
        that nothing breaks.
        """
        images_BCHW, how = batch.images, {"norm": self.norm}
        grid = torch.tensor([0.0, *self.radii.values()], device=images_BCHW.device)
        with torch.no_grad():
            answers_B = classifier(images_BCHW).argmax(dim=1)
        low_B = torch.zeros_like(answers_B)
        high_B = torch.where(answers_B == batch.labels, len(grid), 0)
        first: Any = {"epsilon": float(grid[len(grid) // 2]), "key": (self.name,), **how}
        current_BCHW = random_start(images_BCHW, image_numbers(batch.ids), **first)
        while len(places := (high_B - low_B > 1).nonzero().squeeze(1)):
            middle_P = (low_B + high_B)[places] // 2
            images, labels = images_BCHW[places], batch.labels[places]
            epsilon = grid[middle_P].view(-1, 1, 1, 1)
            start = self.ball.ball(images, epsilon)(current_BCHW[places])
            settings: Any = {"epsilon": epsilon, "start_BCHW": start, **how}
            before_B = high_B.clone()
            for _, points in pgd_iterates(victim, images, labels, stops=STEPS, **settings):
                with torch.no_grad():
                    predicted_P = classifier(points).argmax(dim=1)
                # Rounding may leave an example a little outside of the radius it was made for.
                size_P = self.ball.length(points - images)
                smallest_P = torch.minimum(torch.searchsorted(grid, size_P), middle_P)
                reached_P = torch.where(predicted_P == labels, len(grid), smallest_P)
                better = reached_P < high_B[places]
                high_B[places] = torch.minimum(high_B[places], reached_P)
                answers_B[places[better]] = predicted_P[better]
                moved = better | (high_B[places] == before_B[places])
                current_BCHW[places[moved]] = points[moved]
            survived_P = high_B[places] == before_B[places]
            low_B[places[survived_P]] = middle_P[survived_P]
        return high_B, answers_B
