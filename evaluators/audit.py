"""audit: is a model's robustness real? Signs of masked gradients, and an attack adapted to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluators.autoattack import AutoAttack
from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, verdicts
from evaluators.health import HUGE_EPSILON, HUGE_STEPS
from evaluators.memory import images_at_once
from evaluators.own_model import ROUNDING, classifier_of
from evaluators.surrogate import View
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.train.adversary import attacked, pgd_iterates
from trainables.train.exactness import image_numbers
from trainables.train.norms import random_start

STEPS = 40  # of the plain attack, and of each of the adapted one's
DRAWS = 8  # of a random model, averaged
QUERIES = 500  # of Square
SPSA_STEPS, SPSA_DRAWS = 20, 32
# Noise on the surrogate's images, in radii, and how many draws of it are averaged.
SMOOTHING = ((0.0, 1), (0.25, 4), (1.0, 4))
SURROGATE_STOPS = (4, 8, 12, 16, 20)  # steps after which the model itself is asked
PROBE = 0.1  # of the radius: a step by which the loss must rise
Answers = Callable[[Batch], Iterable[Tensor]]


class Audit(BallAttack):
    """Does the answer withstand attacks that look for a gradient which the model hides?

    `audit/plain` is PGD as most run it. `audit` is what withstands, after it and in turn, PGD from
    another start, on rescaled logits, on a surrogate (straight gradients through what has none,
    averaged over noise), Square and SPSA. The answers of a random model are averaged, and their
    gradients. The other questions are signs of masked gradients, which `red_flags` reads. Sources:
    Athalye et al. (2018); Carlini et al. (2019), sections 4 and 5; Tramer et al. (2020); Croce and
    Hein (2020).
    """

    name = "audit"
    columns = (
        Column("audit/clean", "Clean, same images"),
        Column("audit/plain", f"PGD-{STEPS}, same images"),
        Column("audit", "Adapted attack"),
    )

    def identity(self, source: Data) -> dict[str, Any]:
        budget = (STEPS, DRAWS, QUERIES, SPSA_STEPS, SPSA_DRAWS, SMOOTHING, SURROGATE_STOPS)
        return {**super().identity(source), "version": 1, "epsilons": self.radii, "budget": budget}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count the signs of all images, and the adapted attack of those that withstand PGD."""
        smooth = SURROGATE_STOPS[-1] * sum(draws for _, draws in SMOOTHING)
        adapted = 2 * (2 * STEPS + smooth + SPSA_STEPS * SPSA_DRAWS) + QUERIES
        signs = 2 * (2 * STEPS + HUGE_STEPS + 4)
        return len(self.radii) * self.asked_about(held_out) * (signs + withstanding * adapted)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        device = batch.images.device
        devices = [device] if device.type == "cuda" else []
        rows: list[pa.Table] = []
        with attacked(classifier), torch.random.fork_rng(devices=devices):
            heaviest = View(classifier, straight=True, draws=DRAWS)
            at_once = images_at_once(heaviest, batch.images, most=len(batch.ids))
            for part in batch.parts(at_once):
                for question, epsilon in self.radii.items():
                    torch.manual_seed(0)  # which a random model draws by
                    suspect = _Suspect(self, classifier, part, epsilon)
                    rows += suspect.signs(question)
                    rows += suspect.attacks(question)
        return pa.concat_tables(rows)


class _Suspect:
    """A classifier under audit, some images and a radius; images that break stay broken."""

    def __init__(self, audit: Audit, classifier: Classifier, batch: Batch, epsilon: float) -> None:
        self.audit, self.classifier, self.batch, self.epsilon = audit, classifier, batch, epsilon
        with torch.no_grad():
            first, again = classifier(batch.images), classifier(batch.images)
        self.repeats_B = torch.isclose(first, again, rtol=ROUNDING, atol=ROUNDING).all(dim=1)
        self.victim = classifier
        if not self.repeats_B.all():
            averaged = classifier_of(classifier, batch.images.shape[1], 0.0, 1.0, draws=DRAWS)
            self.victim = averaged.to(batch.images.device).eval()
        self.predicted_B = self._answers(batch.images, batch)
        wrong = (self.predicted_B != batch.labels).tolist()
        self.stages = ["clean" if image_is_wrong else None for image_is_wrong in wrong]

    def signs(self, question: str) -> Iterator[pa.Table]:
        """Yield the verdicts of the questions that a sound model answers in a known way."""
        has_gradient_B, rises_B = self._gradients()
        signs = {"repeats": self.repeats_B, "gradient": has_gradient_B, "ascends": rises_B}
        for name, survived_B in signs.items():
            row = f"{question}/{name}", self.predicted_B
            yield verdicts(self.batch, *row, survived_B=survived_B)
        yield verdicts(self.batch, f"{question}/clean", self.predicted_B)
        plain = View(self.classifier)
        for name, epsilon, stops in (
            ("one-step", self.epsilon, 1),
            ("half", self.epsilon / 2, STEPS),
            ("unbounded", HUGE_EPSILON, HUGE_STEPS),
        ):
            (answers_B,) = self._pgd(plain, self.batch, epsilon=epsilon, stops=(stops,))
            yield verdicts(self.batch, f"{question}/{name}", answers_B)

    def attacks(self, question: str) -> Iterator[pa.Table]:
        """Yield the verdicts of the plain and of the adapted attack."""
        plain, averaged = View(self.classifier), View(self.victim)
        rescaled = View(self.victim, rescaled=True)
        self._attack("plain", lambda rest: self._pgd(plain, rest))
        yield verdicts(self.batch, f"{question}/plain", self.predicted_B.clone())
        self._attack("restart", lambda rest: self._pgd(averaged, rest, start="again"))
        self._attack("rescaled", lambda rest: self._pgd(rescaled, rest))
        self._attack("square-search", self._square)
        self._attack("spsa", self._spsa)
        self._attack("surrogate", self._surrogates)
        yield verdicts(self.batch, question, self.predicted_B, stage=self.stages)

    def _attack(self, stage: str, answers: Answers) -> None:
        """Break the images that no attack has broken yet, and that this one's answers miss."""
        places = [place for place, broken_by in enumerate(self.stages) if broken_by is None]
        if not places:
            return
        ids = tuple(self.batch.ids[place] for place in places)
        rest = Batch(self.batch.images[places], self.batch.labels[places], ids)
        for answers_R in answers(rest):
            for row in (answers_R != rest.labels).nonzero().flatten().tolist():
                self.stages[places[row]] = self.stages[places[row]] or stage
                self.predicted_B[places[row]] = answers_R[row]

    @torch.no_grad()
    def _answers(self, images_BCHW: Tensor, batch: Batch) -> Tensor:
        """Return the predicted classes; an image with a pixel that is no number breaks nothing."""
        finite_B = images_BCHW.isfinite().flatten(1).all(dim=1)
        answers_B = self.victim(images_BCHW.nan_to_num(0.5)).argmax(dim=1)
        return torch.where(finite_B, answers_B, batch.labels)

    def _pgd(
        self,
        view: nn.Module,
        batch: Batch,
        *,
        epsilon: float = 0.0,
        stops: Sequence[int] = (STEPS,),
        start: str = "start",
    ) -> Iterator[Tensor]:
        """Yield the answers to PGD's iterates; a single step starts at the images."""
        how: dict[str, Any] = {"epsilon": epsilon or self.epsilon}
        if max(stops) > 1:
            drawn = image_numbers(batch.ids)
            how["start_BCHW"] = random_start(batch.images, drawn, key=("audit", start), **how)
        else:
            how["step_size"] = how["epsilon"]
        pair = batch.images, batch.labels
        for _, images_BCHW in pgd_iterates(view, *pair, stops=stops, **how):
            yield self._answers(images_BCHW, batch)

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Say of which images the loss has a gradient, and of which the margin falls along it."""
        images, labels = self.batch.images.detach().requires_grad_(True), self.batch.labels
        logits = View(self.victim)(images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        largest_B = gradient.flatten(1).abs().amax(dim=1)
        length = PROBE * self.epsilon
        with torch.no_grad():
            step = images + length * gradient.nan_to_num().sign()
            after_B = _margin(self.victim(step.clamp(0, 1)), labels)
        falls_B = after_B <= _margin(logits, labels)
        return (largest_B > 0) & largest_B.isfinite(), falls_B

    def _surrogates(self, rest: Batch) -> Iterator[Tensor]:
        for noise, draws in SMOOTHING:
            how: dict[str, Any] = {"noise": noise * self.epsilon, "draws": draws}
            view = View(self.classifier, rescaled=True, straight=True, **how)
            yield from self._pgd(view, rest, stops=SURROGATE_STOPS)

    def _square(self, rest: Batch) -> Iterator[Tensor]:
        scale = replace(self.audit.scale, square_queries=QUERIES, attacks_in="float32")
        square = AutoAttack(scale, radii=[Fraction(self.epsilon)])
        ledger = square.attack(self.victim, rest, attacks=("square",))
        yield torch.tensor(ledger["predicted"].to_pylist(), device=rest.labels.device)

    @torch.no_grad()
    def _spsa(self, rest: Batch) -> Iterator[Tensor]:
        """Follow differences of the margin between opposite draws, which all images share."""
        generator = torch.Generator().manual_seed(0)
        within = self.audit.ball.ball(rest.images, self.epsilon)
        current, shape = rest.images, rest.images.shape[1:]
        for _ in range(SPSA_STEPS):
            slope = torch.zeros_like(current)
            for _ in range(SPSA_DRAWS):
                draw = torch.randint(2, shape, generator=generator).to(current) * 2 - 1
                ahead_B, behind_B = (
                    _margin(self.victim(current + side * self.epsilon / 2 * draw), rest.labels)
                    for side in (1, -1)
                )
                slope += (behind_B - ahead_B).view(-1, 1, 1, 1) * draw
            current = within(current + self.epsilon / 4 * slope.sign())
        yield self._answers(current, rest)


def _margin(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return by how much the label's logit is above the largest other one."""
    others_BK = logits_BK.scatter(1, labels_B[:, None], -torch.inf)
    return logits_BK.gather(1, labels_B[:, None]).squeeze(1) - others_BK.amax(dim=1)
