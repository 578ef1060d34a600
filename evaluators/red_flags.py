"""Red flags: why the attacks on a model are not to be believed, read from its ledgers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from evaluators.ledger import share

HUGE_EPSILON = 0.5  # every image can be turned into the same grey
CHANCE = 0.01  # a share above this, by its interval's lower end, is more than chance
SIGNIFICANCE = 0.01
LENGTH = re.compile(r"pgd-(\d+)(@.+)?")  # with its radius where several were asked
HEALTH_QUESTIONS = {"pgd-huge", "gradient"}


def red_flags(ledgers: Iterable[pa.Table]) -> list[str]:
    """Return why one model's attacks are not to be believed; each check needs its questions."""
    ledger = pa.concat_tables(list(ledgers), promote_options="default")
    return [
        *_more_steps_help_the_model(ledger),
        *_huge_epsilon_survived(ledger),
        *_black_box_wins(ledger),
        *_no_gradient(ledger),
    ]


def is_checked(ledgers: Iterable[pa.Table]) -> bool:
    """Say whether one model's ledgers hold every question of the health evaluator."""
    questions = {q for ledger in ledgers for q in pc.unique(ledger["question"]).to_pylist()}
    return questions >= HEALTH_QUESTIONS


def _more_steps_help_the_model(ledger: pa.Table) -> Iterator[str]:
    names = (LENGTH.fullmatch(question) for question in pc.unique(ledger["question"]).to_pylist())
    lengths: dict[str, list[int]] = {}
    for name in filter(None, names):
        lengths.setdefault(name[2] or "", []).append(int(name[1]))
    for radius, steps in lengths.items():
        yield from _longer_is_weaker(ledger, sorted(steps), radius)


def _longer_is_weaker(ledger: pa.Table, lengths: list[int], radius: str) -> Iterator[str]:
    survived = {steps: _survived(ledger, f"pgd-{steps}{radius}") for steps in lengths}
    for few, many in pairwise(lengths):
        shared = survived[few].keys() & survived[many].keys()
        gained = sum(survived[many][i] and not survived[few][i] for i in shared)
        lost = sum(survived[few][i] and not survived[many][i] for i in shared)
        if gained > lost and _exceeds_half(gained, gained + lost):
            yield (
                f"PGD-{many}{radius} is weaker than PGD-{few}{radius}: {gained} images survive "
                f"only the longer attack, {lost} only the shorter one, of {len(shared)}"
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
        attacked_images = len(stages) - stages.count("clean")
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
    return count > 0 and share("", count, n).low > CHANCE
