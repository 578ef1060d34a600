"""Scales: which data, image size, model widths and epochs stand behind a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import fmean
from typing import Any, Literal, get_args

from trainables.data.registry import DATA_SETS, FOLDER, REDUCED, DataSet, data_set_named
from trainables.models import Settings, model_named
from trainables.recipe import STUDY_OPTIMIZERS, CurriculumRow, Preprocessing, Recipe

PUBLISHED_EPSILON = Fraction(4, 255)
LEAST_STEPS = 8  # of an epoch
STUDY_SIZE = 224  # pixels a side of the study's images
# The arguments of timm's schedules that count epochs.
SCHEDULE_EPOCHS = ("decay_epochs", "decay_milestones", "stable_timescale")
AT_BATCH = 4096  # of adversarial training, whose rate is in proportion
# The study's settings of a kind of model and an optimizer. DeiT under SGD is not in the study: 0.1
# per 256 images.
_FIELDS = ("learning_rate", "weight_decay", "batch_size", "warmup_epochs")
_PUBLISHED: dict[tuple[str, str], tuple[float, float, int, float]] = {
    ("cnn", "sgd"): (0.1, 1e-4, 256, 0.0),
    ("cnn", "adamw"): (5e-4, 0.05, 256, 5.0),
    ("transformer", "sgd"): (0.8, 1e-4, 2048, 0.0),
    ("transformer", "adamw"): (2e-3, 0.05, 2048, 5.0),
}


def published_settings(model: str, optimizer: str) -> dict[str, float | int]:
    """Return the study's rate, decay, batch and warm-up; none for an unknown optimizer."""
    kind = "cnn" if model_named(model).settings == "cnn" else "transformer"
    return dict(zip(_FIELDS, _PUBLISHED.get((kind, optimizer), ()), strict=False))


@dataclass(frozen=True, kw_only=True)
class PatchBudget:
    """What the texture patch attack may spend on an image; the study's unless a scale says less.

    images: how many held-out images are attacked. area: one patch's share of the image.
    textures: dictionary entries per class. samples, steps: per patch. Source: STUDY section 5.
    """

    images: int = 5000
    patches: int = 4
    area: float = 0.025
    textures: int = 30
    samples: int = 500
    steps: int = 50

    def side(self, image_size: int) -> int:
        """Return a patch's side in pixels; ValueError when not one pixel fits, or no position."""
        side = math.floor(math.sqrt(image_size**2 * self.area))
        if not 1 <= side < image_size:
            raise ValueError(f"a patch of area {self.area} does not fit {image_size} px")
        return side


def _stretched(epochs: Any, share: float) -> Any:
    """Return epochs, or each of several, times a share; below 1 they are a share already."""
    if isinstance(epochs, tuple):
        return tuple(_stretched(epoch, share) for epoch in epochs)
    return epochs * share if epochs >= 1 else epochs


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One scale, and the rule by which it shrinks the study's recipes.

    The rule: depth / `depth_divisor` (rounded, at least 1), width / the family's divisor (DeiT's
    rounded up to whole heads), epochs * `epochs_factor`, RandAugment magnitude and mix
    probability / `strength_divisor`, what a stated `least_crop` cuts off as well, radii of
    adversarial training * `training_epsilon` (default: `epsilon`) / (4/255). Where the data are too
    few for the study's total batches, `batch_size`, `learning_rate` and `weight_decay` state the
    scale's own by a model's settings and the optimizer, and ghost batches shrink with them; a
    recipe that departs from the study's there departs from the scale's in proportion.
    `natural_tilt`: by how many degrees natural-adversarial images are turned, either way or not.
    `stored_jpeg`: at which quality generated corruptions are stored, as ImageNet-C's are at 85; 0:
    they are not.
    """

    data_set: DataSet
    epsilon: Fraction = PUBLISHED_EPSILON
    small_epsilon: Fraction = Fraction(1, 1000)
    training_epsilon: Fraction | None = None
    natural_tilt: float = 0.0
    stored_jpeg: int = 0
    stem: Literal["imagenet", "small"] = "imagenet"
    stem_stride: int = 2
    patch_size: int = 16
    head_width: int = 64
    parameter_divisor: int = 1
    depth_divisor: int = 1
    resnet_width_divisor: int = 1
    vit_width_divisor: int = 1
    init_std: float = 0.02
    position_std: float = 0.02
    epochs_factor: Fraction = Fraction(1)
    strength_divisor: int = 1
    batch_size: dict[str, int] = field(default_factory=dict)
    learning_rate: dict[tuple[str, str], float] = field(default_factory=dict)
    weight_decay: dict[tuple[str, str], float] = field(default_factory=dict)
    attack_subset: int = 5000
    probe_images: int = 500
    ghost_batch: int = 64
    patch: PatchBudget = PatchBudget()
    autoattack: Literal["exact", "bounded"] = "exact"
    autoattack_subset: int = 5000
    autoattack_bound: float = 0.02  # a share of the images
    square_queries: int = 5000
    attacks_in: Literal["float32", "bf16"] = "float32"  # in which they seek; verdicts are float32's
    smoothing_samples: int = 10_000  # a certificate ends at 3.2 sigma; Cohen et al.: 100,000, 3.8
    # Trainings of each row that a headline claim compares; at most 3 of adversarial training.
    headline_seeds: int = 3
    cost_unit: Literal["macs", "seconds"] = "macs"
    validate_every: int = 1
    detect: float = 0.0  # the least difference that claims are to tell, as a share; 0: not stated
    # Drawn by a designed run for cells that no claim is about; 0: the evaluators' numbers above.
    unclaimed_images: int = 0

    @property
    def name(self) -> str:
        return self.data_set.name

    @property
    def title(self) -> str:
        return self.data_set.title

    @property
    def image_size(self) -> int:
        return self.data_set.image_size

    @property
    def num_classes(self) -> int:
        return self.data_set.num_classes

    def preprocessed(self, preprocessing: Preprocessing) -> Scale:
        """Return the scale as a model with a preprocessing of its own sees it."""
        return replace(self, data_set=self.data_set.preprocessed(preprocessing))

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

    def epoch_cost(self, recipe: Recipe) -> float:
        """Return what an epoch of plain training costs, in the unit `cost_unit` of a model.

        At another image size than the scale's it is in proportion to the pixels.
        """
        pixels = (self.preprocessed(recipe.preprocessing).image_size / self.image_size) ** 2
        return float(getattr(model_named(recipe.model).cost, self.cost_unit)) * pixels

    def cost(self, recipe: Recipe) -> float:
        """Return what training the recipe costs, in the unit of `epoch_cost`; for ordering."""
        epoch = self.epoch_cost(recipe)
        # Forward, weight gradients and input gradients cost about the same; a teacher's forward
        # is one more of the three. AutoPGD weighs its start as well; TRADES and MART learn from
        # the clean images too, and TRADES attacks the answers to them.
        passes = 3 + {"ce": 0, "trades": 4, "mart": 3}[recipe.adversarial_loss]
        if attack := recipe.adversary:
            passes += 2 * (attack.steps + (attack.attack == "apgd"))
        size = self.preprocessed(recipe.preprocessing).image_size
        pixels = fmean((side / size) ** 2 for side in recipe.train_sizes or (size,))
        return recipe.epochs * epoch * pixels * (passes + (1 if recipe.teacher else 0)) / 3

    def own_value(self, recipe: Recipe, name: str) -> float:
        """Return the rate, decay or batch of the study's recipe as it is at this scale.

        It is the scale's own, times what the recipe makes of the study's. The rate of an optimizer
        that the study does not have follows the square root of the batch.
        """
        value: float = getattr(recipe, name)
        settings = model_named(recipe.model).settings
        optimizer = recipe.optimizer if recipe.optimizer in STUDY_OPTIMIZERS else "adamw"
        kind = settings if name == "batch_size" else (settings, optimizer)
        stated: float | None = getattr(self, name).get(kind)
        if name == "learning_rate" and optimizer != recipe.optimizer:
            return value * math.sqrt(self.own_value(recipe, "batch_size") / recipe.batch_size)
        if stated is None:
            return value
        published = published_settings(recipe.model, optimizer)
        if recipe.adversary:
            published["learning_rate"] *= AT_BATCH / published["batch_size"]
            published["batch_size"] = AT_BATCH
        return stated * (value / published[name])

    def shrink(self, recipe: Recipe) -> Recipe:
        """Return the study's recipe, teacher included, as it is trained at this scale."""
        if not recipe.epochs:
            return recipe.replace(scale=self.name)
        epochs = max(1, round(recipe.epochs * self.epochs_factor))
        rate, batch = self._rate_and_batch(recipe)
        changes: dict[str, Any] = {
            "scale": self.name,
            "epochs": epochs,
            "warmup_epochs": recipe.warmup_epochs * epochs / recipe.epochs,
            "warmup_rate": recipe.warmup_rate * rate / recipe.learning_rate,
            "learning_rate": rate,
            "weight_decay": self.own_value(recipe, "weight_decay"),
            "batch_size": batch,
            "curriculum": tuple(
                row.model_copy(update=self._softened(row)) for row in recipe.curriculum
            ),
            **self._softened(recipe),
            **self._beyond_study(recipe, epochs),
        }
        if recipe.micro_batch:
            changes["micro_batch"] = min(recipe.micro_batch, int(changes["batch_size"]))
        if recipe.norm == "ghost":
            changes["ghost_batch"] = min(recipe.ghost_batch, self.ghost_batch)
        if recipe.adversary:
            radius, attack = self.training_epsilon or self.epsilon, recipe.adversary
            ratio = float(radius / PUBLISHED_EPSILON)
            if attack.norm == "l2":  # the distance to a max-norm ball's corner grows by the side
                ratio *= self.image_size / STUDY_SIZE
            changes["adversary"] = attack.model_copy(
                update={
                    "epsilon": attack.epsilon * ratio,
                    "step_size": attack.step_size and attack.step_size * ratio,
                    "epsilon_epochs": attack.epsilon_epochs * epochs / recipe.epochs,
                }
            )
        return recipe.with_prerequisites(self.shrink).replace(**changes)

    def _rate_and_batch(self, recipe: Recipe) -> tuple[float, int]:
        """Return a recipe's rate and total batch at this scale.

        A batch that would leave an epoch under 8 steps is a power of two that does not, and one
        under half the scale's own is this half; SGD's rate follows in proportion, that of others by
        the square root.
        """
        rate = self.own_value(recipe, "learning_rate")
        batch = max(1, round(self.own_value(recipe, "batch_size")))
        most = 2 ** math.floor(math.log2(max(1, self.data_set.train_images // LEAST_STEPS)))
        stated = self.batch_size.get(model_named(recipe.model).settings, 2 * batch)
        fitting = min(most, max(batch, stated // 2))
        ratio = fitting / batch
        return rate * (ratio if recipe.optimizer == "sgd" else math.sqrt(ratio)), fitting

    def _beyond_study(self, recipe: Recipe, epochs: int) -> dict[str, Any]:
        """Return what the study does not vary, as it is at this scale.

        The mean of the weights spans the same share of the training's steps; train sizes are in
        proportion to the image size, in whole patches.
        """
        share = epochs / recipe.epochs
        arguments = {
            name: _stretched(value, share) if name in SCHEDULE_EPOCHS else value
            for name, value in recipe.scheduler_args.items()
        }
        changes: dict[str, Any] = {
            "cooldown_epochs": round(recipe.cooldown_epochs * share),
            "scheduler_args": arguments,
            # Where no image is flipped, both values are one recipe.
            "flip": recipe.flip or not self.data_set.flip,
        }
        if recipe.least_crop and self.strength_divisor > 1:
            changes["least_crop"] = 1 - (1 - recipe.least_crop) / self.strength_divisor
        if recipe.ema_decay:
            images = self.data_set.train_images, IMAGENET.data_set.train_images
            batches = self._rate_and_batch(recipe)[1], recipe.batch_size
            ratio = Fraction(
                epochs * images[0] * batches[1], recipe.epochs * images[1] * batches[0]
            )
            changes["ema_decay"] = max(0.0, 1 - (1 - recipe.ema_decay) / float(ratio))
        if recipe.train_sizes and self.image_size != STUDY_SIZE:
            patches = self.image_size / STUDY_SIZE / self.patch_size
            sizes = (max(1, round(size * patches)) * self.patch_size for size in recipe.train_sizes)
            changes["train_sizes"] = tuple(sizes)
        return changes

    def _softened(self, strong: Recipe | CurriculumRow) -> dict[str, float]:
        return {
            "randaug_magnitude": round(strong.randaug_magnitude / self.strength_divisor),
            "mix_probability": strong.mix_probability / self.strength_divisor,
        }


IMAGENET = Scale(data_set=DATA_SETS["imagenet"], headline_seeds=1)  # once, as published

DIGITS = Scale(
    data_set=DATA_SETS["digits"],
    # By the rule of `python -m benchmarks.calibrate`, measured with AutoAttack's two APGD stages:
    # of 3 x 200 images they leave the clean-trained ResNet-50 3.8 % at 27/255 and of 3 x 64 44 % at
    # 16/255; the adversarially trained one with GELU 34 % of 3 x 200 at 27/255 (seeds 0 to 2).
    epsilon=Fraction(27, 255),
    small_epsilon=Fraction(16, 255),
    # One-step training at 24/255 and above overfits to its own attack: 78 to 97 % clean, not 98.
    training_epsilon=Fraction(16, 255),
    stem="small",
    patch_size=4,
    head_width=16,
    parameter_divisor=110,  # at least, of every model of the study
    depth_divisor=4,
    resnet_width_divisor=8,
    vit_width_divisor=6,
    # The clean-trained ResNet-50 gets 66, 63 and 70 % of 597 right (seeds 0 to 2). Its 12 or 13
    # errors on them as they are would fill a quarter of 50 hard images.
    natural_tilt=20.0,
    # At width 64 timm's 0.02 starts every token nearly alike: 20 epochs reached 60 % with it.
    # DeiT-S reaches 96.1, 97.7 and 97.5 % at 0.5 (seeds 0 to 2), 96.3, 95.0 and 97.3 at 1.
    init_std=0.1,
    position_std=0.5,
    epochs_factor=Fraction(1, 10),
    strength_divisor=4,
    batch_size={"cnn": 64, "transformer": 32, "timm": 64},
    # ResNet-50 reaches 98.0, 97.8 and 97.8 % with SGD at 0.1 (seeds 0 to 2), 95.1 to 97.2 at 0.2,
    # and trains no more at 0.3: its residual branches start with a gain of one.
    learning_rate={
        ("cnn", "sgd"): 0.1,
        ("cnn", "adamw"): 8e-3,
        ("transformer", "sgd"): 0.1,
        ("transformer", "adamw"): 2e-3,
        ("timm", "sgd"): 0.1,
        ("timm", "adamw"): 2e-3,
    },
    attack_subset=64,
    autoattack="bounded",
    autoattack_subset=60,
    unclaimed_images=32,
    square_queries=500,
    smoothing_samples=1000,
    probe_images=50,
    headline_seeds=7,
    ghost_batch=32,
    patch=PatchBudget(images=50, textures=5, samples=25, steps=8),
    cost_unit="seconds",
    validate_every=4,
    detect=0.10,
)

CIFAR10 = Scale(
    data_set=DATA_SETS["cifar10"],
    # The radius that the field judges CIFAR-10 by (RobustBench); the small one is a quarter. Not
    # calibrated: `python -m benchmarks.calibrate --scale cifar10 --data DIR` would.
    epsilon=Fraction(8, 255),
    small_epsilon=Fraction(2, 255),
    stem="small",
    stem_stride=1,
    patch_size=4,
    batch_size=dict.fromkeys(get_args(Settings), 128),
    learning_rate={
        ("cnn", "sgd"): 0.1,
        ("cnn", "adamw"): 5e-4,
        ("transformer", "sgd"): 0.05,
        ("transformer", "adamw"): 5e-4,
        ("timm", "sgd"): 0.1,
        ("timm", "adamw"): 5e-4,
    },
    weight_decay={("cnn", "sgd"): 5e-4},
    patch=PatchBudget(images=1000, textures=10),
)

SCALES: dict[str, Scale] = {scale.name: scale for scale in (DIGITS, IMAGENET, CIFAR10)}
_FEW_STEPS = 16  # of an epoch: fewer leave a schedule by epochs without meaning
_STUDYS_DEIT_BATCH = 2048


def scale_names() -> tuple[str, ...]:
    """Return what `--scale` takes: every data set, and the user's folders."""
    return (*DATA_SETS, FOLDER)


def scale_named(name: str) -> Scale:
    """Return a scale by its data set's name; ValueError lists the names."""
    if name in SCALES:
        return SCALES[name]
    data_set = data_set_named(name)
    if name.endswith(REDUCED):
        return _reduced(scale_named(name.removesuffix(REDUCED)), data_set)
    if data_set.chosen_train and (whole := name.rpartition("-")[0]) in SCALES:
        return replace(SCALES[whole], data_set=data_set)
    return scale_for(data_set)


def _reduced(scale: Scale, data_set: DataSet) -> Scale:
    """Return a scale whose models are cut as at digits and trained by its values.

    What follows from the images is the scale's own: radii, stem and patches, how many are attacked.
    """
    names = ("epsilon", "small_epsilon", "stem", "stem_stride", "patch_size", "attack_subset")
    attacks = ("autoattack", "autoattack_subset", "autoattack_bound", "detect", "unclaimed_images")
    trained = ("training_epsilon", "natural_tilt")
    of_images = {name: getattr(scale, name) for name in (*names, *attacks, *trained)}
    return replace(DIGITS, data_set=data_set, epochs_factor=Fraction(1), **of_images)


def scale_of_recipe(recipe: Recipe) -> Scale:
    """Return a recipe's scale, with the recipe's own preprocessing."""
    return scale_named(recipe.scale).preprocessed(recipe.preprocessing)


def scale_for(data_set: DataSet) -> Scale:
    """Return the scale of a data set that has no training values of its own.

    The study's models and recipes at another image size. At most 64 px: the small stem; patches
    so that a side has at least 8. Where the study's batches would leave an epoch fewer than 16
    steps: a power of two that does not, SGD's rate in proportion, AdamW's by the square root.
    """
    size = data_set.image_size
    batch, rates = _batch_for(data_set.train_images)
    return Scale(
        data_set=data_set,
        stem="small" if size <= 64 else "imagenet",
        stem_stride=1 if size <= 32 else 2,
        patch_size=next(
            (side for side in (16, 8, 4, 2) if size % side == 0 and size // side >= 8), 1
        ),
        batch_size=dict.fromkeys(get_args(Settings), batch) if batch else {},
        learning_rate=rates,
        ghost_batch=min(64, batch or 64),
        patch=PatchBudget(textures=5),
    )


def _batch_for(train_images: int) -> tuple[int | None, dict[tuple[str, str], float]]:
    """Return the total batch for so many images and its rates; none: the study's own do."""
    if train_images >= _FEW_STEPS * _STUDYS_DEIT_BATCH * 2:
        return None, {}
    fitting = max(8, min(256, train_images // _FEW_STEPS))
    batch = 2 ** math.floor(math.log2(fitting))
    sgd, adamw = batch / 256, math.sqrt(batch / _STUDYS_DEIT_BATCH)
    rates = {("cnn", "sgd"): 0.1 * sgd, ("cnn", "adamw"): 5e-4 * math.sqrt(sgd)}
    for settings in ("transformer", "timm"):
        rates |= {(settings, "sgd"): 0.1 * sgd, (settings, "adamw"): 2e-3 * adamw}
    return batch, rates
