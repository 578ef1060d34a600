from __future__ import annotations

import pytest
import torch

from grid.studies import deit, resnet50
from trainables.models import build_classifier
from trainables.optim import build_optimizer, learning_rate, parameter_groups, rate_at


def test_cosine_meets_the_figure_of_the_public_log():
    recipe = deit().replace(learning_rate=4e-3, floor_rate=1e-5, warmup_epochs=10.0)
    assert learning_rate(recipe, 43) == pytest.approx(0.00244019576659, abs=1e-13)
    lagging = recipe.replace(protocol="as-published")
    assert rate_at(lagging, 44, 7, 100) == pytest.approx(0.00244019576659, abs=1e-13)


def test_as_published_is_held_for_an_epoch_and_lags_by_one():
    recipe = deit().replace(protocol="as-published")
    assert rate_at(recipe, 0, 5, 10) == rate_at(recipe, 1, 0, 10) == recipe.warmup_rate
    assert rate_at(recipe, 30, 0, 10) == rate_at(recipe, 30, 9, 10) == learning_rate(recipe, 29)


def test_corrected_follows_the_schedule_step_by_step():
    recipe = deit()
    assert rate_at(recipe, 50, 5, 10) == learning_rate(recipe, 50.5)


def test_warmup_is_linear_and_the_cosine_is_not_shifted_by_it():
    recipe = deit()
    assert learning_rate(recipe, 0) == recipe.warmup_rate
    halfway = (recipe.warmup_rate + recipe.learning_rate) / 2
    assert learning_rate(recipe, 2.5) == pytest.approx(halfway)
    without = recipe.replace(warmup_epochs=0.0)
    assert learning_rate(recipe, 5) == learning_rate(without, 5)


def test_step_drops_by_ten_at_30_60_90_of_any_length():
    recipe = resnet50()
    rates = [learning_rate(recipe, e) for e in (0, 29.9, 30, 60, 90)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])
    assert learning_rate(recipe.replace(epochs=300), 90) == pytest.approx(0.01)


@pytest.mark.parametrize("base", ["resnet", "deit"])
def test_no_decay_on_vectors_biases_position_and_class_token(small, base):
    classifier = build_classifier(small(base))
    decayed, free = parameter_groups(classifier, 0.05)
    names = {id(p): n for n, p in classifier.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    matrices = {names[id(p)] for p in free["params"] if p.ndim > 1}
    expected = {"backbone.cls_token", "backbone.pos_embed"} if base == "deit" else set()
    assert matrices == expected
    assert len(names) == len(decayed["params"]) + len(free["params"])


def test_ghost_affine_is_decayed(small):
    recipe = small(norm="ghost", ghost_batch=16)
    decayed, _ = parameter_groups(build_classifier(recipe), 0.1)
    assert any(p.shape[0] == 1 and p.shape[2:] == (1, 1) for p in decayed["params"])


def test_optimizers_are_the_studys(small):
    sgd = build_optimizer(small(), build_classifier(small()))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["nesterov"]
    assert sgd.defaults["momentum"] == 0.9
    adamw = build_optimizer(small("deit"), build_classifier(small("deit")))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["eps"] == 1e-8
