"""Image folders as people have them: odd sizes, grey, RGBA, CMYK, turned by the camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 12
KINDS = ("RGB", "L", "RGBA", "CMYK", "turned", "png")


def write_folder(root: Path, *, per_class: int = 6, held_out: int = 2, side: int = 40) -> Path:
    """Write train/ and val/ with twelve classes, each a colour under noise; return the root."""
    for label in range(CLASSES):
        for split, count in (("train", per_class), ("val", held_out)):
            for number in range(count):
                folder = root / split / f"class-{label:02d}"
                write_picture(folder, number, label, side=side + 3 * (number % 4))
    return root


def write_picture(folder: Path, number: int, label: int, *, side: int) -> Path:
    """Write one picture of a class, of a kind and size that follow from its number."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((label, number, len(folder.parent.name)))
    base = np.array([[label * 20, 255 - label * 20, 128]])
    noise = rng.integers(-20, 20, (side, side + 7, 3))
    pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
    kind = KINDS[number % len(KINDS)]
    image, options = Image.fromarray(pixels), {}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif kind not in ("png", "RGB"):
        image = image.convert(kind)
    suffix = "png" if kind in ("png", "RGBA") else "JPEG"
    path = folder / f"picture {number}.{suffix}"
    image.save(path, **options)
    return path
