"""Images in files, decoded when they are indexed, or once into the cache."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainables.data.cache import Mapped, cached, mapped

logger = logging.getLogger(__name__)

# Decoders raise all kinds of errors on bytes that are not an image.
UNREADABLE = Exception
# Pillow knows more formats, and hands one of them (EPS) to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
CHANNELS = 3
AT_ONCE = 512  # decoded and cropped images that are written together
WAITING = 4  # images per thread that are decoded and not yet taken
Item = TypeVar("Item")
Made = TypeVar("Made")


def opened(path: str | Path) -> Image.Image:
    """Open an image by its header; raises UNREADABLE, also where it is a pipe or a device."""
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - per image
        raise OSError("it is not a file")
    return Image.open(path, formats=FORMATS)


def as_rgb(file: Image.Image) -> Image.Image:
    """Decode an opened image as RGB, turned as its camera says; raises UNREADABLE."""
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode != "RGB":
        return _in_8_bits(file).convert("RGB")
    # convert() would copy an image that is RGB already.
    file.load()
    return file


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Bring deeper grey to 8 bits, which convert() would cut off; ValueError: its white is unknown.

    A PNG's or PPM's grey of mode I has 16 bits of its 32.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of mode {image.mode}, and what is white is not known: save it with 8 "
            "or 16 bits a channel"
        )
    return image


def validated(image: Image.Image, *, size: int) -> Image.Image:
    """Bring the shorter side to 256/224 of `size` (bilinear) and cut out the middle square.

    Source: the study's datasets.py, `build_transform`.
    """
    # Two seconds of imports that a study of images in memory, and its driver, need not pay.
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.v2 import functional as T  # type: ignore[import-untyped]

    shorter = round(size * 256 / 224)
    resized = T.resize(image, [shorter], interpolation=InterpolationMode.BILINEAR)
    cropped: Image.Image = T.center_crop(resized, [size, size])
    return cropped


def as_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageFiles:
    """Images below a folder; indexing decodes them: uint8 (B, 3, size, size).

    They are brought to `size` as validated, or must have it as stored (`native`). `original` gives
    one as it is stored, for the random crops of training. `workers`: threads that may decode even
    where torch has fewer. Paths are kept as one array of bytes: workers that were forked would copy
    a million Python strings by merely counting references to them.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        *,
        size: int,
        native: bool = False,
        workers: int = 0,
    ) -> None:
        self.root, self.size, self.native = root, size, native
        self.workers = workers
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self._originals: Originals | None = None
        self._rows = np.arange(len(paths))

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), CHANNELS, self.size, self.size

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        places = np.arange(len(self))[index.numpy() if isinstance(index, Tensor) else index]
        images = torch.empty((len(places), *self.shape[1:]), dtype=torch.uint8)
        for row, image in enumerate(in_threads(self._decoded, places.tolist(), self.workers)):
            images[row] = image
        return images

    def at(self, places: np.ndarray) -> ImageFiles:
        """Return the images at some places, still undecoded."""
        chosen = copy.copy(self)
        chosen._paths, chosen._rows = self._paths[places], self._rows[places]
        return chosen

    def out_of(self, originals: Originals) -> ImageFiles:
        """Return the same images, taken out of the cache."""
        taken = copy.copy(self)
        taken._originals = originals
        return taken

    def path(self, place: int) -> Path:
        """Return the file of the image at a place."""
        return self.root / os.fsdecode(bytes(self._paths[place]))

    def original(self, place: int) -> Image.Image:
        """Return the image at a place, whole; ValueError names it when it cannot be read."""
        if self._originals is not None:
            return self._originals.image(int(self._rows[place]))
        return self._read(place, as_rgb)

    def stored_size(self, place: int) -> tuple[int, int]:
        """Return an image's width and height as stored, from its file's header."""
        return self._read(place, lambda file: file.size)

    def _read(self, place: int, take: Callable[[Image.Image], Made]) -> Made:
        path = self.path(place)
        try:
            with opened(path) as file:
                return take(file)
        except UNREADABLE as error:
            raise unreadable(path, error) from error

    def _decoded(self, place: int) -> Tensor:
        image = self.original(place)
        if not self.native:
            return as_tensor(validated(image, size=self.size))
        if image.size != (self.size, self.size):
            raise ValueError(
                f"{self.path(place)} is {image.width} x {image.height} px, not {self.size} x "
                f"{self.size}: --scale folder --image-size N takes images of N px a side and more"
            )
        return as_tensor(image)


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error that names an unreadable image, its class and what to do."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ValueError(
        f"{path} (class {path.parent.name}) cannot be read: {reason}; replace or remove it"
    )


def in_threads(
    work: Callable[[Item], Made], items: Iterable[Item], workers: int = 0
) -> Iterator[Made]:
    """Yield the work on every item, in order, done by torch's number of threads or `workers`.

    Pillow lets go of Python's lock while it decodes and resizes.
    """
    threads, rest = max(torch.get_num_threads(), workers), iter(items)
    if threads < 2:
        yield from map(work, rest)
        return
    with ThreadPoolExecutor(threads) as pool:
        # Few at a time: whole decoded photographs wait here to be taken.
        pending = deque(pool.submit(work, item) for item in islice(rest, WAITING * threads))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(rest, 1))


class Originals:
    """Decoded images of any sizes, one behind another in a cached file, their sizes behind them."""

    def __init__(self, content: Mapped, count: int) -> None:
        self._content, self._count = content, count
        self.sizes = np.array(content[len(content) - 16 * count :]).view(np.int64).reshape(-1, 2)
        self.ends = np.cumsum(self.sizes.prod(axis=1) * CHANNELS)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped array would be pickled as its content; the other process maps it itself.
        return _mapped_originals, (self._content.filename, self._count)

    def image(self, row: int) -> Image.Image:
        """Return one image."""
        width, height = (int(side) for side in self.sizes[row])
        end = int(self.ends[row])
        pixels = self._content[end - CHANNELS * width * height : end]
        return Image.fromarray(np.asarray(pixels).reshape(height, width, CHANNELS))


def _mapped_originals(file: Path, count: int) -> Originals:
    return Originals(mapped(file), count)


def keep_originals(images: ImageFiles, cache: Path, budget: int) -> Originals | None:
    """Decode the images once into the cache, or find them there; None beyond the budget (bytes)."""
    stamps = stamps_of(images, budget)
    if stamps is None:
        return None
    file, places = cache / f"originals-{stamps}.u8", range(len(images))
    if not file.exists():
        sizes = in_threads(images.stored_size, places, images.workers)
        if sum(CHANNELS * width * height for width, height in sizes) > budget:
            return None

    def write(out: BinaryIO) -> None:
        sizes = []
        for image in in_threads(images.original, places, images.workers):
            sizes.append(image.size)
            out.write(np.asarray(image).data)
        out.write(np.array(sizes, dtype=np.int64).data)

    originals = Originals(cached(file, write), len(images))
    return originals if originals.ends[-1] <= budget else None


def keep_decoded(images: ImageFiles, cache: Path, budget: int) -> Tensor | None:
    """Decode and crop the images once into the cache, or find them there; None beyond budget."""
    if images.nbytes > budget or (stamps := stamps_of(images)) is None:
        return None
    kind = "native" if images.native else "validated-bilinear"

    def write(out: BinaryIO) -> None:
        for first in range(0, len(images), AT_ONCE):
            out.write(images[first : first + AT_ONCE].numpy().data)

    content = cached(cache / f"{kind}-{images.size}px-{stamps}.u8", write)
    return torch.from_numpy(content).view(images.shape)


def stamps_of(images: ImageFiles, budget: int | None = None) -> str | None:
    """Return 16 hex digits of every file's name, size and time; None where they exceed a budget.

    A decoded image is not smaller than its file.
    """
    digest, total = hashlib.sha256(str(images.root).encode()), 0
    for place in range(len(images)):
        path = images.path(place)
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        total += stat.st_size
        if budget is not None and total > budget:
            return None
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
