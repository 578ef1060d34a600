"""Measure this project beside other packages: `python -m benchmarks [NAME ...] [--quick]`.

`python -m benchmarks.scale` stands apart: it has no other side, and prints what a trial costs the
grid in seconds and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Figure, device_name
from trainables.store.results import provenance

BENCHMARKS = (
    *("training", "loader", "pgd", "autoattack", "bounded", "tpa", "corruptions", "api"),
    *("overhead", "study", "audit"),
)
KEPT = Path(__file__).with_name("results.json")
PACKAGES = ("torch", "timm", "ray", "mlflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, all by default, and keep and print their figures.

    Raises DisagreementError where two sides did not compute the same thing.
    """
    options = _parser().parse_args(arguments)
    if options.table:
        print(table(json.loads(KEPT.read_text())))
        return 0
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    found: dict[str, list[dict[str, object]]] = {}
    for name in options.names or BENCHMARKS:
        if name not in BENCHMARKS:
            raise SystemExit(f"unknown benchmark {name!r}; one of {', '.join(BENCHMARKS)}")
    for name in options.names or BENCHMARKS:
        for figure in figures(name, quick=options.quick):
            found.setdefault(name, []).append(asdict(figure) | circumstances())
            print(table({name: found[name][-1:]}).splitlines()[-1], flush=True)
            if not options.quick:
                kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
                KEPT.write_text(json.dumps(kept | found, indent=1) + "\n")
    return 0


def figures(name: str, *, quick: bool) -> Iterator[Figure]:
    """Yield a benchmark's figures; on one thread, or, quick, only to see that the sides agree."""
    import torch

    from benchmarks.measure import DEVICE
    from trainables.train.exactness import exact

    exact(DEVICE)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield from import_module(f"benchmarks.{name}").compare(quick=quick)


def table(found: dict[str, list[dict[str, object]]]) -> str:
    """Write figures as Markdown, a row each, in the order of the benchmarks."""
    rows = ["| | median [quartiles] | n | target | both sides | measured |", "| --- " * 6 + "|"]
    for row in (row for name in BENCHMARKS for row in found.get(name, ())):
        figure = Figure(**{f: row[f] for f in Figure.__dataclass_fields__})  # type: ignore[arg-type]
        bound = "at least" if figure.better == "more" else "at most"
        rows.append(
            f"| {figure.name} | {figure.spread()} {figure.unit} | {len(figure.values)} "
            f"| {bound} {figure.target:g}{'' if figure.reached else ', not reached'} "
            f"| {figure.same} | {row['date']}, {row['commit']} |"
        )
    return "\n".join(rows)


def circumstances() -> dict[str, str]:
    """Say when, of which commit, with which packages and on what a figure was measured."""
    here = provenance("cpu")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": here.get("commit", "unknown"),
        "versions": ", ".join(f"{name} {here[name]}" for name in PACKAGES),
        "machine": f"{os.cpu_count()} cores, {here['cpu']}, models on {device_name()}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small: only whether both sides compute the same"
    )
    parser.add_argument("--table", action="store_true", help="print the kept figures, and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
