"""A study recorded by the project's own recorder, its trainings and verdicts made up by a seed.

For what is about many trials or every table, and not about what they say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from evaluators import PGD_STEPS
from evaluators.autoattack import CLEAN, STAGES
from evaluators.base import EXAMPLES, Batch, verdicts
from evaluators.ledger import to_parquet
from grid.assess import Cell
from grid.plan import Plan
from grid.record import Recorder
from grid.status import ProgressLine, open_tracker
from grid.study import Study
from trainables.data.base import Split, to_unit
from trainables.data.load import load_data
from trainables.data.registry import KINDS, SEVERITIES
from trainables.scale import DIGITS
from trainables.store.tracking import Tracker

SIZES = {"clean": 597, "health": 50, "autoattack": 30, "autoattack-small": 30, "tpa": 50,
         "autoattack-bounded": 30, "autoattack-small-bounded": 30, "natural": 597,
         "transfer": 64, "corruptions": 100, "stylized": 597, "pgd": 64}  # fmt: skip
QUESTIONS = {
    "health": ("pgd-huge", "gradient"),
    "pgd": tuple(f"pgd-{steps}" for steps in PGD_STEPS),
    "tpa": ("tpa/clean", "tpa", "tpa/patches-1", "tpa-random"),
    "corruptions": tuple(f"{kind}-{level}" for kind in KINDS for level in SEVERITIES),
}


def ledger(evaluator: str, rng: np.random.Generator, questions: Sequence[str] = ()) -> pa.Table:
    """Return verdicts as an evaluator would keep them, right as often as a draw of `rng` says."""
    held_out = load_data(DIGITS).held_out
    split: Split = held_out.subset(SIZES[evaluator], seed=0)
    images = to_unit(split.images)
    examples = frozenset(held_out.subset(EXAMPLES, seed=0).ids)
    batch = Batch(images, split.labels, split.ids, examples=examples)
    noise = torch.from_numpy(rng.normal(0, 0.05, images.shape)).float()
    skill = rng.uniform(0.3, 0.95)
    parts = []
    for question in questions or QUESTIONS.get(evaluator, (evaluator,)):
        right = torch.from_numpy(rng.uniform(size=len(split)) < skill)
        if evaluator == "health":
            right = torch.full_like(right, question == "gradient")
        predicted = torch.where(right, split.labels, (split.labels + 1) % 10)
        shown = images if evaluator == "clean" else (images + noise).clamp(0, 1)
        parts.append(
            verdicts(
                batch,
                question,
                predicted,
                stage=_stages(evaluator, right.tolist(), rng),
                queries=[100] * len(split) if evaluator == "tpa" else None,
                judged_BCHW=shown if question in SHOWN else None,
            )
        )
    return pa.concat_tables(parts)


SHOWN = ("clean", "pgd-100", "tpa", "gaussian_noise-3", "defocus_blur-3", "fog-3", "stylized")


def _stages(evaluator: str, right: list[bool], rng: np.random.Generator) -> list[str | None] | None:
    if evaluator == "stylized":
        return [f"texture:{rng.integers(10)}" for _ in right]
    if evaluator.startswith("autoattack"):
        return [None if r else str(rng.choice((CLEAN, *STAGES[:3]))) for r in right]
    if evaluator == "tpa":
        return [None if r else str(rng.choice(("clean", "patch-1", "patch-3"))) for r in right]
    return None


class MadeUpPool:
    """Answers every cell at once, as the pool of evaluators would."""

    def __init__(self) -> None:
        self._asked: list[Cell] = []

    def __len__(self) -> int:
        return len(self._asked)

    def submit(self, cell: Cell, total: int, *, least: int) -> None:
        self._asked.append(cell)

    def poll(self, timeout: float) -> list[tuple[Cell, bytes, str]]:
        return [(cell, self._content(cell), "") for cell in list(self._asked)]

    def settle(self, cell: Cell) -> None:
        self._asked.remove(cell)

    def seconds(
        self, coming: Counter[str], costs: Mapping[str, float], pace: float
    ) -> tuple[float, float]:
        return 0.0, 0.0

    def _content(self, cell: Cell) -> bytes:
        rng = np.random.default_rng(int(cell.trial, 16))
        names = ["clean", *(digest for digest, *_ in cell.sources)] if cell.sources else []
        questions = {"questions": [f"transfer/{name}" for name in names]} if names else {}
        return to_parquet(ledger(cell.evaluator, rng, **questions), seconds=0.1)


def record(results: Path, study: Study, plan: Plan, *, collapsed: int = 0) -> Tracker:
    """Record every trial of a plan of scale digits; the last `collapsed` of them as collapsed."""
    results.mkdir(parents=True, exist_ok=True)
    tracker = open_tracker(results, None, DIGITS)
    data = load_data(DIGITS)
    recorder = Recorder(
        tracker,
        plan,
        study=study.name,
        scale=DIGITS,
        data=data,
        line=ProgressLine(),
    )
    recorder.open_study()
    weights = results / "weights.safetensors"
    weights.write_bytes(b"made up")
    with recorder.recording(MadeUpPool()):
        for place, trial in enumerate(plan):
            falls = place >= len(plan.trials) - collapsed
            recorder.started(trial.digest)
            recorder.reported(
                {
                    "digest": trial.digest,
                    "epoch": 3,
                    "epochs": [
                        {"epoch": e, "train/loss": 2.0 / e, "held_out/accuracy": 0.3 * e}
                        for e in (1, 2, 3)
                    ],
                    "outcome": "collapsed" if falls else "finished",
                    "reason": "PGD-10 accuracy stayed at chance" if falls else "",
                    "weights": str(weights),
                    "sha256": "0" * 64,
                }
            )
    assert not recorder.failures
    return tracker
