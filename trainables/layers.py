"""Layers that any network may have: the normalisation of pixels in front, and ghost batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Map images in [0, 1] to logits; the normalisation is part of the model.

    images_BCHW float32 in [0, 1] -> logits_BK. The contract of every attack and evaluator.
    `columns`: the head's outputs in the order in which the logits show them; None: its own.
    """

    mean: Tensor
    std: Tensor
    columns: Tensor | None

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("columns", None, persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = cast(Tensor, self.backbone((images_BCHW - self.mean) / self.std))
        return logits_BK if self.columns is None else logits_BK[:, self.columns]


class Program(nn.Module):
    """An exported program: it stays in the mode that it was exported in."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def train(self, mode: bool = True) -> Program:
        self.training = mode  # which a graph module refuses to change
        return self

    def forward(self, images_BCHW: Tensor) -> Tensor:
        try:
            return cast(Tensor, self.graph(images_BCHW))
        except Exception as error:  # its guards raise all kinds of errors
            raise ValueError(
                f"the exported program cannot take images {tuple(images_BCHW.shape)}: export it "
                "for any number of images of this size: torch.export.export(model, (images,), "
                'dynamic_shapes=({0: torch.export.Dim("batch")},))'
            ) from error


class GhostBatchNorm2d(nn.Module):
    """Batch normalisation by virtual batches, with statistics of their own, under one affine.

    Of a batch of n, ghost j holds the images whose index = j mod `ghosts`. Each of `sets`
    accumulation steps has its own running statistics (`use_set`). The weight is (1, C, 1, 1), so
    that it is weight-decayed, and the bias (C,), so that it is not. In eval mode: set 0, ghost 0,
    or under `by_own_ghost` each image's own. Source: STUDY section 3, GhostBN.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum, eps = 0.1, 1e-5

    def __init__(self, features: int, *, ghosts: int, sets: int, **factory: Any) -> None:
        super().__init__()
        self.features, self.ghosts = features, ghosts
        self.weight = nn.Parameter(torch.ones(1, features, 1, 1, **factory))
        self.bias = nn.Parameter(torch.zeros(features, **factory))
        self.register_buffer("running_mean", torch.zeros(sets, ghosts * features, **factory))
        self.register_buffer("running_var", torch.ones(sets, ghosts * features, **factory))
        self.active_set = 0
        self.own_ghost = False

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.training or self.own_ghost:
            normalised = self._ghost_by_ghost(images_BCHW)
        else:
            mean, var = self.running_mean[0, : self.features], self.running_var[0, : self.features]
            normalised = F.batch_norm(images_BCHW, mean, var, eps=self.eps)
        scaled = normalised * self.weight + self.bias.view(-1, 1, 1)
        return scaled.to(images_BCHW.dtype)  # the affine's float32 would double what is kept

    def _ghost_by_ghost(self, images_BCHW: Tensor) -> Tensor:
        count, _, height, width = images_BCHW.shape
        if count % self.ghosts:
            raise ValueError(f"a batch of {count} does not split into {self.ghosts} ghost batches")
        # The ghosts side by side as channels, which keeps channels last in memory.
        split = images_BCHW.permute(0, 2, 3, 1).reshape(
            count // self.ghosts, self.ghosts, height, width, self.features
        )
        side_by_side = split.permute(0, 2, 3, 1, 4).flatten(3)
        normalised = self._normalised(side_by_side.permute(0, 3, 1, 2))
        parted = normalised.permute(0, 2, 3, 1).reshape(
            count // self.ghosts, height, width, self.ghosts, self.features
        )
        together: Tensor = parted.permute(0, 3, 1, 2, 4).flatten(0, 1)
        return together.permute(0, 3, 1, 2)

    def _normalised(self, side_by_side: Tensor) -> Tensor:
        mean, var = self.running_mean[self.active_set], self.running_var[self.active_set]
        return self._by_batch(side_by_side, mean, var)

    def _by_batch(self, images_BCHW: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise by the batch's statistics and move the running ones towards them.

        In eval mode: by the running ones.
        """
        return F.batch_norm(
            images_BCHW, mean, var, training=self.training, momentum=self.momentum, eps=self.eps
        )


def use_set(module: nn.Module, index: int) -> None:
    """Make every ghost batch normalisation use the set of statistics of one accumulation step."""
    for layer in _ghost_norms(module):
        layer.active_set = index


@contextmanager
def by_own_ghost(module: nn.Module) -> Iterator[None]:
    """Make ghost batch normalisations in eval mode use the statistics of each image's own ghost.

    They are those of the active set. Source: `to_adv` of the study's models/advresnet_gbn.py.
    """
    norms = _ghost_norms(module)
    for layer in norms:
        layer.own_ghost = True
    try:
        yield
    finally:
        for layer in norms:
            layer.own_ghost = False


def _ghost_norms(module: nn.Module) -> list[GhostBatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, GhostBatchNorm2d)]
