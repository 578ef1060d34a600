"""A trial's artifacts as the model that MLflow loads, and what damages them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainables.networks import build_classifier
from trainables.store.checkpoint import save_weights
from trainables.store.packaged import _load_pyfunc


@pytest.fixture
def artifacts(tmp_path, small):
    """A folder as a trial's run has it: weights beside the recipe; and its classifier."""
    recipe = small()
    classifier = build_classifier(recipe).eval()
    save_weights(tmp_path / "weights.safetensors", classifier, recipe.model_dump_json())
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    return tmp_path, classifier


def test_the_model_answers_as_the_trained_classifier_does(artifacts):
    folder, classifier = artifacts
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = classifier(images).numpy()
    assert np.array_equal(_load_pyfunc(str(folder)).predict(images.numpy()), expected)


@pytest.mark.parametrize("damage", ["flipped", "another trial's"])
def test_weights_that_are_not_those_of_the_recipe_are_refused(artifacts, small, damage):
    folder, _ = artifacts
    path, other = folder / "weights.safetensors", small(seed=1)
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        save_weights(path, build_classifier(other), other.model_dump_json())
    with pytest.raises(ValueError, match=r"is damaged|holds the weights of trial"):
        _load_pyfunc(str(folder))
