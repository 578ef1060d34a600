"""Questions asked of a classifier; one verdict per image, scores computed from verdicts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from trainables.scale import Scale

if TYPE_CHECKING:
    from evaluators.base import Evaluator

# Where each evaluator is, the cheapest first; it is imported when it is asked for, so that
# `--help` stays quick.
EVALUATORS: dict[str, str] = {
    "clean": "evaluators.clean:Clean",
    "natural": "evaluators.natural:Natural",
    "stylized": "evaluators.stylized:Stylized",
    "health": "evaluators.health:Health",
    "corruptions": "evaluators.corruptions:Corruptions",
    "pgd": "evaluators.pgd:PGD",
    "pgd-as-published": "evaluators.pgd:PublishedPGD",
    "tpa": "evaluators.texture_patch:TexturePatchAttack",
    "autoattack-small": "evaluators.autoattack:SmallAutoAttack",
    "autoattack": "evaluators.autoattack:AutoAttack",
}
SHARD_SECONDS = 30.0  # of work, about: what a killed run loses
SEVERITIES = (1, 2, 3, 4, 5)  # of every corruption
EXTRA_KINDS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # not of the fifteen


def evaluator_named(name: str, scale: Scale) -> Evaluator:
    """Return an evaluator set up for a scale; ValueError lists the names."""
    if name not in EVALUATORS:
        raise ValueError(f"unknown evaluator {name!r}; one of {sorted(EVALUATORS)}")
    module, _, made = EVALUATORS[name].partition(":")
    return cast("Evaluator", getattr(import_module(module), made)(scale))
