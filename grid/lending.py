"""Which GPUs evaluators may hold, so that no trial waits for them. Pure: no Ray, no clock."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

EVALUATOR_GPUS = 0.25  # of one GPU, for each evaluator
ROUNDING = 1e-6
Home = tuple[str, str]  # the ids of a node and of a GPU there; "": any
Bundle = Mapping[str, float]  # what one worker needs, by resource
ANYWHERE: Home = ("", "")


def lendable(
    nodes: Mapping[str, Mapping[str, float]],
    placed: Iterable[tuple[str, Bundle]],
    waiting: Iterable[Sequence[Bundle]],
    evaluators: Counter[Home],
    *,
    wanted: int,
    kept: float,
) -> Counter[Home]:
    """Return how many evaluators may be on each GPU, which is what no waiting trial can use.

    nodes: the resources of each. placed: the workers of trials, each with its node. waiting: the
    workers of each trial that waits. evaluators: those there now. wanted: for how many there is
    work. kept: GPUs that they hold while trials wait; one that is larger gets these, too. An
    evaluator at "" is to wait on its node for a share that comes free.
    """
    rest = {node: dict(resources) for node, resources in nodes.items()}
    gpus: dict[Home, float] = {}
    for node, resources in nodes.items():
        used = [home for home in evaluators if home[0] == node]
        others = range(int(resources.get("GPU", 0)) - len(used))
        gpus |= dict.fromkeys([*used, *((node, f"other {index}") for index in others)], 1.0)
    training = set()
    for node, bundle in placed:
        training.add(node)
        # Which GPU it is on is not known: of shares, one that evaluators leave least of.
        for beside in (evaluators, Counter[Home]()):
            if node in rest and _place(bundle, {node: rest[node]}, gpus, beside, evaluators):
                break
    least = min(int(kept / EVALUATOR_GPUS + ROUNDING), wanted)
    staying = _fill(gpus, evaluators, least)
    sizes = [sum(bundle.get("GPU", 0.0) for bundle in trial) for trial in waiting]
    for size, trial in zip(sizes, waiting, strict=True):
        beside = staying if size <= kept else Counter()
        rest_then, gpus_then = {node: dict(has) for node, has in rest.items()}, dict(gpus)
        if all(_place(bundle, rest_then, gpus_then, beside, evaluators) for bundle in trial):
            rest, gpus = rest_then, gpus_then
    # Those without work stay beside trials, as a new one takes long to start. An autoscaler ends
    # nodes without either.
    beside = Counter({home: count for home, count in evaluators.items() if home[0] in training})
    lent = _fill(gpus, evaluators, wanted) | (beside & _fill(gpus, beside, sys.maxsize))
    if not gpus and wanted:
        lent[ANYWHERE] = 1  # an autoscaler starts a node for it
    elif max(sizes, default=0.0) <= kept:
        with_gpus = sorted({node for node, _ in gpus})
        for index in range(least - lent.total()):
            on_one_gpu = int(1 / EVALUATOR_GPUS)
            lent[with_gpus[index // on_one_gpu % len(with_gpus)], ""] += 1
    return +lent


def _fill(gpus: Mapping[Home, float], evaluators: Counter[Home], most: int) -> Counter[Home]:
    """Return how many evaluators have room on each GPU, first where some are."""
    lent: Counter[Home] = Counter()
    for home in sorted(gpus, key=lambda home: -evaluators[home]):
        lent[home] = min(most - lent.total(), int(gpus[home] / EVALUATOR_GPUS + ROUNDING))
    return lent


def _place(
    bundle: Bundle,
    rest: Mapping[str, dict[str, float]],
    gpus: dict[Home, float],
    beside: Counter[Home],
    ending: Counter[Home],
) -> bool:
    """Take what a worker needs from a node, where it leaves least and ends the fewest evaluators.

    A share lies on one GPU: what several leave over adds up to none. beside: evaluators that stay.
    """
    share = bundle.get("GPU", 0.0)
    others = {name: amount for name, amount in bundle.items() if name != "GPU"}
    choices = []
    for node, has in rest.items():
        if any(has.get(name, 0.0) + ROUNDING < amount for name, amount in others.items()):
            continue
        free = {h: room - EVALUATOR_GPUS * beside[h] for h, room in gpus.items() if h[0] == node}
        fits = [home for home, room in free.items() if room + ROUNDING >= min(share, 1)]
        fits.sort(key=lambda home: (ending[home], free[home]))
        if len(fits) >= (count := math.ceil(share)):
            choices.append((sum(ending[home] for home in fits[:count]), node, fits[:count]))
    if not choices:
        return False
    _, node, homes = min(choices)
    for home in homes:
        gpus[home] -= min(share, 1)
    for name, amount in others.items():
        rest[node][name] -= amount
    return True
