"""certified: within which L2 radius does no perturbation change the smoothed model's answer?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.special import ndtri
from torch import Tensor

from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, verdicts
from evaluators.intervals import CLEAN_RADIUS, image_scores, mean_score
from evaluators.ledger import Score, by_question, share, survival_scores
from evaluators.proportions import clopper_pearson
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.train.exactness import seed_of

AT_ONCE = 100  # noisy copies of an image: always as many, so that shards change no bit
HALF_SIGMAS = 8  # radii by default, half a sigma apart
MOST_SIGMA = 4.0  # of pixels in [0, 1]; Cohen et al. have 0.12 to 1
ABSTAINED = "abstained"


class Certified(BallAttack):
    """Certified accuracy of the model smoothed by Gaussian noise of standard deviation `sigma`.

    The class that most of `selection` noisy copies get is certified by `samples` others: with
    probability 1 - `alpha`, no perturbation within the ledger's `radius` changes the smoothed
    model's answer; 0 where it abstains. Noisy pixels are not cut to [0, 1]. An image counts as
    certified at a radius, certified@0.25, if the answer is right and the certificate reaches it.
    The score `certified` is the area under that curve. ValueError where the settings cannot
    certify. Source: Cohen et al. (ICML 2019), CERTIFY and its n0 = 100, alpha = 0.001.
    """

    name = "certified"
    always_named = True
    norm, sigma = "l2", 0.25
    columns: tuple[Column, ...] = (Column("certified", "Area under certified accuracy by radius"),)

    def __init__(
        self,
        scale: Scale,
        *,
        radii: Sequence[Fraction] = (),
        sigma: float = 0.0,
        alpha: float = 0.001,
        selection: int = 100,
        samples: int = 0,
    ) -> None:
        self.sigma, self.alpha = sigma or self.sigma, alpha
        self.selection, self.samples = selection, samples or scale.smoothing_samples
        if not 0 < self.sigma <= MOST_SIGMA:
            allowed = f"above 0 and at most {MOST_SIGMA:g}, like 0.25"
            raise ValueError(f"sigma {sigma:g} is no noise on pixels in [0, 1]: {allowed}")
        if not 0 < alpha < 1 / 2:
            raise ValueError(f"alpha {alpha:g}, of wrong certificates, is above 0 and below 1/2")
        least = math.floor(math.log(alpha, 1 / 2)) + 1
        if selection < 1 or self.samples < least:
            few = f"{selection} to choose a class and {self.samples} to certify it are too few"
            raise ValueError(f"{few} samples: at alpha {alpha:g} 1 and {least} or more can")
        super().__init__(scale, radii=radii)

    @classmethod
    def within(cls, sigma: str, name: str) -> type[Certified]:
        """Return the evaluator at another sigma, by the name of its entry: certified-0.5."""
        columns = (Column(name, f"{cls.columns[0].label}, sigma {sigma}"),)
        return type(name, (cls,), {"name": name, "columns": columns, "sigma": float(sigma)})

    def standard_radii(self, standard: Fraction) -> list[Fraction]:
        return [Fraction(self.sigma) * half / 2 for half in range(1, HALF_SIGMAS + 1)]

    def identity(self, source: Data) -> dict[str, Any]:
        settings = {n: getattr(self, n) for n in ("sigma", "alpha", "selection", "samples")}
        return {**super().identity(source), "epsilons": self.radii, **settings}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * (self.selection + self.samples)

    @torch.inference_mode()
    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        images = zip(batch.ids, batch.images, strict=True)
        certificates = [self._certificate(classifier, *image) for image in images]
        predicted_B, radius_B = (torch.tensor(part) for part in zip(*certificates, strict=True))
        right_B, rows = predicted_B == batch.labels.cpu(), []
        pairs = zip(right_B, radius_B, strict=True)
        reasons = [("radius" if right else "clean") if r else ABSTAINED for right, r in pairs]
        for question, radius in {f"{self.name}{CLEAN_RADIUS}": 0.0, **self.radii}.items():
            survived_B = right_B & (radius_B > 0) & (radius_B >= radius)
            stage = [None if s else why for s, why in zip(survived_B, reasons, strict=True)]
            how: dict[str, Any] = {"survived_B": survived_B, "stage": stage, "radius_B": radius_B}
            rows.append(verdicts(batch, question, predicted_B, **how))
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the area, the accuracy at each radius, and the share of abstentions."""
        areas_N = np.array([*(image_scores(ledger, self.name) or {}).values()])
        clean = next(iter(by_question(ledger).values()))
        abstained = clean["stage"].to_pylist().count(ABSTAINED)
        rate = share(f"{self.name}/{ABSTAINED}", abstained, len(clean))
        return [mean_score(self.name, areas_N, most=1), *survival_scores(ledger), rate]

    def _certificate(
        self, classifier: Classifier, image_id: str, image_CHW: Tensor
    ) -> tuple[int, float]:
        """Return the smoothed model's class, and the radius that is certified: 0 if it abstains."""
        generator = torch.Generator(image_CHW.device).manual_seed(seed_of(f"certified\n{image_id}"))
        noisy = partial(self._answers, classifier, image_CHW, generator)
        top = int(noisy(self.selection).bincount().argmax())
        agreeing = int((noisy(self.samples) == top).sum())
        least, _ = clopper_pearson(agreeing, self.samples, 1 - 2 * self.alpha)
        return top, self.sigma * max(0.0, float(ndtri(least)))

    def _answers(
        self, classifier: Classifier, image_CHW: Tensor, generator: torch.Generator, samples: int
    ) -> Tensor:
        """Return the classes (N,) of so many noisy copies of an image."""
        answers = []
        for first in range(0, samples, AT_ONCE):
            shape = min(AT_ONCE, samples - first), *image_CHW.shape
            noise_BCHW = torch.randn(shape, generator=generator, device=image_CHW.device)
            answers.append(classifier(image_CHW + self.sigma * noise_BCHW).argmax(dim=1))
        return torch.cat(answers)
