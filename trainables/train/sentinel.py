"""The collapse sentinel: tells from a training's history whether it has collapsed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trainables.recipe import Recipe

PROBE = "probe/pgd-10"
PROBE_STEPS = 10
PATIENCE_SHARE = 0.1
LEAST_PATIENCE = 3


def chance_limit(num_classes: int, n: int) -> float:
    """Return the highest accuracy on n images that guessing reaches in 19 of 20 cases."""
    chance = 1 / num_classes
    return chance + 1.645 * math.sqrt(chance * (1 - chance) / n)


def at_chance(entry: Mapping[str, float], *, num_classes: int, n: int) -> bool:
    """Tell whether an epoch's probe, if it had one, is no better than guessing."""
    return PROBE in entry and entry[PROBE] <= chance_limit(num_classes, n)


def collapse_reason(
    recipe: Recipe, history: Sequence[Mapping[str, float]], *, num_classes: int, n: int
) -> str:
    """Say why a training has collapsed, or '' while it has not.

    Collapsed: the loss is not finite; or the PGD-10 probe (n images) stays at chance for a tenth
    of the epochs, at least three, after the warm-up, while the training loss falls.
    """
    last = history[-1]
    if not math.isfinite(last["train/loss"]):
        return f"the training loss became {last['train/loss']} in epoch {last['epoch']:.0f}"
    patience = max(LEAST_PATIENCE, math.ceil(PATIENCE_SHARE * recipe.epochs))
    recent = history[-patience:]
    if len(recent) < patience or recent[0]["epoch"] <= recipe.warmup_epochs:
        return ""
    stuck = all(at_chance(entry, num_classes=num_classes, n=n) for entry in recent)
    if stuck and last["train/loss"] < recent[0]["train/loss"]:
        return (
            f"PGD-{PROBE_STEPS} accuracy was at chance ({last[PROBE]:.1%}) in the {patience} "
            f"epochs up to {last['epoch']:.0f} while the training loss fell"
        )
    return ""
