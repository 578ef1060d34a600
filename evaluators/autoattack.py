"""autoattack: does the answer withstand the standard AutoAttack at a radius of the scale's?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from evaluators import memory
from evaluators.base import Batch, Column, Evaluator, verdicts
from evaluators.ledger import Score, share
from evaluators.pgd import FOLDED_ON, at_radius
from trainables.data.base import WHOLE, Data, Shard
from trainables.networks import Classifier
from trainables.scale import Scale
from trainables.train.adversary import attacked
from trainables.train.exactness import image_numbers, uniform
from trainables.train.folding import folded

CLEAN = "clean"
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
STANDARD_TARGETS = 9
DLR_CLASSES = 4  # the targeted DLR loss divides by a difference with the fourth logit
ITERATIONS = 100
GATHERED_BATCHES = 4
STEPS_TO_BREAK = 10  # of the images that APGD-CE breaks, about
SMALL_WITHSTANDING = 0.9  # the share of images that withstands the small radius, about
BEFORE, UNBROKEN = 0, 2**31  # ranks of no target: of images broken before a stage, and of others
BALL_TOLERANCE = 1e-6  # float32 rounding of image + epsilon is up to 6e-8
logger = logging.getLogger(__name__)


class AutoAttack(Evaluator):
    """The standard AutoAttack in the max-norm, stage by stage over the survivors.

    APGD-CE, APGD-T and FAB-T against the 9 likeliest other classes (all of them where there are
    fewer), Square with 5,000 queries; float32. A scale may state fewer queries and images for
    time: the identity carries both. `images_at_once` bounds the rows of one forward pass, images
    times targets, as memory does; the survivors of several batches share a pass. Out of memory
    halves it for the rest of the batch, and only what did not fit is done again. Every draw follows
    from the image, the target class's rank and the iteration, and an image's answer is that of the
    likeliest target that breaks it, so no verdict depends on what else is in the batch. Source:
    Croce and Hein (2020).
    """

    name = "autoattack"
    columns: tuple[Column, ...] = (
        Column("autoattack/clean", "Clean, same images"),
        Column("autoattack/after-apgd-ce", "after APGD-CE"),
        Column("autoattack/after-apgd-t", "after APGD-T"),
        Column("autoattack/after-fab-t", "after FAB-T"),
        Column("autoattack", "AutoAttack 4/255", "AutoAttack"),
    )
    least_shard = 1

    def __init__(
        self,
        scale: Scale,
        *,
        radii: Sequence[Fraction] = (),
        square_queries: int | None = None,
        images_at_once: int = 200,
    ) -> None:
        radii = sorted(radii or [self._radius(scale)])
        self.radii = {self.name + at_radius(r, radii): float(r) for r in radii}
        self.square_queries = square_queries or scale.square_queries
        self.subset_size = min(scale.autoattack_subset, scale.attack_subset)
        self.targets = min(STANDARD_TARGETS, scale.num_classes - 1)
        self.stages = tuple(s for s in STAGES if s != "apgd-t" or scale.num_classes >= DLR_CLASSES)
        self.images_at_once = images_at_once

    def identity(self, source: Data) -> dict[str, Any]:
        return {
            **super().identity(source),
            "version": "standard",
            "epsilons": self.radii,
            "stages": self.stages,
            "targets": self.targets,
            "iterations": ITERATIONS,
            "square_queries": self.square_queries,
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count two passes for a step of APGD and three for one of FAB-T, and Square's queries."""
        steps = ITERATIONS + 1
        every_stage = 2 * steps + self.targets * steps * (2 + 3) + self.square_queries
        broken = 2 * STEPS_TO_BREAK
        each = 2 + withstanding * every_stage + (1 - withstanding) * broken
        return len(self.radii) * self.asked_about(held_out) * each

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        return super().batches(source, batch_size=batch_size * GATHERED_BATCHES, shard=shard)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        rows, smaller, images_at_once = [], None, self.images_at_once
        # APGD draws a start on the CPU even where it is given one.
        with torch.random.fork_rng(devices=()), attacked(classifier):
            for question, epsilon in self.radii.items():
                victims = _Victims(classifier, batch, epsilon, images_at_once)
                self._attack(victims, smaller)
                rows.append(victims.verdicts(question))
                smaller, images_at_once = victims, victims.images_at_once
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        scores = super().summarize(ledger)
        standard = ledger.filter(pc.equal(ledger["question"], ledger["question"][0]))
        right = sum(stage != CLEAN for stage in standard["stage"].to_pylist())
        scores.append(share(f"{self.name}/{CLEAN}", right, len(standard)))
        for question in pc.unique(ledger["question"]).to_pylist():
            stages = ledger.filter(pc.equal(ledger["question"], question))["stage"].to_pylist()
            alive = sum(stage != CLEAN for stage in stages)
            for stage in self.stages:
                alive -= stages.count(stage)
                scores.append(share(f"{question}/after-{stage}", alive, len(stages)))
        return scores

    def _radius(self, scale: Scale) -> Fraction:
        return scale.epsilon

    def _attack(self, victims: _Victims, smaller: _Victims | None) -> None:
        """Run every stage over the survivors of the one before.

        An image that a stage broke in a smaller ball is broken by that stage in the larger one:
        the same adversarial example lies in both.
        """
        for stage in self.stages:
            victims.begin(stage)
            if smaller is not None:
                victims.inherit(smaller)
            for run in victims.runs(self.targets if stage.endswith("-t") else 1):
                attack = partial(_ATTACKS[stage], victims, queries=self.square_queries)
                _in_memory(attack, victims, run)


class SmallAutoAttack(AutoAttack):
    """AutoAttack at the scale's small radius, which cleanly trained models survive in part."""

    name = "autoattack-small"
    columns = (Column("autoattack-small", "AutoAttack 0.001", "AutoAttack, small radius"),)

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return super().cost(held_out, withstanding=max(withstanding, SMALL_WITHSTANDING))

    def _radius(self, scale: Scale) -> Fraction:
        return scale.small_epsilon


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

    def parts(self, rows: int) -> Iterator[_Run]:
        """Yield the run in parts of at most `rows` rows."""
        columns = (self.owners, self.images, self.labels, self.targets, self.ranks)
        for part in zip(*(torch.split(column, rows) for column in columns), strict=True):
            yield _Run(*part)


class _Victims:
    """A batch under attack within one radius, and what became of each image.

    An attack asks `query`. A row's first answer that is wrong breaks its image, provided that the
    classifier itself gets the image wrong once it is brought into the ball and into [0, 1]. From
    then on the row costs no forward pass, nor do those of less likely targets; those of likelier
    ones go on, for theirs would be the image's answer had they been asked first.
    """

    def __init__(
        self, classifier: Classifier, batch: Batch, epsilon: float, images_at_once: int
    ) -> None:
        self.classifier, self.batch, self.epsilon = classifier, batch, epsilon
        # pyautoattack flattens by view: rows must be contiguous.
        self.images_BCHW = batch.images.contiguous()
        self.fast = folded(classifier, self.images_BCHW[:FOLDED_ON]) or classifier
        self.images_at_once = memory.images_at_once(
            self.fast, self.images_BCHW, most=images_at_once
        )
        self.low = (self.images_BCHW - epsilon).clamp_(min=0)
        self.high = (self.images_BCHW + epsilon).clamp_(max=1)
        logits_BK = self.logits(classifier, self.images_BCHW)
        self.ranking_BK = logits_BK.sort(dim=1).indices
        self.predicted_B = self.ranking_BK[:, -1].clone()
        self.broken_B = self.predicted_B != batch.labels
        self.numbers_B = image_numbers(batch.ids).to(batch.labels.device)
        self.begin(CLEAN)
        self.stages = [CLEAN if broken else None for broken in self.broken_B.tolist()]
        self.queries: list[int | None] = [None] * len(batch.ids)

    def begin(self, stage: str) -> None:
        """Go on to a stage. `rank_B` is the rank of the target that has broken an image in it."""
        self.stage = stage
        self.rank_B = torch.where(self.broken_B, BEFORE, UNBROKEN)

    def runs(self, targets: int) -> Iterator[_Run]:
        """Yield the survivors with each of their likeliest `targets` other classes, in turn.

        The pairs are packed into runs of `images_at_once` rows, the likeliest targets first.
        """
        survivors = (~self.broken_B).nonzero().squeeze(1)
        owners = survivors.repeat(targets)
        ranks = torch.arange(targets, device=owners.device).repeat_interleave(len(survivors)) + 2
        while len(owners):
            now, later = slice(self.images_at_once), slice(self.images_at_once, None)
            yield _Run(
                owners[now],
                self.images_BCHW[owners[now]],
                self.batch.labels[owners[now]],
                self.ranking_BK[owners[now], -ranks[now]],
                ranks[now],
            )
            owners, ranks = owners[later], ranks[later]
            alive = ~self.broken_B[owners]
            owners, ranks = owners[alive], ranks[alive]

    @torch.no_grad()
    def logits(self, model: nn.Module, images_BCHW: Tensor) -> Tensor:
        """Return a model's logits, `images_at_once` a pass; out of memory halves that for good."""
        parts: list[Tensor] = []
        done = 0
        # Square asks of no image at all where no margin is above 0.
        while done < len(images_BCHW) or not parts:
            part = images_BCHW[done : done + self.images_at_once]
            try:
                parts.append(model(part))
                done += len(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.images_at_once = len(part) // 2
        return torch.cat(parts)

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
        inside = torch.clamp(images_RCHW, self.low[owners], self.high[owners])
        near = (inside - images_RCHW).abs().amax(dim=(1, 2, 3)) <= BALL_TOLERANCE
        if not near.any():
            return
        predicted = self.logits(self.classifier, inside[near]).argmax(dim=1)
        columns = (column.tolist() for column in (owners[near], ranks[near], predicted))
        for owner, rank, answer in zip(*columns, strict=True):
            if answer != self.batch.labels[owner] and rank < self.rank_B[owner]:
                self._break(owner, rank, answer)

    def inherit(self, smaller: _Victims) -> None:
        """Break the images that the present stage broke within a smaller radius."""
        for owner, stage in enumerate(smaller.stages):
            if stage == self.stage and not self.broken_B[owner]:
                self._break(owner, BEFORE, int(smaller.predicted_B[owner]))
                self.queries[owner] = smaller.queries[owner]

    def verdicts(self, question: str) -> pa.Table:
        """Return the rows of the ledger."""
        return verdicts(
            self.batch,
            question,
            self.predicted_B,
            survived_B=~self.broken_B,
            stage=self.stages,
            queries=self.queries,
        )

    def _break(self, owner: int, rank: int, answer: int) -> None:
        self.broken_B[owner] = True
        self.rank_B[owner] = rank
        self.predicted_B[owner] = answer
        self.stages[owner] = self.stage


def _apgd_ce(victims: _Victims, run: _Run, *, queries: int) -> None:
    _ascend(APGDAttack, victims, run)


def _apgd_t(victims: _Victims, run: _Run, *, queries: int) -> None:
    _ascend(APGDAttack_targeted, victims, run)


def _ascend(attack_of: type[APGDAttack], victims: _Victims, run: _Run) -> None:
    """Run APGD from a start of each row's own, at the ball's surface."""
    attack = attack_of(
        partial(victims.query, run),
        n_iter=ITERATIONS,
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
    start_RCHW = run.images + victims.epsilon * attack.normalize(2 * noise_RCHW - 1)
    attack.attack_single_run(run.images, run.labels, x_init=start_RCHW)


class _FABAgainst(FABAttack_PT):  # type: ignore[misc]
    """FAB with a target class per row, where pyautoattack's has one rank for all of them."""

    def __init__(self, targets_R: Tensor, predict: Any, **options: Any) -> None:
        super().__init__(predict, **options)
        self.targets_R = targets_R

    def get_diff_logits_grads_batch(self, imgs: Tensor, la: Tensor) -> tuple[Tensor, Tensor]:
        differences: tuple[Tensor, Tensor] = self.get_diff_logits_grads_batch_targeted(
            imgs, la, self.targets_R
        )
        return differences


def _fab_t(victims: _Victims, run: _Run, *, queries: int) -> None:
    attack = _FABAgainst(
        run.targets,
        partial(victims.query, run),
        n_iter=ITERATIONS,
        eps=victims.epsilon,
        device=run.images.device,
    )
    attack.attack_single_run(run.images)


class _Square(SquareAttack):  # type: ignore[misc]
    """Square whose first stripes follow from the image, and whose squares from the iteration."""

    def __init__(self, numbers_R: Tensor, predict: Any, **options: Any) -> None:
        super().__init__(predict, **options)
        self.numbers_R = numbers_R
        self.shared = torch.Generator().manual_seed(0)

    def random_choice(self, shape: Sequence[int]) -> Tensor:
        """Return signs: of every image's stripes (R, 3, 1, W), or of one square for all images."""
        if len(shape) == 4:
            draws = uniform(self.numbers_R, shape[1:], key=("square",))
        else:
            draws = torch.rand(*shape, generator=self.shared).to(self.numbers_R.device)
        return (2 * draws - 1).sign()

    def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
        """Return whole numbers from `low` up to `high`, without it: where a square lies."""
        return (low + (high - low) * torch.rand(*shape, generator=self.shared)).long()


def _square(victims: _Victims, run: _Run, *, queries: int) -> None:
    attack = _Square(
        victims.numbers_B[run.owners],
        partial(victims.logits, victims.fast),
        n_queries=queries,
        eps=victims.epsilon,
        resc_schedule=False,
        device=run.images.device,
    )
    attack.init_hyperparam(run.images)
    counts, images_RCHW = attack.attack_single_run(run.images, run.labels)
    for owner, count in zip(run.owners.tolist(), counts.tolist(), strict=True):
        victims.queries[owner] = int(count)
    victims.try_break(run.owners, run.ranks, images_RCHW)


_ATTACKS = {"apgd-ce": _apgd_ce, "apgd-t": _apgd_t, "fab-t": _fab_t, "square": _square}


def _in_memory(attack: Callable[[_Run], None], victims: _Victims, run: _Run) -> None:
    """Attack a run; where memory does not hold it, in halves."""
    try:
        attack(run)
        return
    except _AllBrokenError:
        return
    except torch.OutOfMemoryError:
        if len(run.owners) == 1:
            raise
    rows = len(run.owners) // 2
    victims.images_at_once = min(victims.images_at_once, rows)
    for part in run.parts(rows):
        _in_memory(attack, victims, part)
