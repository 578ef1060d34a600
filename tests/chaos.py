"""Disturb studies at random and see that none comes to anything else: `python -m tests.chaos`.

`--nodes`: on a cluster of a head and two nodes, all on this machine, with epochs that are saved
every second; workers, evaluators and whole nodes are killed, five in a study. Only root may mount
the small disk that is filled; others do without that fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

import psutil
from ray.cluster_utils import Cluster

from evaluators.ledger import from_parquet
from tests.disks import fill, small_disk
from tests.driver import study_of_one
from tests.servers import MlflowServer
from trainables.store.tracking import Tracker, fetch_content

ROOT = Path(__file__).parents[1]
SECONDS = 600
RUNS = 4
MEGABYTES = 128
FAULTS_EACH, KILLS_EACH = 3, 5
SMALL = """
name = "chaos"
base = "resnet50"
evaluators = ["clean", "pgd"]
[axes]
size = ["small"]
epochs = [EPOCHS]
"""
ALONE = SMALL.replace("EPOCHS", "60") + 'augmentation = ["none", "randaug+cutmix"]'
TOGETHER = study_of_one(epochs=100)
ON_NODES = f"""{SMALL}
augmentation = ["randaug+cutmix"]
batch_size = [16]
learning_rate = [0.02]
adversary = [{{epsilon = "2/255", step_size = "1/255", steps = 3}}]
seed = [SEEDS]
"""
# Every process that Python starts with this on its path saves its trial every second.
OFTEN = """
import importlib.util
import sys

class Often:
    def find_spec(self, name, *_):
        if name == "trainables.running":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda m: (execute(m), setattr(m, "MIDWAY_SECONDS", 1.0))
            return spec

sys.meta_path.insert(0, Often())
"""
ROWS = (
    "select t.value, m.key, m.step, m.value from metrics m join tags t using (run_uuid) "
    "where t.key = 'digest' and m.key not like '%/seconds' order by 1, 2, 3, 4"
)
# How long verdicts took stands in the tag and in the ledger's file, and so in its sha256; a model's
# tag names its run.
TAGS = (
    "select d.value, t.key, case when t.key like 'cell.%' and t.value != '' "
    "then json_remove(t.value, '$.sha256', '$.seconds') "
    "when t.key = 'mlflow.log-model.history' then json_remove(t.value, '$[0].run_id') "
    "else t.value end "
    "from tags d join tags t using (run_uuid) "
    "where d.key = 'digest' and t.key != 'mlflow.parentRunId' order by 1, 2"
)
# On a server one run more names who trains each trial.
STATUSES = "select name, status from runs where name != 'who has which trial' order by 1, 2"


class Disturbed:
    """A small study in a folder of its own, and the run of the real command that works on it."""

    def __init__(
        self, folder: Path, *, together: bool, on_server: bool, on_nodes: bool, outage: float
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.results, self.outage = folder, folder / "results", outage
        self.together, self.runs = together, 0
        self.nodes = two_nodes() if on_nodes else None
        self.server = MlflowServer(folder / "server") if on_server else None
        self.driver: subprocess.Popen[bytes] | None = None
        self.family: dict[int, psutil.Process] = {}
        if self.server:
            self.server.start()

    def start(self) -> None:
        """Start the command, unless it runs."""
        if self.driver and self.driver.poll() is None:
            return
        self.runs += 1
        study = self.folder / "study.toml"
        study.write_text(study_text(self.together, on_nodes=self.nodes is not None))
        address = self.nodes.address if self.nodes else "local"
        command = [sys.executable, "grid/run.py", "--study", str(study), "--address", address]
        command += ["--results", str(self.results), "--hung-after", "30"]
        command += ["--workers", "2" if self.together else "1"]
        command += ["--mlflow", self.server.uri] if self.server else []
        with (self.folder / "said.txt").open("ab") as said:
            self.driver = subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True
            )

    def finish(self) -> bool:
        """Run the command until it says that all is done; False where it never does."""
        while self.runs <= RUNS:
            self.start()
            if self.ended() == 0:
                return True
        return False

    def ended(self) -> int | None:
        """Wait for the command's end; return its exit status, None where it does not end."""
        self.processes("")
        try:
            return self.driver.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.driver.kill()
            self.driver.wait()
            return None

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes below the driver that have a word in their title."""
        found, roots = [], [self.driver.pid]
        for node in self.nodes.list_all_nodes() if self.nodes else ():
            roots += [process.pid for _, process in node.live_processes()]
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(root).children(recursive=True):
                    self.family[process.pid] = process
                    with contextlib.suppress(psutil.Error):
                        if title in " ".join([process.name(), *process.cmdline()[:1]]):
                            found.append(process)
        return found

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until a condition holds; False where the command ends before."""
        deadline = time.monotonic() + SECONDS
        while self.driver.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.1)
        return False

    def is_under_way(self) -> bool:
        """Tell whether this run of the command has said what there is to do."""
        return self.said().count("cells to judge") >= self.runs

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def close(self) -> None:
        """End every process that was seen below a driver, and the server."""
        if self.driver and self.driver.poll() is None:
            self.processes("")
            self.driver.kill()
            self.driver.wait()
        if self.nodes:
            self.nodes.shutdown()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.server:
            self.server.kill()

    def outcome(self) -> dict[str, object]:
        """Return all that a fault could lose or double, but for what was measured in seconds."""
        path = (self.server.folder if self.server else self.results) / "mlflow.db"
        uri = self.server.uri if self.server else f"sqlite:///{path}"
        tracker = Tracker(uri, experiment="robustness-digits", artifacts=None)
        trials = tracker.trials()

        with contextlib.closing(sqlite3.connect(path)) as database:
            rows = {sql: database.execute(sql).fetchall() for sql in (ROWS, TAGS, STATUSES)}
        return rows | {
            "weights": {
                digest: hashlib.sha256(
                    fetch_content(uri, trials[digest].artifact_uri, "weights.safetensors") or b""
                ).digest()
                for digest in trials
            },
            "ledgers": {
                (digest, name): from_parquet(tracker.ledger(run, name))[0]
                for digest, run in trials.items()
                for name in run.cells
            },
            "tables": (self.results / "report" / "tables.md").read_text(),
        }


def two_nodes() -> Cluster:
    """Start a cluster of a head, on which no trial fits, and two nodes of one CPU each."""
    head = {"num_cpus": 0, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    return nodes


def save_often(folder: Path) -> None:
    """Have the processes that start from now on save their trials every second."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(OFTEN)
    paths = str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}


def study_text(together: bool, *, on_nodes: bool) -> str:
    """Return the file of a study that teams train, or single workers."""
    if on_nodes:
        epochs, seeds = ("40", "0") if together else ("20", "0, 1")
        return ON_NODES.replace("EPOCHS", epochs).replace("SEEDS", seeds)
    return TOGETHER if together else ALONE


Fault = Callable[[Disturbed, random.Random], bool]


def _kill(title: str) -> Fault:
    """Return the fault that kills one of the processes with a title."""

    def inject(study: Disturbed, chance: random.Random) -> bool:
        if not study.wait_for(lambda: study.processes(title)):
            return False
        time.sleep(chance.uniform(0, 3))
        processes = study.processes(title)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            chance.choice(processes).kill()
            return True
        return False

    return inject


def _signal_driver(study: Disturbed, number: int) -> bool:
    if study.driver.poll() is not None:
        return False
    study.processes("")
    study.driver.send_signal(number)
    status = study.ended()
    assert status in (-9, 0, 130), f"{number} ended the command with {status}"
    return True


def _kill_server(study: Disturbed, chance: random.Random) -> bool:
    study.server.kill()
    time.sleep(study.outage or chance.uniform(1, 20))
    study.server.start()
    return True


def _fill_disk(study: Disturbed, chance: random.Random) -> bool:
    said = study.said().count("no room")
    filler = fill(study.results)
    noticed = study.wait_for(lambda: study.said().count("no room") > said)
    time.sleep(chance.uniform(0, 5))
    filler.unlink()
    return noticed


def _truncate(study: Disturbed, chance: random.Random) -> bool:
    """Cut the newest checkpoints of a study whose driver is killed."""
    killed = _signal_driver(study, signal.SIGKILL)
    folders = {path.parent for path in study.results.glob("trials/*/epoch-*.pt")}
    for folder in folders:
        newest = max(folder.glob("epoch-*.pt"))
        os.truncate(newest, chance.randrange(newest.stat().st_size))
    return killed and bool(folders)


def _kill_node(study: Disturbed, chance: random.Random) -> bool:
    """Kill all processes of a node at once; another joins a while later."""
    node = chance.choice(sorted(study.nodes.worker_nodes, key=lambda node: node.node_id))
    study.nodes.remove_node(node, allow_graceful=False)
    time.sleep(chance.uniform(0, 5))
    study.nodes.add_node(num_cpus=1)
    return True


NODE = "node killed"
FAULTS: dict[str, Fault] = {
    "trial actor killed": _kill("ResourceTrainable"),
    "evaluator killed": _kill("EvaluatorActor"),
    "raylet killed": _kill("raylet"),
    "driver killed": lambda study, _: _signal_driver(study, signal.SIGKILL),
    "driver terminated": lambda study, _: _signal_driver(study, signal.SIGTERM),
    "disk full": _fill_disk,
    "checkpoint truncated": _truncate,
    "MLflow server killed": _kill_server,
    "Train worker killed": _kill("TrainWorker"),
    "Train controller killed": _kill("TrainController"),
    "team's trial killed": _kill("ImplicitFunc"),
    NODE: _kill_node,
}
FILLED, ON_SERVER = {"disk full"}, {"MLflow server killed"}
ON_TEAM = {"Train worker killed", "Train controller killed", "team's trial killed"}


class Chaos:
    """Studies in folders of their own, and what they come to undisturbed.

    A seed sets which faults come, after which part of the time that the study takes undisturbed.
    outage: how many seconds MLflow is away, 0 for up to 20 at random. on_nodes: each study is on a
    cluster of several nodes, and only killed at.
    """

    def __init__(
        self, folder: Path, seed: int, *, outage: float = 0, on_nodes: bool = False
    ) -> None:
        self._folder, self.chance, self._outage = folder, random.Random(seed), outage
        self._on_nodes = on_nodes
        self._expected: dict[bool, tuple[dict[str, object], float]] = {}
        self._rounds = 0

    def rounds(self, names: Sequence[str], count: int) -> list[list[str]]:
        """Draw faults, each as often as any other, for studies that can have them."""
        drawn: list[str] = []
        while len(drawn) < count:
            drawn += self.chance.sample(names, len(names))
        parts = [[n for n in drawn[:count] if (n in ON_TEAM) == team] for team in (False, True)]
        return [p[i : i + FAULTS_EACH] for p in parts for i in range(0, len(p), FAULTS_EACH)]

    def kills(self, count: int) -> list[list[str]]:
        """Draw kills for studies on nodes: every other one is trained by teams."""
        rounds, either = [], {"evaluator killed", NODE}
        for number in range(math.ceil(count / KILLS_EACH)):
            names = sorted(either | ({"trial actor killed"} if number % 2 else ON_TEAM))
            drawn = self.chance.choices(names, k=KILLS_EACH)
            rounds.append(drawn[: count - KILLS_EACH * number])
        return rounds

    def round(self, faults: Sequence[str]) -> tuple[list[str], str]:
        """Disturb a study; return which faults came in time, and what was lost by them."""
        together, injected = bool(ON_TEAM.intersection(faults)), []
        expected, seconds = self._undisturbed(together)
        study = self._new(together, on_server=bool(ON_SERVER.intersection(faults)))
        filled = FILLED.intersection(faults)
        disk = small_disk(study.results, MEGABYTES) if filled else contextlib.nullcontext()
        with disk, contextlib.closing(study):
            for name in faults:
                study.start()
                if not study.wait_for(study.is_under_way):
                    break
                time.sleep(self.chance.uniform(0, 1.5 * seconds / len(faults)))
                try:
                    injected += [name] * FAULTS[name](study, self.chance)
                except AssertionError as error:
                    return [*injected, name], str(error)
            if not study.finish():
                return injected, f"the command does not end well:\n{study.said()[-3000:]}"
            found = study.outcome()
            differing = [name for name, value in expected.items() if found[name] != value]
            return injected, f"other {', '.join(differing)}" if differing else ""

    def _undisturbed(self, together: bool) -> tuple[dict[str, object], float]:
        if together not in self._expected:
            with contextlib.closing(self._new(together, on_server=False)) as study:
                study.start()
                assert study.wait_for(study.is_under_way), study.said()
                began = time.monotonic()
                assert study.ended() == 0, study.said()
                self._expected[together] = study.outcome(), time.monotonic() - began
        return self._expected[together]

    def _new(self, together: bool, *, on_server: bool) -> Disturbed:
        self._rounds += 1
        folder = self._folder / f"study-{self._rounds}"
        kind = {"together": together, "on_server": on_server, "on_nodes": self._on_nodes}
        return Disturbed(folder, **kind, outage=self._outage)


def main() -> int:
    """Return 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nodes", action="store_true", help="kill on a cluster of several nodes")
    parser.add_argument("--faults", type=int, default=len(FAULTS), metavar="N")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument(
        "--outage", type=float, default=0, metavar="S", help="seconds that MLflow is away"
    )
    options = parser.parse_args()
    names = [name for name in options.only if name not in FILLED or os.geteuid() == 0]
    names = [name for name in names if options.nodes or name != NODE]
    injected: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.seed, outage=options.outage, on_nodes=options.nodes)
        if options.nodes:
            save_often(Path(folder, "often"))
        count = options.faults
        for faults in chaos.kills(count) if options.nodes else chaos.rounds(names, count):
            there, problem = chaos.round(faults)
            injected.update(there)
            lost.update(there if problem else ())
            print(f"{', '.join(there)}: {problem or 'as undisturbed'}", flush=True)
    print(f"\n{'fault':24}{'injected':>9}{'survived':>9}{'lost':>6}")
    for name, count, gone in (
        *((name, injected[name], lost[name]) for name in names),
        ("all", injected.total(), lost.total()),
    ):
        print(f"{name:24}{count:>9}{count - gone:>9}{gone:>6}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
