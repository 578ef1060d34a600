"""Images in files, decoded when they are asked for, or once into memory that processes share."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainables.store.storage import ASIDE, write_atomically

logger = logging.getLogger(__name__)

# What bytes that are no image make a decoder raise is anything.
UNREADABLE = Exception
# Pillow knows more formats, and hands one of them (EPS) to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
CHANNELS = 3
ORIENTATION = 0x0112  # EXIF's tag for how the camera was held: from SIDEWAYS on, on its side
SIDEWAYS = 5
UNUSED_SECONDS = 30 * 86400
HASH_BYTES = 32  # behind the pixels of a decoded file
BLOCK_BYTES = 2**24
LOCK = ".lock"


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image as RGB, turned as its camera says; raises UNREADABLE."""
    with opened(path) as file:
        return as_rgb(file)


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


def validated(image: Image.Image, *, resize: int, size: int) -> Image.Image:
    """Bring the shorter side to `resize` (bilinear) and cut out the middle square of `size`.

    Source: the study's datasets.py, `build_transform`.
    """
    # Two seconds of imports that a study of images in memory, and its driver, need not pay.
    from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
    from torchvision.transforms.v2 import functional as T  # type: ignore[import-untyped]

    resized = T.resize(image, [resize], interpolation=InterpolationMode.BILINEAR)
    cropped: Image.Image = T.center_crop(resized, [size, size])
    return cropped


def as_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_for(size: int) -> int:
    """Return the shorter side that the study resizes to before it crops to `size`: 256 for 224."""
    return round(size * 256 / 224)


class ImageFiles:
    """Images below a folder; indexing gives them as validated: uint8 (B, 3, size, size).

    `original` gives one as it is stored, for the random crops of training. `workers`: threads that
    may decode even where torch has fewer. Paths are kept as one
    array of bytes: workers that were forked would copy a million Python strings by merely
    counting references to them.
    """

    def __init__(self, root: Path, paths: Sequence[str], *, size: int, workers: int = 0) -> None:
        self.root, self.size, self.workers = root, size, workers
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self._decoded: DecodedImages | None = None
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

        def fill(row: int) -> None:
            image = self.original(int(places[row]))
            images[row] = as_tensor(validated(image, resize=resize_for(self.size), size=self.size))

        in_threads(fill, range(len(places)), workers=self.workers)
        return images

    def at(self, places: np.ndarray) -> ImageFiles:
        """Return the images at some places, still undecoded."""
        chosen = copy.copy(self)
        chosen._paths, chosen._rows = self._paths[places], self._rows[places]
        return chosen

    def out_of(self, decoded: DecodedImages) -> ImageFiles:
        """Return the same images, taken out of memory."""
        kept = copy.copy(self)
        kept._decoded = decoded
        return kept

    def path(self, place: int) -> Path:
        """Return the file of the image at a place."""
        return self.root / os.fsdecode(bytes(self._paths[place]))

    def original(self, place: int) -> Image.Image:
        """Return the image at a place, whole; ValueError names it when it cannot be read."""
        if self._decoded is not None:
            return self._decoded.image(int(self._rows[place]))
        path = self.path(place)
        try:
            return read_rgb(path)
        except UNREADABLE as error:
            raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error that names an unreadable image, its class and what to do."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ValueError(
        f"{path} (class {path.parent.name}) cannot be read: {reason}; "
        "--skip-damaged goes on without it"
    )


class DecodedImages:
    """Images of any sizes, whole, one behind another in a file that is mapped into memory.

    The pages are the machine's, so every process that maps the file shares them.
    """

    def __init__(self, file: Path, sizes_N2: np.ndarray) -> None:
        self.file, self.sizes = file, sizes_N2
        self.ends = np.cumsum(sizes_N2.prod(axis=1, dtype=np.int64) * CHANNELS)

    @cached_property
    def _pixels(self) -> np.ndarray:
        return np.memmap(self.file, dtype=np.uint8, mode="r")

    def __getstate__(self) -> dict[str, object]:
        # A mapped array would be pickled as its content; the other process maps it itself.
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    def image(self, row: int) -> Image.Image:
        """Return one image."""
        width, height = (int(side) for side in self.sizes[row])
        end = int(self.ends[row])
        pixels = self._pixels[end - CHANNELS * width * height : end]
        return Image.fromarray(np.asarray(pixels).reshape(height, width, CHANNELS))


def in_threads(work: Callable[[int], None], items: Sequence[int], *, workers: int = 0) -> None:
    """Do the work on every item with as many threads as torch may use here, or with `workers`.

    Pillow lets go of Python's lock while it decodes and resizes.
    """
    threads = min(max(torch.get_num_threads(), workers), len(items))
    if threads < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass


def keep_originals(images: ImageFiles, cache: Path, budget: int) -> DecodedImages | None:
    """Decode the images once into the cache, or find them there; None beyond the budget (bytes)."""
    stamps = stamps_of(images, budget)
    if stamps is None:
        return None
    known = cache / f"sizes-{stamps}"
    sizes = _kept_sizes(known, images)
    decoded = DecodedImages(cache / f"originals-{stamps}.u8", sizes)
    total = int(decoded.ends[-1])
    if total > budget:
        return None

    def write(pixels: np.ndarray) -> None:
        def fill(place: int) -> None:
            flat = np.asarray(images.original(place)).reshape(-1)
            end = int(decoded.ends[place])
            pixels[end - len(flat) : end] = flat

        in_threads(fill, range(len(images)), workers=images.workers)

    write_once(decoded.file, total, write)
    if not known.exists():
        content = sizes.tobytes()
        with sole_writer(cache):
            write_atomically(known, hashlib.sha256(content).digest() + content)
    return decoded


def _kept_sizes(known: Path, images: ImageFiles) -> np.ndarray:
    """Return the sizes that an earlier process kept, or measure them; a damaged file goes."""
    if known.exists():
        digest, content = known.read_bytes()[:32], known.read_bytes()[32:]
        if hashlib.sha256(content).digest() == digest:
            return np.frombuffer(content, dtype=np.int64).reshape(-1, 2)
        known.unlink(missing_ok=True)
    return _sizes(images)


def _sizes(images: ImageFiles) -> np.ndarray:
    """Return each image's width and height, upright, from its file's header."""
    sizes = np.empty((len(images), 2), dtype=np.int64)

    def measure(place: int) -> None:
        path = images.path(place)
        try:
            with opened(path) as file:
                turned = file.getexif().get(ORIENTATION, 1) >= SIDEWAYS
                sizes[place] = file.size[::-1] if turned else file.size
        except UNREADABLE as error:
            raise unreadable(path, error) from error

    in_threads(measure, range(len(images)), workers=images.workers)
    return sizes


def keep_validated(images: ImageFiles, cache: Path, budget: int) -> Tensor | None:
    """Decode and crop the images once into the cache, or find them there; None beyond budget."""
    if images.nbytes > budget or (stamps := stamps_of(images)) is None:
        return None
    file = cache / f"validated-bilinear-{images.size}px-{stamps}.u8"

    def write(pixels: np.ndarray) -> None:
        whole = pixels.reshape(images.shape)
        for first in range(0, len(images), 512):
            part = slice(first, first + 512)
            whole[part] = images[part].numpy()

    write_once(file, images.nbytes, write)
    return map_tensor(file, images.shape)


def map_tensor(file: Path, shape: Sequence[int]) -> Tensor:
    """Map a file of bytes into memory as a uint8 tensor; writing to it leaves the file alone."""
    count = int(np.prod(shape))
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.uint8).view(*shape)


def stamps_of(images: ImageFiles, budget: int | None = None) -> str | None:
    """Return 16 hex digits of every file's name, size and time; None where they exceed a budget.

    A decoded image is not smaller than its file.
    """
    found, total = hashlib.sha256(str(images.root).encode()), 0
    for place in range(len(images)):
        path = images.path(place)
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        total += stat.st_size
        if budget is not None and total > budget:
            return None
        found.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def write_once(file: Path, size: int, write: Callable[[np.ndarray], None]) -> None:
    """Write a file of `size` bytes, and a hash of them behind, unless it is there whole.

    One process does, the others wait. A damaged file is written anew.
    """
    try:
        with sole_writer(file.parent):
            pass  # who writes it now has written it by then
        # Without the lock: the processes of a machine look at the same time.
        if _is_whole(file, size):
            return
        with sole_writer(file.parent):
            if not _is_whole(file, size):
                remove_unused(file.parent)
                _write_aside(file, size, write)
    except OSError as error:
        raise ValueError(
            f"decoded images ({size / 2**30:.2f} GiB) cannot be kept in {file.parent}: "
            f"{error.strerror}; --data-memory 0 does without"
        ) from error


def _is_whole(file: Path, size: int) -> bool:
    """Tell whether a file is there as it was written; a damaged one is logged."""
    if not file.exists():
        return False
    if file.stat().st_size == size + HASH_BYTES:
        content = np.memmap(file, dtype=np.uint8, mode="r")
        if _hash(file.name, content[:size]) == content[size:].tobytes():
            file.touch()
            return True
    logger.warning("%s is damaged: its images are decoded again", file)
    return False


def _write_aside(file: Path, size: int, write: Callable[[np.ndarray], None]) -> None:
    aside = file.with_name(f"{ASIDE}{file.name}.{uuid.uuid4().hex}")
    try:
        # Space is claimed first: a full disk is an error here and not a crash later.
        with aside.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size + HASH_BYTES)
        content = np.memmap(aside, dtype=np.uint8, mode="r+")
        write(content[:size])
        content[size:] = np.frombuffer(_hash(file.name, content[:size]), np.uint8)
        content.flush()
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _hash(name: str, content: np.ndarray) -> bytes:
    """Return the SHA-256 of a name and of every block's SHA-256: threads share the work."""
    hashes = [b""] * -(-len(content) // BLOCK_BYTES)

    def fill(block: int) -> None:
        part = content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        hashes[block] = hashlib.sha256(part.data).digest()

    in_threads(fill, range(len(hashes)))
    return hashlib.sha256(name.encode() + b"".join(hashes)).digest()


def remove_unused(cache: Path) -> None:
    """Remove what was decoded and not asked for in a month; who has it mapped keeps it."""
    for file in cache.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > UNUSED_SECONDS:
                file.unlink()


@contextmanager
def sole_writer(cache: Path) -> Iterator[None]:
    """Hold a cache, made where it is not there, without what killed writers left half written."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in cache.glob(f"{ASIDE}*"):
            if file.name != LOCK:
                file.unlink()
        yield
