"""Where the time of a study goes: a profile of the real command, by the processor time it takes.

    python -m benchmarks.where_time_goes                        # the whole digits study
    python -m benchmarks.where_time_goes --tables T6 --evaluators clean pgd

Every process that the command starts is looked at twice a second, and its processor time goes to
its role. The driver tells its own time apart: imports, the recorder's thread (MLflow, reading and
summing ledgers), the report, and the rest, which is Tune. What imports take in an actor is measured
in a process of its own and taken off its role. Shares are of all cores until the end. How long they
were idle, and what the host of a virtual machine took of them, is the system's own account; what
is left was spent by other work on the machine, by the kernel, and by processes between the last
look at them and their end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from grid.run import ENVIRONMENT

LOOK_SECONDS = 0.5
TRAINS = (
    "import trainables.trial, trainables.train.loop, trainables.models, trainables.store.checkpoint"
)
JUDGES = (
    f"{TRAINS}, evaluators.actor, evaluators.autoattack, evaluators.pgd, trainables.store.tracking"
)
ROLES = {"ray::RecipeTrial": "training", "ray::EvaluatorActor": "judging"}
ARITHMETIC = ("training", "judging")
IDLE, HOST, ELSEWHERE = "idle", "taken by the host", "not seen"
TARGET = 0.05


def main() -> None:
    """Run the command with the arguments given, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.child:
        drive(arguments, options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "driver.json"
        command = [sys.executable, "-m", "benchmarks.where_time_goes", "--child", str(told)]
        command += ["--results", f"{folder}/results", "--address", "local", *arguments]
        began, before = time.perf_counter(), system_seconds()
        driver = subprocess.Popen(command, env=os.environ | ENVIRONMENT)  # noqa: S603
        spent = watch(driver)
        wall, after = time.perf_counter() - began, system_seconds()
        system = {part: after[part] - before[part] for part in after}
        print_shares(shares(spent, json.loads(told.read_text()), wall, system), wall)


def drive(arguments: list[str], told: Path) -> None:
    """Run the command in this process, and keep what its parts took."""
    began = time.process_time()
    from grid import launch
    from grid.report import build

    parts = {"imports": time.process_time() - began, "recorder": 0.0, "report": 0.0}
    record, write = launch.Recorder.run, build.write_report

    def timed_record(recorder: Any) -> None:
        record(recorder)
        parts["recorder"] = time.thread_time()

    def timed_write(*given: Any) -> Path:
        start = time.process_time()
        page = write(*given)
        parts["report"] = time.process_time() - start
        return page

    launch.Recorder.run = timed_record  # type: ignore[method-assign]
    build.write_report = timed_write
    from grid.run import main as command

    code = command(arguments)
    told.write_text(json.dumps(parts | {"all": time.process_time()}))
    raise SystemExit(code)


def watch(driver: subprocess.Popen[bytes]) -> dict[str, list[float]]:
    """Return the processor seconds of all processes but the driver, by role."""
    last: dict[tuple[int, float], tuple[str, float]] = {}
    root = psutil.Process(driver.pid)
    while driver.poll() is None:
        for process in _children(root):
            try:
                spent, key = process.cpu_times(), (process.pid, process.create_time())
                title = (process.cmdline() or [process.name()])[0]
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            role = next((name for start, name in ROLES.items() if title.startswith(start)), "Ray")
            # Between two calls an actor may go by another title.
            known = last.get(key, (role, 0.0))[0]
            last[key] = (known if known in ARITHMETIC else role, spent.user + spent.system)
        time.sleep(LOOK_SECONDS)
    if driver.returncode:
        raise SystemExit(f"the command ended with {driver.returncode}")
    found: dict[str, list[float]] = {"training": [], "judging": [], "Ray": []}
    for role, spent in last.values():
        found[role].append(spent)
    return found


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def system_seconds() -> dict[str, float]:
    """Return our cores' seconds idle, and kept by a virtual machine's host, since it started."""
    cores = psutil.cpu_times(percpu=True)
    times = [cores[place] for place in os.sched_getaffinity(0)]
    return {
        IDLE: sum(each.idle + each.iowait for each in times),
        HOST: sum(each.steal for each in times),
    }


def shares(
    spent: dict[str, list[float]],
    driver: dict[str, float],
    wall: float,
    system: dict[str, float],
) -> dict[str, float]:
    """Return each part's share of all cores."""
    found, imported = {}, 0.0
    for role, code in (("training", TRAINS), ("judging", JUDGES)):
        imports = import_seconds(code)
        # An actor that was asked nothing has not imported everything.
        found[role] = sum(max(0.0, each - imports) for each in spent[role])
        imported += sum(min(each, imports) for each in spent[role])
    tune = driver["all"] - driver["imports"] - driver["recorder"] - driver["report"]
    found |= system | {
        "imports": imported + driver["imports"],
        "Ray": sum(spent["Ray"]) + tune,
        "MLflow and ledgers": driver["recorder"],
        "report": driver["report"],
    }
    cores = len(os.sched_getaffinity(0))
    found[ELSEWHERE] = cores * wall - sum(found.values())
    return {part: spent / (cores * wall) for part, spent in found.items()}


def import_seconds(code: str) -> float:
    """Return the processor time of importing what an actor imports, Python's own start included."""
    timed = f"{code}; import time; print(time.process_time())"
    command = [sys.executable, "-c", timed]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return float(ended.stdout)


def print_shares(found: dict[str, float], wall: float) -> None:
    """Print the table, the largest share first, and which parts miss the target."""
    print(f"\n{wall:.0f} s on {len(os.sched_getaffinity(0))} cores")
    for part, share in sorted(found.items(), key=lambda entry: -entry[1]):
        ours = part not in (*ARITHMETIC, HOST, ELSEWHERE)
        over = f"  (target: under {TARGET:.0%})" if ours and share >= TARGET else ""
        print(f"{part:>20} {share:7.1%}{over}")


if __name__ == "__main__":
    main()
