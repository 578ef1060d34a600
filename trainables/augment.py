"""Augmentation that follows from (seed, epoch, image) alone, so a resumed epoch is the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torch.nn import functional as F

from trainables.data import Split
from trainables.recipe import Recipe
from trainables.scale import scale_named

SHIFT_FRACTION = 16  # small images move by up to 1/16 of their side
CACHED_EPOCHS = 128


@contextmanager
def library_randomness() -> Iterator[Callable[..., None]]:
    """Yield a function that seeds `random` and `numpy.random`, which timm draws from.

    Both states are put back on leaving.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()

    def seed(*key: int) -> None:
        value = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(value)
        np.random.seed(value)

    try:
        yield seed
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits `count` images."""
    rng = np.random.default_rng((seed, epoch, 0))
    return torch.from_numpy(rng.permutation(count))


def augmented_epoch(recipe: Recipe, split: Split, epoch: int) -> Tensor:
    """Return every image of the split as this epoch shows it: shifted, then RandAugmented."""
    row = recipe.curriculum_row(epoch)
    strength = row.randaug_magnitude if row else recipe.randaug_magnitude
    magnitude = strength if "randaug" in recipe.augmentations else None
    mean = scale_named(recipe.scale).mean
    fill = tuple(round(255 * channel) for channel in mean)
    return _augmented_epoch(_Identity(split), recipe.seed, epoch, magnitude, fill)


class _Identity:
    """A split as a cache key: the same object is the same data."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __hash__(self) -> int:
        return id(self.split)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.split is self.split


@lru_cache(maxsize=CACHED_EPOCHS)
def _augmented_epoch(
    key: _Identity, seed: int, epoch: int, magnitude: int | None, fill: tuple[int, ...]
) -> Tensor:
    shifted = shift(key.split.images, seed=seed, epoch=epoch)
    if magnitude is None:
        return shifted
    return randaugment(shifted, magnitude=magnitude, fill=fill, seed=seed, epoch=epoch)


def shift(images_NCHW: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Move each image by up to 1/16 of its side, filling with black."""
    count, channels, height, width = images_NCHW.shape
    reach = height // SHIFT_FRACTION
    rng = np.random.default_rng((seed, epoch, 1))
    offsets = torch.from_numpy(rng.integers(0, 2 * reach + 1, size=(count, 2)))
    padded = F.pad(images_NCHW, (reach,) * 4)
    rows = (offsets[:, :1] + torch.arange(height))[:, None, :, None]
    columns = (offsets[:, 1:] + torch.arange(width))[:, None, None, :]
    image = torch.arange(count)[:, None, None, None]
    return padded[image, torch.arange(channels)[None, :, None, None], rows, columns]


def randaugment(
    images_NCHW: Tensor, *, magnitude: int, fill: tuple[int, ...], seed: int, epoch: int
) -> Tensor:
    """Apply timm's rand-m{magnitude}-mstd0.5-inc1 to each uint8 image, filling with a colour."""
    transform = _rand_augment(magnitude, images_NCHW.shape[-1], fill)
    augmented = np.empty((len(images_NCHW), *images_NCHW.shape[2:], 3), dtype=np.uint8)
    with library_randomness() as reseed:
        for index, pixels in enumerate(images_NCHW.permute(0, 2, 3, 1).numpy()):
            reseed(seed, epoch, 2, index)
            augmented[index] = np.asarray(transform(Image.fromarray(pixels)))
    return torch.from_numpy(augmented).permute(0, 3, 1, 2).contiguous()


def _rand_augment(magnitude: int, image_size: int, fill: tuple[int, ...]) -> RandAugment:
    hparams = {"translate_const": int(image_size * 0.45), "img_mean": fill}
    transform = rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", hparams)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    # At full magnitude timm asks for 0 bits: black in the study's Pillow, an error in today's.
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else image.point(lambda _: 0)


def mix(
    recipe: Recipe,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    num_classes: int,
    epoch: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Apply the recipe's Mixup and CutMix to a batch, overwriting its images.

    Returns the images and soft, smoothed targets_BK; labels_B untouched where nothing is mixed.
    """
    if not recipe.mixes:
        return images_BCHW, labels_B
    row = recipe.curriculum_row(epoch) or recipe
    mixer = Mixup(
        mixup_alpha=recipe.mixup_alpha if "mixup" in recipe.augmentations else 0.0,
        cutmix_alpha=row.cutmix_alpha if "cutmix" in recipe.augmentations else 0.0,
        prob=row.mix_probability,
        switch_prob=row.switch_probability,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
    with library_randomness() as reseed:
        reseed(recipe.seed, epoch, 3, step)
        return cast("tuple[Tensor, Tensor]", mixer(images_BCHW, labels_B))
