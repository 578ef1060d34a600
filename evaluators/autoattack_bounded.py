"""autoattack-bounded: what AutoAttack leaves, estimated, with a bound on what was not attacked."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from evaluators.autoattack import (
    ITERATIONS,
    STAGES,
    STEPS_TO_BREAK,
    AutoAttack,
    SmallAutoAttack,
)
from evaluators.base import Batch, Column
from evaluators.intervals import Rest, rest_of, with_rest
from evaluators.ledger import LEDGER, OF_SLICE, OTHER_TARGETS, SPARED, Score
from trainables.data.base import WHOLE, Data, Shard
from trainables.layers import Classifier

FIRST_ATTACKS = ("apgd-ce", "apgd-t")
LIKELY_TARGETS = 2  # of APGD-T on all images


class BoundedAutoAttack(AutoAttack):
    """AutoAttack whose costly part runs on a random slice of the images alone.

    APGD-CE, and APGD-T against the two likeliest other classes, attack all images; APGD-T against
    the other targets, FAB-T and Square attack those of the slice that survive. Inside the slice a
    verdict is that of `autoattack`. The score is an estimate: from what survives on all images it
    takes the share that the rest breaks in the slice. Its interval adds what the rest may break
    outside of it. The slice is the first of the images by a hash of their ids, and as small as
    leaves at most the scale's `autoattack_bound` of the images in doubt where the rest breaks none.
    """

    name = "autoattack-bounded"
    columns: tuple[Column, ...] = (
        Column("autoattack-bounded/clean", "Clean, same images"),
        Column("autoattack-bounded/after-apgd-ce", "after APGD-CE"),
        Column("autoattack-bounded/after-apgd-t", f"after APGD-T, {LIKELY_TARGETS} targets"),
        Column("autoattack-bounded", "AutoAttack 4/255, bounded", "AutoAttack, bounded"),
    )

    def identity(self, source: Data) -> dict[str, Any]:
        version = {"version": "bounded", "likely_targets": LIKELY_TARGETS}
        return {
            **super().identity(source),
            **version,
            "slice": self._slice_size(self.total(source)),
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count the first attacks of all images, and the rest of AutoAttack of the slice."""
        images = self.asked_about(held_out)
        inside = self._slice_size(images) / images
        survivor = 2 * (ITERATIONS + 1) * (self.rounds["apgd-ce"] + LIKELY_TARGETS)
        first = 2 + withstanding * survivor + (1 - withstanding) * 2 * STEPS_TO_BREAK
        exact = super().cost(held_out, withstanding=withstanding)
        everywhere = len(self.radii) * images * first
        return everywhere + inside * (exact - everywhere)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        """Yield the batches of a shard, with the remark SPARED on images outside the slice."""
        ids = sorted(self.images(source).ids, key=_place)
        inside = set(ids[: self._slice_size(len(ids))])
        for batch in super().batches(source, batch_size=batch_size, shard=shard):
            remarks = tuple(None if image_id in inside else SPARED for image_id in batch.ids)
            yield replace(batch, stage=remarks)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        """Run the first attacks on all images, then what is left on the slice's survivors."""
        first = self.attack(classifier, batch, attacks=FIRST_ATTACKS, most_targets=LIKELY_TARGETS)
        outside = {i for i, remark in zip(batch.ids, batch.stage or (), strict=False) if remark}
        survivors = set(first.filter(first["survived"])["image_id"].to_pylist())
        inside = [place for place, i in enumerate(batch.ids) if i in survivors - outside]
        rows, exact = first.to_pylist(), {}
        if inside:
            ids = tuple(batch.ids[place] for place in inside)
            of_slice = Batch(batch.images[inside], batch.labels[inside], ids)
            rest = self.attack(
                classifier, of_slice, attacks=STAGES[1:], targets_withstood=LIKELY_TARGETS
            )
            for row in rest.to_pylist():
                exact[row["question"], row["image_id"]] = row
        for row in (row for row in rows if row["survived"]):
            row.update(exact.get((row["question"], row["image_id"]), {"stage": SPARED}))
            if row["stage"] == "apgd-t":
                row["stage"] = OTHER_TARGETS
        return pa.Table.from_pylist(rows, schema=LEDGER)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return the estimate, and how many images survive the first attacks."""
        scores = {score.name: score for score in super().summarize(ledger)}
        for question in self.radii:
            scores[question] = with_rest(scores[question], rest_of(ledger, question))
        last = tuple(f"/after-{stage}" for stage in OF_SLICE)
        return [score for name, score in scores.items() if not name.endswith(last)]

    def _slice_size(self, images: int) -> int:
        """Return how many images are in the slice.

        If none of S is broken, the share of images that are is at most 1 - 0.05^(1/S): it may
        still be of those outside, and the smallest S that leaves no more than the bound is taken.
        """

        def is_enough(size: int) -> bool:
            in_doubt = Rest(images - size, size, 0, images).hidden()[2]
            return bool(in_doubt <= self.scale.autoattack_bound)

        return bisect_left(range(images), True, lo=1, key=is_enough)


class SmallBoundedAutoAttack(BoundedAutoAttack, SmallAutoAttack):
    """Bounded AutoAttack at the scale's small radius."""

    name = "autoattack-small-bounded"
    columns = (
        Column(
            "autoattack-small-bounded",
            "AutoAttack 0.001, bounded",
            "AutoAttack, small radius, bounded",
        ),
    )


def _place(image_id: str) -> bytes:
    """Return an image's place in an order that no one chose."""
    return hashlib.sha256(f"slice {image_id}".encode()).digest()
