"""The images of a training, epoch by epoch: out of memory, or through worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainables.data.augment import augmented, epoch_order, is_cached
from trainables.data.base import Split
from trainables.data.images import ImageFiles
from trainables.recipe import Recipe
from trainables.train.team import ALONE, Team

Key = tuple[int, int]  # epoch, place


class _Augmented(Dataset[Tensor]):
    """Batches of a split by (epoch, place); it knows no epoch itself, so its workers stay."""

    def __init__(self, recipe: Recipe, images: Tensor | ImageFiles) -> None:
        self._recipe, self._images = recipe, images

    def __getitems__(self, keys: list[Key]) -> Tensor:
        places = torch.tensor([place for _, place in keys])
        return augmented(self._recipe, self._images, keys[0][0], places)


class _Order(Sampler[list[Key]]):
    """The batches of the epoch that comes next, as far as one worker of a team sees them."""

    def __init__(self, recipe: Recipe, count: int, team: Team) -> None:
        self._recipe, self._count = recipe, count
        self._rows = team.rows(recipe.forward_batch, paired=recipe.mixes)
        self.epoch = 0

    def batches(self) -> list[list[int]]:
        """Return the places of each whole batch, in the epoch's order."""
        recipe = self._recipe
        order = epoch_order(self._count, seed=recipe.seed, epoch=self.epoch)
        whole = len(order) // recipe.batch_size * recipe.batch_size
        parts = torch.split(order[:whole], recipe.forward_batch)
        return [part[self._rows].tolist() for part in parts]

    def __iter__(self) -> Iterator[list[Key]]:
        for places in self.batches():
            yield [(self.epoch, place) for place in places]


class TrainBatches:
    """The forward batches of a recipe's epochs: the same bits with any number of workers.

    Few images are kept augmented, and need none.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: Split,
        *,
        workers: int,
        pin: bool = False,
        team: Team = ALONE,
    ) -> None:
        self._order = _Order(recipe, len(split), team)
        self._dataset = _Augmented(recipe, split.images)
        self.steps = len(split) // recipe.batch_size
        if not self.steps:
            raise ValueError(
                f"batch_size {recipe.batch_size} exceeds the {len(split)} train images"
            )
        self._loader: DataLoader[Tensor] | None = None
        if workers and not is_cached(split.images):
            self._loader = DataLoader(
                self._dataset,
                batch_sampler=self._order,
                num_workers=workers,
                collate_fn=_as_it_is,
                persistent_workers=True,
                pin_memory=pin,
            )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each forward batch of an epoch: images uint8 (B, 3, H, W), their places.

        A worker of a team gets the rows that it has to see.
        """
        self._order.epoch = epoch
        places = self._order.batches()
        alone = map(self._dataset.__getitems__, self._order)
        images = alone if self._loader is None else self._loader
        for batch, chosen in zip(images, places, strict=True):
            yield batch, torch.tensor(chosen)


def _as_it_is(batch: Any) -> Any:
    """Keep a batch whole: the data set made it so."""
    return batch
