"""The evaluator actor: reads a trial's weights from MLflow and judges them, cell after cell."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluators.base import Score
    from trainables.models import Classifier
    from trainables.recipe import Recipe

WEIGHTS = "weights.safetensors"


class EvaluatorActor:
    """One long-lived process of the pool; it keeps the model it judged last.

    Heavy imports are made here and not on top, so that the driver need not have them.
    """

    def __init__(self, tracking_uri: str, *, threads: int, device: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self._tracking_uri = tracking_uri
        self._device = torch.device(device)
        self._loaded: tuple[str, Recipe, Classifier] | None = None

    def judge(self, artifact_uri: str, evaluator: str) -> tuple[bytes, list[Score], float]:
        """Return a cell's ledger as Parquet, the scores read from it, and the seconds it took."""
        import pyarrow.parquet as pq

        from evaluators import evaluator_named
        from evaluators.base import evaluate
        from trainables.data import load_data
        from trainables.scale import scale_named

        began = time.monotonic()
        recipe, classifier = self._load(artifact_uri)
        scale = scale_named(recipe.scale)
        question = evaluator_named(evaluator, scale)
        ledger = evaluate(question, classifier, load_data(scale), device=self._device)
        buffer = io.BytesIO()
        pq.write_table(ledger, buffer, compression="zstd")
        return buffer.getvalue(), question.summarize(ledger), time.monotonic() - began

    def _load(self, artifact_uri: str) -> tuple[Recipe, Classifier]:
        from trainables.checkpoint import load_weights, recipe_json_of
        from trainables.models import build_classifier
        from trainables.recipe import Recipe
        from trainables.tracking import fetch_artifact

        if self._loaded is None or self._loaded[0] != artifact_uri:
            path = fetch_artifact(self._tracking_uri, artifact_uri, WEIGHTS)
            recipe = Recipe.model_validate_json(recipe_json_of(path))
            classifier = build_classifier(recipe)
            load_weights(path, classifier)
            self._loaded = (artifact_uri, recipe, classifier)
        return self._loaded[1], self._loaded[2]
