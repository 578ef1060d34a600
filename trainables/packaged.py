"""A trial's run as a model that MLflow loads: `mlflow.pyfunc.load_model("runs:/RUN_ID/")`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainables.checkpoint import load_weights, recipe_json_of
from trainables.models import Classifier, build_classifier
from trainables.recipe import Recipe

WEIGHTS = "weights.safetensors"


class PackagedClassifier:
    """Answers float32 images_BCHW in [0, 1] with logits_BK; normalisation is inside."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    @torch.inference_mode()
    def predict(self, images_BCHW: np.ndarray, params: object = None) -> np.ndarray:
        logits: np.ndarray = self.classifier(torch.from_numpy(images_BCHW)).numpy()
        return logits


def _load_pyfunc(folder: str) -> PackagedClassifier:
    """Build the model that the weights' header names; MLflow calls this, nothing is unpickled."""
    path = Path(folder) / WEIGHTS
    classifier = build_classifier(Recipe.model_validate_json(recipe_json_of(path)))
    load_weights(path, classifier)
    return PackagedClassifier(classifier)
