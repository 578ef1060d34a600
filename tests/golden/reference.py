"""What the golden values are made by: timm's parts and the study's steps in our own words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F

from tests.golden import STEPS, classifier_of, data_of_one_batch, recipe_at_digits
from trainables.data.augment import TrainBatches, library_randomness
from trainables.layers import GhostBatchNorm2d
from trainables.recipe import Recipe
from trainables.train.adversary import training_start


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the study's scripts give timm's scheduler; the peak rate as its main files scale it."""

    lr: float
    sched: str = "cosine"
    epochs: int = 100
    decay_epochs: float = 30
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6


# Sources: script/res.sh, deit.sh, advres.sh and advdeit.sh; lr x total batch / adjust_lr.
IMAGENET = {
    "resnet50": Options(sched="step", lr=0.1),
    "resnet50-aligned": Options(lr=5e-4 * 64 * 4 / 256, warmup_epochs=5),
    "deit-small": Options(lr=5e-4 * 256 * 8 / 512, warmup_epochs=5),
    "adversarial-resnet50": Options(
        sched="step", lr=0.1 * 256 * 4 * 4 / 256, warmup_epochs=5, warmup_lr=0.1
    ),
    "adversarial-resnet50-gelu": Options(
        sched="step", lr=0.1 * 128 * 4 * 4 / 256, warmup_epochs=5, warmup_lr=0.1
    ),
    "adversarial-deit-small": Options(lr=5e-4 * 128 * 8 * 4 / 512, warmup_epochs=10),
}
# At digits ten epochs stand for a hundred, and the rates are the scale's own.
_DIGITS: dict[str, Any] = {"epochs": 10, "decay_epochs": 3}
DIGITS = {
    "resnet50": Options(sched="step", lr=0.1, **_DIGITS),
    "resnet50-aligned": Options(lr=8e-3, warmup_epochs=0.5, warmup_lr=1.6e-5, **_DIGITS),
    "deit-small": Options(lr=2e-3, warmup_epochs=0.5, **_DIGITS),
    "adversarial-resnet50": Options(
        sched="step", lr=0.1, warmup_epochs=0.5, warmup_lr=0.00625, **_DIGITS
    ),
    "adversarial-resnet50-gelu": Options(
        sched="step", lr=0.05, warmup_epochs=0.5, warmup_lr=0.00625, **_DIGITS
    ),
    "adversarial-deit-small": Options(lr=2e-3, warmup_epochs=1, warmup_lr=5e-7, **_DIGITS),
}


def values(name: str) -> dict[str, Any]:
    """Return everything that is golden of a recipe."""
    recipe = recipe_at_digits(name)
    classifier = classifier_of(recipe)
    _restate_ghosts(classifier)
    images, _ = next(TrainBatches(recipe, data_of_one_batch(recipe).train, workers=0).epoch(0))
    return {
        "losses": _losses(recipe, classifier, DIGITS[name]),
        "rates": {"imagenet": _rates(IMAGENET[name]), "digits": _rates(DIGITS[name])},
        "decay": _decay(classifier),
        "batch": hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(),
    }


def _scheduler(optimizer: torch.optim.Optimizer, options: Options) -> Any:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,
        decay_epochs=options.decay_epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=1e-5,
        decay_rate=0.1,
    )
    return scheduler


def _rates(options: Options) -> list[float]:
    """Return each epoch's rate: the study steps timm's scheduler by `epoch` after each epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.lr)
    scheduler = _scheduler(optimizer, options)
    rates = []
    for epoch in range(options.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


class StudysGhostNorm(nn.Module):
    """GhostBN of the study: a set of norms over ghosts as channels, and one depthwise affine."""

    def __init__(self, features: int, ghosts: int, sets: int) -> None:
        super().__init__()
        self.features, self.ghosts = features, ghosts
        self.sets = nn.ModuleList(
            nn.BatchNorm2d(features * ghosts, affine=False) for _ in range(sets)
        )
        self.affine = nn.Conv2d(features, features, 1, groups=features)
        nn.init.ones_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.current, self.to_adv = 0, False

    def forward(self, images: Tensor) -> Tensor:
        _, channels, height, width = images.shape
        if self.training or self.to_adv:
            ghosts = images.reshape(-1, self.ghosts * channels, height, width)
            normalised = self.sets[self.current](ghosts).reshape(images.shape)
        else:
            held = (self.sets[0].running_mean, self.sets[0].running_var)
            normalised = F.batch_norm(images, *(each[: self.features] for each in held))
        return self.affine(normalised)


def _restate_ghosts(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, GhostBatchNorm2d):
            restated = StudysGhostNorm(child.features, child.ghosts, len(child.running_mean))
            setattr(module, name, restated.double())
        else:
            _restate_ghosts(child)


def _not_decayed(classifier: nn.Module) -> set[str]:
    network = classifier.backbone
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    return {f"backbone.{name}" for name in listed}


def _decay(classifier: nn.Module) -> dict[str, bool]:
    """Return by name whether timm's rule decays a parameter; an affine's are named as a norm's."""
    groups = param_groups_weight_decay(
        classifier, 1.0, no_weight_decay_list=_not_decayed(classifier)
    )
    decay = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    named = classifier.named_parameters()
    return {name.replace(".affine.", "."): decay[id(parameter)] for name, parameter in named}


def _losses(recipe: Recipe, classifier: nn.Module, options: Options) -> list[float]:
    """Return the loss of each of the first steps, each an epoch, in double precision."""
    extra = {"momentum": 0.9} if recipe.optimizer == "sgd" else {"eps": 1e-8}
    groups = param_groups_weight_decay(
        classifier,
        0.05 if recipe.optimizer == "adamw" else 1e-4,
        no_weight_decay_list=_not_decayed(classifier),
    )
    optimizer = create_optimizer_v2(
        groups, opt=recipe.optimizer, lr=options.lr, weight_decay=0.0, **extra
    )
    scheduler = _scheduler(optimizer, options)
    batches = TrainBatches(recipe, data_of_one_batch(recipe).train, workers=0)
    labels = data_of_one_batch(recipe).train.labels
    losses = []
    for epoch in range(STEPS):
        scheduler.step(epoch)  # not after the epoch, as published: every step has its own rate
        optimizer.zero_grad()
        total = 0.0
        parts = list(batches.epoch(epoch))
        for micro, (images, places) in enumerate(parts):
            inputs, targets = _mixed(recipe, images.double() / 255, labels[places], epoch, micro)
            for norm in _ghost_norms(classifier):
                norm.current = micro
            if recipe.adversary:
                inputs = _attacked(recipe, classifier, inputs, targets, places, epoch, micro)
            classifier.train()
            loss = _loss(recipe)(classifier(inputs), targets)
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
        optimizer.step()
        losses.append(total)
    return losses


def _ghost_norms(classifier: nn.Module) -> list[StudysGhostNorm]:
    return [norm for norm in classifier.modules() if isinstance(norm, StudysGhostNorm)]


def _mixed(
    recipe: Recipe, images: Tensor, labels: Tensor, epoch: int, forward: int
) -> tuple[Tensor, Tensor]:
    """Mix as the study does; at digits the chance of mixing is a quarter of the study's."""
    if not recipe.augmentations:
        return images, labels
    row = recipe.curriculum_row(epoch)
    with library_randomness() as reseed:
        reseed(0, epoch, 3, forward)
        mixer = Mixup(
            mixup_alpha=0.8,
            cutmix_alpha=row.cutmix_alpha if row else 1.0,
            prob=row.mix_probability if row else 0.25,
            switch_prob=row.switch_probability if row else 0.5,
            label_smoothing=0.1,
            num_classes=10,
        )
        mixed, targets = mixer(images, labels)
    return mixed, targets


def _loss(recipe: Recipe) -> nn.Module:
    """Return the study's criterion: soft targets where images are mixed, smoothed labels in AT."""
    if recipe.augmentations:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(0.1) if recipe.adversary else nn.CrossEntropyLoss()


def _attacked(
    recipe: Recipe,
    classifier: nn.Module,
    images: Tensor,
    targets: Tensor,
    places: Tensor,
    epoch: int,
    micro: int,
) -> Tensor:
    """Take one step of 16/255 up the cross-entropy's gradient, from a start within 16/255."""
    radius = 16 / 255
    start = training_start(
        recipe, recipe.adversary, images, places, epoch=epoch, step=0, micro=micro
    )
    classifier.eval()
    for norm in _ghost_norms(classifier):
        norm.to_adv = True
    start = start.requires_grad_(True)
    loss = F.cross_entropy(classifier(start), targets)
    (gradient,) = torch.autograd.grad(loss, start)
    for norm in _ghost_norms(classifier):
        norm.to_adv = False
    moved = start.detach() + radius * gradient.sign()
    return (images + (moved - images).clamp(-radius, radius)).clamp(0, 1)
