from __future__ import annotations

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from tests.paper import deit, resnet50
from trainables.models import MODELS
from trainables.networks import build_classifier
from trainables.train.optim import build_optimizer, learning_rate, parameter_groups, rate_at


def test_cosine_meets_the_figure_of_the_public_log():
    recipe = deit().replace(learning_rate=4e-3, floor_rate=1e-5, warmup_epochs=10.0)
    assert learning_rate(recipe, 43) == pytest.approx(0.00244019576659, abs=1e-13)
    lagging = recipe.replace(protocol="as-published")
    assert rate_at(lagging, 44, 7, 100) == pytest.approx(0.00244019576659, abs=1e-13)


def test_as_published_holds_the_rate_for_an_epoch_and_lags_and_corrected_follows_steps():
    recipe = deit().replace(protocol="as-published")
    assert rate_at(recipe, 0, 5, 10) == rate_at(recipe, 1, 0, 10) == recipe.warmup_rate
    assert rate_at(recipe, 30, 0, 10) == rate_at(recipe, 30, 9, 10) == learning_rate(recipe, 29)
    assert rate_at(deit(), 50, 5, 10) == learning_rate(deit(), 50.5)


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


def names_by_decay(module, groups):
    """Return the decay of each of a module's parameters, by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("model", MODELS)
def test_weight_decay_is_where_timms_rule_has_it(small, model):
    classifier = build_classifier(small(model=model))
    network = classifier.backbone
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    expected = names_by_decay(
        network, param_groups_weight_decay(network, 0.05, no_weight_decay_list=listed)
    )
    found = names_by_decay(classifier, parameter_groups(classifier, 0.05))
    assert found == {f"backbone.{name}": decay for name, decay in expected.items()}
    assert set(found.values()) == {0.0, 0.05}


@pytest.mark.parametrize(
    ("optimizer", "theirs"), [("sgd", {"momentum": 0.9}), ("adamw", {"eps": 1e-8})]
)
def test_optimizers_step_as_timms_do_under_the_studys_options(small, optimizer, theirs):
    recipe = small(optimizer=optimizer, learning_rate=0.01, weight_decay=0.3)
    models = [build_classifier(recipe).double() for _ in range(2)]
    timms = create_optimizer_v2(
        models[1], opt=optimizer, lr=0.01, weight_decay=0.3, filter_bias_and_bn=True, **theirs
    )
    pairs = zip(models, (build_optimizer(recipe, models[0]), timms), strict=True)
    images = torch.rand(3, 8, 3, 16, 16, dtype=torch.double)
    for model, stepper in pairs:
        for batch in images:
            stepper.zero_grad()
            model(batch).square().mean().backward()
            stepper.step()
    ours, expected = (dict(model.named_parameters()) for model in models)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("scheduler", ["step", "cosine", "tanh", "multistep", "poly", "wsd"])
def test_schedules_beyond_the_studys_are_timms_at_every_epoch(scheduler):
    recipe = deit().replace(
        scheduler=scheduler,
        scheduler_args={"decay_rate": 0.5, "decay_epochs": 20, "decay_milestones": [30, 60]},
        cooldown_epochs=10,
        warmup_epochs=5.0,
    )
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=recipe.learning_rate)
    schedule, _ = create_scheduler_v2(
        optimizer,
        scheduler,
        num_epochs=90,
        warmup_epochs=5,
        warmup_lr=recipe.warmup_rate,
        min_lr=recipe.floor_rate,
        cooldown_epochs=10,
        decay_rate=0.5,
        decay_epochs=20,
        decay_milestones=[30, 60],
    )
    for epoch in range(100):
        schedule.step(epoch)
        assert learning_rate(recipe, epoch) == optimizer.param_groups[0]["lr"], epoch


def test_a_warmup_prefix_and_a_cooldown_leave_the_cosine_what_lies_between_them():
    recipe = deit().replace(warmup_prefix=True, warmup_epochs=20.0, cooldown_epochs=10)
    assert learning_rate(recipe, 20) == pytest.approx(recipe.learning_rate)
    halfway = (recipe.learning_rate + recipe.floor_rate) / 2
    assert learning_rate(recipe, 55) == pytest.approx(halfway)
    assert learning_rate(recipe, 90) == learning_rate(recipe, 99) == recipe.floor_rate


@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "lion", "rmsproptf", "nadamw"])
def test_groups_and_rates_of_layer_decay_are_timms(small, optimizer):
    recipe = small("deit", optimizer=optimizer, layer_decay=0.7, weight_decay=0.05)
    classifier = build_classifier(recipe)
    ours = build_optimizer(recipe, classifier)
    expected = create_optimizer_v2(
        classifier.backbone, optimizer, lr=recipe.learning_rate, weight_decay=0.05, layer_decay=0.7
    )
    assert type(ours) is type(expected)
    assert len({group["lr_scale"] for group in ours.param_groups}) > 3
    for group, theirs in zip(ours.param_groups, expected.param_groups, strict=True):
        assert group["lr_scale"] == theirs["lr_scale"]
        assert group["weight_decay"] == theirs["weight_decay"]
        assert list(map(id, group["params"])) == list(map(id, theirs["params"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb", "optimizer_args": {"beta": 1}}, "optimizer 'lamb': .*beta"),
        ({"optimizer_args": {"eps": "small"}}, "optimizer 'sgd': .*eps"),
        (
            {"scheduler": "poly", "scheduler_args": {"power": 2}},
            "scheduler_args of 'poly': .*power",
        ),
    ],
)
def test_arguments_that_timm_does_not_take_are_refused_by_name(small, changes, message):
    recipe = small("resnet", **changes)
    with pytest.raises(ValueError, match=message):
        learning_rate(recipe, 1) and build_optimizer(recipe, build_classifier(recipe))


def test_lookahead_goes_half_the_way_every_six_steps():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    recipe = resnet50().replace(
        learning_rate=1.0,
        weight_decay=0.0,
        lookahead=True,
        optimizer_args={"momentum": 0.0, "nesterov": False},
    )
    optimizer, ways = build_optimizer(recipe, layer), []
    for _ in range(12):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        ways.append(layer.weight.item())
    # The slow weights are first those after six steps; half way from there to -12 is -9.
    assert ways == [-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -9]
