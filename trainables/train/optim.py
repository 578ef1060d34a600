"""Optimizers and the learning rate as pure functions of a recipe."""

from __future__ import annotations

import math
from typing import cast

import torch
from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from trainables.recipe import STUDY_OPTIMIZERS, STUDY_SCHEDULERS, Recipe

STEP_MILESTONES = (0.3, 0.6, 0.9)  # 30, 60 and 90 of 100 epochs
NO_DECAY = ("pos_embed", "cls_token")


def learning_rate(recipe: Recipe, epochs_done: float) -> float:
    """Return the rate after `epochs_done` epochs: linear warm-up, then cosine or x0.1 steps.

    The cosine is not shifted by the warm-up. Source: STUDY section 3. Whatever the study does not
    vary about a schedule is timm's.
    """
    beyond = recipe.scheduler_args or recipe.warmup_prefix or recipe.cooldown_epochs
    if beyond or recipe.scheduler not in STUDY_SCHEDULERS:
        optimizer = SGD([nn.Parameter(torch.zeros(()))], lr=recipe.learning_rate)
        build_schedule(recipe, optimizer).step(epochs_done)  # which may be a fraction
        return float(optimizer.param_groups[0]["lr"])
    if epochs_done < recipe.warmup_epochs:
        done = epochs_done / recipe.warmup_epochs
        return recipe.warmup_rate + (recipe.learning_rate - recipe.warmup_rate) * done
    progress = epochs_done / recipe.epochs
    if recipe.scheduler == "cosine":
        swing = recipe.learning_rate - recipe.floor_rate
        return recipe.floor_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))
    passed = sum(epochs_done >= milestone * recipe.epochs for milestone in STEP_MILESTONES)
    return recipe.learning_rate * 0.1**passed


def build_schedule(recipe: Recipe, optimizer: Optimizer) -> Scheduler:
    """Build timm's schedule of a recipe; ValueError where it does not take an argument.

    The training's epochs hold the cooldown, and the warm-up too where it is a prefix.
    """
    ahead = recipe.cooldown_epochs + (recipe.warmup_epochs if recipe.warmup_prefix else 0)
    arguments = {
        "num_epochs": recipe.epochs - ahead,
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_lr": recipe.warmup_rate,
        "warmup_prefix": recipe.warmup_prefix,
        "min_lr": recipe.floor_rate,
        **recipe.scheduler_args,
    }
    try:
        return create_scheduler_v2(optimizer, recipe.scheduler, **arguments)[0]
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"scheduler_args of {recipe.scheduler!r}: {error}") from None


def rate_at(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """Return the rate of one step of an epoch under the recipe's protocol.

    corrected: the schedule is followed step by step. as-published: it is stepped once per epoch,
    after the epoch, so epoch e >= 1 is trained at the value of e - 1.
    """
    if recipe.protocol == "as-published":
        return learning_rate(recipe, max(epoch - 1, 0))
    return learning_rate(recipe, epoch + step / steps)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters: no decay on 1-D ones, biases, position embedding, class token."""
    decayed, free = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.endswith(NO_DECAY)
            (free if exempt else decayed).append(parameter)
    groups = ((decayed, weight_decay), (free, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups]


def build_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Build a recipe's optimizer; ValueError where it does not take an argument."""
    optimizer = _single(recipe, module)
    return Lookahead(optimizer) if recipe.lookahead else optimizer


def _single(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Build the study's SGD (Nesterov, momentum 0.9) or AdamW (eps 1e-8), or timm's optimizer.

    A group's rate is the recipe's times its `lr_scale`, which layer decay sets.
    """
    name, rate, decay = recipe.optimizer, recipe.learning_rate, recipe.weight_decay
    network = getattr(module, "backbone", module)
    if recipe.layer_decay and not hasattr(network, "group_matcher"):
        raise ValueError(f"layer_decay: {recipe.model!r} does not say which layers follow others")
    try:
        if name not in STUDY_OPTIMIZERS or recipe.layer_decay:
            arguments = {"momentum": 0.9, **recipe.optimizer_args}
            rates = {"lr": rate, "weight_decay": decay, "layer_decay": recipe.layer_decay}
            return cast(Optimizer, create_optimizer_v2(network, name, **rates, **arguments))
        groups = parameter_groups(module, decay)
        if name == "sgd":
            # torch's fused SGD leaves its momentum unset where the first scaled step is skipped.
            fused = recipe.precision != "fp16"
            arguments = {"momentum": 0.9, "nesterov": True, "fused": fused, **recipe.optimizer_args}
            return SGD(groups, lr=rate, **arguments)
        return AdamW(groups, lr=rate, **{"eps": 1e-8, "fused": True, **recipe.optimizer_args})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"optimizer {name!r}: {error}") from None


def check_step(recipe: Recipe) -> None:
    """Raise ValueError where a recipe's optimizer cannot be built, or cannot make a step."""
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(recipe.replace(layer_decay=None), layer)
    layer(torch.ones(1, 2)).sum().backward()
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"optimizer {recipe.optimizer!r} cannot make a step: {error}") from None
