"""Training images per second of the real loop, beside a bare PyTorch loop and timm's pieces.

The bare loop is the limit: the same model, loss and optimizer on one batch that is a tensor in
memory already, with no augmentation. timm has no loop of its own in the package, so its data set,
transforms, Mixup, optimizer and scheduler are put together as its training script does, for DeiT's
recipe on the digits as files. Ours is `train()` as a trial runs it: order, augmentation, decoding,
schedule. Before anything is timed, an epoch of each side on the same batches, from the same
weights and at one rate, must leave the same weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageDataset, Mixup, create_transform
from timm.data.loader import fast_collate
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loader import write_images
from benchmarks.measure import (
    DEVICE,
    Clock,
    Figure,
    device_seconds,
    in_turns,
    rate,
    require,
)
from grid.study import base_named
from trainables.data.augment import TrainBatches, mix
from trainables.data.base import Data, Split, to_unit
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import CIFAR10, DIGITS, IMAGENET, Scale
from trainables.train.loop import PRECISIONS, accuracy, train
from trainables.train.optim import build_optimizer
from trainables.train.team import ALONE

EPOCHS = 10
ALIKE = 0.1  # of held-out accuracy: the sides draw otherwise
# Of how far an epoch moves the weights: timm and a compiler sum in another order, and where a
# gradient is nothing but rounding, as that of the keys' bias, AdamW takes a whole step by its sign.
ROUNDED = 0.05

Batch = tuple[Tensor, Tensor]  # images as the model gets them, labels_B or targets_BK
Side = Callable[[Recipe, Classifier, Iterable[Batch]], Iterator[None]]


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratios to the bare loop at 32 px and 224 px, and to timm's at 16 px."""
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # Short epochs in many turns: a machine's speed changes within seconds.
        yield beside_bare(*small(64), batch=32, repeats=4 * repeats)
        # A worker reads the files beside the training, as the command's do, hence the wall clock.
        pictures = large(root / "large", 4 if quick else 8)
        yield beside_bare(*pictures, batch=4, repeats=8 * repeats, clock=time.perf_counter)
        yield from beside_timm(root / "digits", 1 if quick else EPOCHS - 1)
    if DEVICE.type == "cuda":
        for recipe in (base_named("resnet50"), base_named("deit_small")):
            for precision, compiled in (("float32", False), ("bf16", False), ("bf16", True)):
                sides = full_size(recipe, precision, 512)
                yield beside_bare(*sides, batch=64, repeats=repeats, compiled=compiled)


def beside_bare(
    recipe: Recipe,
    data: Data,
    *,
    batch: int,
    repeats: int,
    clock: Clock = device_seconds,
    compiled: bool = False,
) -> Figure:
    """Time an epoch of each side in turns; its judging is cut down to one image.

    Ours, `compiled`, rounds otherwise; so what it computes is looked at in float32.
    """
    # A few images at the rate of a whole batch would make rounding grow from step to step.
    learning_rate = recipe.learning_rate * batch / recipe.batch_size
    fewer = {"batch_size": batch, "learning_rate": learning_rate}
    recipe = recipe.replace(**fewer, epochs=repeats + 1, warmup_epochs=0.0)
    data = replace(data, held_out=few(data.held_out))
    bare_side = partial(bare_epochs, data.held_out)
    whole = recipe.replace(precision="float32") if compiled else recipe
    drift = drift_from(bare_side, whole, data, compiled=compiled)
    least = ROUNDED if compiled else 0.0
    require(drift <= least, f"weights after the same batches, by {drift:.1e} of their way")
    ours = train(recipe, build_classifier(recipe), data, device=DEVICE, compiled=compiled)
    one = to_unit(data.train.images[:batch].to(DEVICE)), data.train.labels[:batch].to(DEVICE)
    steps = len(data.train) // batch
    bare = bare_side(recipe, build_classifier(recipe), [one] * steps)
    pairs = in_turns(lambda: next(ours), lambda: next(bare), repeats=repeats, clock=clock)
    how = f"{recipe.precision}{', compiled' * compiled}"
    alike = f"weights within {drift:.0e} of their way" if drift else "the same weights, each bit,"
    return Figure(
        name=f"training {recipe.model} at {data.train.images.shape[-1]} px, {how}, "
        "ours / bare loop",
        values=tuple(bare_s / our_s for our_s, bare_s in pairs),
        target=0.97,
        same=f"{alike} after {steps} steps of {batch} images, "
        f"{rate(steps * batch, (our_s for our_s, _ in pairs))}",
    )


def drift_from(side: Side, recipe: Recipe, data: Data, *, compiled: bool = False) -> float:
    """Return how far a side's weights end from ours after an epoch, of how far ours have moved.

    Both begin with the same weights, see the same batches and keep the rate.
    """
    recipe = recipe.replace(scheduler="step", epochs=EPOCHS, warmup_epochs=0.0)
    start, ours, theirs = (build_classifier(recipe).to(DEVICE) for _ in range(3))
    next(train(recipe, ours, data, device=DEVICE, compiled=compiled))
    next(side(recipe, theirs, list(first_epoch(recipe, data))))
    at_start, here, there = (
        torch.cat([value.double().flatten() for value in model.state_dict().values()])
        for model in (start, ours, theirs)
    )
    return float((there - here).norm() / (here - at_start).norm())


def first_epoch(recipe: Recipe, data: Data) -> Iterator[Batch]:
    """Yield the batches of a training's first epoch as its model gets them."""
    batches = TrainBatches(recipe, data.train, workers=0).epoch(0)
    for step, (images, seen) in enumerate(batches):
        yield mix(
            recipe,
            to_unit(images.to(DEVICE)),
            data.train.labels[seen].to(DEVICE),
            num_classes=len(data.class_names),
            epoch=0,
            step=step,
        )


def beside_timm(root: Path, repeats: int) -> Iterator[Figure]:
    """Time epochs of DeiT's recipe on the digits; all sides must step and learn alike.

    A process keeps its augmented epochs for the trainings after the first, so two of ours are
    timed: one that makes them, and the same once more behind it.
    """
    recipe = DIGITS.shrink(base_named("deit_small")).replace(epochs=repeats + 1)
    data = load_data(DIGITS)
    judged_by_one = replace(data, held_out=few(data.held_out))
    drift = drift_from(timm_epochs, recipe, judged_by_one)
    require(drift <= ROUNDED, f"weights after the same batches, by {drift:.1e} of their way")
    models = [build_classifier(recipe) for _ in range(3)]
    first, later = (train(recipe, model, judged_by_one, device=DEVICE) for model in models[:2])
    theirs = timm_epochs(recipe, models[2], TimmBatches(recipe, data, root))
    sides = [lambda side=side: next(side) for side in (first, later, theirs)]
    rounds = in_turns(*sides, repeats=repeats, clock=device_seconds)
    found = [accuracy(model, data.held_out, device=DEVICE, team=ALONE) for model in models]
    require(found[0] == found[1], f"two of ours are of accuracy {found[0]} and {found[1]}")
    told = "held-out accuracy " + ", ".join(f"{each:.2f}" for each in found)
    require(repeats + 1 < EPOCHS or max(found) - min(found) <= ALIKE, told)
    for place, which in enumerate(("a process's first", "a further one")):
        yield Figure(
            name=f"training {recipe.model} on the digits, {which}, ours / timm's pieces",
            values=tuple(seconds[2] / seconds[place] for seconds in rounds),
            target=1.5,
            same=f"weights within {drift:.0e} of their way after the same batches; {told}",
        )


class TimmBatches:
    """timm's data set of files, transforms, collation and Mixup: an epoch each time it is asked."""

    def __init__(self, recipe: Recipe, data: Data, root: Path) -> None:
        for place, image in enumerate(data.train.images):
            folder = root / str(int(data.train.labels[place]))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place:04d}.png")
        transform = create_transform(
            data.train.images.shape[-1],
            is_training=True,
            use_prefetcher=True,
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            hflip=0.0,
            auto_augment=f"rand-m{recipe.randaug_magnitude}-mstd0.5-inc1",
            interpolation="bicubic",
        )
        self._loader = torch.utils.data.DataLoader(
            ImageDataset(str(root), transform=transform),
            batch_size=recipe.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=fast_collate,
        )
        self._mixup = Mixup(
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
            prob=recipe.mix_probability,
            switch_prob=recipe.switch_probability,
            label_smoothing=recipe.label_smoothing,
            num_classes=len(data.class_names),
        )

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._loader:
            yield self._mixup(to_unit(images.to(DEVICE)), labels.to(DEVICE))


def timm_epochs(recipe: Recipe, classifier: Classifier, batches: Iterable[Batch]) -> Iterator[None]:
    """Train on the batches, epoch by epoch, by timm's loss, optimizer and schedule."""
    classifier.to(DEVICE)
    optimizer = create_optimizer_v2(
        classifier, opt="adamw", lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = CosineLRScheduler(optimizer, t_initial=recipe.epochs, lr_min=recipe.floor_rate)
    loss_of = SoftTargetCrossEntropy()
    for epoch in range(recipe.epochs):
        schedule.step(epoch)
        classifier.train()
        for images, targets in batches:
            optimizer.zero_grad()
            loss_of(classifier(images), targets).backward()
            optimizer.step()
        yield


def bare_epochs(
    held_out: Split, recipe: Recipe, classifier: Classifier, batches: Iterable[Batch]
) -> Iterator[None]:
    """Train on the batches, epoch by epoch, and judge by `held_out`: the plain PyTorch loop."""
    classifier.to(DEVICE)
    optimizer = build_optimizer(recipe, classifier)
    half = PRECISIONS[recipe.precision]
    while True:
        classifier.train()
        for images, labels in batches:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, half, enabled=half is not torch.float32):
                logits_BK = classifier(images)
            F.cross_entropy(logits_BK.float(), labels).backward()
            optimizer.step()
        accuracy(classifier, held_out, device=DEVICE)
        yield


def small(count: int) -> tuple[Recipe, Data]:
    """Return ResNet-18's recipe at CIFAR-10's scale, and noise in memory at 32 px."""
    recipe = CIFAR10.shrink(base_named("resnet50")).replace(model="resnet18")
    return recipe, noise(CIFAR10, count)


def noise(scale: Scale, count: int) -> Data:
    """Return a data set of noise in memory, of ten classes."""
    pixels = torch.randint(0, 256, (count, 3, *[scale.image_size] * 2), dtype=torch.uint8)
    split = Split(images=pixels, labels=torch.arange(count) % 10, ids=tuple(map(str, range(count))))
    names = tuple(map(str, range(10)))
    return Data(data_set=scale.data_set, train=split, held_out=few(split), class_names=names)


def large(root: Path, count: int) -> tuple[Recipe, Data]:
    """Return ResNet-50's recipe at 224 px, and JPEGs in class folders that a worker reads."""
    write_images(root, count, (500, 375))
    source = DataSource(root=root, workers=1)
    scale = scale_of("folder", source, image_size=224)
    data = load_data(scale, source)
    return scale.shrink(base_named("resnet50")), data


def full_size(recipe: Recipe, precision: str, count: int) -> tuple[Recipe, Data]:
    """Return a recipe of the study's without its augmentation, and noise in memory at 224 px."""
    data = noise(IMAGENET, count)
    return recipe.replace(precision=precision, augmentations=(), label_smoothing=0.0), data


def few(split: Split) -> Split:
    """Return one image, so that judging after an epoch costs next to nothing."""
    return split.subset(1, seed=0)
