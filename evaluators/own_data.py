"""A user's images and labels, in any of the usual forms, as one of this project's data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainables.data.base import Data, Split
from trainables.data.images import as_rgb, validated
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.registry import FOLDER, DataSet
from trainables.recipe import Preprocessing
from trainables.scale import PUBLISHED_EPSILON, Scale, scale_for, scale_named

FORMS = (
    "(images, labels), a Dataset, a DataLoader, a folder, a Hugging Face Dataset or (images, "
    "labels, ids)"
)
IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "y")
SMALL_SIDE = 64
AT_ONCE = 256  # images that are brought together
ROUNDING = 1e-6  # of float32, beyond [0, 1]


@dataclass(frozen=True)
class OwnData:
    """Images to judge; of a folder or a registered data set also its scale and train images."""

    split: Split
    class_names: tuple[str, ...] = ()
    scale: Scale | None = None
    data: Data | None = None

    def digest(self) -> str:
        """Return 12 hex digits of the labels, and of the images where they are in memory."""
        digest = hashlib.sha256(self.split.labels.numpy().tobytes())
        if isinstance(self.split.images, Tensor):
            digest.update(self.split.images.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def with_classes(self, outputs: int) -> tuple[Scale, Data]:
        """Return the scale, whose attacks take every image, and the data for a model's head."""
        names, n = self.class_names or tuple(map(str, range(outputs))), len(self.split)
        _check_range(self.split.labels, len(names))
        channels, height, width = self.split.images.shape[1:]
        data_set = DataSet(
            name="own",
            title=f"{n} images of {channels} x {height} x {width}, {len(names)} classes",
            image_size=max(height, width),
            num_classes=len(names),
            train_images=0,
            held_out_images=n,
            counterparts=(),
        )
        scale = self.scale or replace(scale_for(data_set), epsilon=_radius(data_set.image_size))
        nothing = self.split.at(np.arange(0))
        data = self.data or Data(
            data_set=data_set, train=nothing, held_out=self.split, class_names=names
        )
        patch = replace(scale.patch, images=n)
        data = replace(data, corrupted=n)
        return replace(scale, attack_subset=n, autoattack_subset=n, patch=patch), data


def read(data: Any, image_size: int | None) -> OwnData:
    """Read images and labels; ValueError says what is wrong with them.

    image_size: of images in files, and of PIL's.
    """
    if isinstance(data, str | Path):
        return _folder(Path(data), image_size)
    if isinstance(data, Data):
        return replace(_with_scale(data), split=data.held_out)
    if isinstance(data, Split):
        return OwnData(data)
    if isinstance(data, tuple | list) and len(data) in (2, 3):
        images, labels, *ids = data
        if image_size:
            raise ValueError("image_size is for files; resize these images before")
        return OwnData(_split(_pixels(images), _labels(labels), *ids))
    rows = [_row(item) for item in _items(data)]
    if not rows:
        raise ValueError("there are no images in the data")
    images = _together(
        [_image(image, image_size) for image, _ in rows], isinstance(data, DataLoader)
    )
    labels = _labels(torch.cat([torch.as_tensor(label).reshape(-1) for _, label in rows]))
    return OwnData(_split(images, labels), class_names=_class_names(data))


def _with_scale(data: Data) -> OwnData:
    scale = replace(scale_named(data.name), data_set=data.data_set)
    return OwnData(data.held_out, data.class_names, scale, data)


def _folder(root: Path, image_size: int | None) -> OwnData:
    """Read val/ or test/; where there is neither, all images are judged."""
    if not root.is_dir():
        raise ValueError(f"the folder {root} is not there")
    source = DataSource(root=root)
    try:
        scale = scale_of(FOLDER, source)
    except ValueError as problem:
        source = DataSource(root=root, hold_out=1)
        try:
            scale = scale_of(FOLDER, source)
        except ValueError:
            raise problem from None
    scale = scale.preprocessed(Preprocessing(size=image_size))
    scale = replace(scale, epsilon=_radius(scale.image_size))
    data = load_data(scale, source)
    return OwnData(data.held_out, data.class_names, scale, data)


def _radius(side: int) -> Fraction:
    """Return the radius of data without a scale of their own: CIFAR-10's, or the study's."""
    return Fraction(8, 255) if side <= SMALL_SIDE else PUBLISHED_EPSILON


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, Mapping):
        splits = ", ".join(map(repr, data))
        raise ValueError(f"the data are a mapping: take one of its entries, {splits}")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return (data[place] for place in range(len(data)))  # type: ignore[arg-type]
    if isinstance(data, DataLoader | IterableDataset) or _is_hugging_face(data):
        return iter(data)
    raise ValueError(f"data of {type(data).__name__} are not known; one of {FORMS}")


def _is_hugging_face(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def _class_names(data: Any) -> tuple[str, ...]:
    """Return the names that a data set states of its labels; none where it states none."""
    if _is_hugging_face(data):
        features = data.features or {}
        return tuple(getattr(features.get(_key(features, LABEL_KEYS, "label")), "names", ()))
    source = getattr(data, "dataset", data)
    names = getattr(source, "classes", ())
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def _row(item: Any) -> tuple[Any, Any]:
    """Return the image and label of an item, or those of a batch."""
    if isinstance(item, Mapping):
        return item[_key(item, IMAGE_KEYS, "image")], item[_key(item, LABEL_KEYS, "label")]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise ValueError(
            f"the data yield {type(item).__name__}, not (image, label): add the labels"
        )
    return item[0], item[1]


def _key(columns: Mapping[str, Any], usual: Sequence[str], kind: str) -> str:
    for name in usual:
        if name in columns:
            return name
    has = ", ".join(map(repr, columns))
    raise ValueError(
        f"the data have no column {usual[0]!r}, only {has}: rename that of the {kind}s"
    )


def _image(image: Any, size: int | None) -> Tensor:
    if not isinstance(image, Image.Image):
        return torch.as_tensor(image)
    grey = image.mode in ("L", "1")
    image = image.convert("L") if grey else as_rgb(image)
    if size:
        image = validated(image, Preprocessing(size=size))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if grey else pixels.permute(2, 0, 1)


def _together(images: list[Tensor], batched: bool) -> Tensor:
    """Return images, or batches of them, as one tensor; greys among colours become colours."""
    images = images if batched else [image[None] for image in images]
    if {image.shape[1] for image in images if image.ndim == 4} == {1, 3}:
        images = [image.expand(-1, 3, -1, -1) for image in images]
    if len(shapes := {tuple(image.shape[1:]) for image in images}) > 1:
        first, second, *_ = sorted(shapes)
        raise ValueError(
            f"images are of different sizes, {first} and {second}: image_size=224 brings images of "
            "files to one size; resize tensors before"
        )
    parts = [torch.cat(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
    parts = [_pixels(part) for part in parts]
    if len({part.dtype for part in parts}) > 1:
        parts = [part if part.is_floating_point() else part.float().div_(255) for part in parts]
    return torch.cat(parts)


def _pixels(images: Any) -> Tensor:
    """Return images_NCHW uint8, or float32 in [0, 1] where eighths of a byte would be lost."""
    pixels = torch.as_tensor(images).detach().cpu()
    if pixels.ndim == 3 and len(pixels):
        pixels = pixels[:, None]
    if pixels.ndim != 4:
        raise ValueError(
            f"images are of shape {tuple(pixels.shape)}, not (N, channels, height, width)"
        )
    if not pixels.numel():
        raise ValueError(f"there are no images in the data: shape {tuple(pixels.shape)}")
    if pixels.shape[3] in (1, 3) and pixels.shape[1] not in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)  # as numpy and PIL have them
    if pixels.dtype == torch.uint8:
        return pixels.contiguous()
    if not pixels.is_floating_point():
        raise ValueError(f"images are {_dtype(pixels)}: uint8 from 0 to 255, or floats in [0, 1]")
    return _compact(_checked(pixels.float()))


def _checked(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1]; ValueError with the likely cause of others."""
    low, high = pixels.min().item(), pixels.max().item()
    if not np.isfinite([low, high]).all():
        bad = (~pixels.isfinite()).flatten(1).any(dim=1).nonzero().flatten()
        raise ValueError(f"{len(bad)} images have pixels that are NaN or infinite: {_places(bad)}")
    if low < -ROUNDING:
        raise ValueError(
            f"pixels are from {low:.3g} to {high:.3g}, not in [0, 1]: normalised already? Give "
            "images without it, and the normalisation as mean= and std=: radii are in pixels"
        )
    if high > 1 + ROUNDING:
        cause = "from 0 to 255? Divide them by 255" if high <= 255 else "of another unit?"
        raise ValueError(f"pixels are from {low:.3g} to {high:.3g}, not in [0, 1]: {cause}")
    return pixels.clamp(0, 1)


def _compact(pixels: Tensor) -> Tensor:
    """Return floats that are whole 255ths as uint8, which are the same pixels."""
    whole = pixels.mul(255).round_()
    return whole.byte() if torch.equal(whole / 255, pixels) else pixels


def _labels(labels: Any) -> Tensor:
    classes = torch.as_tensor(labels).detach().cpu()
    if classes.ndim == 2 and classes.shape[1] > 1:
        raise ValueError(f"labels are of shape {tuple(classes.shape)}: one-hot? Give .argmax(1)")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"labels are {_dtype(classes)}: give whole numbers from 0, int64")
    return classes.flatten().long()


def _split(images: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    names = tuple(map(str, ids)) or _content_ids(images)
    if len(set(names)) != len(images):
        raise ValueError(f"there are {len(images)} images and {len(set(names))} different ids")
    return Split(images=images, labels=labels, ids=names)


def _content_ids(images: Tensor) -> tuple[str, ...]:
    """Name images by place and content: other images of the same places are not compared."""
    width = len(str(len(images) - 1))
    contents = (image.contiguous().numpy().tobytes() for image in images)
    digests = (hashlib.sha256(content).hexdigest()[:12] for content in contents)
    return tuple(f"{place:0{width}d}-{digest}" for place, digest in enumerate(digests))


def _check_range(labels: Tensor, classes: int) -> None:
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if not len(outside):
        return
    from_one = labels.min() == 1 and labels.max() == classes
    raise ValueError(
        f"label {int(labels[outside[0]])} is out of range: there are {classes} classes, so labels "
        f"are from 0 to {classes - 1}; {len(outside)} images, {_places(outside)}"
        + ("; they begin at 1: subtract 1" if from_one else "")
    )


def _places(places: Tensor) -> str:
    return f"the first at place {int(places[0])}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
