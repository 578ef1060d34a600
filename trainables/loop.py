"""The training loop: one generator of epoch reports that knows neither Ray nor MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from trainables.augment import augmented_epoch, epoch_order, mix
from trainables.data import Data, Split, to_unit
from trainables.models import Classifier
from trainables.optim import build_optimizer, rate_at, set_rate
from trainables.recipe import Recipe
from trainables.scale import scale_named

Outcome = Literal["training", "finished", "collapsed"]
EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch did.

    `metrics` are this epoch's figures; `state` is all that the next epoch needs. Its tensors are
    the live ones, valid until the next report is asked for.
    """

    epoch: int
    metrics: dict[str, float]
    outcome: Outcome
    reason: str
    state: dict[str, Any]


def train(
    recipe: Recipe,
    classifier: Classifier,
    data: Data,
    *,
    device: torch.device,
    start: dict[str, Any] | None = None,
) -> Iterator[EpochReport]:
    """Train a classifier by its recipe and report after every epoch.

    `start` is the `state` of an earlier report: training goes on behind it with the same bits as
    if it had never stopped, because every random draw follows from (seed, epoch, image) alone.
    A loss that is not finite ends the training as collapsed: an outcome, not an error.
    """
    scale = scale_named(recipe.scale)
    classifier.to(device)
    optimizer = build_optimizer(recipe, classifier)
    done = 0
    if start is not None:
        classifier.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
        done = int(start["epoch"])
    for epoch in range(done, recipe.epochs):
        last = epoch + 1 == recipe.epochs
        loss, rate = _train_epoch(recipe, classifier, optimizer, data, epoch, device)
        metrics = {"train/loss": loss, "train/rate": rate}
        outcome: Outcome = "finished" if last else "training"
        reason = ""
        if not math.isfinite(loss):
            outcome, reason = "collapsed", f"the training loss became {loss} in epoch {epoch + 1}"
        elif last or (epoch + 1) % scale.validate_every == 0:
            metrics["held_out/accuracy"] = accuracy(classifier, data.held_out, device=device)
        yield EpochReport(
            epoch=epoch + 1,
            metrics=metrics,
            outcome=outcome,
            reason=reason,
            state={
                "epoch": epoch + 1,
                "model": classifier.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )
        if outcome == "collapsed":
            return


def _train_epoch(
    recipe: Recipe,
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    data: Data,
    epoch: int,
    device: torch.device,
) -> tuple[float, float]:
    """Train one epoch; return its mean loss and its last rate."""
    classifier.train()
    images = augmented_epoch(recipe, data.train, epoch)
    order = epoch_order(len(data.train), seed=recipe.seed, epoch=epoch)
    steps = len(order) // recipe.batch_size
    if steps == 0:
        raise ValueError(f"batch_size {recipe.batch_size} exceeds the {len(order)} train images")
    total = torch.zeros((), device=device)
    rate = 0.0
    for step in range(steps):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        images_BCHW = to_unit(images[chosen].to(device))
        labels_B = data.train.labels[chosen].to(device)
        inputs, targets = mix(
            recipe,
            images_BCHW,
            labels_B,
            num_classes=len(data.class_names),
            epoch=epoch,
            step=step,
        )
        rate = rate_at(recipe, epoch, step, steps)
        set_rate(optimizer, rate)
        loss = training_loss(recipe, classifier(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
    return float(total) / steps, rate


def training_loss(recipe: Recipe, logits_BK: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy on labels_B (smoothed here) or on soft targets_BK (already so)."""
    smoothing = 0.0 if targets.is_floating_point() else recipe.label_smoothing
    return F.cross_entropy(logits_BK, targets, label_smoothing=smoothing)


@torch.inference_mode()
def accuracy(classifier: Classifier, split: Split, *, device: torch.device) -> float:
    """Return the share of a split's images that the classifier, in eval mode, gets right."""
    classifier.eval()
    right = 0
    for first in range(0, len(split), EVALUATION_BATCH):
        part = slice(first, first + EVALUATION_BATCH)
        predicted = classifier(to_unit(split.images[part].to(device))).argmax(dim=1)
        right += int((predicted == split.labels[part].to(device)).sum())
    return right / len(split)
