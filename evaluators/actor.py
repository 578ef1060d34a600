"""The evaluator actor: reads a trial's weights from MLflow and judges them, cell after cell."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import torch

from evaluators import evaluator_named
from evaluators.base import Score, evaluate
from trainables.checkpoint import load_weights, recipe_json_of
from trainables.data import load_data
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.scale import scale_named
from trainables.tracking import fetch_artifact
from trainables.trial import WEIGHTS


class EvaluatorActor:
    """One long-lived process of the pool; it keeps the model it judged last."""

    def __init__(self, tracking_uri: str, *, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._tracking_uri = tracking_uri
        self._device = torch.device(device)
        self._loaded: tuple[str, Recipe, Classifier] | None = None

    def judge(self, artifact_uri: str, evaluator: str) -> tuple[bytes, list[Score]]:
        """Return a cell's ledger as Parquet, and the scores read from it."""
        recipe, classifier = self._load(artifact_uri)
        scale = scale_named(recipe.scale)
        question = evaluator_named(evaluator, scale)
        ledger = evaluate(question, classifier, load_data(scale), device=self._device)
        buffer = io.BytesIO()
        pq.write_table(ledger, buffer, compression="zstd")
        return buffer.getvalue(), question.summarize(ledger)

    def _load(self, artifact_uri: str) -> tuple[Recipe, Classifier]:
        if self._loaded is None or self._loaded[0] != artifact_uri:
            path = fetch_artifact(self._tracking_uri, artifact_uri, WEIGHTS)
            recipe = Recipe.model_validate_json(recipe_json_of(path))
            classifier = build_classifier(recipe)
            load_weights(path, classifier)
            self._loaded = (artifact_uri, recipe, classifier)
        return self._loaded[1], self._loaded[2]
