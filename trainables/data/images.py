"""Images in files, decoded when they are indexed, or once into a cache that processes share."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainables.data.layouts import FORMATS, bytes_and_stamp, open_image, open_tables
from trainables.recipe import Preprocessing
from trainables.store.storage import ASIDE

# Decoders raise all kinds of errors on bytes that are not an image.
UNREADABLE = Exception
WHOLE = Preprocessing(squash=True)  # of images that are stored at a data set's size: none is cut
CHANNELS = 3
AT_ONCE = 512  # decoded and cropped images that are written together
WAITING = 4  # images per thread that are decoded and not yet taken
Item = TypeVar("Item")
Result = TypeVar("Result")
Mapped = np.ndarray[Any, np.dtype[np.uint8]]  # to a file


def as_rgb(file: Image.Image) -> Image.Image:
    """Decode an opened image as RGB, turned as its camera says; raises UNREADABLE."""
    ImageOps.exif_transpose(file, in_place=True)
    if file.mode[0] in "IF":  # convert() would cut off what is above 255
        raise ValueError(f"its pixels are of mode {file.mode}: save it with 8 bits a channel")
    if file.mode != "RGB":
        return file.convert("RGB")
    # convert() would copy an image that is RGB already.
    file.load()
    return file


def size_or_problem(path: Path) -> tuple[int, int] | str:
    """Read an image down to its last byte; return its width and height, or why it is unreadable."""
    try:
        with open_image(path) as content, Image.open(content, formats=FORMATS) as file:
            size = file.size
            # An eighth of a JPEG's size: every byte is read, few pixels are made.
            file.draft("RGB", (1, 1))
            as_rgb(file)
    except UNREADABLE as error:
        return str(error) or type(error).__name__
    return size


def validated(image: Image.Image, to: Preprocessing) -> Image.Image:
    """Bring an image to the size of a preprocessing; bilinear unless it says otherwise.

    Without `crop`: the shorter side to 256/224 of the size, as the study's datasets.py,
    `build_transform`. With it: as timm's transforms_factory.py, crop mode "center".
    """
    # Two seconds of imports that a study of images in memory, and its driver, need not pay.
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.v2 import functional as T  # type: ignore[import-untyped]

    assert to.size
    mode = InterpolationMode(to.interpolation or "bilinear")
    shorter = math.floor(to.size / to.crop) if to.crop else round(to.size * 256 / 224)
    sides = [to.size, to.size] if to.squash else [shorter]
    image = T.resize(image, sides, interpolation=mode)  # as it is where it has the size already
    return image if to.squash else cast(Image.Image, T.center_crop(image, [to.size, to.size]))


def as_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageFiles:
    """Images below a folder; indexing decodes them: uint8 (B, 3, size, size).

    They are `validated`; those stored at an exact side (`native`, in pixels) must have it, and are
    resized whole. `original` gives one as it is stored, for the random crops of training.
    `workers`: threads that may decode even where torch has fewer. `border`: pixels to cut off on
    each side first. Paths are one array of bytes: workers that were forked would copy a million
    Python strings by merely counting references.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        *,
        preprocessing: Preprocessing,
        native: int = 0,
        workers: int = 0,
    ) -> None:
        assert preprocessing.size
        self.root, self.native, self.workers, self.border = root, native, workers, 0
        self.preprocessing = preprocessing | WHOLE if native else preprocessing
        self.size = preprocessing.size
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        open_tables(root, paths)  # before threads would, each for itself
        self._content: Mapped | None = None  # decoded images, one behind another
        self._cached = np.zeros((len(paths), 3), dtype=np.int64)  # begin, width, height of each

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), CHANNELS, self.size, self.size

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        places = np.arange(len(self))[index.numpy() if isinstance(index, Tensor) else index]
        images = torch.empty((len(places), *self.shape[1:]), dtype=torch.uint8)
        for row, image in enumerate(in_threads(self._decoded, places.tolist(), self.workers)):
            images[row] = image
        return images

    def at(self, places: np.ndarray) -> ImageFiles:
        """Return the images at some places, still undecoded."""
        chosen = copy.copy(self)
        chosen._paths, chosen._cached = self._paths[places], self._cached[places]
        return chosen

    def path(self, place: int) -> Path:
        """Return the file of the image at a place."""
        return self.root / os.fsdecode(bytes(self._paths[place]))

    def original(self, place: int) -> Image.Image:
        """Return the image at a place, whole; ValueError names it when it cannot be read."""
        if self._content is None:
            return self._read(place, as_rgb)
        begin, width, height = (int(number) for number in self._cached[place])
        pixels = self._content[begin : begin + CHANNELS * width * height]
        return Image.fromarray(np.asarray(pixels).reshape(height, width, CHANNELS))

    def decoded_once(self, cache: Path | None, budget: int) -> tuple[ImageFiles, int]:
        """Decode all images once into the cache, or find them there.

        Returns the images and the bytes they take, 0 where they stay in files beyond the budget.
        """
        stamp = self._stamp(budget) if cache and len(self) else None
        if not cache or not stamp:
            return self, 0
        file, places = cache / f"originals-{stamp}.u8", range(len(self))
        if not file.exists():
            read_size = partial(self._read, take=attrgetter("size"))
            sizes = in_threads(read_size, places, self.workers)
            if sum(CHANNELS * width * height for width, height in sizes) > budget:
                return self, 0

        def write(out: BinaryIO) -> None:
            sizes = []
            for image in in_threads(self.original, places, self.workers):
                sizes.append(image.size)
                out.write(np.asarray(image).data)
            out.write(np.array(sizes, dtype=np.int64).data)

        taken = copy.copy(self)
        taken._content = written_once(file, write)
        sizes_N2 = np.array(taken._content[-16 * len(self) :]).view(np.int64).reshape(-1, 2)
        ends = np.cumsum(sizes_N2.prod(axis=1) * CHANNELS)
        taken._cached = np.column_stack([np.concatenate([[0], ends[:-1]]), sizes_N2])
        return taken, int(ends[-1])

    def cropped_once(self, cache: Path | None, budget: int) -> Tensor | ImageFiles:
        """Decode and crop all images once into the cache, or find them there.

        The tensor is mapped: writing to it leaves the file alone. Beyond the budget the images
        stay in files.
        """
        if not cache or not len(self) or self.nbytes > budget:
            return self
        rule = repr((self.native, self.preprocessing.geometry()))

        def write(out: BinaryIO) -> None:
            for first in range(0, len(self), AT_ONCE):
                out.write(self[first : first + AT_ONCE].numpy().data)

        stamp = hashlib.sha256(f"{rule} {self._stamp()}".encode()).hexdigest()[:16]
        content = written_once(cache / f"cropped-{self.size}px-{stamp}.u8", write)
        return torch.from_numpy(content).view(self.shape)

    def _stamp(self, budget: int | None = None) -> str | None:
        """Return 16 hex digits of every file's path, size and time; None if they exceed a budget.

        A decoded image is not smaller than its file.
        """
        digest, total = hashlib.sha256(str(self.root).encode()), 0
        for place in range(len(self)):
            size, stamp = bytes_and_stamp(self.path(place))
            total += size
            if budget is not None and total > budget:
                return None
            digest.update(stamp)
        return digest.hexdigest()[:16]

    def _read(self, place: int, take: Callable[[Image.Image], Result]) -> Result:
        path = self.path(place)
        try:
            with open_image(path) as content, Image.open(content, formats=FORMATS) as file:
                return take(file)
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ValueError(
                f"{path} (class {path.parent.name}) cannot be read: {reason}; replace or remove it"
            ) from error

    def _decoded(self, place: int) -> Tensor:
        image = self.original(place)
        if self.native and image.size != (self.native, self.native):
            raise ValueError(
                f"{self.path(place)} is {image.width} x {image.height} px, not {self.native} x "
                f"{self.native}: --scale folder takes images of any size"
            )
        return as_tensor(validated(ImageOps.crop(image, self.border), self.preprocessing))


class ResizedImages:
    """Images in memory, uint8 (N, 3, S, S), that indexing resizes: uint8 (B, 3, size, size)."""

    def __init__(self, stored_N3SS: Tensor, preprocessing: Preprocessing) -> None:
        assert preprocessing.size
        self.stored, self.preprocessing = stored_N3SS, preprocessing | WHOLE
        self.shape = (len(stored_N3SS), CHANNELS, preprocessing.size, preprocessing.size)
        self.nbytes = math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.resized(self.stored[index])

    def at(self, places: np.ndarray) -> ResizedImages:
        """Return the images at some places, still at their stored size."""
        return ResizedImages(self.stored[torch.from_numpy(places)], self.preprocessing)

    def resized(self, images_B3SS: Tensor) -> Tensor:
        """Resize images of the stored size as these are resized."""
        shown = torch.empty((len(images_B3SS), *self.shape[1:]), dtype=torch.uint8)
        for row, image in enumerate(in_threads(self._resized, images_B3SS)):
            shown[row] = image
        return shown

    def _resized(self, image_3SS: Tensor) -> Tensor:
        image = Image.fromarray(image_3SS.permute(1, 2, 0).contiguous().numpy())
        return as_tensor(validated(image, self.preprocessing))


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = 0
) -> Iterator[Result]:
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


def written_once(file: Path, write: Callable[[BinaryIO], None]) -> Mapped:
    """Map a file's bytes, written on first use by one process while the others wait.

    Writing to the map leaves the file alone. ValueError where the file cannot be kept.
    """
    aside = file.with_name(ASIDE + file.name)  # the same name again after a killed writer
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (file.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                try:
                    with aside.open("wb") as out:
                        write(out)
                        out.flush()
                        os.fsync(out.fileno())  # the name appears after the content
                    aside.replace(file)
                finally:
                    aside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"decoded images cannot be kept in {file.parent}: {error.strerror}; "
            "--data-memory 0 does without"
        ) from error
    return np.memmap(file, dtype=np.uint8, mode="c")
