"""A user's images and labels, in any of the usual forms, as one of this project's data sets."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from evaluators.judging import attacking
from trainables.data.base import Data, Split, to_unit
from trainables.data.images import as_rgb, validated
from trainables.data.layouts import split_places
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.registry import FOLDER, DataSet
from trainables.recipe import Preprocessing
from trainables.scale import PUBLISHED_EPSILON, Scale, scale_for, scale_named

FORMS = "(images, labels), a Dataset, a DataLoader, a folder or a split of a Hugging Face Dataset"
IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "y")
NOT_FILES = "image_size is for files; resize these images before"
SMALL_SIDE = 64  # whose radius is CIFAR-10's, not the study's
ROUNDING = 1e-6  # of float32, beyond [0, 1]


def read(data: Any, image_size: int | None) -> tuple[Scale, Data]:
    """Read images and labels, and the scale they are judged at; ValueError says what is wrong.

    Data of a user that name no classes have none until `for_head`. image_size: of images in files,
    and of PIL's.
    """
    if isinstance(data, str | Path):
        return _folder(Path(data), image_size)
    if image_size and isinstance(data, Data | tuple | list):
        raise ValueError(NOT_FILES)
    if isinstance(data, Data):
        return replace(scale_named(data.name), data_set=data.data_set), data
    if isinstance(data, tuple | list) and len(data) == 2:
        return _own(_split(_pixels(data[0]), _labels(data[1])))
    if type(data).__module__.partition(".")[0] == "datasets":
        features = getattr(data, "features", None) or {}
        names = getattr(features.get(_key(features, LABEL_KEYS)), "names", ()) if features else ()
        return _rows(data, image_size, names)
    names = getattr(getattr(data, "dataset", data), "classes", ())
    if isinstance(data, DataLoader | IterableDataset):
        return _rows(data, image_size, names)
    if isinstance(data, Dataset):
        rows = (data[place] for place in range(len(data)))  # type: ignore[arg-type]
        return _rows(rows, image_size, names)
    raise ValueError(f"data of {type(data).__name__} are not known; one of {FORMS}")


def for_head(scale: Scale, data: Data, outputs: int) -> tuple[Scale, Data]:
    """Return the scale, whose attacks take every image, and the data for a model's head.

    ValueError where a label is none of the classes, which are the head's where the data name none.
    """
    if not data.class_names:
        scale, data = _own(data.held_out, tuple(map(str, range(outputs))))
    labels, classes = data.held_out.labels, len(data.class_names)
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        allowed = f"there are {classes} classes, so labels are from 0 to {classes - 1}"
        raise ValueError(f"label {int(labels[outside][0])} is out of range: {allowed}")
    return attacking(scale, len(labels)), replace(data, corrupted=len(labels))


def digest(data: Data) -> str:
    """Return 12 hex digits of the data set, its labels, and the images that are in memory."""
    sha256 = hashlib.sha256(repr(data.data_set).encode())
    sha256.update(data.held_out.labels.numpy().tobytes())
    if isinstance(data.held_out.images, Tensor):
        sha256.update(data.held_out.images.contiguous().numpy().tobytes())
    return sha256.hexdigest()[:12]


def _folder(root: Path, image_size: int | None) -> tuple[Scale, Data]:
    """Read val/ or test/; where there is neither, all images are judged."""
    has_held_out = root.is_dir() and split_places(root)[1]
    source = DataSource(root=root, hold_out=0 if has_held_out else 1)
    scale = scale_of(FOLDER, source, image_size=image_size)
    return scale, load_data(scale, source)


def _rows(rows: Iterable[Any], image_size: int | None, names: Any) -> tuple[Scale, Data]:
    """Read images, or a loader's batches, one by one."""
    images, labels = [], []
    for image, label in map(_row, rows):
        pixels = _decoded(image, image_size)
        images.append(_pixels(pixels if isinstance(rows, DataLoader) else pixels[None]))
        labels.append(torch.as_tensor(label).reshape(-1))
    if not images:
        raise ValueError("there are no images in the data")
    classes = tuple(map(str, names)) if isinstance(names, list | tuple) else ()
    return _own(_split(_together(images), _labels(torch.cat(labels))), classes)


def _own(split: Split, names: tuple[str, ...] = ()) -> tuple[Scale, Data]:
    """Return images in memory as a data set of its own, and its scale."""
    channels, height, width = split.images.shape[1:]
    data_set = DataSet(
        name="own",
        title=f"{len(split)} images of {channels} x {height} x {width}, {len(names)} classes",
        image_size=max(height, width),
        num_classes=len(names) or 2,  # a classifier's least, until the head tells
        train_images=0,
        held_out_images=len(split),
        counterparts=(),
    )
    epsilon = Fraction(8, 255) if data_set.image_size <= SMALL_SIDE else PUBLISHED_EPSILON
    nothing = split.at(np.arange(0))
    data = Data(data_set=data_set, train=nothing, held_out=split, class_names=names)
    return replace(scale_for(data_set), epsilon=epsilon), data


def _row(item: Any) -> tuple[Any, Any]:
    """Return the image and label of an item, or those of a batch."""
    if isinstance(item, Mapping):
        return item[_key(item, IMAGE_KEYS)], item[_key(item, LABEL_KEYS)]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise ValueError(f"the data yield {type(item).__name__}, not (image, label); take {FORMS}")
    return item[0], item[1]


def _key(columns: Mapping[str, Any], usual: Sequence[str]) -> str:
    for name in usual:
        if name in columns:
            return name
    has = ", ".join(map(repr, columns))
    raise ValueError(f"the data have no column {usual[0]!r}, only {has}: rename one")


def _decoded(image: Any, size: int | None) -> Tensor:
    """Return an image of PIL as bytes (C, H, W), of the size; other images as a tensor."""
    if not isinstance(image, Image.Image):
        if size:
            raise ValueError(NOT_FILES)
        return torch.as_tensor(image)
    image = image.convert("L") if image.mode in ("L", "1") else as_rgb(image)
    if size:
        image = validated(image, Preprocessing(size=size))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _together(batches: list[Tensor]) -> Tensor:
    """Return batches as one tensor; greys among colours become colours."""
    if {images.shape[1] for images in batches} == {1, 3}:
        batches = [images.expand(-1, 3, -1, -1) for images in batches]
    if len(shapes := {tuple(images.shape[1:]) for images in batches}) > 1:
        first, second, *_ = sorted(shapes)
        remedy = "image_size=224 brings images of files to one size; resize tensors before"
        raise ValueError(f"images are of different sizes, {first} and {second}: {remedy}")
    if len({images.dtype for images in batches}) > 1:
        batches = [to_unit(images) for images in batches]
    return torch.cat(batches)


def _pixels(images: Any) -> Tensor:
    """Return images_NCHW uint8, or float32 in [0, 1] that are not whole 255ths; ValueError."""
    pixels = torch.as_tensor(images).detach().cpu()
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or not pixels.numel():
        shape = f"shape {tuple(pixels.shape)}, not (N, channels, height, width)"
        raise ValueError(f"there are no images in the data: {shape}")
    if pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)  # as numpy and PIL have them
    if pixels.dtype == torch.uint8:
        return pixels.contiguous()
    if not pixels.is_floating_point():
        raise ValueError(f"images are {pixels.dtype}: uint8 from 0 to 255, or floats in [0, 1]")
    pixels = pixels.float()
    low, high = pixels.min().item(), pixels.max().item()
    if not math.isfinite(low + high):
        raise ValueError("some pixels are NaN or infinite")
    if low < -ROUNDING or high > 1 + ROUNDING:
        cause = "from 0 to 255? Divide them by 255"
        if low < -ROUNDING:
            cause = "normalised already? Give images without it, and it as mean= and std="
        raise ValueError(f"pixels are from {low:.3g} to {high:.3g}, not in [0, 1]: {cause}")
    pixels = pixels.clamp(0, 1)
    whole = pixels.mul(255).round_()
    return whole.byte() if torch.equal(whole / 255, pixels) else pixels


def _labels(labels: Any) -> Tensor:
    classes = torch.as_tensor(labels).detach().cpu()
    if classes.ndim == 2 and classes.shape[1] > 1:
        raise ValueError(f"labels are of shape {tuple(classes.shape)}: one-hot? Give .argmax(1)")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"labels are {classes.dtype}: give whole numbers from 0, int64")
    return classes.flatten().long()


def _split(images: Tensor, labels: Tensor) -> Split:
    """Name images by place, and by content and label, by which `compare` pairs them."""
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    width = len(str(len(images) - 1))
    ids, times = [], Counter[str]()
    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        content = image.contiguous().numpy().tobytes() + f"={label}".encode()
        digest = hashlib.sha256(content).hexdigest()[:12]
        times[digest] += 1
        ids.append(f"{place:0{width}d}-{digest}.{times[digest]}")
    return Split(images=images, labels=labels, ids=tuple(ids))
