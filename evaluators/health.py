"""health: are the attacks on a model to be believed? Two cheap questions, and the red flags."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.stats import binomtest
from torch.nn import functional as F

from evaluators.base import Batch, Evaluator, verdicts
from evaluators.ledger import LEDGER, SPARED, by_question, share
from trainables.data.base import Data
from trainables.layers import Classifier
from trainables.scale import Scale
from trainables.train.adversary import attacked, pgd_iterates
from trainables.train.exactness import image_numbers
from trainables.train.norms import random_start

HUGE_EPSILON = 0.5  # every image can be turned into the same grey
HUGE_STEPS = 20
IMAGES = 50
CHANCE = 0.01  # a share above this, by its interval's lower end, is more than chance
SIGNIFICANCE = 0.01
# The same of an audit's signs: 7 of 64 images or more. The first 12 honest models of
# `python -m benchmarks.audit --chosen` show each sign at 3 of 64 at most.
AUDIT_CHANCE = 0.05
LENGTH = re.compile(r"(pgd(?:-l[12])?)-(\d+)(@.+)?")  # with its radius if there are several
QUESTIONS = {"pgd-huge", "gradient"}
AUDIT = re.compile(r"audit(@\d[^/]*/255)?")
# Signs of masked gradients by the question, or the stage, of an audit that counts them among all
# images.
SIGNS = {
    "repeats": "the model answers {} of {} images differently each time",
    "gradient": "the gradient is zero, or no number, at {} of {} images",
    "ascends": "a small step along the gradient raises the margin of {} of {} images",
    "unbounded": "{} of {} images survive PGD at epsilon 0.5, where none can",
    "one-step": "one step breaks images that PGD leaves: {} of {}",
    "half": "PGD within half of the radius breaks images that it leaves within the whole: {} of {}",
    "restart": "PGD from another start breaks more images: {} of {}",
    "rescaled": "PGD on rescaled logits breaks more images: {} of {}",
    "square-search": "Square, a black box, breaks images that PGD leaves: {} of {}",
    "spsa": "SPSA, a black box, breaks images that PGD and Square leave: {} of {}",
    "surrogate": "a differentiable surrogate's adversarial images break more: {} of {}",
    "adapted": "the attack adapted to the model breaks images that plain PGD leaves: {} of {}",
}


class Health(Evaluator):
    """Two cheap questions that a sound attack surface answers in a known way.

    pgd-huge: does the answer survive 20 steps of PGD at epsilon 1/2? It must not.
    gradient: does the cross-entropy have a gradient at the image? It must.
    """

    name = "health"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.subset_size = min(IMAGES, scale.attack_subset)

    def identity(self, source: Data) -> dict[str, Any]:
        return {**super().identity(source), "epsilon": HUGE_EPSILON, "steps": HUGE_STEPS}

    def cost(self, held_out: int, *, withstanding: float) -> float:
        return self.asked_about(held_out) * (1 + 2 * (HUGE_STEPS + 1))

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        numbers_B = image_numbers(batch.ids)
        start = random_start(batch.images, numbers_B, epsilon=HUGE_EPSILON, key=(self.name,))
        with attacked(classifier):
            pair, stops = (batch.images, batch.labels), (HUGE_STEPS,)
            ((_, images_BCHW),) = pgd_iterates(
                classifier, *pair, epsilon=HUGE_EPSILON, stops=stops, start_BCHW=start
            )
            with torch.no_grad():
                predicted = classifier(images_BCHW).argmax(dim=1)
            images = batch.images.detach().requires_grad_(True)
            logits = classifier(images)
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images)
        has_gradient = gradient.abs().amax(dim=(1, 2, 3)) > 0
        answers = logits.detach().argmax(dim=1)
        rows = verdicts(batch, "gradient", answers, survived_B=has_gradient)
        return pa.concat_tables([verdicts(batch, "pgd-huge", predicted), rows])


def is_checked(ledgers: Iterable[pa.Table]) -> bool:
    """Say whether one model's ledgers hold every question of the health evaluator, or an audit."""
    questions = {q for ledger in ledgers for q in pc.unique(ledger["question"]).to_pylist()}
    return questions >= QUESTIONS or any(map(AUDIT.fullmatch, questions))


def red_flags(ledgers: Iterable[pa.Table]) -> list[str]:
    """Return why one model's attacks are not to be believed; each check needs its questions."""
    rows = by_question(pa.concat_tables(ledgers))
    flags = [*_longer_attacks_that_are_weaker(rows), *_signs_of_masked_gradients(rows)]
    reasons = {audit: _reasons(rows, audit) for audit in filter(AUDIT.fullmatch, rows)}
    return flags + [f"{a}: suspect, {'; '.join(why)}" for a, why in reasons.items() if why]


def unmasked(ledgers: Iterable[pa.Table]) -> list[str]:
    """Return a note for each radius at which one model's audit shows no sign of masking."""
    rows = by_question(pa.concat_tables(ledgers))
    audits = [audit for audit in filter(AUDIT.fullmatch, rows) if not _reasons(rows, audit)]
    return [f"{audit}: no sign of masked gradients" for audit in audits]


def audit_signs(rows: Mapping[str, pa.Table], audit: str) -> dict[str, int]:
    """Return of how many images an audit's ledger shows each sign of masked gradients."""
    answers = {sign: _survived(rows, f"{audit}/{sign}") for sign in (*SIGNS, "plain")}
    plain, broken_by = answers["plain"], Counter(rows[audit]["stage"].to_pylist())
    counts = {sign: broken_by[sign] for sign in SIGNS}
    for sign in ("repeats", "gradient", "ascends"):
        counts[sign] = sum(not survived for survived in answers[sign].values())
    for sign in ("one-step", "half"):
        counts[sign] = sum(plain[i] and not survived for i, survived in answers[sign].items())
    counts["unbounded"] = sum(answers["unbounded"].values())
    counts["adapted"] = sum(plain.values()) - broken_by[None]
    return counts


def _reasons(rows: Mapping[str, pa.Table], audit: str) -> list[str]:
    n, counts = len(rows[audit]), audit_signs(rows, audit)
    return [
        sentence.format(counts[sign], n)
        for sign, sentence in SIGNS.items()
        if counts[sign] and share("", counts[sign], n).low > AUDIT_CHANCE
    ]


def _longer_attacks_that_are_weaker(rows: Mapping[str, pa.Table]) -> Iterator[str]:
    lengths: dict[tuple[str, str], list[int]] = {}
    for match in filter(None, map(LENGTH.fullmatch, rows)):
        lengths.setdefault((match[1], match[3] or ""), []).append(int(match[2]))
    for (attack, radius), steps in lengths.items():
        for few, many in pairwise(sorted(steps)):
            shorter, longer = (_survived(rows, f"{attack}-{n}{radius}") for n in (few, many))
            shared = shorter.keys() & longer.keys()
            gained = sum(longer[i] and not shorter[i] for i in shared)
            lost = sum(shorter[i] and not longer[i] for i in shared)
            test = binomtest(gained, max(1, gained + lost), alternative="greater")
            if gained > lost and test.pvalue < SIGNIFICANCE:
                name = attack.upper()
                yield (
                    f"{name}-{many}{radius} is weaker than {name}-{few}{radius}: {gained} images "
                    f"survive only the longer attack, {lost} only the shorter one, of {len(shared)}"
                )


def _signs_of_masked_gradients(rows: Mapping[str, pa.Table]) -> Iterator[str]:
    survived = _survived(rows, "pgd-huge")
    if _more_than_chance(count := sum(survived.values()), len(survived)):
        yield (
            f"{count} of {len(survived)} images survive PGD at epsilon {HUGE_EPSILON:g}, "
            "where none can: the gradients mislead the attack"
        )
    for question, table in rows.items():
        stages = table["stage"].to_pylist()
        attacked_images = len(stages) - stages.count("clean") - stages.count(SPARED)
        if _more_than_chance(count := stages.count("square"), attacked_images):
            yield (
                f"{question}: Square, a black box, breaks {count} of {attacked_images} images "
                "that every white-box attack left: the gradients mislead the attack"
            )
    has_gradient = _survived(rows, "gradient")
    if _more_than_chance(count := sum(not g for g in has_gradient.values()), len(has_gradient)):
        yield (
            f"the input gradient is zero at {count} of {len(has_gradient)} images: "
            "attacks by gradient have nothing to follow"
        )


def _survived(rows: Mapping[str, pa.Table], question: str) -> dict[str, bool]:
    table = rows.get(question, LEDGER.empty_table())
    return dict(zip(table["image_id"].to_pylist(), table["survived"].to_pylist(), strict=True))


def _more_than_chance(count: int, n: int) -> bool:
    return count > 0 and share("", count, n).low > CHANCE
