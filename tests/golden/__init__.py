"""Golden values of six recipes: `python -m tests.golden` makes them anew by the reference.

The inputs are integers and weights by formula, in double precision, so that the values do not
depend on the processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grid.study import base_named
from trainables.data.base import Data, Split
from trainables.data.registry import DATA_SETS
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS

FOLDER = Path(__file__).parent
STEPS = 3
RECIPES = {
    "resnet50": "resnet50",
    "resnet50-aligned": "resnet50_aligned",
    "deit-small": "deit_small",
    "adversarial-resnet50": "adversarial_resnet50",
    "adversarial-resnet50-gelu": "adversarial_resnet50_gelu",
    "adversarial-deit-small": "adversarial_deit_small",
}


def stored(name: str) -> dict[str, Any]:
    """Return a recipe's golden values."""
    values: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return values


def recipe_at_digits(name: str) -> Recipe:
    """Return a recipe as it is trained at digits; ghost batches accumulate in four parts, too."""
    recipe = DIGITS.shrink(base_named(RECIPES[name]))
    return recipe.replace(micro_batch=16, ghost_batch=8) if recipe.norm == "ghost" else recipe


def data_of_one_batch(recipe: Recipe) -> Data:
    """Return blocks of 4 x 4 px in random colours: as many images as a step learns from."""
    colours = np.random.default_rng(0).integers(0, 256, (recipe.batch_size, 3, 4, 4))
    images = torch.from_numpy(np.kron(colours, np.ones((4, 4), dtype=int)).astype(np.uint8))
    ids = tuple(f"blocks/{i}" for i in range(len(images)))
    split = Split(images=images, labels=torch.arange(len(images)) % 10, ids=ids)
    return Data(
        data_set=DATA_SETS["digits"], train=split, held_out=split, class_names=tuple("0123456789")
    )


@torch.no_grad()
def set_weights(module: nn.Module) -> None:
    """Draw every matrix uniformly, by its fan-in; vectors stay as they are."""
    rng = np.random.default_rng(0)
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.shape[1:] != (1, 1, 1) and len(parameter) > 1:
            fan_in = parameter[0].numel()
            drawn = rng.uniform(-1, 1, tuple(parameter.shape)) * (3 / fan_in) ** 0.5
            parameter.copy_(torch.from_numpy(drawn))


def classifier_of(recipe: Recipe) -> Classifier:
    """Return a recipe's classifier in double precision, with weights by formula."""
    classifier = build_classifier(recipe).double()
    set_weights(classifier)
    return classifier
