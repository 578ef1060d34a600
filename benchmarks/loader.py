"""Images per second that reach a training, beside timm's loader with the same transforms.

Both sides read the same JPEGs (500 x 375 px, made here), with RandomResizedCrop 0.08-1, flip,
bicubic, in one process, whose CPU time other work on the machine does not move. timm's loader is
asked for uint8 batches too (its prefetcher converts on the GPU and is left out). At 32 px ours has
the images in memory, as CIFAR-10's, and timm's reads them from files.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate

from benchmarks.measure import Figure, in_turns, require
from grid.studies import resnet50
from trainables.data import Data, Split, load_data
from trainables.loader import TrainBatches
from trainables.recipe import Recipe
from trainables.scale import CIFAR10
from trainables.source import DataSource, scale_of

CLASSES = 4
BATCH = 32
IN_MEMORY = 10_000


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratios at 224 px and 32 px, and how the workers' memory grows over 20 epochs."""
    repeats, epochs = (1, 2) if quick else (5, 20)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "large"
        write_images(root, 64 if quick else 256, (500, 375))
        recipe, data = from_files(root)
        name, turns = "from files at 224 px", 3 * repeats
        yield beside_timm(name, recipe, data, root, target=1.0, repeats=turns)
        batches = TrainBatches(recipe.replace(batch_size=BATCH), data.train, workers=2)
        megabytes = [memory_after(batches, epoch) for epoch in range(epochs)]
        yield Figure(
            name=f"memory of 2 loader workers after {epochs} epochs / after the first",
            values=(megabytes[-1] / megabytes[0],),
            target=1.05,
            better="less",
            same=f"{megabytes[0]:.0f} and {megabytes[-1]:.0f} MB",
        )
        root = Path(folder) / "small"
        write_images(root, 64 if quick else IN_MEMORY // 5, (32, 32))
        recipe, data = from_memory(64 if quick else IN_MEMORY)
        yield beside_timm("from memory at 32 px", recipe, data, root, target=5.0, repeats=repeats)


def beside_timm(
    name: str, recipe: Recipe, data: Data, root: Path, *, target: float, repeats: int
) -> Figure:
    """Time an epoch of each side in turns; both must deliver batches of the same form."""
    side = data.train.images.shape[-1]
    ours = TrainBatches(recipe.replace(batch_size=BATCH), data.train, workers=0)
    other = theirs(root, side)
    forms = {(i.dtype, i.shape[1:]) for i in (next(iter(other))[0], next(ours.epoch(0))[0])}
    require(forms == {(torch.uint8, (3, side, side))}, f"batches are {forms}")
    epochs = itertools.count()
    delivered: dict[str, int] = {}

    def mine() -> None:
        delivered["ours"] = sum(len(images) for images, _ in ours.epoch(next(epochs)))

    def their() -> None:
        delivered["timm"] = sum(len(images) for images, _ in other)

    pairs = in_turns(mine, their, repeats=repeats, clock=time.process_time)
    share = delivered["ours"] / delivered["timm"]
    return Figure(
        name=f"loader {name}, ours / timm",
        values=tuple(share * their_s / our_s for our_s, their_s in pairs),
        target=target,
        same=f"batches of {BATCH} at {side} px",
    )


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


def theirs(root: Path, side: int) -> torch.utils.data.DataLoader[Any]:
    """Return timm's data set, transforms and collation, as uint8."""
    transform = create_transform(
        side, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic"
    )
    return torch.utils.data.DataLoader(
        ImageDataset(str(root / "train"), transform=transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=fast_collate,
    )


def memory_after(batches: TrainBatches, epoch: int) -> float:
    """Go through an epoch; return the megabytes of this process and its workers then."""
    for _ in batches.epoch(epoch):
        pass
    return resident_megabytes()


def resident_megabytes() -> float:
    """Return the memory of this process and its children, shared pages counted in part."""
    total, me = 0, os.getpid()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if me in (parent, int(folder.name)):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError, IndexError):
            continue  # a process that has just ended
    return total / 1024


def from_files(root: Path) -> tuple[Recipe, Data]:
    """Return a recipe and its data, read from files at 224 px."""
    source = DataSource(root=root)
    scale = scale_of("folder", source, image_size=224)
    return scale.shrink(resnet50()), load_data(scale, source)


def from_memory(count: int) -> tuple[Recipe, Data]:
    """Return a recipe of CIFAR-10's and images in memory at 32 px."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(count, dtype=torch.int64)
    split = Split(images=pixels, labels=labels, ids=tuple(map(str, range(count))))
    data = Data(name="cifar10", train=split, held_out=split, class_names=("a",))
    return CIFAR10.shrink(resnet50()), data
