"""autoattack: does the answer withstand the standard AutoAttack at a radius of the scale's?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from pyautoattack import autopgd_base, square
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from evaluators import memory
from evaluators.balls import BallAttack
from evaluators.base import Batch, Column, verdicts
from evaluators.ledger import Score, by_question, share
from evaluators.pgd import FOLDED_ON
from trainables.data.base import WHOLE, Data, Shard
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.train.adversary import attacked, folded, in_bf16
from trainables.train.exactness import image_numbers, uniform
from trainables.train.norms import LEAST_DRAW, NORMS

CLEAN = "clean"
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
STANDARD_TARGETS = 9
# How often a stage attacks an image: from other starts, or against another target each time.
ROUNDS = {"apgd-ce": 1, "apgd-t": STANDARD_TARGETS, "fab-t": STANDARD_TARGETS, "square": 1}
L1_ROUNDS = {"apgd-ce": 5, "apgd-t": 5}
# In L1 APGD comes down from larger radii: multiples of the radius, and shares of the iterations.
L1_DESCENT = ((3, 0.3), (2, 0.3), (1, 0.4))
DLR_CLASSES = 4  # the targeted DLR loss divides by a difference with the fourth logit
ITERATIONS = 100
ROWS_AT_ONCE = 200  # images x targets in one forward pass, at most
GATHERED_BATCHES = 4
STEPS_TO_BREAK = 10  # of the images that APGD-CE breaks, about
SMALL_WITHSTANDING = 0.9  # the share of images that withstands the small radius, about
BEFORE, UNBROKEN = 0, 2**31  # ranks of no target: of images broken before a stage, and of others
BALL_TOLERANCE = 1e-6  # float32 rounding of image + epsilon is up to 6e-8
logger = logging.getLogger(__name__)


class AutoAttack(BallAttack):
    """The standard AutoAttack of a norm, stage by stage over the survivors.

    APGD-CE, APGD-T and FAB-T against the 9 likeliest other classes (all of them where there are
    fewer), Square with 5,000 queries; float32. In L1 APGD comes down from three radii, five times
    for the cross-entropy and against 5 classes. A scale may state fewer queries and images for
    time: the identity carries both. The survivors of several batches share a forward pass. Every
    draw follows from the image, the target class's rank and the iteration, and an image's answer is
    that of the likeliest target that breaks it, so no verdict depends on the rest of the batch.
    Source: Croce and Hein (2020; in L1 2021).
    """

    name = "autoattack"
    columns: tuple[Column, ...] = (
        Column("autoattack/clean", "Clean, same images"),
        Column("autoattack/after-apgd-ce", "after APGD-CE"),
        Column("autoattack/after-apgd-t", "after APGD-T"),
        Column("autoattack/after-fab-t", "after FAB-T"),
        Column("autoattack", "AutoAttack 4/255", "AutoAttack"),
    )
    drawn = "autoattack_subset"
    may_be_bf16 = True

    def __init__(self, scale: Scale, **settings: Any) -> None:
        super().__init__(scale, **settings)
        self.rounds = ROUNDS | (L1_ROUNDS if self.norm == "l1" else {})
        self.targets, self.stages = _standard(scale.num_classes)

    def identity(self, source: Data) -> dict[str, Any]:
        return {
            **super().identity(source),
            "version": "standard",
            "epsilons": self.radii,
            "stages": self.stages,
            "targets": self.targets,
            "iterations": ITERATIONS,
            "square_queries": self.scale.square_queries,
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count two passes for a step of APGD and three for one of FAB-T, and Square's queries."""
        steps = ITERATIONS + 1
        ce, *targeted = (self.rounds[stage] for stage in STAGES[:3])
        t, fab = (min(self.targets, rounds) for rounds in targeted)
        every_stage = steps * (2 * ce + 2 * t + 3 * fab) + self.scale.square_queries
        broken = 2 * STEPS_TO_BREAK
        each = 2 + withstanding * every_stage + (1 - withstanding) * broken
        return len(self.radii) * self.asked_about(held_out) * each

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        return super().batches(source, batch_size=batch_size * GATHERED_BATCHES, shard=shard)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        """Run every stage over the survivors of the one before, from the smallest radius on."""
        return self.attack(classifier, batch)

    def attack(
        self,
        classifier: Classifier,
        batch: Batch,
        *,
        attacks: Sequence[str] = STAGES,
        most_targets: int = STANDARD_TARGETS,
        targets_withstood: int = 0,
    ) -> pa.Table:
        """Return the verdicts of some of the stages, against so many of the likeliest targets.

        targets_withstood: APGD-T leaves out so many of these, which have broken none of the images.
        """
        rows, smaller = [], None
        # APGD draws a start on the CPU even if it gets one.
        with torch.random.fork_rng(devices=()), attacked(classifier), _bisecting():
            for question, epsilon in self.radii.items():
                victims = _Victims(classifier, batch, epsilon, self.norm, bf16=self.is_bf16)
                targets, stages = self.targets, self.stages
                if (head := victims.ranking_BK.shape[1]) > self.scale.num_classes:
                    targets, stages = _standard(head)
                for stage in (stage for stage in stages if stage in attacks):
                    victims.begin(stage, smaller)
                    rounds = self.rounds[stage]
                    if stage.endswith("-t"):
                        rounds = min(rounds, targets, most_targets)
                    for run in victims.runs(rounds, targets_withstood if stage == "apgd-t" else 0):
                        with suppress(_AllBrokenError):
                            _ATTACKS[stage](victims, run, self.scale.square_queries)
                answers, broken_by, queries = victims.predicted_B, victims.stages, victims.queries
                rows.append(verdicts(batch, question, answers, stage=broken_by, queries=queries))
                smaller = victims
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        scores = super().summarize(ledger)
        stages_of = {q: rows["stage"].to_pylist() for q, rows in by_question(ledger).items()}
        first = next(iter(stages_of.values()))
        scores.append(share(f"{self.name}/{CLEAN}", len(first) - first.count(CLEAN), len(first)))
        for question, stages in stages_of.items():
            alive = len(stages) - stages.count(CLEAN)
            for stage in [s for s in STAGES if s in {*self.stages, *stages}]:
                alive -= stages.count(stage)
                scores.append(share(f"{question}/after-{stage}", alive, len(stages)))
        return scores


def _standard(classes: int) -> tuple[int, tuple[str, ...]]:
    """Return the target classes of a targeted attack and the stages, of a head of some classes."""
    stages = tuple(stage for stage in STAGES if stage != "apgd-t" or classes >= DLR_CLASSES)
    return min(STANDARD_TARGETS, classes - 1), stages


class SmallAutoAttack(AutoAttack):
    """AutoAttack at the scale's small radius, which cleanly trained models survive in part."""

    name = "autoattack-small"
    columns = (Column("autoattack-small", "AutoAttack 0.001", "AutoAttack, small radius"),)
    radius = "small_epsilon"
    takes_radii = False

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return super().cost(held_out, withstanding=max(withstanding, SMALL_WITHSTANDING))


class _AllBrokenError(Exception):
    """No image of a run is left to attack."""


@dataclass(frozen=True)
class _Run:
    """The rows of one attack: images, labels, target classes and their ranks, and the owners.

    The owner of a row is the image of the batch that it attacks; the likeliest target has rank 2.
    """

    owners: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor
    ranks: Tensor


class _Victims:
    """A batch under attack within one radius, and the state of each image.

    An attack calls `query`. A row's first answer that is wrong breaks its image, provided that the
    classifier itself gets the image wrong once it is brought into the ball and into [0, 1]. From
    then on the row costs no forward pass, nor do those of less likely targets; those of likelier
    ones go on, for theirs would be the image's answer in a run of their own.
    """

    def __init__(
        self,
        classifier: Classifier,
        batch: Batch,
        epsilon: float,
        norm: str = "linf",
        *,
        bf16: bool = False,
    ) -> None:
        self.classifier, self.batch = classifier, batch
        self.epsilon, self.norm = epsilon, NORMS[norm]
        # pyautoattack flattens by view: rows must be contiguous.
        self.images_BCHW = batch.images.contiguous()
        self.tolerance = BALL_TOLERANCE * max(1, epsilon)
        fast = folded(classifier, self.images_BCHW[:FOLDED_ON]) or classifier
        self.at_once = memory.images_at_once(fast, self.images_BCHW, most=ROWS_AT_ONCE)
        self.fast = in_bf16(fast) if bf16 else fast
        logits_BK = self.logits(classifier, self.images_BCHW)
        self.ranking_BK = logits_BK.sort(dim=1).indices
        self.predicted_B = self.ranking_BK[:, -1].clone()
        self.broken_B = self.predicted_B != batch.labels
        self.numbers_B = image_numbers(batch.ids).to(batch.labels.device)
        self.stages = [CLEAN if broken else None for broken in self.broken_B.tolist()]
        self.queries: list[int | None] = [None] * len(batch.ids)

    def begin(self, stage: str, smaller: _Victims | None = None) -> None:
        """Go on to a stage, and break the images that it broke within a smaller radius.

        The same adversarial examples lie in the larger ball. `rank_B` is the rank of the target
        that has broken an image in the stage.
        """
        self.stage = stage
        self.rank_B = torch.where(self.broken_B, BEFORE, UNBROKEN)
        for owner, their_stage in enumerate(smaller.stages if smaller else ()):
            if smaller and their_stage == stage and not self.broken_B[owner]:
                self._break(owner, BEFORE, int(smaller.predicted_B[owner]))
                self.queries[owner] = smaller.queries[owner]

    def runs(self, targets: int, first: int = 0) -> Iterator[_Run]:
        """Yield the survivors with each of their likeliest `targets` other classes, in turn.

        The pairs are packed into runs of `at_once` rows, the likeliest targets first, but for the
        `first` so many, which are left out.
        """
        survivors, classes = (~self.broken_B).nonzero().squeeze(1), self.ranking_BK.shape[1]
        order = torch.arange(min(first, targets), targets, device=survivors.device) + 2
        owners, ranks = survivors.repeat(len(order)), order.repeat_interleave(len(survivors))
        while len(owners):
            now, later = slice(self.at_once), slice(self.at_once, None)
            yield _Run(
                owners[now],
                self.images_BCHW[owners[now]],
                self.batch.labels[owners[now]],
                self.ranking_BK[owners[now], -ranks[now].clamp(max=classes)],
                ranks[now],
            )
            owners, ranks = owners[later], ranks[later]
            alive = ~self.broken_B[owners]
            owners, ranks = owners[alive], ranks[alive]

    @torch.no_grad()
    def logits(self, model: Callable[[Tensor], Tensor], images_BCHW: Tensor) -> Tensor:
        """Return a model's logits, `at_once` images a pass."""
        return torch.cat([model(part) for part in torch.split(images_BCHW, self.at_once)])

    def query(self, run: _Run, images_RCHW: Tensor) -> Tensor:
        """Return the logits of a run's rows; those of broken images are made up, and wrong."""
        alive = (run.ranks < self.rank_B[run.owners]).nonzero().squeeze(1)
        if not len(alive):
            raise _AllBrokenError
        everyone = len(alive) == len(run.owners)
        asked_RCHW = images_RCHW if everyone else images_RCHW[alive]
        logits: Tensor = self.fast(asked_RCHW)
        missed = logits.detach().argmax(dim=1) != run.labels[alive]
        rows = alive[missed]
        self.try_break(run.owners[rows], run.ranks[rows], asked_RCHW.detach()[missed])
        if everyone:
            return logits
        wrong = torch.ones(len(run.labels), logits.shape[1], device=logits.device)
        return wrong.scatter_(1, run.labels[:, None], 0.0).index_copy(0, alive, logits)

    @torch.no_grad()
    def try_break(self, owners: Tensor, ranks: Tensor, images_RCHW: Tensor) -> None:
        """Break the images of which the classifier gets one of these, inside the ball, wrong."""
        inside = self.norm.ball(self.images_BCHW[owners], self.epsilon)(images_RCHW)
        near = (inside - images_RCHW).abs().amax(dim=(1, 2, 3)) <= self.tolerance
        if not near.any():
            return
        predicted = self.logits(self.classifier, inside[near]).argmax(dim=1)
        columns = (column.tolist() for column in (owners[near], ranks[near], predicted))
        for owner, rank, answer in zip(*columns, strict=True):
            if answer != self.batch.labels[owner] and rank < self.rank_B[owner]:
                self._break(owner, rank, answer)

    def _break(self, owner: int, rank: int, answer: int) -> None:
        self.broken_B[owner] = True
        self.rank_B[owner] = rank
        self.predicted_B[owner] = answer
        self.stages[owner] = self.stage


@contextmanager
def _bisecting() -> Iterator[None]:
    """Let pyautoattack project in L1 by bisection, which takes a seventh of its sort's time."""

    def correction(images_BCHW: Tensor, offset_BCHW: Tensor, epsilon: float) -> Tensor:
        inside_BCHW = NORMS["l1"].ball(images_BCHW, epsilon)(images_BCHW + offset_BCHW)
        return (inside_BCHW - images_BCHW) - offset_BCHW

    theirs = autopgd_base.L1_projection
    autopgd_base.L1_projection = square.L1_projection = correction
    try:
        yield
    finally:
        autopgd_base.L1_projection = square.L1_projection = theirs


def _apgd(
    attack_class: type[APGDAttack], victims: _Victims, run: _Run, square_queries: int
) -> None:
    """Run APGD from each row's own start, at the ball's surface."""
    attack = attack_class(
        partial(victims.query, run),
        n_iter=ITERATIONS,
        norm=victims.norm.title,
        eps=victims.epsilon,
        device=run.images.device,
        logger=logger,
    )
    attack.init_hyperparam(run.images)
    attack.y_target = run.targets
    noise_RCHW = torch.empty_like(run.images)
    for rank in set(run.ranks.tolist()):
        rows = run.ranks == rank
        numbers = victims.numbers_B[run.owners[rows]]
        noise_RCHW[rows] = uniform(numbers, noise_RCHW.shape[1:], key=(victims.stage, rank))
    directions_RCHW = (
        2 * noise_RCHW - 1
        if attack.norm == "Linf"
        else torch.special.ndtri(noise_RCHW.clamp_(min=LEAST_DRAW))
    )
    if attack.norm != "L1":
        start_RCHW = run.images + victims.epsilon * attack.normalize(directions_RCHW)
        attack.attack_single_run(run.images, run.labels, x_init=start_RCHW)
        return
    current_RCHW = run.images + directions_RCHW
    for multiple, share_of_steps in L1_DESCENT:
        attack.eps, attack.n_iter = multiple * victims.epsilon, round(share_of_steps * ITERATIONS)
        within = victims.norm.ball(run.images, attack.eps)
        current_RCHW, *_ = attack.attack_single_run(
            run.images, run.labels, x_init=within(current_RCHW)
        )


def _fab(victims: _Victims, run: _Run, square_queries: int) -> None:
    """Run FAB with a target class per row; pyautoattack's has one rank for all of them."""
    attack = FABAttack_PT(
        partial(victims.query, run),
        n_iter=ITERATIONS,
        norm=victims.norm.title,
        eps=victims.epsilon,
        device=run.images.device,
    )
    attack.get_diff_logits_grads_batch = partial(
        attack.get_diff_logits_grads_batch_targeted, la_target=run.targets
    )
    attack.attack_single_run(run.images)


def _square(victims: _Victims, run: _Run, square_queries: int) -> None:
    """Run Square: its first stripes follow from the image, its squares from the iteration."""
    attack = SquareAttack(
        partial(victims.logits, victims.fast),
        n_queries=square_queries,
        norm=victims.norm.title,
        eps=victims.epsilon,
        resc_schedule=False,
        device=run.images.device,
    )
    numbers_R = victims.numbers_B[run.owners]
    shared = torch.Generator().manual_seed(0)

    torch.default_generator.manual_seed(0)  # which the squares of L2 and L1 are turned by

    def signs(shape: Sequence[int]) -> Tensor:
        """Return those of every image's stripes (R, 3, 1, W), or of one square for all images."""
        if shape[-1] > 1:
            draws = uniform(numbers_R, shape[1:], key=("square",))
        else:
            draws = torch.rand(*shape[-3:], generator=shared).to(numbers_R.device)
        return (2 * draws - 1).sign()

    def whole_numbers(low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
        """Return those from `low` up to `high`, without it: where a square lies."""
        return (low + (high - low) * torch.rand(*shape, generator=shared)).long()

    attack.random_choice, attack.random_int = signs, whole_numbers
    attack.init_hyperparam(run.images)
    counts, images_RCHW = attack.attack_single_run(run.images, run.labels)
    for owner, count in zip(run.owners.tolist(), counts.tolist(), strict=True):
        victims.queries[owner] = int(count)
    victims.try_break(run.owners, run.ranks, images_RCHW)


_ATTACKS: dict[str, Callable[[_Victims, _Run, int], None]] = {
    "apgd-ce": partial(_apgd, APGDAttack),
    "apgd-t": partial(_apgd, APGDAttack_targeted),
    "fab-t": _fab,
    "square": _square,
}
