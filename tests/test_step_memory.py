"""The memory of a training step, reckoned from a few images before anything is trained."""

from __future__ import annotations

import pytest
import torch

from trainables.networks import build_classifier
from trainables.recipe import OF_STEP, Adversary
from trainables.train import memory
from trainables.train.memory import _Living, misfit, reckoned, step_bytes

CPU = torch.device("cpu")
GIB = 2**30


def test_memory_is_that_of_the_tensors_alive_at_once():
    with _Living() as living:
        first = torch.ones(1000)  # of 4 bytes each
        second = first.view(10, 100) + 1
        del first
        third = second * 2
        del second, third
        torch.ones(500)
    assert living.most == 2 * 4000


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("deit", {}),
        ("resnet", {"norm": "ghost", "ghost_batch": 32}),
        ("resnet", {"ema_decay": 0.9, "adversary": Adversary(epsilon=0.1, step_size=0.1)}),
    ],
)
def test_a_few_images_tell_what_many_take(small, base, changes):
    recipe = small(base, **changes)
    fixed, each = reckoned(recipe, CPU)
    assert 0.95 < (fixed + 64 * each) / step_bytes(recipe, 64, CPU) < 1.25
    parameters = 4 * sum(p.numel() for p in build_classifier(recipe).parameters())
    assert fixed > 3 * parameters  # weights, gradients, moments


@pytest.mark.parametrize(
    "changes", [{"activation": "gelu"}, {"drop_path": 0.1}, {"norm": "ghost", "ghost_batch": 16}]
)
def test_what_changes_the_memory_of_a_step_is_tried_by_itself(small, changes):
    recipes = small(), small(**changes)
    keys = {recipe.model_dump_json(include=OF_STEP) for recipe in recipes}
    assert len(keys) == 2
    assert step_bytes(recipes[0], 8, CPU) != step_bytes(recipes[1], 8, CPU)


def test_small_steps_whose_memory_rounds_to_the_same_are_reckoned_with(small, monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: 20 * 2**20)
    needs = reckoned(small(), CPU)
    assert needs == (20 * 2**20 - 16, 1)
    assert misfit(small(), 1, needs, GIB) == ""


def test_a_recipe_that_does_not_fit_is_told_which_micro_batch_does(small):
    recipe, needs = small(batch_size=256), (GIB, GIB // 100)  # 1 GiB, and 0.01 an image
    assert misfit(recipe, 1, needs, 5 * GIB) == ""  # it takes 1.15 * 3.56
    text = misfit(recipe, 1, needs, 3 * GIB)  # in which 160 images fit
    assert "256 images a worker take 4.1 GiB, and it has 3.0: --set micro_batch=128 fits" in text
    assert misfit(recipe, 2, needs, 3 * GIB) == ""
    ghosts = small(batch_size=256, norm="ghost", ghost_batch=32)
    assert misfit(ghosts, 2, needs, int(1.7 * GIB)).endswith("--set micro_batch=64 fits")
    assert "nor does any micro_batch fit: give more --workers" in misfit(recipe, 1, needs, GIB)
