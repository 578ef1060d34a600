"""Images per second that reach a training, beside timm's loader with the same transforms.

    python -m benchmarks.loader                    # from files at 224 px: at least 1.0x
    python -m benchmarks.loader --memory           # from memory at 32 px: at least 5x
    python -m benchmarks.loader --epochs 20        # and the workers' memory after each epoch

Both sides read the same JPEGs (500 x 375 px, made here), with RandomResizedCrop 0.08-1, flip,
bicubic, and the same number of workers; sides take turns, the best of three rounds counts. With
--workers 0 the clock is the process's own, which other work on the machine does not move. timm's
loader is asked for uint8 batches too (its prefetcher converts on the GPU and is left out).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate

from grid.studies import resnet50
from trainables.data import Data, Split, load_data
from trainables.loader import TrainBatches
from trainables.recipe import Recipe
from trainables.scale import CIFAR10
from trainables.source import DataSource, scale_of

CLASSES = 4
BATCH = 32
ROUNDS = 3
IN_MEMORY = 10_000


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


def theirs(root: Path, side: int, workers: int) -> Callable[[], Iterable[object]]:
    """Return a function that starts an epoch of timm's data set and transforms, as uint8."""
    transform = create_transform(
        side, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic"
    )
    loader = torch.utils.data.DataLoader(
        ImageDataset(str(root / "train"), transform=transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=fast_collate,
    )
    return lambda: loader


def images_per_second(
    epoch: Callable[[], Iterable[object]], count: int, clock: Callable[[], float]
) -> float:
    """Return the images per second of one epoch by a clock."""
    began = clock()
    for _ in epoch():
        pass
    return count // BATCH * BATCH / (clock() - began)


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


def from_files(images: int, workers: int, root: Path) -> tuple[Recipe, Data, int]:
    """Return a recipe and its data, read from files at 224 px."""
    write_images(root, images, (500, 375))
    source = DataSource(root=root, workers=workers)
    scale = scale_of("folder", source, image_size=224)
    return scale.shrink(resnet50()), load_data(scale, source), images


def from_memory(root: Path) -> tuple[Recipe, Data, int]:
    """Return a recipe of CIFAR-10's and images in memory at 32 px; timm reads them as files."""
    write_images(root, IN_MEMORY // 5, (32, 32))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IN_MEMORY, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(IN_MEMORY, dtype=torch.int64)
    split = Split(images=pixels, labels=labels, ids=tuple(map(str, range(IN_MEMORY))))
    data = Data(name="cifar10", train=split, held_out=split, class_names=("a",))
    return CIFAR10.shrink(resnet50()), data, IN_MEMORY


def main() -> None:
    """Measure both sides and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = (
            from_memory(root)
            if options.memory
            else from_files(options.images, options.workers, root)
        )
        compare(*made, root=root, workers=options.workers, epochs=options.epochs)


def compare(
    recipe: Recipe, data: Data, count: int, *, root: Path, workers: int, epochs: int
) -> None:
    """Time both sides in turns, then follow the memory of ours over the epochs."""
    side, ours = (
        data.train.images.shape[-1],
        TrainBatches(recipe.replace(batch_size=BATCH), data.train, workers=data.workers),
    )
    other = theirs(root, side, workers)
    their_count = sum(1 for _ in (root / "train").rglob("*.jpg"))
    clock = time.perf_counter if workers else time.process_time
    best_ours = best_theirs = 0.0
    for number in range(ROUNDS + 1):  # the first round starts the workers
        mine = images_per_second(lambda number=number: ours.epoch(number), count, clock)  # type: ignore[misc]
        their = images_per_second(other, their_count, clock)
        if number:
            best_ours, best_theirs = max(best_ours, mine), max(best_theirs, their)
    print(f"{side} px, ours:  {best_ours:9.0f} images/s")
    print(f"{side} px, timm:  {best_theirs:9.0f} images/s")
    print(f"ratio: {best_ours / best_theirs:.2f}")
    for epoch in range(epochs):
        images_per_second(lambda epoch=epoch: ours.epoch(epoch), count, clock)  # type: ignore[misc]
        print(f"epoch {epoch + 1:2}: {resident_megabytes():7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
