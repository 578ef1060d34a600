"""health: are the attacks on a model to be believed? Red flags, read from its ledgers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from evaluators.autoattack import CLEAN
from evaluators.base import Batch, Score, share, split_batches, survival_scores, verdicts
from evaluators.pgd import STEPS, SUBSET_SEED
from trainables.adversary import attacked, pgd_iterates, random_start
from trainables.data import WHOLE, Data, Shard, Split
from trainables.models import Classifier
from trainables.scale import Scale

HUGE_EPSILON = 0.5  # every image can be turned into the same grey
HUGE_STEPS = 20
IMAGES = 50
CHANCE = 0.01  # a share above this, by its interval's lower end, is more than chance
SIGNIFICANCE = 0.01


class Health:
    """Two cheap questions that a sound attack surface answers in a known way.

    pgd-huge: does the answer survive 20 steps of PGD at epsilon 1/2? It must not.
    gradient: does the cross-entropy have a gradient at the image? It must.
    """

    name = "health"

    def __init__(self, scale: Scale) -> None:
        self.images = min(IMAGES, scale.attack_subset)

    def identity(self, source: Data) -> dict[str, Any]:
        return {
            "images": self._images(source).ids_hash(),
            "epsilon": HUGE_EPSILON,
            "steps": HUGE_STEPS,
        }

    def shards(self, source: Data) -> int:
        return 1

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        return split_batches(self._images(source), batch_size=batch_size, shard=shard)

    def judge(
        self, classifier: Classifier, batch: Batch, *, generator: torch.Generator
    ) -> pa.Table:
        start = random_start(batch.images, epsilon=HUGE_EPSILON, generator=generator)
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

    def summarize(self, ledger: pa.Table) -> list[Score]:
        return survival_scores(ledger)

    def _images(self, source: Data) -> Split:
        return source.held_out.subset(self.images, seed=SUBSET_SEED)


def red_flags(ledgers: Iterable[pa.Table]) -> list[str]:
    """Return why one model's attacks are not to be believed; each check needs its questions."""
    ledger = pa.concat_tables(list(ledgers), promote_options="default")
    return [
        *_more_steps_help_the_model(ledger),
        *_huge_epsilon_survived(ledger),
        *_black_box_wins(ledger),
        *_no_gradient(ledger),
    ]


def _more_steps_help_the_model(ledger: pa.Table) -> Iterator[str]:
    survived = {steps: _survived(ledger, f"pgd-{steps}") for steps in STEPS}
    for few, many in pairwise(steps for steps in STEPS if survived[steps]):
        shared = survived[few].keys() & survived[many].keys()
        gained = sum(survived[many][i] and not survived[few][i] for i in shared)
        lost = sum(survived[few][i] and not survived[many][i] for i in shared)
        if gained > lost and _exceeds_half(gained, gained + lost):
            yield (
                f"PGD-{many} is weaker than PGD-{few}: {gained} images survive only the longer "
                f"attack, {lost} only the shorter one, of {len(shared)}"
            )


def _huge_epsilon_survived(ledger: pa.Table) -> Iterator[str]:
    survived = _survived(ledger, "pgd-huge")
    if _more_than_chance(count := sum(survived.values()), len(survived)):
        yield (
            f"{count} of {len(survived)} images survive PGD at epsilon {HUGE_EPSILON:g}, "
            "where none can: the gradients mislead the attack"
        )


def _black_box_wins(ledger: pa.Table) -> Iterator[str]:
    for question in pc.unique(ledger["question"]).to_pylist():
        stages = ledger.filter(pc.equal(ledger["question"], question))["stage"].to_pylist()
        attacked_images = len(stages) - stages.count(CLEAN)
        if _more_than_chance(count := stages.count("square"), attacked_images):
            yield (
                f"{question}: Square, a black box, breaks {count} of {attacked_images} images "
                "that every white-box attack left: the gradients mislead the attack"
            )


def _no_gradient(ledger: pa.Table) -> Iterator[str]:
    has_gradient = _survived(ledger, "gradient")
    if _more_than_chance(count := sum(not g for g in has_gradient.values()), len(has_gradient)):
        yield (
            f"the input gradient is zero at {count} of {len(has_gradient)} images: "
            "attacks by gradient have nothing to follow"
        )


def _survived(ledger: pa.Table, question: str) -> dict[str, bool]:
    rows = ledger.filter(pc.equal(ledger["question"], question))
    return dict(zip(rows["image_id"].to_pylist(), rows["survived"].to_pylist(), strict=True))


def _exceeds_half(count: int, n: int) -> bool:
    return bool(binomtest(count, n, alternative="greater").pvalue < SIGNIFICANCE)


def _more_than_chance(count: int, n: int) -> bool:
    return n > 0 and share("", count, n).low > CHANCE
