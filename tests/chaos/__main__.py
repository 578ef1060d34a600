"""Disturb studies at random and see that none comes to anything else: `python -m tests.chaos`.

Only root may mount the small disk that is filled; others do without that fault.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

from tests.chaos.faults import FAULTS, FILLED
from tests.chaos.rounds import Chaos
from trainables.options import amount


def main() -> int:
    """Return 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(FAULTS), metavar="N")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument(
        "--outage", type=amount, default=0, metavar="S", help="seconds that MLflow is away"
    )
    options = parser.parse_args()
    names = [name for name in options.only if name not in FILLED or os.geteuid() == 0]
    injected: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.seed, outage=options.outage)
        for faults in chaos.rounds(names, options.faults):
            there, problem = chaos.round(faults)
            injected.update(there)
            lost.update(there if problem else ())
            print(f"{', '.join(there)}: {problem or 'as undisturbed'}", flush=True)
    print(f"\n{'fault':24}{'injected':>9}{'survived':>9}{'lost':>6}")
    for name in names:
        print(_row(name, injected[name], lost[name]))
    print(_row("all", injected.total(), lost.total()))
    return 1 if lost else 0


def _row(name: str, injected: int, lost: int) -> str:
    return f"{name:24}{injected:>9}{injected - lost:>9}{lost:>6}"


if __name__ == "__main__":
    raise SystemExit(main())
