"""When trials would be trained and judged on some machines: simulated, without any. Pure."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

EVALUATOR_GPUS = 0.25
GPUS_BESIDE = 1 - EVALUATOR_GPUS  # what one evaluator leaves of its GPU
ROUNDING = 1e-6
DAY = 86_400.0


@dataclass(frozen=True)
class Job:
    """A trial as work: seconds of training on its lane, and of each shard to judge.

    `shards` are pairs of a rank and seconds of one worker alone: the lowest ranks go first.
    """

    digest: str
    training: float
    epochs: int = 1
    teacher: str = ""
    shards: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What trains and judges: lanes of trials on nodes, and evaluators.

    The evaluators have `own` workers' worth of machines to themselves; None: they share the lanes'
    cores with the training, each process at the same speed.
    """

    lanes: int
    evaluators: int
    nodes: int = 1
    own: float | None = None

    def nodes_of(self, lane: int) -> range:
        """Return the nodes that a lane needs."""
        first, end = (self.nodes * place // self.lanes for place in (lane, lane + 1))
        return range(first, max(first + 1, end))


@dataclass(frozen=True, kw_only=True)
class Interruptions:
    """Spot nodes are taken away at a rate, each on its own, and come back after a while."""

    per_node_day: float
    seconds_away: float
    seed: int = 0


@dataclass
class Schedule:
    """What a simulation found, in seconds; `starts` maps a trial's digest to when it begins.

    lower_bound: no order is done earlier, be it for the work or for the longest chain of teachers
    and students. utilisation: the share of the lanes' time, until training ends, that is training.
    repeated: training lost to interruptions, up to each trial's last whole epoch.
    """

    lower_bound: float
    trained: float = 0.0
    makespan: float = 0.0
    utilisation: float = 1.0
    interruptions: int = 0
    repeated: float = 0.0
    starts: dict[str, float] = field(default_factory=dict)


def evaluators_beside(gpus: float) -> int:
    """Return how many evaluators, a quarter of a GPU each, a cluster of so many GPUs gets."""
    return max(1, int(gpus // 2))


def gpu_machines(
    nodes: int, gpus_per_node: int, *, workers: int, gpus_per_worker: float
) -> Machines:
    """Return what nodes of GPUs hold; ValueError if not even one trial. No worker spans nodes."""
    evaluators = evaluators_beside(nodes * gpus_per_node)
    own = evaluators * EVALUATOR_GPUS
    free = [[1.0] * gpus_per_node for _ in range(nodes)]
    for place in range(evaluators):
        node, gpu = divmod(int(place * EVALUATOR_GPUS), gpus_per_node)
        free[node][gpu] -= EVALUATOR_GPUS
    lanes = sum(_held(gpus, gpus_per_worker) for gpus in free) // workers
    if lanes < 1:
        fits = sum(_held(gpus, GPUS_BESIDE) for gpus in free) >= workers
        advice = f"give --gpus-per-worker {GPUS_BESIDE:g}" if fits else "give fewer --workers"
        raise ValueError(
            f"{nodes} nodes of {gpus_per_node} GPUs do not hold {workers} workers of "
            f"{gpus_per_worker:g} GPUs beside the evaluators' {own:g} GPUs: {advice}"
        )
    return Machines(lanes=lanes, evaluators=evaluators, nodes=nodes, own=own)


def _held(free: Sequence[float], gpus_per_worker: float) -> int:
    """Return how many workers fit what a node has free of each GPU; a share is of one GPU."""
    if gpus_per_worker > 1:
        return int(sum(gpu == 1 for gpu in free) / gpus_per_worker)
    return sum(int(gpu / gpus_per_worker + ROUNDING) for gpu in free)


def speed_of(gpus_per_worker: float) -> float:
    """Return how fast a worker trains, where 1 is alone on a GPU: those that share one divide it.

    Evaluators slow nobody; 0 stands for workers without GPUs.
    """
    beside = int(1 / gpus_per_worker + ROUNDING) if gpus_per_worker else 1
    return 1 / max(1, beside)


def simulate(
    jobs: Sequence[Job], machines: Machines, interruptions: Interruptions | None = None
) -> Schedule:
    """Train jobs in their order, each on the first free lane once its teacher has ended.

    Shards are judged as the launcher does, from the end of their trial on.
    """
    simulation = _Simulation(jobs, machines, interruptions)
    while simulation.step():
        pass
    return simulation.found


def _lower_bound(jobs: Sequence[Job], machines: Machines) -> float:
    training = sum(job.training for job in jobs)
    judging = sum(seconds for job in jobs for _, seconds in job.shards)
    chain = _longest_chain(jobs)
    if machines.own is None:
        return max((training + judging) / machines.lanes, chain)
    return max(training / machines.lanes, chain, judging / machines.own)


def _longest_chain(jobs: Iterable[Job]) -> float:
    """Return the seconds of the longest run of trials of which each teaches the next."""
    by_digest = {job.digest: job for job in jobs}
    longest = 0.0
    for job in by_digest.values():
        chain, link = 0.0, by_digest.get(job.digest)
        while link:
            chain, link = chain + link.training, by_digest.get(link.teacher)
        longest = max(longest, chain)
    return longest


@dataclass
class _Training:
    job: Job
    place: int  # in the plan's order
    left: float


class _Simulation:
    """The state between two events; a step goes to the next one."""

    def __init__(
        self, jobs: Sequence[Job], machines: Machines, interruptions: Interruptions | None
    ) -> None:
        self.found = Schedule(_lower_bound(jobs, machines))
        self._machines, self._interruptions = machines, interruptions
        self._now = 0.0
        self._ready: list[tuple[int, _Training]] = []
        self._students: dict[str, list[_Training]] = {}
        known = {job.digest for job in jobs}
        for place, job in enumerate(jobs):
            training = _Training(job, place, job.training)
            if job.teacher in known:
                self._students.setdefault(job.teacher, []).append(training)
            else:
                heapq.heappush(self._ready, (place, training))
        self._work = sum(job.training for job in jobs)
        self._lanes: dict[int, _Training] = {}
        self._waiting: list[tuple[int, int, float]] = []  # shards: rank, order, seconds
        self._judging: list[float] = []  # seconds left of each
        self._down: set[int] = set()
        self._outages: list[tuple[float, int, bool]] = []  # when, which node, whether it goes
        self._random = random.Random(interruptions.seed if interruptions else 0)
        if interruptions and interruptions.per_node_day:
            for node in range(machines.nodes):
                self._expect_outage(node)

    def step(self) -> bool:
        """Go to the next event; False when all is done."""
        self._hand_out()
        waiting = self._ready or self._lanes or self._waiting or self._judging
        if not waiting:
            return False
        training, judging = self._speeds()
        ends = [training_of.left / training for training_of in self._lanes.values()]
        ends += [left / judging for left in self._judging]
        outage = self._outages[0][0] - self._now if self._outages else float("inf")
        passed = min([*ends, outage])
        self._now += passed
        for running in self._lanes.values():
            running.left -= passed * training
        self._judging = [left - passed * judging for left in self._judging]
        self._finish()
        while self._outages and self._outages[0][0] <= self._now:
            self._turn(*heapq.heappop(self._outages))
        self.found.makespan = self._now
        return True

    def _speeds(self) -> tuple[float, float]:
        """Return how fast a training and a shard go, where 1 is a worker of its own."""
        machines, judging = self._machines, max(1, len(self._judging))
        if machines.own is None:
            shared = min(1.0, machines.lanes / (len(self._lanes) + judging))
            return (shared, shared) if self._judging else (1.0, 1.0)
        return 1.0, min(1.0, machines.own / judging)

    def _hand_out(self) -> None:
        for lane in range(self._machines.lanes):
            if not self._ready:
                break
            if lane not in self._lanes and not self._down.intersection(
                self._machines.nodes_of(lane)
            ):
                _, training = heapq.heappop(self._ready)
                self._lanes[lane] = training
                self.found.starts.setdefault(training.job.digest, self._now)
        while self._waiting and len(self._judging) < self._machines.evaluators:
            self._judging.append(heapq.heappop(self._waiting)[2])

    def _finish(self) -> None:
        """Take what is done off its lane; rounding may leave a trillionth of a second."""
        over = [lane for lane, training in self._lanes.items() if training.left <= 1e-9]
        for lane in over:
            training = self._lanes.pop(lane)
            job = training.job
            for student in self._students.pop(job.digest, []):
                heapq.heappush(self._ready, (student.place, student))
            for rank, seconds in job.shards:
                heapq.heappush(self._waiting, (rank, training.place, seconds))
            self.found.trained = self._now
            self.found.utilisation = self._work / (self._machines.lanes * self._now)
        self._judging = [left for left in self._judging if left > 1e-9]

    def _expect_outage(self, node: int) -> None:
        assert self._interruptions is not None
        wait = self._random.expovariate(self._interruptions.per_node_day / DAY)
        heapq.heappush(self._outages, (self._now + wait, node, True))

    def _turn(self, _when: float, node: int, goes: bool) -> None:
        """Take a node away, or bring it back; its trials go on from their last whole epoch."""
        assert self._interruptions is not None
        if not goes:
            self._down.discard(node)
            self._expect_outage(node)
            return
        self._down.add(node)
        self.found.interruptions += 1
        back = self._now + self._interruptions.seconds_away
        heapq.heappush(self._outages, (back, node, False))
        for lane in [lane for lane in self._lanes if node in self._machines.nodes_of(lane)]:
            training = self._lanes.pop(lane)
            epoch = training.job.training / training.job.epochs
            lost = (training.job.training - training.left) % epoch if epoch else 0.0
            training.left += lost
            self.found.repeated += lost
            heapq.heappush(self._ready, (training.place, training))
