"""Writes pgd.json: the tenth iterate of torchattacks' PGD on two images: `-m tests.golden.pgd`.

torchattacks asks for a requests of 2021: `pip install --no-deps torchattacks==3.5.1`.
"""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.golden import FOLDER, classifier_of, data_of_one_batch, recipe_at_digits
from trainables.data.base import to_unit
from trainables.layers import Classifier

STORED = FOLDER / "pgd.json"
EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


def attack_inputs() -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """Return a classifier, images, labels and a start in the ball, all in double precision."""
    recipe = recipe_at_digits("resnet50")
    split = data_of_one_batch(recipe).train
    images = to_unit(split.images[:2]).double()
    noise = np.random.default_rng(1).uniform(-EPSILON, EPSILON, tuple(images.shape))
    start = (images + torch.from_numpy(noise)).clamp(0, 1)
    return classifier_of(recipe).eval(), images, split.labels[:2], start


def main() -> None:
    """Attack by torchattacks from the same start and store the iterate, in 1e-7 of white."""
    import torchattacks

    classifier, images, labels, start = attack_inputs()
    attack = torchattacks.PGD(classifier, eps=EPSILON, alpha=STEP_SIZE, steps=STEPS)
    with mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.copy_(start - images)):
        iterate = attack(images, labels)
    STORED.write_text(json.dumps((iterate * 1e7).round().long().flatten().tolist()) + "\n")


if __name__ == "__main__":
    main()
