"""The memory that a training step takes: measured with few images, reckoned for more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainables.data.base import Data, Split
from trainables.networks import build_classifier
from trainables.recipe import Recipe, check_team
from trainables.scale import scale_of_recipe
from trainables.train.loop import train

FEW, FEWER = (8, 16), (2, 4)  # images of the two dry steps, and where these do not fit
MARGIN = 1.15  # for what libraries hold, and for gaps between tensors
GIBIBYTE = 2**30


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those that operations handle on a CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._addresses = set[int]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if address not in self._addresses:
                    self._addresses.add(address)
                    self._now += size
                    weakref.finalize(storage, self._freed, address, size)
        self.most = max(self.most, self._now)
        return result

    def _freed(self, address: int, size: int) -> None:
        self._addresses.remove(address)
        self._now -= size


def step_bytes(recipe: Recipe, images: int, device: torch.device, *, is_fast: bool = False) -> int:
    """Return the most memory that a recipe's steps take with forward batches of so many images.

    It makes two steps of two forward batches each: weights, gradients and moments are all there. On
    a GPU it makes them twice, as the first try out kernels, which takes memory for once.
    """
    sizes = recipe.train_sizes and (max(recipe.train_sizes),)
    few = {"batch_size": 2 * images, "micro_batch": images, "ghost_batch": images}
    recipe = recipe.replace(**few, train_sizes=sizes, epochs=max(2, recipe.epochs))
    data_set = scale_of_recipe(recipe).data_set
    sides = (3, data_set.image_size, data_set.image_size)

    def black(count: int) -> Split:
        shown, labels = torch.zeros(count, *sides, dtype=torch.uint8), torch.arange(count)
        ids = tuple(map(str, range(count)))
        return Split(images=shown, labels=labels % data_set.num_classes, ids=ids)

    names = tuple(map(str, range(data_set.num_classes)))
    data = Data(data_set=data_set, train=black(4 * images), held_out=black(1), class_names=names)
    gc.collect()  # what an earlier dry step left in cycles
    classifier = build_classifier(recipe)
    teacher = build_classifier(recipe.teacher) if recipe.teacher else None
    reports = train(recipe, classifier, data, device=device, teacher=teacher, is_fast=is_fast)
    if device.type == "cuda":
        next(reports)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        next(reports)
        return int(torch.cuda.max_memory_reserved(device))
    living = _Living()
    with living:
        next(reports)
    return living.most


def misfits(recipes: Sequence[Recipe], workers: int, share: float, *, is_fast: bool) -> list[str]:
    """Say of each recipe why workers cannot train it with a share each of a GPU like this one.

    It is '' where they can.
    """
    if not torch.cuda.is_available():  # a node whose GPUs are made up
        return [""] * len(recipes)
    device = torch.device("cuda")
    gpu = torch.cuda.get_device_properties(device)
    limit = int(min(share, 1) * gpu.total_memory)

    def tried(recipe: Recipe) -> str:
        for few in (FEW, FEWER):
            with suppress(torch.OutOfMemoryError):
                needs = reckoned(recipe, device, few=few, is_fast=is_fast)
                return misfit(recipe, workers, needs, limit)
        return f"{recipe.describe()}: not even {FEWER[1]} images fit"

    return [text and f"on {gpu.name}, {text}" for text in map(tried, recipes)]


def reckoned(
    recipe: Recipe,
    device: torch.device,
    *,
    few: tuple[int, int] = FEW,
    is_fast: bool = False,
) -> tuple[int, int]:
    """Return the bytes that a recipe's steps take whatever their batch, and those of an image."""
    fewer, more = (step_bytes(recipe, images, device, is_fast=is_fast) for images in few)
    each = max(1, (more - fewer) // (few[1] - few[0]))  # small ones may round to the same
    return more - few[1] * each, each


def misfit(recipe: Recipe, workers: int, needs: tuple[int, int], limit: int) -> str:
    """Say which micro_batch fits a worker's memory of `limit` bytes; '' where the recipe's does.

    needs: as `reckoned`.
    """
    fixed, each = needs
    room = int((limit / MARGIN - fixed) // each)
    images = recipe.forward_batch // workers
    if images <= room:
        return ""
    said = (
        f"{recipe.describe()}: {images} images a worker take "
        f"{MARGIN * (fixed + images * each) / GIBIBYTE:.1f} GiB, and it has {limit / GIBIBYTE:.1f}"
    )
    for micro_batch in range(min(room * workers, recipe.forward_batch - 1), 0, -1):
        with suppress(ValueError):
            check_team(recipe.replace(micro_batch=micro_batch), workers)
            return f"{said}: --set micro_batch={micro_batch} fits"
    more = "" if recipe.precision != "float32" else ", or --set precision=bf16"
    return f"{said}, nor does any micro_batch fit: give more --workers, or larger GPUs{more}"
