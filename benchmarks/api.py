"""The Python API beside the attack that it calls, and how soon a fresh process has a verdict.

Both sides attack the same images by the evaluator's PGD-5, -10, -50 and -100; the other side calls
it on batches of 200. A fresh process imports torch and judges 200 images of 32 px.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, require, seconds
from benchmarks.pgd import trained
from evaluators import evaluate
from evaluators.base import Batch
from evaluators.pgd import PGD
from grid.study import base_named
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.scale import DIGITS

BATCH = 200
FRESH = """
import torch
from torch import nn
from evaluators import evaluate
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 900, 10))
scores = evaluate(model, (torch.rand(200, 3, 32, 32), torch.randint(10, (200,))), ["clean"])
assert scores["clean"].n == 200
"""


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of the times for both families, and the seconds of a fresh process."""
    digits = load_data(DIGITS)
    split = digits.held_out.subset(8 if quick else 2 * BATCH, seed=0)
    images, labels = to_unit(split.images.to(DEVICE)), split.labels.to(DEVICE)
    batches = [*Batch(images, labels, split.ids).parts(BATCH)]
    for recipe in (base_named("resnet50"), base_named("deit_small")):
        classifier = trained(DIGITS.shrink(recipe), epochs=1 if quick else 4)
        attack = PGD(DIGITS)

        def direct(classifier=classifier, attack=attack) -> list[bool]:  # type: ignore[no-untyped-def]
            tables = [attack.judge(classifier, batch) for batch in batches]
            return [s for steps in range(4) for t in tables for s in survived(t, steps)]

        def api(classifier=classifier) -> list[bool]:  # type: ignore[no-untyped-def]
            data = replace(digits, held_out=split)
            scores = evaluate(classifier, data, "pgd", epsilon="27/255", progress=False)
            return [bool(s) for s in scores.ledger["survived"].to_pylist()]

        require(direct() == api(), "verdicts differ")
        pairs = in_turns(direct, api, repeats=1 if quick else 7, clock=device_seconds)
        yield Figure(
            name=f"evaluate() of {recipe.model} / its PGD called directly",
            values=tuple(api_s / direct_s for direct_s, api_s in pairs),
            target=1.02,
            better="less",
            same=f"all {4 * len(split)} verdicts are equal",
        )
    command = [sys.executable, "-c", FRESH]
    times = [seconds(lambda: subprocess.run(command, check=True)) for _ in range(1 if quick else 5)]  # noqa: S603
    yield Figure(
        name="the first score of a fresh process, with torch's import",
        values=tuple(times),
        target=5,
        better="less",
        unit="s",
        same="200 images of 32 px",
    )


def survived(table: object, steps: int) -> list[bool]:
    """Return the verdicts of one length of the attack, the images in their order."""
    rows = table["survived"].to_pylist()  # type: ignore[index]
    count = len(rows) // 4
    return [bool(row) for row in rows[steps * count : (steps + 1) * count]]
