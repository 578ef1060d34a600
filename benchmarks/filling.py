"""How many of eight GPUs are busy over the paper's study: `python -m benchmarks.filling`.

Two nodes of four GPUs. Each training and each cell takes as long as `--plan` reckons, in the plan's
order, students after their teachers. Simulated: scale imagenet, for trials of 1, 2 and 4 GPUs. With
`--real SECONDS`: scale digits through Ray Tune and the pool of evaluators, on a Ray whose GPUs are
made up; trials and evaluators sleep, so many seconds for a unit of work. A GPU is busy where a
trial holds it, which counts its start, and a quarter of it where an evaluator is there that has an
image to judge.

The study takes no less than its longest trial. At imagenet with one GPU each that is longer than an
eighth of all work, which bounds the busy share: the bound is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks.stub_evaluator import StubCell, StubEvaluator, StubShard
from grid.estimate import Work, held_out_images, work_of
from grid.lending import EVALUATOR_GPUS, Home, lendable
from grid.options import EVALUATOR_SHARE, RunOptions
from grid.plan import Plan, build_plan
from grid.record import Lease
from grid.run import ENVIRONMENT
from grid.study import load_study
from trainables.data.listing import EMBEDDED
from trainables.scale import DIGITS, Scale, scale_named
from trainables.trial import RecipeTrial

NODES = {f"node {index}": {"CPU": 64.0, "GPU": 4.0} for index in range(2)}
GPUS = int(sum(node["GPU"] for node in NODES.values()))
PARTS = 20  # of the time, that are printed
STEPS = 4000  # of a simulation's time if all were busy
MOST_WAITING = 16  # trials that Tune has wait
Looks = list[tuple[float, float]]  # a time, and the GPUs that are busy from then on


def simulated(plan: Plan, work: Work, workers: int, share: float = EVALUATOR_SHARE) -> Looks:
    """Return the GPUs that are busy over a study with trials of so many GPUs."""
    gpus = [(node, str(index)) for node in NODES for index in range(int(GPUS / len(NODES)))]
    bundles = [{"CPU": 1.0, "GPU": 1.0}] * workers
    waiting, step = [*plan.trials], sum(work.values()) / GPUS / STEPS
    held: dict[Home, str] = {}  # by a trial
    left: dict[str, float] = {}  # of a running trial's time
    there, claims = Counter[Home](), Counter[str]()
    judging: list[tuple[float, Home]] = []  # until when, and where
    shards: list[float] = []
    looks: Looks = []
    while waiting or left or shards or judging:
        now = len(looks) * step
        for digest in [digest for digest, rest in left.items() if rest <= 0]:
            del left[digest]
            held = {home: other for home, other in held.items() if other != digest}
            cells = [units for (trial, name), units in work.items() if trial == digest and name]
            counts = {units: max(1, int(units / step)) for units in sorted(cells)}
            shards += [u / count for u, count in counts.items() for _ in range(count)]
        judging = [(until, home) for until, home in judging if until > now]
        for home in gpus:  # evaluators that wait on a node come first
            while home not in held and there[home] < 1 / EVALUATOR_GPUS and claims[home[0]]:
                there[home], claims[home[0]] = there[home] + 1, claims[home[0]] - 1
        undone = {trial.digest for trial in waiting} | left.keys()
        for trial in [*waiting]:
            free = [home for home in gpus if home not in held and not there[home]]
            needs = {other.digest() for other in trial.recipe.prerequisites}
            if len(free) >= workers and not undone & needs:
                waiting.remove(trial)
                held |= dict.fromkeys(free[:workers], trial.digest)
                left[trial.digest] = work[trial.digest, ""] / workers
        ready = [
            trial
            for trial in waiting
            if not {other.digest() for other in trial.recipe.prerequisites} & undone
        ]
        lent = lendable(
            NODES,
            [(home[0], bundles[0]) for home in held],
            [bundles] * min(len(ready), MOST_WAITING),
            +there,
            wanted=len(shards) + len(judging),
            kept=share * GPUS,
        )
        busy = Counter(home for _, home in judging)
        for home in gpus:
            there[home] = max(busy[home], min(there[home], lent[home]))
        claims = Counter({node: count for (node, gpu), count in lent.items() if not gpu})
        there += _started([home for home in gpus if home not in held], there, lent)
        for home in gpus:
            while shards and busy[home] < there[home]:
                judging.append((now + shards.pop(0) / EVALUATOR_GPUS, home))
                busy[home] += 1
        looks.append((now, len(held) + EVALUATOR_GPUS * len(judging)))
        left = {digest: rest - step for digest, rest in left.items()}
    return looks


def _started(free: list[Home], there: Counter[Home], lent: Counter[Home]) -> Counter[Home]:
    """Return the evaluators that start on GPUs without a trial, as many on a node as are lent."""
    started = Counter[Home]()
    for node in NODES:
        on_node = sum(count for (at, gpu), count in lent.items() if at == node and gpu)
        new = on_node - sum(count for (at, _), count in there.items() if at == node)
        for home in (home for home in free if home[0] == node):
            started[home] = max(0, min(new, int(1 / EVALUATOR_GPUS) - there[home]))
            new -= started[home]
    return started


class StubTrial(RecipeTrial):
    """A trial that sleeps as long as its file says."""

    def step(self) -> dict[str, Any]:
        config = self._trial_config
        seconds = json.loads(Path(config["storage"], "seconds.json").read_text())
        time.sleep(seconds[config["digest"]])
        result = {"epoch": 1, "epochs": [], "outcome": "finished", "reason": "", "done": True}
        return result | {"digest": config["digest"]}


class StubRecorder(threading.Thread):
    """Hands the cells of trials that have ended to the pool, as the recorder does."""

    def __init__(self, plan: Plan, shards: int) -> None:
        super().__init__(daemon=True)
        self._plan, self._shards = plan, shards
        self._pool: Any = None
        self.work_waited_at = 0.0  # the last time that some had no GPU
        self.todo = {trial.digest: trial for trial in plan}
        self.failures: list[str] = []
        self.judged = 0
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def start_with(self, pool: Any) -> None:
        self._pool = pool
        self.start()

    def trials_to_train(self) -> Iterable[Any]:
        return [*self._plan]

    def started(self, digest: str) -> None:
        """Do nothing."""

    def check(self) -> None:
        if not self.is_alive():
            raise RuntimeError("nobody hands out cells any more")

    lease = staticmethod(lambda _: Lease.OURS)

    def reported(self, result: Mapping[str, Any]) -> None:
        self._ended.put(result["digest"])

    def retried(self, digest: str, reason: str) -> None:
        self.failures.append(reason)

    def failed(self, digest: str, reason: str, trace: str = "") -> None:
        self.failures.append(reason)
        self._ended.put(digest)

    def run(self) -> None:
        while self.todo or len(self._pool):
            while not self._ended.empty():
                trial = self.todo.pop(self._ended.get())
                for name in trial.evaluators:
                    self._pool.submit(StubCell(trial.digest, name, name), self._shards)
            for cell, _, error in self._pool.poll(0.1):
                self.judged += not error
                self.failures += [error] if error else []
                if not error:
                    self._pool.settle(cell)


def on_ray(
    plan: Plan, work: Work, unit: float, shards_each: int, folder: Path
) -> tuple[Looks, StubRecorder]:
    """Return the GPUs that were busy over a study of stubs, `unit` seconds a unit of work."""
    from evaluators import shards
    from evaluators.ledger import LEDGER, to_parquet
    from grid import assess, launch

    looks: Looks = []
    recorder = StubRecorder(plan, shards_each)

    def looked_at(nodes: Any, placed: Any, waiting: Any, there: Any, **needs: Any) -> Counter[Home]:
        judging = EVALUATOR_GPUS * min(there.total(), needs["wanted"])
        looks.append((time.monotonic(), len(placed) + judging))
        if waiting or needs["wanted"] > there.total():
            recorder.work_waited_at = time.monotonic()
        return lendable(nodes, placed, waiting, there, **needs)

    seconds = {digest: unit * work[digest, ""] for digest in {trial.digest for trial in plan}}
    (folder / "seconds.json").write_text(json.dumps(seconds))
    judging = {
        f"{digest} {name}": unit * units / EVALUATOR_GPUS / shards_each
        for (digest, name), units in work.items()
    }
    ledger = to_parquet(LEDGER.empty_table(), seconds=1.0)
    # Else its processes would import this file, and torch.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    launch.RecipeTrial = StubTrial  # type: ignore[misc]
    launch.lendable = looked_at
    assess.EvaluatorActor = StubEvaluator  # type: ignore[assignment,misc]
    assess.LOOK_SECONDS = 1.0
    shards.Shard = StubShard  # type: ignore[assignment,misc]
    shards.ShardStore._images = lambda _: 1  # type: ignore[method-assign]
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in NODES:
            nodes.add_node(num_cpus=4, num_gpus=4, object_store_memory=100_000_000)
        ray.init(address=nodes.address, log_to_driver=False)
        options = RunOptions(results=folder, gpus_per_worker=1.0)
        what = launch.Launch(study=load_study("bai2021"), plan=plan, scale=DIGITS, options=options)
        recorder.start_with(launch._start_pool(what, json.dumps([judging, ledger.hex()])))
        launch.train_missing(what, recorder, {})  # type: ignore[arg-type]
        recorder.join()
        looks.append((time.monotonic(), 0.0))
    finally:
        ray.shutdown()
        nodes.shutdown()
    return looks, recorder


def busy(looks: Looks, parts: int = 1) -> list[float]:
    """Return the mean number of busy GPUs in each of so many equal parts of the time."""
    first, last = looks[0][0], looks[-1][0]
    sums = [0.0] * parts
    for (since, count), (until, _) in pairwise(looks):
        for part in range(parts):
            start, end = (first + (last - first) * edge / parts for edge in (part, part + 1))
            sums[part] += count * max(0.0, min(until, end) - max(since, start))
    return [total * parts / (last - first) for total in sums]


def study_at(
    scale: Scale, tables: Sequence[str] = (), evaluators: Sequence[str] = ()
) -> tuple[Plan, Work]:
    """Return the paper's plan at a scale, and the work of its trials and cells."""
    plan = build_plan(load_study("bai2021"), scale, tables=tables, evaluators=evaluators)
    return plan, work_of(plan, scale, held_out_images(scale, EMBEDDED))


def main() -> None:
    """Print the busy GPUs over the time, simulated or on Ray."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=float, metavar="SECONDS", help="of a unit of work, on Ray")
    parser.add_argument("--tables", nargs="+", default=[], help="of the study, all by default")
    parser.add_argument("--evaluators", nargs="+", default=[], help="on Ray, all by default")
    parser.add_argument("--shards", type=int, default=8, help="of a cell, on Ray")
    options = parser.parse_args()
    if options.real:
        os.environ |= ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"}
        plan, work = study_at(DIGITS, options.tables, options.evaluators)
        with tempfile.TemporaryDirectory() as folder:
            looks, recorder = on_ray(plan, work, options.real, options.shards, Path(folder))
        print(f"{recorder.judged} cells judged, failures: {recorder.failures}")
        full = next((at for at, count in looks if count >= GPUS), looks[0][0])
        edges = (looks[0][0], full, max(full, recorder.work_waited_at), looks[-1][0])
        titles = ("start, until all are busy", "while work waits", "tail, when none waits any more")
        for title, (since, until) in zip(titles, pairwise(edges), strict=True):
            part = [(at, count) for at, count in looks if since <= at < until]
            mean = busy([*part, (until, 0.0)])[0] if part else 0.0
            print(f"{title}: {mean:.2f} of {GPUS} GPUs busy in {until - since:.0f} s")
        report(f"on Ray, {options.real:g} s a unit", looks, GPUS)
        return
    for scale, workers in (("digits", 1), ("imagenet", 1), ("imagenet", 2), ("imagenet", 4)):
        plan, work = study_at(scale_named(scale))
        bound = min(GPUS, sum(work.values()) * workers / plan.longest_chain)
        report(f"{scale}, {workers} GPUs a trial", simulated(plan, work, workers), bound)


def report(title: str, looks: Looks, bound: float) -> None:
    """Print the mean of the busy GPUs, and that of each part of the time."""
    over_time = " ".join(f"{count:.1f}" for count in busy(looks, PARTS))
    print(f"{title}: {busy(looks)[0]:.2f} of {GPUS} GPUs busy (at most {bound:.2f}): {over_time}")


if __name__ == "__main__":
    main()
