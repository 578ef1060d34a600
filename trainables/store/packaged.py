"""A trial's run as a model that MLflow loads: `mlflow.pyfunc.load_model("runs:/RUN_ID/")`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trainables.networks import Classifier, build_classifier
from trainables.recipe import Recipe
from trainables.store.checkpoint import fit_weights, read_weights
from trainables.store.storage import WEIGHTS

RECIPE = "recipe.json"


class PackagedClassifier:
    """Answers float32 images_BCHW in [0, 1] with logits_BK; normalisation is inside."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    @torch.inference_mode()
    def predict(self, images_BCHW: np.ndarray, params: object = None) -> np.ndarray:
        logits: np.ndarray = self.classifier(torch.from_numpy(images_BCHW)).numpy()
        return logits


def classifier_of(path: Path, digest: str) -> Classifier:
    """Build the model that a weights file's header names, with its weights.

    ValueError where the file is damaged or of another trial than the one with the digest.
    """
    recipe, tensors = read_weights(path.read_bytes(), path, digest)
    classifier = build_classifier(recipe)
    fit_weights(tensors, classifier, path)
    return classifier


def _load_pyfunc(folder: str) -> PackagedClassifier:
    """Build the model of the recipe beside the weights; MLflow calls this, nothing is unpickled."""
    recipe = Recipe.model_validate_json((Path(folder) / RECIPE).read_text())
    return PackagedClassifier(classifier_of(Path(folder) / WEIGHTS, recipe.digest()))
