"""Training images per second of the real loop, beside a bare PyTorch loop and timm's pieces.

The bare loop is the limit: the same model, loss and optimizer on one batch that is a tensor in
memory already, with no augmentation. timm has no loop of its own in the package, so its data set,
transforms, Mixup, optimizer and scheduler are put together as its training script does, for DeiT's
recipe on the digits as files. Ours is `train()` as a trial runs it: order, augmentation, decoding,
schedule.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
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
    device_name,
    device_seconds,
    in_turns,
    require,
)
from grid.studies import deit, resnet50
from trainables.data import Data, Split, load_data, to_unit
from trainables.loop import PRECISIONS, accuracy, train
from trainables.models import Classifier, build_classifier
from trainables.optim import build_optimizer
from trainables.recipe import Recipe
from trainables.scale import CIFAR10, DIGITS
from trainables.source import DataSource, scale_of
from trainables.team import ALONE

EPOCHS = 10
ALIKE = 0.1  # of held-out accuracy: the sides draw otherwise


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
        for recipe in (resnet50(), deit()):
            for precision in ("float32", "bf16"):
                yield beside_bare(*full_size(recipe, precision, 512), batch=64, repeats=repeats)


def beside_bare(
    recipe: Recipe, data: Data, *, batch: int, repeats: int, clock: Clock = device_seconds
) -> Figure:
    """Time an epoch of each side in turns; its judging is cut down to one image."""
    recipe = recipe.replace(batch_size=batch, epochs=repeats + 1, warmup_epochs=0.0)
    judged_by_one = replace(data, held_out=few(data.held_out))
    ours = train(recipe, build_classifier(recipe), judged_by_one, device=DEVICE)
    bare = bare_epochs(recipe, judged_by_one)
    pairs = in_turns(lambda: next(ours), lambda: next(bare), repeats=repeats, clock=clock)
    steps = len(data.train) // batch
    rate = steps * batch / statistics.median(our_s for our_s, _ in pairs)
    return Figure(
        name=f"training {recipe.model} at {data.train.images.shape[-1]} px, {recipe.precision}, "
        "ours / bare loop",
        values=tuple(bare_s / our_s for our_s, bare_s in pairs),
        target=0.97,
        same=f"{steps} steps of {batch} images, ours {rate:.0f} a second on {device_name()}",
    )


def beside_timm(root: Path, repeats: int) -> Iterator[Figure]:
    """Time epochs of DeiT's recipe on the digits; all sides must learn alike.

    A process keeps its augmented epochs for the trainings after the first, so two of ours are
    timed: one that makes them, and the same once more behind it.
    """
    recipe = DIGITS.shrink(deit()).replace(epochs=repeats + 1)
    data = load_data(DIGITS)
    models = [build_classifier(recipe) for _ in range(3)]
    judged_by_one = replace(data, held_out=few(data.held_out))
    first, later = (train(recipe, model, judged_by_one, device=DEVICE) for model in models[:2])
    theirs = timm_epochs(recipe, models[2], data, root)
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
            same=told,
        )


def timm_epochs(recipe: Recipe, classifier: Classifier, data: Data, root: Path) -> Iterator[None]:
    """Train by timm's data set, transforms, Mixup, loss, optimizer and schedule."""
    for place, (image, label) in enumerate(zip(data.train.images, data.train.labels, strict=True)):
        folder = root / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place:04d}.png")
    side = data.train.images.shape[-1]
    transform = create_transform(
        side,
        is_training=True,
        use_prefetcher=True,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        hflip=0.0,
        auto_augment=f"rand-m{recipe.randaug_magnitude}-mstd0.5-inc1",
        interpolation="bicubic",
    )
    loader = torch.utils.data.DataLoader(
        ImageDataset(str(root), transform=transform),
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=fast_collate,
    )
    mixup = Mixup(
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        prob=recipe.mix_probability,
        switch_prob=recipe.switch_probability,
        label_smoothing=recipe.label_smoothing,
        num_classes=len(data.class_names),
    )
    classifier.to(DEVICE)
    optimizer = create_optimizer_v2(
        classifier, opt="adamw", lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = CosineLRScheduler(optimizer, t_initial=recipe.epochs, lr_min=recipe.floor_rate)
    loss_of = SoftTargetCrossEntropy()
    for epoch in range(recipe.epochs):
        schedule.step(epoch)
        classifier.train()
        for images, labels in loader:
            mixed, targets = mixup(to_unit(images.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss_of(classifier(mixed), targets).backward()
            optimizer.step()
        yield


def small(count: int) -> tuple[Recipe, Data]:
    """Return ResNet-18's recipe at CIFAR-10's scale, and noise in memory at 32 px."""
    return CIFAR10.shrink(resnet50()).replace(model="resnet18"), noise("cifar10", count, 32)


def noise(name: str, count: int, side: int) -> Data:
    """Return a data set of noise in memory, of ten classes."""
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    split = Split(images=pixels, labels=torch.arange(count) % 10, ids=tuple(map(str, range(count))))
    names = tuple(map(str, range(10)))
    return Data(name=name, train=split, held_out=few(split), class_names=names)


def large(root: Path, count: int) -> tuple[Recipe, Data]:
    """Return ResNet-50's recipe at 224 px, and JPEGs in class folders that a worker reads."""
    write_images(root, count, (500, 375))
    source = DataSource(root=root, workers=1)
    scale = scale_of("folder", source, image_size=224)
    data = load_data(scale, source)
    return scale.shrink(resnet50()), data


def full_size(recipe: Recipe, precision: str, count: int) -> tuple[Recipe, Data]:
    """Return a recipe of the study's without its augmentation, and noise in memory at 224 px."""
    data = noise("imagenet", count, 224)
    return recipe.replace(precision=precision, augmentations=(), label_smoothing=0.0), data


def few(split: Split) -> Split:
    """Return one image, so that judging after an epoch costs next to nothing."""
    return split.subset(1, seed=0)


def bare_epochs(recipe: Recipe, data: Data) -> Iterator[None]:
    """Train on one batch in memory, as many steps as an epoch of ours has, and judge."""
    classifier = build_classifier(recipe).to(DEVICE)
    optimizer = build_optimizer(recipe, classifier)
    images: Tensor = to_unit(data.train.images[: recipe.batch_size].to(DEVICE))
    labels = data.train.labels[: recipe.batch_size].to(DEVICE)
    half = PRECISIONS[recipe.precision]
    while True:
        classifier.train()
        for _ in range(len(data.train) // recipe.batch_size):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, half, enabled=half is not torch.float32):
                logits_BK = classifier(images)
            F.cross_entropy(logits_BK.float(), labels).backward()
            optimizer.step()
        accuracy(classifier, data.held_out, device=DEVICE)
        yield
