"""pgd: does the answer withstand projected gradient descent at the scale's radius?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from evaluators.base import Batch, Score, shards_of, split_batches, survival_scores, verdicts
from trainables.adversary import attacked, pgd_iterates, random_start
from trainables.data import WHOLE, Data, Shard, Split
from trainables.folding import folded
from trainables.scale import Scale

if TYPE_CHECKING:
    from trainables.models import Classifier

STEPS = (5, 10, 50, 100)
SUBSET_SEED = 0


class PGD:
    """PGD-5, -10, -50 and -100 as one trajectory with step epsilon/4 and a random start.

    The final iterate of each length is scored, in float32. Step max(epsilon/4, epsilon/n) is
    epsilon/4 for all n >= 4: 1/255 at the study's 4/255. Source: STUDY section 3.
    """

    name = "pgd"

    def __init__(self, scale: Scale) -> None:
        self.epsilon = float(scale.epsilon)
        self.subset_size = scale.attack_subset
        self.shard_images = scale.shard_images

    def identity(self, source: Data) -> dict[str, Any]:
        return {
            "images": self._images(source).ids_hash(),
            "epsilon": self.epsilon,
            "steps": STEPS,
        }

    def shards(self, source: Data) -> int:
        return shards_of(self._images(source), self.shard_images)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        return split_batches(self._images(source), batch_size=batch_size, shard=shard)

    def judge(
        self, classifier: Classifier, batch: Batch, *, generator: torch.Generator
    ) -> pa.Table:
        start = random_start(batch.images, epsilon=self.epsilon, generator=generator)
        rows = []
        with attacked(classifier):
            iterates = pgd_iterates(
                folded(classifier, batch.images) or classifier,
                batch.images,
                batch.labels,
                epsilon=self.epsilon,
                step_size=self.epsilon / 4,
                stops=STEPS,
                start_BCHW=start,
            )
            for steps, images_BCHW in iterates:
                with torch.no_grad():
                    predicted = classifier(images_BCHW).argmax(dim=1)
                shown = images_BCHW if steps == STEPS[-1] else None
                rows.append(verdicts(batch, f"pgd-{steps}", predicted, judged_BCHW=shown))
        return pa.concat_tables(rows)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        return survival_scores(ledger)

    def _images(self, source: Data) -> Split:
        return source.held_out.subset(self.subset_size, seed=SUBSET_SEED)
