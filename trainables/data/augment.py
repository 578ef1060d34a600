"""The images of a training: augmented, and served in batches, epoch by epoch.

Augmentation follows from (seed, epoch, view) alone, so a resumed epoch is the same. Of n images,
view v is the image at place v mod n, shown for the (v // n)th time in its epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-untyped]

from trainables.data.base import Images, Split, to_unit
from trainables.data.images import ImageFiles, ResizedImages
from trainables.recipe import POLICIES, Preprocessing, Recipe
from trainables.scale import scale_named
from trainables.train.team import ALONE, Team

SHIFT_FRACTION = 16  # small images move by up to 1/16 of their side
LEAST_CROP = 0.08  # of an area, as in the study
FLIP_PROBABILITY = 0.5
TIMM_POLICIES = {
    "randaug": "rand-m{magnitude}-n{layers}-mstd{std}-inc1",
    "augmix": "augmix",
    "3augment": "3a",
}
CACHED_BYTES = 2**24  # of an epoch's images; more are augmented batch by batch
KEPT_BYTES = 2**27  # of all augmented epochs that a process keeps
_EPOCHS: dict[Hashable, Tensor] = {}  # augmented epochs, the last used at the end


@contextmanager
def library_randomness() -> Iterator[Callable[..., None]]:
    """Yield a function that seeds what timm and torchvision draw from.

    These are `random`, `numpy.random` and torch's generator; their states are put back on leaving.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()

    def seed(*key: int) -> None:
        value = seed_of(*key)
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)

    try:
        yield seed
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


def seed_of(*key: int) -> int:
    """Return the seed of one stream of draws, told apart by its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def epoch_order(count: int, *, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Return the views that an epoch has of `count` images, as many, in order.

    Each image that it shows is shown `repeats` times in a row; the last one may be cut short.
    """
    places = torch.from_numpy(np.random.default_rng((seed, epoch, 0)).permutation(count))
    shown = torch.arange(count)
    return places[shown // repeats] + count * (shown % repeats)


def augmented(recipe: Recipe, images: Images, epoch: int, views: Tensor) -> Tensor:
    """Return some views of the images in this epoch: uint8 (B, 3, H, W), erased ones float32.

    Images in memory are shifted and, where the scale says so, flipped; images in files, and all
    where the recipe has a `least_crop`, are cropped at random and flipped, as in the study. Then
    the recipe's policy and colour jitter; they resample what was cropped bicubically, as in the
    study, and what was shifted as timm draws it for each operation. Images in memory that a model
    sees at another size are resized then. Random erasing ends it. Each follows from (seed, epoch,
    view) alone, whichever images are asked for beside it.
    """
    shown = _resized(recipe, images, epoch, views)
    return erased(recipe, shown, views, epoch=epoch) if recipe.erasing else shown


def _resized(recipe: Recipe, images: Images, epoch: int, views: Tensor) -> Tensor:
    """Return views at the size that a model sees in this epoch."""
    if isinstance(images, ImageFiles):
        return _cropped(images, recipe, epoch, views)
    if isinstance(images, ResizedImages):
        stored, to = images.stored, images.preprocessing
    else:
        stored, to = images, Preprocessing()
    if is_cached(recipe, stored):
        shown = augmented_epoch(recipe, stored, epoch)[views]
    else:
        shown = _in_memory(stored, recipe, epoch, views)
    to = to | Preprocessing(size=recipe.train_size(epoch))
    return ResizedImages(stored, to).resized(shown) if to.size else shown


def is_cached(recipe: Recipe, images: Images) -> bool:
    """Tell whether the views of an epoch are so few that all are kept."""
    is_small = isinstance(images, Tensor) and images.nbytes <= CACHED_BYTES
    return is_small and recipe.repeats == 1


def augmented_epoch(recipe: Recipe, images: Tensor, epoch: int) -> Tensor:
    """Return every image as this epoch shows it; made once for all trials that share it."""
    # A tensor is equal to itself alone as a key: its hash is its identity.
    changes = recipe.least_crop, _flips(recipe), *_changes_of(recipe, epoch)
    key = images, recipe.seed, epoch, changes
    shown = _EPOCHS.pop(key, None)
    if shown is None:
        shown = _in_memory(images, recipe, epoch, torch.arange(len(images)))
    _EPOCHS[key] = shown
    while sum(other.nbytes for other in _EPOCHS.values()) > KEPT_BYTES:
        del _EPOCHS[next(iter(_EPOCHS))]
    return shown


def _in_memory(images: Tensor, recipe: Recipe, epoch: int, views: Tensor) -> Tensor:
    """Shift or crop, flip and change some views of images in memory."""
    if recipe.least_crop:
        return _cropped(images, recipe, epoch, views)
    seed, repeats = recipe.seed, recipe.repeats
    shown = shift(images, views, seed=seed, epoch=epoch, repeats=repeats)
    if _flips(recipe):
        shown = flipped(shown, views, count=len(images) * repeats, seed=seed, epoch=epoch)
    change = color_changes(images.shape[-1], *_changes_of(recipe, epoch))
    return changed(shown, views, change, seed=seed, epoch=epoch) if change else shown


def _flips(recipe: Recipe) -> bool:
    return recipe.flip and scale_named(recipe.scale).data_set.flip


def _changes_of(recipe: Recipe, epoch: int) -> tuple[str, float, tuple[float, ...]]:
    """Return timm's name of the recipe's policy in an epoch ('': none), its jitter, the fill."""
    policy = next((TIMM_POLICIES[name] for name in POLICIES if name in recipe.augmentations), "")
    magnitude = (recipe.curriculum_row(epoch) or recipe).randaug_magnitude
    std = np.format_float_positional(recipe.randaug_std)
    policy = policy.format(magnitude=magnitude, layers=recipe.randaug_layers, std=std)
    return policy, recipe.color_jitter, scale_named(recipe.scale).data_set.mean


def _cropped(images: ImageFiles | Tensor, recipe: Recipe, epoch: int, views: Tensor) -> Tensor:
    """Crop, flip and change images one by one: torchvision and timm draw for one."""
    seed, size, may_flip = recipe.seed, images.shape[-1], _flips(recipe)
    if isinstance(images, ImageFiles):
        size = recipe.train_size(epoch) or size
    areas = (recipe.least_crop or LEAST_CROP, 1.0)
    crop = v2.RandomResizedCrop(size, scale=areas, interpolation=InterpolationMode.BICUBIC)
    policy, *rest = _changes_of(recipe, epoch)
    change = color_changes(size, policy, *rest, interpolation="bicubic")
    augmented = np.empty((len(views), size, size, 3), dtype=np.uint8)
    with library_randomness() as reseed:
        for row, view in enumerate(views.tolist()):
            image = original(images, view % len(images))
            if policy:
                reseed(seed, epoch, 5, view)
            else:
                # torchvision draws from torch alone; timm's two generators are slow to seed.
                torch.default_generator.manual_seed(seed_of(seed, epoch, 5, view))
            # The same draws and pixels as the transforms' own calls, which look for what to
            # transform in any structure, and so take longer than the flip itself.
            image = v2.functional.resized_crop(
                image, **crop.make_params([image]), size=crop.size, interpolation=crop.interpolation
            )
            if torch.rand(1) < FLIP_PROBABILITY and may_flip:
                image = v2.functional.horizontal_flip(image)
            augmented[row] = np.asarray(change(image) if change else image)
    return torch.from_numpy(augmented).permute(0, 3, 1, 2)


def original(images: ImageFiles | Tensor, place: int) -> Image.Image:
    """Return the image at a place as it is stored."""
    if isinstance(images, ImageFiles):
        return images.original(place)
    return Image.fromarray(images[place].permute(1, 2, 0).contiguous().numpy())


def flipped(images_BCHW: Tensor, views: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """Mirror each image, or not, by an even chance; `views` are theirs among `count`."""
    drawn = _mirrored(seed, epoch, count)[views]
    return torch.where(drawn[:, None, None, None], images_BCHW.flip(-1), images_BCHW)


@lru_cache(maxsize=2)
def _mirrored(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch, 6)).integers(0, 2, count) == 1)


def shift(images_NCHW: Tensor, views: Tensor, *, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """Move the image of each view by up to 1/16 of its side, filling with black."""
    count, channels, height, width = images_NCHW.shape
    reach = height // SHIFT_FRACTION
    offsets = _offsets(seed, epoch, count * repeats, reach)[views]
    padded = F.pad(images_NCHW[views % count], (reach,) * 4)
    rows = (offsets[:, :1] + torch.arange(height))[:, None, :, None]
    columns = (offsets[:, 1:] + torch.arange(width))[:, None, None, :]
    image = torch.arange(len(views))[:, None, None, None]
    return padded[image, torch.arange(channels)[None, :, None, None], rows, columns]


@lru_cache(maxsize=2)
def _offsets(seed: int, epoch: int, count: int, reach: int) -> Tensor:
    rng = np.random.default_rng((seed, epoch, 1))
    return torch.from_numpy(rng.integers(0, 2 * reach + 1, size=(count, 2)))


def changed(
    images_BCHW: Tensor,
    views: Tensor,
    change: Callable[[Image.Image], Image.Image],
    *,
    seed: int,
    epoch: int,
) -> Tensor:
    """Change the uint8 image of each view by its own draw."""
    pixels_BHWC = images_BCHW.permute(0, 2, 3, 1).numpy()
    augmented = np.empty_like(pixels_BHWC, order="C")
    with library_randomness() as reseed:
        for row, view in enumerate(views.tolist()):
            reseed(seed, epoch, 2, view)
            augmented[row] = np.asarray(change(Image.fromarray(pixels_BHWC[row])))
    return torch.from_numpy(augmented).permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=4)
def color_changes(
    image_size: int,
    policy: str,
    color_jitter: float,
    mean: tuple[float, ...],
    *,
    interpolation: str = "random",
) -> Callable[[Image.Image], Image.Image] | None:
    """Return timm's policy and then colour jitter, filling with the mean; None without either."""
    if not policy and not color_jitter:
        return None
    _, change, _ = transforms_imagenet_train(
        image_size,
        auto_augment=policy or None,
        color_jitter=color_jitter or None,
        force_color_jitter=True,
        interpolation=interpolation,
        mean=mean,
        separate=True,
    )
    for op in (op for step in change.transforms for op in getattr(step, "ops", ())):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return cast(Callable[[Image.Image], Image.Image], change)


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    # At full magnitude timm asks for 0 bits: black in the study's Pillow, an error in today's.
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else image.point(lambda _: 0)


def erased(recipe: Recipe, images_BCHW: Tensor, views: Tensor, *, epoch: int) -> Tensor:
    """Erase a rectangle of each image, or not, by timm's RandomErasing: float32 (B, 3, H, W).

    Its pixels are normal draws in the model's normalised units, so that they may leave [0, 1];
    under an adversary, which keeps to it, they are cut to it.
    """
    data_set = scale_named(recipe.scale).data_set.preprocessed(recipe.input)
    mean, std = (torch.tensor(c).view(-1, 1, 1) for c in (data_set.mean, data_set.std))
    erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")
    shown = to_unit(images_BCHW)
    with library_randomness() as reseed:
        for image, view in zip(shown, views.tolist(), strict=True):
            reseed(recipe.seed, epoch, 7, view)
            # On a canvas of its own: pixels that stay keep their bits.
            drawn = erase(torch.full_like(image, math.nan)).mul_(std).add_(mean)
            image.copy_(torch.where(drawn.isnan(), image, drawn))
    return shown.clamp_(0, 1) if recipe.adversary else shown


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


class _Augmented(Dataset[Tensor]):
    """A split's images as an epoch shows them; it knows no epoch itself, so its workers stay."""

    def __init__(self, recipe: Recipe, images: Images) -> None:
        self._recipe, self._images = recipe, images

    def __getitems__(self, batch: list[int]) -> Tensor:
        """Return a batch, which is the number of its epoch and then the views."""
        epoch, *views = batch
        return augmented(self._recipe, self._images, epoch, torch.tensor(views))


class TrainBatches:
    """The forward batches of a recipe's epochs: the same bits with any number of workers.

    Few images are kept augmented, and need none.
    """

    def __init__(
        self, recipe: Recipe, split: Split, *, workers: int, pin: bool = False, team: Team = ALONE
    ) -> None:
        self._recipe, self._count = recipe, len(split)
        self._own = team.own
        self._dataset = _Augmented(recipe, split.images)
        self._batches: list[list[int]] = []  # of the epoch that is served
        self._waited = self._seconds = 0.0  # for batches, and in all, of that epoch
        self._served = 0
        self.steps = len(split) // recipe.batch_size
        if not self.steps:
            raise ValueError(
                f"batch_size {recipe.batch_size} exceeds the {len(split)} train images"
            )
        self._loader: DataLoader[Tensor] | None = None
        self._is_kept = is_cached(recipe, split.images)
        if workers and not self._is_kept:
            self._loader = DataLoader(
                self._dataset,
                batch_sampler=self._batches,
                num_workers=workers,
                collate_fn=_whole,
                persistent_workers=True,
                pin_memory=pin,
            )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each forward batch of an epoch: its views, uint8 (B, 3, H, W), and their numbers.

        A worker of a team gets its own part. first: the batch to begin with.
        """
        recipe = self._recipe
        order = epoch_order(self._count, seed=recipe.seed, epoch=epoch, repeats=recipe.repeats)
        parts = torch.split(order[: self.steps * recipe.batch_size], recipe.forward_batch)
        self._batches[:] = [[epoch, *part[self._own].tolist()] for part in parts[first:]]
        alone = map(self._dataset.__getitems__, self._batches)
        images = alone if self._loader is None else self._loader
        self._waited, self._seconds, self._served = 0.0, 0.0, 0
        began = perf_counter()
        for shown, (_, *views) in zip(images, self._batches, strict=True):
            self._waited += perf_counter() - began
            yield shown, torch.tensor(views)
            now = perf_counter()
            self._seconds, began = self._seconds + now - began, now
            self._served += recipe.forward_batch

    @property
    def pace(self) -> tuple[float, float]:
        """The share of an epoch's time so far that was spent waiting for batches; images a second.

        Nothing where few images are kept augmented. The images are those of all workers of a team.
        """
        if self._is_kept or not self._seconds:
            return 0.0, 0.0
        return self._waited / self._seconds, self._served / self._seconds


def _whole(batch: Any) -> Any:
    """Keep a batch whole: the data set made it so."""
    return batch
