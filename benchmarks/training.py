"""Training images per second of the real loop beside a bare PyTorch loop.

    python -m benchmarks.training                  # ResNet-18 at 32 px (CIFAR-10's): at least 0.97x
    python -m benchmarks.training --size 224       # ResNet-50 at 224 px, from files

The bare loop is the limit: the same model, loss and optimizer on one batch that is a tensor in
memory already, with no augmentation. Ours is `train()` as a trial runs it: order, augmentation,
decoding, schedule. Sides take turns; printed is the median of the ratios with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loader import write_images
from grid.studies import resnet50
from trainables.data import Data, Split, load_data, to_unit
from trainables.loop import train
from trainables.models import build_classifier
from trainables.optim import build_optimizer
from trainables.recipe import Recipe
from trainables.scale import CIFAR10
from trainables.source import DataSource, scale_of

BATCH = {32: 32, 224: 8}
IMAGES = {32: 256, 224: 32}


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=sorted(BATCH), default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe, data = small() if options.size == 32 else large(Path(folder))
        recipe = recipe.replace(
            batch_size=BATCH[options.size], epochs=options.repeats + 1, warmup_epochs=0.0
        )
        ratios = compare(recipe, data, options.repeats)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"{recipe.model} at {options.size} px, batch {recipe.batch_size}: {median:.3f} "
        f"[{low:.3f}, {high:.3f}] of the bare loop over {len(ratios)} epochs (target 0.97)"
    )


def small() -> tuple[Recipe, Data]:
    """Return ResNet-18's recipe at CIFAR-10's scale, and noise in memory at 32 px."""
    count = IMAGES[32]
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=pixels, labels=torch.arange(count) % 10, ids=tuple(map(str, range(count))))
    names = tuple(map(str, range(10)))
    data = Data(name="cifar10", train=split, held_out=few(split), class_names=names)
    return CIFAR10.shrink(resnet50()).replace(model="resnet18"), data


def large(root: Path) -> tuple[Recipe, Data]:
    """Return ResNet-50's recipe at 224 px, and JPEGs in class folders."""
    write_images(root, IMAGES[224], (500, 375))
    source = DataSource(root=root)
    scale = scale_of("folder", source, image_size=224)
    data = load_data(scale, source)
    return scale.shrink(resnet50()), data


def few(split: Split) -> Split:
    """Return one image, so that judging after an epoch costs next to nothing."""
    return split.subset(1, seed=0)


def compare(recipe: Recipe, data: Data, repeats: int) -> list[float]:
    """Return ours / bare, in images per second, epoch by epoch; the first is warm-up."""
    judged_by_one = Data(
        name=data.name,
        train=data.train,
        held_out=few(data.held_out),
        class_names=data.class_names,
    )
    classifier = build_classifier(recipe)
    ours = train(recipe, classifier, judged_by_one, device=torch.device("cpu"))
    bare = bare_epochs(recipe, data)
    seconds = [(timed(ours), timed(bare)) for _ in range(repeats + 1)]
    return [theirs / mine for mine, theirs in seconds[1:]]


def timed(epochs: Iterator[object]) -> float:
    """Return the seconds that the next epoch takes."""
    began = time.perf_counter()
    next(epochs)
    return time.perf_counter() - began


def bare_epochs(recipe: Recipe, data: Data) -> Iterator[None]:
    """Train on one batch in memory, as many steps as an epoch of ours has."""
    classifier = build_classifier(recipe).train()
    optimizer = build_optimizer(recipe, classifier)
    images: Tensor = to_unit(data.train.images[: recipe.batch_size])
    labels = data.train.labels[: recipe.batch_size]
    while True:
        for _ in range(len(data.train) // recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images), labels).backward()
            optimizer.step()
        yield


if __name__ == "__main__":
    main()
