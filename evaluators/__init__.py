"""Questions asked of a classifier; one verdict per image, scores computed from verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from trainables.data.registry import STORED_SETS
from trainables.plugins import register_all
from trainables.recipe import unknown
from trainables.scale import Scale

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from evaluators.base import Column, Evaluator

OTHER_NORMS = ("l2", "l1")  # beside the max-norm: an attack that has them is an entry for each
ALONE = [name for name, stored in STORED_SETS.items() if stored.alone]
# Where each evaluator is, the cheapest first, then plug-ins; it is imported when it is asked for,
# so that `--help` stays quick.
EVALUATORS: dict[str, str] = {
    "clean": "evaluators.base:Clean",
    "calibration": "evaluators.calibration:Calibration",
    "natural": "evaluators.natural:Natural",
    **{name: f"evaluators.shifts:{name}" for name in ALONE},
    "stylized": "evaluators.stylized:Stylized",
    "cue-conflict": "evaluators.stylized:CueConflict",
    "health": "evaluators.health:Health",
    "corruptions": "evaluators.corruptions:Corruptions",
    "c-bar": "evaluators.corruptions:CBar",
    "radii": "evaluators.radii:Radii",
    **{f"radii-{norm}": f"evaluators.radii:Radii@{norm}" for norm in OTHER_NORMS},
    "transfer": "evaluators.transfer:Transfer",
    "pgd": "evaluators.pgd:PGD",
    **{f"pgd-{norm}": f"evaluators.pgd:PGD@{norm}" for norm in OTHER_NORMS},
    "pgd-as-published": "evaluators.pgd:PublishedPGD",
    "audit": "evaluators.audit:Audit",
    "tpa": "evaluators.texture_patch:TexturePatchAttack",
    "autoattack-small-bounded": "evaluators.autoattack_bounded:SmallBoundedAutoAttack",
    "autoattack-bounded": "evaluators.autoattack_bounded:BoundedAutoAttack",
    **{
        f"autoattack-{norm}-bounded": f"evaluators.autoattack_bounded:BoundedAutoAttack@{norm}"
        for norm in OTHER_NORMS
    },
    "autoattack-small": "evaluators.autoattack:SmallAutoAttack",
    "autoattack": "evaluators.autoattack:AutoAttack",
    **{f"autoattack-{norm}": f"evaluators.autoattack:AutoAttack@{norm}" for norm in OTHER_NORMS},
    "certified": "evaluators.certified:Certified",
    **{f"certified-{sigma}": f"evaluators.certified:Certified@{sigma}" for sigma in ("0.5", "1")},
}
# What answers for an evaluator at scales whose AutoAttack is bounded.
BOUNDED = {
    name: f"{name}-bounded"
    for name in EVALUATORS
    if name.startswith("autoattack") and not name.endswith("-bounded")
}
ERRORS = "corruptions"  # over the fifteen kinds; a plug-in's is over one, of its name
GENERATED_IMAGES = 100  # x 15 kinds x 5 severities of corruptions: 7,500 verdicts
HARDEST_SHARE = 1 / 6  # of held-out images that are not turned
SHARD_SECONDS = 30.0  # of work, about: what a killed run loses
PGD_STEPS = (5, 10, 50, 100)  # the lengths of pgd that are scored
PGD_LENGTHS = {  # each alone, by its score's name: the evaluator and the steps
    f"{name}-{steps}": (name, steps)
    for name in ("pgd", *(f"pgd-{norm}" for norm in OTHER_NORMS))
    for steps in PGD_STEPS
}
LARGEST_RADIUS = 1e6  # of any norm: each says how large one may be
PLUG_INS: dict[str, EntryPoint] = {}  # those of EVALUATORS that other packages bring


def set_images(name: str, scale: Scale, held_out: int) -> int:
    """Return how many images a stored set has as published, or are made in its place."""
    stored = STORED_SETS.get(scale.data_set.counterpart(name))
    if stored and stored.images and not scale.data_set.generated:
        return stored.images
    is_part = name == "natural" and not scale.natural_tilt
    return math.ceil(held_out * HARDEST_SHARE) if is_part else held_out


def corrupted_images(scale: Scale, held_out: int) -> int:
    """Return how many images `corruptions` is about."""
    return min(GENERATED_IMAGES, held_out) if scale.data_set.generated else held_out


# What a plan needs of evaluators before it imports them: which draw images, and how many images
# the others judge.
CHECKED = ("pgd", "audit", "autoattack")  # how the names of attacks with red flags begin
DRAWN = (*CHECKED, "radii", "transfer", "tpa", "certified")
DRAWING = {name for name in EVALUATORS if name.startswith(DRAWN)}
UNDRAWN: dict[str, Callable[[Scale, int], int]] = {
    **dict.fromkeys(("clean", "stylized", "cue-conflict"), lambda _, held_out: held_out),
    **{name: partial(set_images, name) for name in ("natural", *ALONE)},
    ERRORS: corrupted_images,
    "c-bar": lambda _, held_out: min(GENERATED_IMAGES, held_out),
}


def __getattr__(name: str) -> Any:
    """Import the Python API when it is used: `import evaluators` stays light."""
    if name not in ("compare", "evaluate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("evaluators.api"), name)


def evaluator_named(name: str, scale: Scale, *, images: int = 0, **settings: Any) -> Evaluator:
    """Return an evaluator set up for a scale; ValueError lists the names.

    images: how many it draws, 0 for the scale's number; one that judges all does so whatever this
    says. settings: of its class, such as the radii of an attack.
    """
    evaluator = cast("Evaluator", class_named(name)(scale, **settings))
    if images and evaluator.subset_size is not None:
        evaluator.subset_size = images
    return evaluator


def class_named(name: str) -> Any:
    """Return an evaluator's class; ValueError lists the names, or says why a plug-in has none."""
    if name not in EVALUATORS:
        raise ValueError(unknown("evaluator", name, EVALUATORS))
    if name in PLUG_INS:
        return import_module("evaluators.plugged").class_of(PLUG_INS[name])
    module, class_name, *norm = re.split("[:@]", EVALUATORS[name])
    evaluator = getattr(import_module(module), class_name)
    return evaluator.within(*norm, name) if norm else evaluator


def in_norm(name: str, norm: str) -> str:
    """Return an attack's name in a norm, as 'pgd-l2-10' of 'pgd-10'; a name that has none stays.

    ValueError where an attack does not have the norm.
    """
    root = next((root for root in ("radii", *CHECKED) if name.startswith(root)), "")
    if (wanted := norm.lower()) not in ("linf", *OTHER_NORMS):
        raise ValueError(unknown("norm", norm, ("Linf", "L2", "L1")))
    if wanted == "linf" or re.search(r"-l[12]\b", name):
        return name
    renamed = name.replace(root, f"{root}-{wanted}", 1) if root else name
    is_attack = root or (name in PLUG_INS and class_named(name).takes_radii)
    if is_attack and (renamed == name or renamed not in {*EVALUATORS, *PGD_LENGTHS}):
        raise ValueError(f"{name} has the norm Linf alone; in {norm} there are pgd and autoattack")
    return renamed


def evaluator_of(score: str) -> str:
    """Return the evaluator of a score by its name: 'pgd' of 'pgd-100'. ValueError lists them."""
    owners = [n for n in EVALUATORS if score == n or score.startswith((f"{n}-", f"{n}/", f"{n}@"))]
    if not owners:
        raise ValueError(unknown("score", score, EVALUATORS))
    return max(owners, key=len)


def answering(evaluator: str, scale: Scale) -> str:
    """Return the evaluator that answers for another at a scale: itself, or its bounded form."""
    bounded = BOUNDED if scale.autoattack == "bounded" else {}
    return bounded.get(evaluator, evaluator)


def images_of_score(score: str, scale: Scale, held_out: int) -> tuple[int, bool, bool]:
    """Return how many images a score can be of, whether it draws some, and whether it is an error.

    The evaluator is imported only where other packages bring it.
    """
    name = answering(evaluator_of(score), scale)
    if name in DRAWING:
        return held_out, True, False
    if name in UNDRAWN:
        return UNDRAWN[name](scale, held_out), False, name == ERRORS
    evaluator = evaluator_named(name, scale)
    draws = evaluator.subset_size is not None
    return held_out if draws else evaluator.asked_about(held_out), draws, column_named(score).error


def columns_of(evaluator: str) -> dict[str, Column]:
    """Return the columns that an evaluator states, by the name of their score."""
    columns: tuple[Column, ...] = class_named(evaluator).columns
    return {column.name: replace(column, evaluator=evaluator) for column in columns}


def headline_of(evaluator: str) -> str:
    """Return the score that stands for an evaluator: the one of its name, or the last; or ''."""
    columns = columns_of(evaluator)
    return evaluator if evaluator in columns else next(reversed(columns), "")


def headlines(evaluators: Collection[str]) -> list[str]:
    """Return the headline scores of these evaluators, in the registry's order."""
    return [s for name in EVALUATORS if name in evaluators and (s := headline_of(name))]


def column_named(score: str) -> Column:
    """Return the column of a score; ValueError lists those of its evaluator."""
    columns = columns_of(evaluator_of(score))
    if score not in columns:
        raise ValueError(unknown("score", score, columns))
    return columns[score]


def _add(plug_in: EntryPoint) -> None:
    """Add another package's evaluator, corruption or attack by its name; ValueError if taken."""
    if plug_in.name in {*EVALUATORS, *PGD_LENGTHS}:
        raise ValueError("an evaluator, or a score, of this name is there already")
    PLUG_INS[plug_in.name] = plug_in
    EVALUATORS[plug_in.name] = plug_in.value


for _kind in ("evaluators", "corruptions", "attacks"):
    register_all(_kind, _add)
