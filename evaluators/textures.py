"""Texture dictionaries for the patch attack: read in the published layout, or a scale's own.

A dictionary maps a class to its textures_TCHW, float32 in [0, 1]. To build textures, the Gram
matrices of a class's images are clustered, and noise is moved until its Gram matrices are a
cluster's centre. Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.data.base import Data, Split, to_unit
from trainables.data.registry import IMAGENET_MEAN, IMAGENET_STD
from trainables.scale import Scale
from trainables.store.storage import write_atomically
from trainables.store.tensors import is_plain, read_content, unpickled
from trainables.watchdog import beat

LAYOUT = (
    "attention-style_t-label_{label}/conv_5_cam-thred_0.8_n-clusters_30/cls-w_0_scale_1"
    "/cluster_{cluster}/iter_9999.pt"
)
SAMPLED_BYTES = 4096
FITTED_IMAGES = 2000  # by the small network
COLOUR_SAMPLE = 256  # of images in files: are they grey?
logger = logging.getLogger(__name__)
_built: dict[str, Mapping[int, Tensor]] = {}


def channels(values: Sequence[float]) -> Tensor:
    """Return a number a channel, shaped to meet images (3, H, W)."""
    return torch.tensor(values).view(3, 1, 1)


def file_names(label: int, clusters: int) -> list[str]:
    """Return the names of a class's files in the published layout."""
    return [LAYOUT.format(label=label, cluster=cluster) for cluster in range(clusters)]


@dataclass(frozen=True)
class StoredTextures(Mapping[int, Tensor]):
    """A dictionary on disk in the published layout; a class is read when it is needed."""

    root: Path
    classes: tuple[int, ...]
    clusters: int

    def __getitem__(self, label: int) -> Tensor:
        names = file_names(label, self.clusters)
        return torch.stack([_read_texture(self.root / name) for name in names])

    def __iter__(self) -> Iterator[int]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """12 hex digits of every file's place, size and middle 4 KiB."""
        digest = hashlib.sha256()
        for name in (n for label in self.classes for n in file_names(label, self.clusters)):
            path = self.root / name
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, (size - SAMPLED_BYTES) // 2))
                digest.update(f"{name} {size}".encode() + file.read(SAMPLED_BYTES))
        return digest.hexdigest()[:12]


def _read_texture(path: Path) -> Tensor:
    stored = unpickled(read_content(path), path)
    if not is_plain(stored) or stored.squeeze(0).ndim != 3 or stored.shape[-3] != 3:
        raise ValueError(f"texture {path} is not one tensor of shape (3, H, W)")
    texture_CHW = stored.squeeze(0).float()
    return (texture_CHW * channels(IMAGENET_STD) + channels(IMAGENET_MEAN)).clamp_(0, 1)


def open_dictionary(root: Path, scale: Scale) -> StoredTextures:
    """Open a stored dictionary of a scale's classes; ValueError names the first missing files.

    A class has all of the scale's textures, or none: then it is left out.
    """
    clusters = scale.patch.textures
    files = {k: [root / n for n in file_names(k, clusters)] for k in range(scale.num_classes)}
    present = tuple(k for k, paths in files.items() if any(path.is_file() for path in paths))
    if len(present) < 2:
        raise ValueError(f"{root} holds textures of {len(present)} classes; first: {LAYOUT}")
    missing = [str(path) for k in present for path in files[k] if not path.is_file()]
    if missing:
        total = len(present) * clusters
        raise ValueError(f"{root} lacks {len(missing)} of {total} textures; first: {missing[:3]}")
    return StoredTextures(root, present, clusters)


def dictionary_identity(scale: Scale, data: Data) -> object:
    """Return what names the dictionary of `dictionary_for`, without building it."""
    if stored := _stored(scale, data):
        return stored.digest
    return {"settings": asdict(own_settings(scale)), "train": data.train.ids_hash()}


def dictionary_for(scale: Scale, data: Data) -> Mapping[int, Tensor]:
    """Return the dictionary stored with the data, or the scale's own, built on first use.

    Where the data have a cache, the scale's own is built once for all processes.
    """
    if stored := _stored(scale, data):
        return stored
    identity = json.dumps([scale.name, dictionary_identity(scale, data)], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    if key not in _built:
        path = data.cache and data.cache / f"dictionary-{scale.name}-{key}.safetensors"
        _built[key] = _load_or_build(scale, data, path)
    return _built[key]


def _stored(scale: Scale, data: Data) -> StoredTextures | None:
    """Open the dictionary stored with the data; ValueError where none other may stand for it."""
    if located := data.counterpart("tpa"):
        return open_dictionary(located[1], scale)
    if not data.data_set.generated:
        title, name = data.data_set.title, data.data_set.counterpart("tpa")
        raise ValueError(f"on {title} this needs the set: --stored {name}=DIR")
    return None


def _load_or_build(scale: Scale, data: Data, path: Path | None) -> Mapping[int, Tensor]:
    try:
        if path:
            textures = load(path.read_bytes())
            return {int(label): textures[label] for label in sorted(textures, key=int)}
    except (FileNotFoundError, SafetensorError):  # it is missing or damaged
        pass
    settings = own_settings(scale)
    network = small_network(scale, data, settings)
    dictionary = build_textures(network, data.train, settings, device=torch.device("cpu"))
    if len(dictionary) < 2:
        raise ValueError(
            f"the patch attack needs textures of two classes; {len(dictionary)} of {data.name} "
            f"have {settings.clusters} images that the feature network gets right"
        )
    if path:
        write_atomically(path, cast(bytes, save({str(k): v for k, v in dictionary.items()})))
    return dictionary


@dataclass(frozen=True, kw_only=True)
class TextureSettings:
    """How a dictionary is built; the published one's unless stated.

    images: how many training images a class are used. network_epochs: how long the small network
    is trained. classes_at_once: how many classes' textures are synthesised in one batch; it does
    not change them beyond rounding.
    """

    images: int = 1300
    clusters: int = 30
    cam_threshold: float = 0.8
    steps: int = 10_000
    rate: float = 0.01
    classes_at_once: int = 1
    network_epochs: int = 8
    seed: int = 0


def own_settings(scale: Scale) -> TextureSettings:
    """Return how a scale's dictionary is built from its own data."""
    return TextureSettings(
        images=120, clusters=scale.patch.textures, steps=120, rate=0.05, classes_at_once=10
    )


@dataclass(frozen=True)
class FeatureNetwork:
    """A VGG-like classifier of normalised images, its layers in a row.

    Grams are taken behind `style_layers`, the Grad-CAM behind `cam_layer`.
    """

    layers: nn.Sequential
    style_layers: tuple[int, ...]
    cam_layer: int
    mean: Sequence[float]
    std: Sequence[float]

    def inputs(self, images_BCHW: Tensor) -> Tensor:
        """Return the network's inputs for images in [0, 1]."""
        mean, std = channels(self.mean).to(images_BCHW), channels(self.std).to(images_BCHW)
        return (images_BCHW - mean) / std

    def style_activations(self, inputs_BCHW: Tensor) -> list[Tensor]:
        """Return what leaves each style layer, with average in place of maximum pooling."""
        activations, current = [], inputs_BCHW
        for index, layer in enumerate(self.layers[: max(self.style_layers) + 1]):
            pools = isinstance(layer, nn.MaxPool2d)
            current = F.avg_pool2d(current, 2) if pools else layer(current)
            if index in self.style_layers:
                activations.append(current)
        return activations

    def grad_cam(self, inputs_BCHW: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Return cam_B1HW >= 0 of a class and whether each input is classified as it.

        Source: Selvaraju et al. (2017), equations 1 and 2.
        """
        split = self.cam_layer + 1
        activation = self.layers[:split](inputs_BCHW).detach().requires_grad_(True)
        logits_BK = self.layers[split:](activation)
        (gradient,) = torch.autograd.grad(logits_BK[:, label].sum(), activation)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        cam_B1HW = F.relu((weights * activation.detach()).sum(dim=1, keepdim=True))
        return cam_B1HW, logits_BK.detach().argmax(dim=1) == label


def small_network(scale: Scale, data: Data, settings: TextureSettings) -> FeatureNetwork:
    """Train a three-convolution network on a scale's own train split; the seed fixes its bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            # Averaged over the image before the last layer: the Grad-CAM is the class's evidence.
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.class_names))),
        )
    mean, std = scale.data_set.mean, scale.data_set.std
    network = FeatureNetwork(layers, style_layers=(1, 4, 7), cam_layer=7, mean=mean, std=std)
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(settings.seed)
    split = data.train.subset(FITTED_IMAGES, seed=settings.seed)
    images_NCHW = network.inputs(to_unit(split.images[:]))
    for _ in range(settings.network_epochs):
        for chosen in torch.split(torch.randperm(len(split), generator=generator), 50):
            loss = F.cross_entropy(layers(images_NCHW[chosen]), split.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            beat()
    layers.eval().requires_grad_(False)
    return network


def build_textures(
    network: FeatureNetwork, split: Split, settings: TextureSettings, *, device: torch.device
) -> dict[int, Tensor]:
    """Return the dictionary of a split's classes.

    A class with fewer rightly classified images than clusters is left out, with a warning.
    """
    network.layers.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    shown = split.images if isinstance(split.images, Tensor) else split.images[:COLOUR_SAMPLE]
    grey = bool((shown == shown[:, :1]).all())  # then the textures are grey, too
    size = (1 if grey else 3, *split.images.shape[2:])
    dictionary: dict[int, Tensor] = {}
    labels = sorted(set(split.labels.tolist()))
    for first in range(0, len(labels), settings.classes_at_once):
        centres = {}
        for label in labels[first : first + settings.classes_at_once]:
            grams = _class_grams(network, split, label, settings, device)
            if len(grams[0]) >= settings.clusters:
                centres[label] = _gram_centres(grams, settings)
            else:
                logger.warning(
                    "class %d is left out of the texture dictionary: the feature network gets %d "
                    "of its images right, too few for %d textures",
                    *(label, len(grams[0]), settings.clusters),
                )
        if centres:
            targets = [torch.cat(layer) for layer in zip(*centres.values(), strict=True)]
            textures_NCHW = _synthesise(network, targets, size, settings, generator).cpu()
            parts = torch.split(textures_NCHW, settings.clusters)
            dictionary |= {k: part.clone() for k, part in zip(centres, parts, strict=True)}
    return dictionary


def _class_grams(
    network: FeatureNetwork,
    split: Split,
    label: int,
    settings: TextureSettings,
    device: torch.device,
) -> list[Tensor]:
    """Return, per style layer, the masked Grams_NCC of a class's rightly classified images."""
    of_class = (split.labels == label).nonzero().flatten()[: settings.images]
    parts: list[list[Tensor]] = []
    for chosen in torch.split(of_class, 64):
        inputs_BCHW = network.inputs(to_unit(split.images[chosen].to(device)))
        cam_B1HW, right_B = network.grad_cam(inputs_BCHW, label)
        usable = right_B & (cam_B1HW.amax(dim=(1, 2, 3)) > 0)
        activations = network.style_activations(inputs_BCHW[usable])
        masks = (cam_mask(cam_B1HW[usable], a.shape[-1], settings) for a in activations)
        parts.append([gram(a, mask) for a, mask in zip(activations, masks, strict=True)])
        beat()
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def cam_mask(cam_B1HW: Tensor, side: int, settings: TextureSettings) -> Tensor:
    """Return mask_B1SS: 1 where the map, at `side` and with peak 1, reaches the threshold."""
    resized = F.interpolate(cam_B1HW, size=side, mode="bilinear", align_corners=False)
    peak = resized.amax(dim=(2, 3), keepdim=True)
    return (resized >= settings.cam_threshold * peak).float()


def gram(activation_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """Return gram_BCC: products of channels, averaged over the channels and the masked pixels."""
    flat = activation_BCHW.flatten(2)
    if mask_B1HW is None:
        return flat @ flat.mT / (flat.shape[1] * flat.shape[2])
    mask = mask_B1HW.flatten(2)
    return (flat * mask) @ flat.mT / (flat.shape[1] * mask.sum(dim=2, keepdim=True))


def _gram_centres(grams: Sequence[Tensor], settings: TextureSettings) -> list[Tensor]:
    """Return, per style layer, the KMeans centres_TCC of one class's Gram matrices."""
    from sklearn.cluster import KMeans

    flat = torch.cat([g.flatten(1) for g in grams], dim=1).cpu().numpy()
    means = KMeans(settings.clusters, n_init=1, random_state=settings.seed).fit(flat)
    centres = torch.from_numpy(means.cluster_centers_.astype(np.float32)).to(grams[0].device)
    parts = torch.split(centres, [g[0].numel() for g in grams], dim=1)
    return [p.reshape(-1, *g.shape[1:]) for p, g in zip(parts, grams, strict=True)]


def _synthesise(
    network: FeatureNetwork,
    grams: Sequence[Tensor],
    size: tuple[int, ...],
    settings: TextureSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return textures_NCHW in [0, 1]: noise moved by Adam until its Grams are the stated ones."""
    noise = torch.randn((len(grams[0]), *size), generator=generator).to(grams[0].device)
    inputs = noise.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=settings.rate)
    for _ in range(settings.steps):
        layers = network.style_activations(inputs.expand(-1, 3, -1, -1))
        terms = [(gram(a) - g).square().sum() for a, g in zip(layers, grams, strict=True)]
        (inputs.grad,) = torch.autograd.grad(torch.stack(terms).sum(), inputs)
        optimizer.step()
        beat()
    mean, std = channels(network.mean).to(inputs), channels(network.std).to(inputs)
    return (inputs.detach() * std + mean).clamp_(0, 1).expand(-1, 3, -1, -1).contiguous()
