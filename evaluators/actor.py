"""The evaluator actor: reads a trial's weights from MLflow and judges them, shard after shard."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from evaluators import evaluator_named
from evaluators.base import evaluate
from evaluators.ledger import to_parquet
from trainables.data.base import Shard
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.scale import Scale
from trainables.store.provenance import provenance
from trainables.store.storage import WEIGHTS
from trainables.store.tracking import Credentials, fetch_artifact
from trainables.watchdog import beat, counting_steps

if TYPE_CHECKING:
    from trainables.networks import Classifier


class EvaluatorActor:
    """One long-lived process of the pool; it keeps the model it judged last.

    Each forward pass counts as a step; without one for `hung_after` seconds the process ends.
    """

    def __init__(
        self,
        tracking_uri: str,
        scale: Scale,
        source: DataSource,
        *,
        threads: int,
        device: str,
        hung_after: float,
        credentials: Credentials,
    ) -> None:
        credentials.use()
        torch.set_num_threads(threads)
        self._tracking_uri, self._scale, self._source = tracking_uri, scale, source
        self._device, self._hung_after = torch.device(device), hung_after
        self._loaded: tuple[str, Classifier] | None = None

    def judge(self, artifact_uri: str, digest: str, evaluator: str, shard: Shard) -> bytes:
        """Return the ledger of one shard of a trial's cell as Parquet, with the seconds it took."""
        classifier = self._load(artifact_uri, digest)
        data = load_data(self._scale, self._source)
        question = evaluator_named(evaluator, self._scale)
        began = time.monotonic()
        with counting_steps(self._hung_after):
            ledger = evaluate(question, classifier, data, device=self._device, shard=shard)
        judged_by = provenance(str(self._device))
        return to_parquet(ledger, seconds=time.monotonic() - began, judged_by=judged_by)

    def _load(self, artifact_uri: str, digest: str) -> Classifier:
        from trainables.store.packaged import classifier_of  # timm, which the driver can spare

        if self._loaded is None or self._loaded[0] != artifact_uri:
            path = fetch_artifact(self._tracking_uri, artifact_uri, WEIGHTS)
            classifier = classifier_of(path, digest)
            classifier.register_forward_pre_hook(lambda *_: beat())
            self._loaded = (artifact_uri, classifier)
        return self._loaded[1]
