"""When a plan's trials would run on some machines: simulated, without any. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from grid.plan import Trial


@dataclass(frozen=True)
class Schedule:
    """What a simulation found, in seconds; `starts` maps a trial's digest to when it begins.

    lower_bound: no order is done earlier, be it for the work or for the longest chain of teachers
    and students. utilisation: the share of the lanes' time until the end that is training.
    """

    makespan: float
    lower_bound: float
    utilisation: float
    starts: dict[str, float]


def lanes_of(nodes: int, gpus_per_node: int, *, workers: int, gpus_per_worker: float) -> int:
    """Return how many trials run at once; ValueError if not even one. No worker spans nodes."""
    lanes = nodes * int(gpus_per_node // gpus_per_worker) // workers
    if lanes < 1:
        raise ValueError(
            f"{nodes} nodes of {gpus_per_node} GPUs do not hold {workers} workers of "
            f"{gpus_per_worker:g} GPUs"
        )
    return lanes


def simulate(
    trials: Sequence[Trial], *, lanes: int, workers: int, seconds_per_unit: float
) -> Schedule:
    """Run trials in their order, each on the first free lane once its teacher has ended.

    seconds_per_unit: of one worker, for a trial's cost; several divide it without loss.
    """
    seconds = {trial.digest: trial.cost * seconds_per_unit / workers for trial in trials}
    waiting, starts, ends = list(trials), {}, dict.fromkeys(seconds, float("inf"))
    running: list[float] = []
    now = 0.0
    while waiting:
        ready = [trial for trial in waiting if ends.get(_teacher(trial), 0.0) <= now]
        for trial in ready[: lanes - len(running)]:
            waiting.remove(trial)
            starts[trial.digest] = now
            ends[trial.digest] = now + seconds[trial.digest]
            heapq.heappush(running, ends[trial.digest])
        now = heapq.heappop(running) if waiting else now
    makespan = max(ends.values(), default=0.0)
    work = sum(seconds.values())
    return Schedule(
        makespan=makespan,
        lower_bound=max(work / lanes, _longest_chain(trials, seconds)),
        utilisation=work / (lanes * makespan) if makespan else 1.0,
        starts=starts,
    )


def _teacher(trial: Trial) -> str:
    return trial.recipe.teacher.digest() if trial.recipe.teacher else ""


def _longest_chain(trials: Sequence[Trial], seconds: dict[str, float]) -> float:
    """Return the seconds of the longest run of trials of which each teaches the next."""
    taught_by = {trial.digest: _teacher(trial) for trial in trials}
    longest = 0.0
    for digest in seconds:
        chain, link = 0.0, digest
        while link in seconds:
            chain, link = chain + seconds[link], taught_by[link]
        longest = max(longest, chain)
    return longest
