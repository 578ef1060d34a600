"""Images per second that reach a training, beside timm's `create_loader` on the same JPEG files.

Both sides deliver uint8 batches from one process and one thread, whose CPU time other work on the
machine does not move; timm's prefetcher, which converts on a GPU, is taken off its loader. Both
crop (RandomResizedCrop 0.08-1, bicubic) and flip: at 224 px from files of 500 x 375 px, and at
32 px files of 32 x 32 px, which ours keeps decoded in memory. Then a process for each core, by
the CPU time of all of them: beside torchvision's `ImageFolder` in torch's loader, and from packed
shards beside folders.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-untyped]

from benchmarks.measure import Figure, in_turns, require
from grid.study import base_named
from trainables.data.augment import TrainBatches
from trainables.data.base import Split
from trainables.data.images import ImageFiles, as_tensor
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.packing import pack
from trainables.recipe import Recipe

Batch = tuple[Tensor, Tensor]  # images, labels
CLASSES = 4
BATCH = 32
SMALL = 6_016  # images of 32 px: whole batches, and more than are kept augmented
ALIKE = 16  # of 255, of an epoch's mean pixel: crops differ, and what is shifted in is black


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratios at 224 px and 32 px."""
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "large", Path(folder) / "cache"
        write_images(root, 64 if quick else 256, (500, 375))
        recipe, train = from_files(root, side=224)
        name = "files at 224 px, crop and flip"
        yield beside_timm(name, recipe, train, root, target=1.0, repeats=3 * repeats)
        yield from on_all_cores(root, Path(folder) / "packed", repeats=3 * repeats)
        root = Path(folder) / "small"
        write_images(root, 64 if quick else SMALL, (32, 32))
        recipe, train = from_files(root, side=32, cache=cache)
        name = "memory at 32 px, crop and flip"
        yield beside_timm(name, recipe, train, root, target=5.0, repeats=repeats)


def on_all_cores(root: Path, packed: Path, *, repeats: int) -> Iterator[Figure]:
    """Yield the speed of a process for each core beside torchvision's, and from shards."""
    cores = len(os.sched_getaffinity(0))
    pack(root, str(packed))
    epochs = itertools.count()
    sides = []
    for place in (root, packed):
        recipe, train = from_files(place, side=224)
        batches = TrainBatches(recipe.replace(batch_size=BATCH), train, workers=cores)
        sides.append(lambda batches=batches: deque(batches.epoch(next(epochs)), maxlen=0))
    crop = v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC)
    steps = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    theirs = torch.utils.data.DataLoader(
        ImageFolder(root / "train", steps),
        batch_size=BATCH,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
    )
    sides.append(lambda: deque(theirs, maxlen=0))
    whole = [batch for epoch in (batches.epoch(0), theirs) for batch in epoch]
    require({images.shape[1:] for images, _ in whole} == {(3, 224, 224)}, "the images' form")
    rounds = in_turns(*sides, repeats=repeats, clock=cpu_seconds)
    same = f"{len(train)} files, {cores} processes each"
    for name, values in (
        ("files at 224 px, all cores, ours / torchvision's", [t / o for o, _, t in rounds]),
        ("files at 224 px, all cores, shards / folders", [o / p for o, p, _ in rounds]),
    ):
        yield Figure(name=f"loader, {name}", values=tuple(values), target=1.0, same=same)


def cpu_seconds() -> float:
    """Return the CPU time of this process and those it has started."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def beside_timm(
    name: str,
    recipe: Recipe,
    train: Split,
    root: Path,
    *,
    target: float,
    repeats: int,
) -> Figure:
    """Time an epoch of each side in turns; both must deliver the same images."""
    side = train.images.shape[-1]
    batches = TrainBatches(recipe.replace(batch_size=BATCH), train, workers=0)
    epochs = itertools.count()

    def ours() -> Iterator[Batch]:
        for images, places in batches.epoch(next(epochs)):
            yield images, train.labels[places]

    theirs = timm_batches(root, side)
    require_same_images(train, root)
    told = require_same_delivery(ours(), theirs, side=side)
    pairs = in_turns(
        lambda: deque(ours(), maxlen=0),
        lambda: deque(theirs, maxlen=0),
        repeats=repeats,
        clock=time.process_time,
    )
    return Figure(
        name=f"loader, {name}, ours / timm's create_loader",
        values=tuple(their_s / our_s for our_s, their_s in pairs),
        target=target,
        same=told,
    )


def require_same_images(train: Split, root: Path) -> None:
    """See that both sides decode every file to the same pixels and know it by the same label."""
    theirs = ImageDataset(str(root / "train"))
    places = {name: place for place, name in enumerate(train.ids)}
    require(len(theirs) == len(train), f"{len(train)} and {len(theirs)} images")
    for number, (image, label) in enumerate(theirs):
        name = f"train/{theirs.filename(number)}"
        place = places[name]
        require(label == int(train.labels[place]), f"the label of {name}")
        require(torch.equal(decoded(train.images, place), as_tensor(image)), f"pixels of {name}")


def decoded(images: Tensor | ImageFiles, place: int) -> Tensor:
    """Return an image as it is before it is augmented: uint8 (3, H, W)."""
    return images[place] if isinstance(images, Tensor) else as_tensor(images.original(place))


def require_same_delivery(ours: Iterable[Batch], theirs: Iterable[Batch], *, side: int) -> str:
    """See that an epoch of both sides has the same form, labels and, roughly, light."""
    epochs = list(ours), list(theirs)
    forms = [{(images.dtype, images.shape) for images, _ in epoch} for epoch in epochs]
    require(forms[0] == forms[1] == {(torch.uint8, (BATCH, 3, side, side))}, f"batches of {forms}")
    labels = [torch.cat([labels for _, labels in epoch]).sort().values for epoch in epochs]
    require(torch.equal(*labels), "the labels of an epoch")
    light = [fmean(float(images.float().mean()) for images, _ in epoch) for epoch in epochs]
    told = f"mean pixel {light[0]:.0f} and {light[1]:.0f}"
    require(abs(light[0] - light[1]) <= ALIKE, told)
    return f"{len(labels[0]):,} images the same once decoded, {told}"


def write_images(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write smooth noise: photographs have edges and no noise in every pixel."""
    rng = np.random.default_rng(0)
    for number in range(count):
        few = rng.integers(0, 255, (size[1] // 12, size[0] // 12, 3), dtype=np.uint8)
        image = Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)
        for split in ("train", "val"):
            folder = root / split / f"class-{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            if split == "train" or number < CLASSES:
                image.save(folder / f"{number}.jpg", quality=90)


def timm_batches(root: Path, side: int) -> torch.utils.data.DataLoader[Any]:
    """Return timm's loader of uint8 batches, as its `create_loader` gives it to its prefetcher."""
    prefetched = create_loader(
        ImageDataset(str(root / "train")),
        input_size=side,
        batch_size=BATCH,
        is_training=True,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=0,
        device=torch.device("cpu"),
    )
    return prefetched.loader


def from_files(root: Path, *, side: int, cache: Path | None = None) -> tuple[Recipe, Split]:
    """Return a recipe and the train images of files, kept decoded where there is a cache."""
    source = DataSource(root=root, cache=cache)
    scale = scale_of("folder", source, image_size=side)
    return scale.shrink(base_named("resnet50")), load_data(scale, source).train
