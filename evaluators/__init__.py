"""Questions asked of a classifier; one verdict per image, scores computed from verdicts."""

from __future__ import annotations

from collections.abc import Callable

from evaluators.base import Evaluator
from evaluators.clean import Clean
from evaluators.corruptions import Corruptions
from evaluators.natural import Natural
from evaluators.pgd import PGD
from evaluators.stylized import Stylized
from evaluators.texture_patch import TexturePatchAttack
from trainables.scale import Scale

EVALUATORS: dict[str, Callable[[Scale], Evaluator]] = {
    "clean": Clean,
    "pgd": PGD,
    "tpa": TexturePatchAttack,
    "natural": Natural,
    "corruptions": Corruptions,
    "stylized": Stylized,
}


def evaluator_named(name: str, scale: Scale) -> Evaluator:
    """Return an evaluator set up for a scale; ValueError lists the names."""
    if name not in EVALUATORS:
        raise ValueError(f"unknown evaluator {name!r}; one of {sorted(EVALUATORS)}")
    return EVALUATORS[name](scale)
