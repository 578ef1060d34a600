"""Optimizers and the learning rate as pure functions of a recipe."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from trainables.recipe import Recipe

STEP_MILESTONES = (0.3, 0.6, 0.9)  # 30, 60 and 90 of 100 epochs
NO_DECAY = ("pos_embed", "cls_token")


def learning_rate(recipe: Recipe, epochs_done: float) -> float:
    """Return the rate after `epochs_done` epochs: linear warm-up, then cosine or x0.1 steps.

    The cosine is not shifted by the warm-up. Source: STUDY section 3.
    """
    if epochs_done < recipe.warmup_epochs:
        done = epochs_done / recipe.warmup_epochs
        return recipe.warmup_rate + (recipe.learning_rate - recipe.warmup_rate) * done
    progress = epochs_done / recipe.epochs
    if recipe.scheduler == "cosine":
        swing = recipe.learning_rate - recipe.floor_rate
        return recipe.floor_rate + 0.5 * swing * (1 + math.cos(math.pi * progress))
    passed = sum(epochs_done >= milestone * recipe.epochs for milestone in STEP_MILESTONES)
    return recipe.learning_rate * 0.1**passed


def rate_at(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """Return the rate of one step of an epoch under the recipe's protocol.

    corrected: the schedule is followed step by step. as-published: it is stepped once per epoch,
    after the epoch, so epoch e >= 1 is trained at the value of e - 1.
    """
    if recipe.protocol == "as-published":
        return learning_rate(recipe, max(epoch - 1, 0))
    return learning_rate(recipe, epoch + step / steps)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters: no decay on 1-D tensors, biases, position embedding and class token."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(NO_DECAY)
        (free if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def build_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Build SGD (Nesterov, momentum 0.9) or AdamW (eps 1e-8) for a recipe."""
    groups = parameter_groups(module, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        # torch's fused SGD leaves its momentum unset where the first scaled step is skipped.
        fused = recipe.precision != "fp16"
        return SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    return AdamW(groups, lr=recipe.learning_rate, eps=1e-8, fused=True)
