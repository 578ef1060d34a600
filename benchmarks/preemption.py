"""The share of its work that a training loses to spot instances: `python -m benchmarks.preemption`.

One training of 100 epochs, an hour each, by 8 nodes, of which each is taken away 0.05 times an hour
at random. Mostly two minutes' notice comes before: the training saves after the step that it is at,
and goes on from there on other nodes. Without notice it goes on from its last checkpoint. Work is
lost where a step is made twice, and while the training saves. The wait for new nodes is no work.
"""

from __future__ import annotations

import random
from statistics import fmean

from trainables.running import LOOK_SECONDS, MIDWAY_SECONDS

HOUR = 3600.0
WORK, LOSSES_AN_HOUR = 100 * HOUR, 8 * 0.05
STEP, SAVING, NOTICE = 10.0, 5.0, 120.0  # seconds of a step and of a checkpoint
STUDIES = 1000


def lost(between: float, noticed: float, rng: random.Random) -> float:
    """Return the share of one training's work that is lost, loss by loss.

    between: seconds between two checkpoints; noticed: the share of losses with notice.
    """
    assert LOOK_SECONDS + STEP + SAVING < NOTICE
    done = spent = 0.0
    while done < WORK:
        after = rng.expovariate(LOSSES_AN_HOUR / HOUR)
        saves, since = divmod(after, between + SAVING)
        in_time = rng.random() < noticed
        done += saves * between + in_time * min(since, between)
        spent += after + in_time * SAVING
    return spent / done - 1


def mean_lost(between: float, noticed: float, *, studies: int = STUDIES) -> float:
    """Return the mean share that is lost, of so many trainings."""
    rng = random.Random(0)
    return fmean(lost(between, noticed, rng) for _ in range(studies))


if __name__ == "__main__":
    for between in (MIDWAY_SECONDS, HOUR):
        for noticed in (1.0, 0.9, 0.0):
            share = mean_lost(between, noticed)
            print(f"saved every {between:.0f} s, {noticed:.0%} with notice: {share:.2%} lost")
