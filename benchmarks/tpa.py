"""A query of the texture patch attack beside a forward pass alone, one image at a time.

No attack that asks one image at a time can be faster than its forward passes. What ours could reach
at most is said beside: the same number of passes in full batches of the model that it asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow.compute as pc
import torch

from benchmarks.measure import DEVICE, Figure, device_seconds, in_turns, require
from benchmarks.pgd import trained
from evaluators.base import judge_images
from evaluators.pgd import FOLDED_ON
from evaluators.texture_patch import FORWARD_BATCH, TexturePatchAttack
from grid.study import base_named
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS
from trainables.train.adversary import folded

IMAGES, REPEATS = 50, 5


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio for both families."""
    for name in ("resnet50",) if quick else ("resnet50", "deit_small"):
        classifier = trained(DIGITS.shrink(base_named(name)), epochs=4)
        yield beside_single_passes(name, classifier, 8 if quick else IMAGES, quick=quick)


def beside_single_passes(name: str, classifier: Classifier, images: int, *, quick: bool) -> Figure:
    """Time the attack, as many passes of one image, and as many in batches, in turns."""
    budget = replace(DIGITS.patch, images=images)
    evaluator = TexturePatchAttack(replace(DIGITS, patch=budget))
    data = load_data(DIGITS)
    one = to_unit(data.held_out.images[:1].to(DEVICE))
    many = one.expand(FORWARD_BATCH, -1, -1, -1).contiguous()
    victim = folded(classifier, many[:FOLDED_ON]) or classifier

    def queries() -> int:
        ledger = judge_images(evaluator, classifier, data, device=DEVICE)
        return int(pc.sum(ledger["queries"]).as_py() or 0)

    count = queries()
    require(count > 0 and queries() == count, f"{count} queries")

    @torch.no_grad()
    def singly() -> None:
        for _ in range(count):
            classifier(one)

    @torch.no_grad()
    def in_batches() -> None:
        for _ in range(count // FORWARD_BATCH):
            victim(many)

    times = in_turns(
        queries, singly, in_batches, repeats=1 if quick else REPEATS, clock=device_seconds
    )
    limits = sorted(alone_s / batched_s for _, alone_s, batched_s in times if batched_s)
    most = f"; in full batches the passes alone {limits[len(limits) // 2]:.1f} x" if limits else ""
    return Figure(
        name=f"TPA on {name}, {images} images, single forward passes alone / ours",
        values=tuple(alone_s / our_s for our_s, alone_s, _ in times),
        target=10,
        same=f"{count:,} queries{most}",
    )
