"""Texture dictionaries for the patch attack: read in the published layout, or the scale's own.

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evaluators.textures_build.builder import SMALL, TextureSettings, build_textures
from evaluators.textures_build.networks import IMAGENET_MEAN, IMAGENET_STD, column, small_network
from evaluators.weights import is_plain
from trainables.data.base import Data
from trainables.scale import Scale
from trainables.store.checkpoint import unpickled
from trainables.store.storage import write_atomically

LAYOUT = (
    "attention-style_t-label_{label}/conv_5_cam-thred_0.8_n-clusters_30/cls-w_0_scale_1"
    "/cluster_{cluster}/iter_9999.pt"
)
SAMPLED_BYTES = 4096
logger = logging.getLogger(__name__)
_built: dict[str, StoredTextures] = {}


class TextureDictionary(Protocol):
    """Texture images by class; `source` says what they were made from."""

    @property
    def source(self) -> str: ...

    @property
    def classes(self) -> tuple[int, ...]: ...

    @property
    def digest(self) -> str: ...

    def of_class(self, label: int) -> Tensor:
        """Return textures_TCHW of one class, float32 in [0, 1]."""
        ...


@dataclass(frozen=True)
class StoredTextures:
    """A dictionary held in memory: textures_KTCHW float32 in [0, 1], one row per class."""

    textures: Tensor
    classes: tuple[int, ...]
    source: str

    @cached_property
    def digest(self) -> str:
        """12 hex digits of the classes and every pixel."""
        content = json.dumps(self.classes).encode() + self.textures.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    def of_class(self, label: int) -> Tensor:
        return self.textures[self.classes.index(label)]


@dataclass(frozen=True)
class PublishedTextures:
    """A dictionary on disk in the published layout; a class is read when it is asked for."""

    root: Path
    classes: tuple[int, ...]
    clusters: int

    @property
    def source(self) -> str:
        return "read in the layout published with PatchAttack"

    @cached_property
    def digest(self) -> str:
        """12 hex digits of every file's place, size and middle 4 KiB."""
        digest = hashlib.sha256()
        for name in _layout(self.classes, self.clusters):
            path = self.root / name
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, (size - SAMPLED_BYTES) // 2))
                digest.update(f"{name} {size}".encode() + file.read(SAMPLED_BYTES))
        return digest.hexdigest()[:12]

    def of_class(self, label: int) -> Tensor:
        return torch.stack([_read_texture(self.root / n) for n in _layout((label,), self.clusters)])


def _layout(classes: Sequence[int], clusters: int) -> list[str]:
    return [LAYOUT.format(label=k, cluster=c) for k in classes for c in range(clusters)]


def read_published(
    root: Path, *, classes: Sequence[int] = range(1000), clusters: int = 30
) -> PublishedTextures:
    """Open a dictionary in the published layout; ValueError names the first missing files."""
    missing = [n for n in _layout(classes, clusters) if not (root / n).is_file()]
    if missing:
        total = len(classes) * clusters
        raise ValueError(f"{root} lacks {len(missing)} of {total} textures; first: {missing[:3]}")
    return PublishedTextures(root, tuple(classes), clusters)


def write_published(dictionary: TextureDictionary, root: Path) -> None:
    """Write a dictionary in the published layout: ImageNet-normalised tensors, one a file."""
    mean, std = column(IMAGENET_MEAN), column(IMAGENET_STD)
    for label in dictionary.classes:
        for cluster, texture_CHW in enumerate(dictionary.of_class(label)):
            buffer = io.BytesIO()
            torch.save(((texture_CHW - mean) / std).clone(), buffer)
            write_atomically(root / LAYOUT.format(label=label, cluster=cluster), buffer.getvalue())


def has_class(root: Path, label: int, clusters: int) -> bool:
    """Say whether all of a class's textures are stored."""
    return all((root / name).is_file() for name in _layout((label,), clusters))


def _read_texture(path: Path) -> Tensor:
    try:
        stored = unpickled(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"texture {path} cannot be read: {error.strerror}") from None
    if not is_plain(stored) or stored.squeeze(0).ndim != 3 or stored.shape[-3] != 3:
        raise ValueError(f"texture {path} is not one tensor of shape (3, H, W)")
    texture_CHW = stored.squeeze(0).float()
    return (texture_CHW * column(IMAGENET_STD) + column(IMAGENET_MEAN)).clamp_(0, 1)


def own_settings(scale: Scale) -> TextureSettings:
    """Return how a scale's dictionary is built from its own data."""
    return replace(SMALL, clusters=scale.patch.textures)


def dictionary_identity(scale: Scale, data: Data) -> object:
    """Return what names the dictionary of `dictionary_for`, without building it."""
    stored = stored_dictionary(scale, data)
    return stored.digest if stored else own_identity(scale, data)


def own_identity(scale: Scale, data: Data) -> dict[str, object]:
    """Return what a scale's own dictionary follows from, without building it."""
    return {"settings": asdict(own_settings(scale)), "train": data.train.ids_hash()}


def dictionary_for(scale: Scale, data: Data) -> TextureDictionary:
    """Return the dictionary stored with the data, or the scale's own, built on first use."""
    if stored := stored_dictionary(scale, data):
        return stored
    return load_or_build(scale, data, data.cache) if data.cache else own_dictionary(scale, data)


def stored_dictionary(scale: Scale, data: Data) -> PublishedTextures | None:
    """Open the dictionary stored with the data, None where there is none."""
    located = data.counterpart("tpa")
    return open_dictionary(located[1], scale) if located else None


def open_dictionary(root: Path, scale: Scale) -> PublishedTextures:
    """Open a stored dictionary of a scale's classes; ValueError says what it lacks.

    All of the scale's textures of a class are there, or none: then the class is left out.
    """
    clusters = scale.patch.textures
    present = [
        label
        for label in range(scale.num_classes)
        if any((root / name).is_file() for name in _layout((label,), clusters))
    ]
    if len(present) < 2:
        raise ValueError(f"{root} holds textures of {len(present)} classes; first: {LAYOUT}")
    return read_published(root, classes=present, clusters=clusters)


def own_dictionary(scale: Scale, data: Data) -> StoredTextures:
    """Return a scale's own dictionary, built once a process by a network of its train split."""
    key = _key(scale, data)
    if key not in _built:
        settings = own_settings(scale)
        network = small_network(scale, data, seed=settings.seed, epochs=settings.network_epochs)
        textures = build_textures(network, data.train, settings, device=torch.device("cpu"))
        _built[key] = StoredTextures(*textures, network.source)
    return _built[key]


def load_or_build(scale: Scale, data: Data, cache_dir: Path) -> StoredTextures:
    """Return a scale's own dictionary from its file, written first where it is not there."""
    path = cache_dir / f"textures-{scale.name}-{_key(scale, data)}.safetensors"
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    except SafetensorError as error:
        logger.warning("%s is damaged (%s) and is built again", path, error)
    dictionary = own_dictionary(scale, data)
    metadata = {"source": dictionary.source, "classes": json.dumps(dictionary.classes)}
    write_atomically(path, cast(bytes, save({"textures": dictionary.textures}, metadata=metadata)))
    return dictionary


def _key(scale: Scale, data: Data) -> str:
    identity = json.dumps([scale.name, own_identity(scale, data)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _load(path: Path) -> StoredTextures:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        classes = tuple(json.loads(metadata["classes"]))
        return StoredTextures(file.get_tensor("textures"), classes, metadata["source"])
