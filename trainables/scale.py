"""Scales: which data, image size, model widths and epochs stand behind a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from trainables.recipe import Recipe

PUBLISHED_DEIT_WIDTH = 384


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One scale, and the rule by which it shrinks the study's recipes.

    The rule: depth / `depth_divisor` (rounded, at least 1), width / the family's divisor (DeiT's
    rounded up to whole heads), epochs * `epochs_factor`, RandAugment magnitude and mix
    probability / `strength_divisor`. Where the data are too few for the study's total batches,
    `batch_size` and `learning_rate` state the scale's own by family and optimizer.
    """

    name: str
    title: str
    image_size: int
    num_classes: int
    train_images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epsilon: Fraction
    small_epsilon: Fraction
    stem: Literal["imagenet", "small"] = "imagenet"
    patch_size: int = 16
    head_width: int = 64
    depth_divisor: int = 1
    resnet_width_divisor: int = 1
    vit_width_divisor: int = 1
    init_std: float = 0.02
    position_std: float = 0.02
    epochs_factor: Fraction = Fraction(1)
    strength_divisor: int = 1
    batch_size: dict[str, int] = field(default_factory=dict)
    learning_rate: dict[tuple[str, str], float] = field(default_factory=dict)
    attack_subset: int = 5000
    autoattack_subset: int = 5000
    square_queries: int = 5000
    epoch_cost: dict[str, float] = field(default_factory=dict)
    validate_every: int = 1

    def depth(self, blocks: int) -> int:
        """Return the number of blocks that stands for `blocks` of the study's model."""
        return max(1, math.floor(blocks / self.depth_divisor + 0.5))

    def resnet_channels(self) -> tuple[int, int, int, int]:
        """Return the four stages' widths."""
        first = 64 // self.resnet_width_divisor
        return first, 2 * first, 4 * first, 8 * first

    def vit_heads(self, width: int) -> int:
        """Return the number of heads, each `head_width` wide, of a DeiT of published `width`."""
        return math.ceil(width / self.vit_width_divisor / self.head_width)

    def epochs(self, published: int) -> int:
        """Return the epochs that stand for `published` epochs of the study."""
        return max(1, round(published * self.epochs_factor))

    def cost(self, recipe: Recipe) -> float:
        """Return what training the recipe costs, in the unit of `epoch_cost`; for ordering."""
        return recipe.epochs * self.epoch_cost.get(recipe.model, max(self.epoch_cost.values()))

    def shrink(self, recipe: Recipe) -> Recipe:
        """Return the study's recipe as it is trained at this scale."""
        batch = self.batch_size.get(recipe.family, recipe.batch_size)
        rate = self.learning_rate.get((recipe.family, recipe.optimizer), recipe.learning_rate)
        epochs = self.epochs(recipe.epochs)
        return recipe.replace(
            scale=self.name,
            epochs=epochs,
            warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs,
            batch_size=batch,
            learning_rate=rate,
            randaug_magnitude=round(recipe.randaug_magnitude / self.strength_divisor),
            mix_probability=recipe.mix_probability / self.strength_divisor,
        )


IMAGENET = Scale(
    name="imagenet",
    title="ImageNet, 224 px",
    image_size=224,
    num_classes=1000,
    train_images=1_281_167,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    epsilon=Fraction(4, 255),
    small_epsilon=Fraction(1, 1000),
    # Multiply-accumulates of one image, in units of 10^9.
    epoch_cost={
        "resnet18": 1.8,
        "resnet50": 4.1,
        "resnet101": 7.8,
        "resnet200": 15.1,
        "deit_mini": 2.1,
        "deit_small": 4.6,
        "deit_base": 17.6,
        "hybrid_deit": 3.9,
    },
)

DIGITS = Scale(
    name="digits",
    title="scikit-learn's handwritten digits, 16 px (1,200 to train, 597 held out)",
    image_size=16,
    num_classes=10,
    train_images=1200,
    mean=(0.3, 0.3, 0.3),
    std=(0.35, 0.35, 0.35),
    epsilon=Fraction(16, 255),
    small_epsilon=Fraction(4, 255),
    stem="small",
    patch_size=4,
    head_width=16,
    depth_divisor=4,
    resnet_width_divisor=8,
    vit_width_divisor=6,
    # At width 64 timm's 0.02 starts every token nearly alike: 20 epochs reached 60 % with it.
    init_std=0.1,
    position_std=1.0,
    epochs_factor=Fraction(12, 100),
    strength_divisor=4,
    batch_size={"resnet": 64, "deit": 32, "hybrid": 32, "timm": 64},
    learning_rate={
        ("resnet", "sgd"): 0.2,
        ("resnet", "adamw"): 8e-3,
        ("deit", "sgd"): 0.1,
        ("deit", "adamw"): 2e-3,
        ("hybrid", "sgd"): 0.1,
        ("hybrid", "adamw"): 2e-3,
        ("timm", "sgd"): 0.1,
        ("timm", "adamw"): 2e-3,
    },
    attack_subset=200,
    autoattack_subset=50,
    square_queries=500,
    # Seconds of an epoch on one core of a 2.5 GHz Xeon.
    epoch_cost={
        "resnet18": 0.33,
        "resnet50": 0.48,
        "resnet101": 0.7,
        "resnet200": 1.2,
        "deit_mini": 0.5,
        "deit_small": 0.74,
        "deit_base": 1.6,
        "hybrid_deit": 0.9,
    },
    validate_every=4,
)

SCALES: dict[str, Scale] = {scale.name: scale for scale in (DIGITS, IMAGENET)}


def scale_named(name: str) -> Scale:
    """Return a scale by name; ValueError lists the names."""
    if name not in SCALES:
        raise ValueError(f"unknown scale {name!r}; one of {sorted(SCALES)}")
    return SCALES[name]
