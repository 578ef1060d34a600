"""Texture dictionaries for the patch attack: read in the published layout, or built.

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from evaluators.weights import is_plain, read_tensors
from trainables.data.base import Data, Split, to_unit
from trainables.scale import Scale
from trainables.store.checkpoint import unpickled
from trainables.store.storage import write_atomically
from trainables.watchdog import beat

LAYOUT = (
    "attention-style_t-label_{label}/conv_5_cam-thred_0.8_n-clusters_30/cls-w_0_scale_1"
    "/cluster_{cluster}/iter_9999.pt"
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SAMPLED_BYTES = 4096
COLOUR_SAMPLE = 256  # of images in files: are they grey?
FITTED_IMAGES = 2000  # by the scale's own feature network
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
        found = hashlib.sha256()
        for name in _layout(self.classes, self.clusters):
            path = self.root / name
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, (size - SAMPLED_BYTES) // 2))
                found.update(f"{name} {size}".encode() + file.read(SAMPLED_BYTES))
        return found.hexdigest()[:12]

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
    mean, std = _column(IMAGENET_MEAN), _column(IMAGENET_STD)
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
    return (texture_CHW * _column(IMAGENET_STD) + _column(IMAGENET_MEAN)).clamp_(0, 1)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class TextureSettings:
    """How a dictionary is built; the published one's unless stated. `classes`: None for all.

    images: how many training images per class are looked at. network_epochs: how long the scale's
    own feature network is trained where there are no VGG-19 weights. classes_at_once: how many
    classes' textures are synthesised in one batch; it does not change them beyond rounding.
    """

    classes: int | None = None
    images: int = 1300
    clusters: int = 30
    cam_threshold: float = 0.8
    steps: int = 10_000
    rate: float = 0.01
    classes_at_once: int = 1
    network_epochs: int = 8
    seed: int = 0


FULL = TextureSettings()
SMALL = TextureSettings(images=120, clusters=5, steps=120, rate=0.05, classes_at_once=10)


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A VGG-like network: `features` in a row, `head` from their output to logits.

    Grams are taken behind `style_layers`, the Grad-CAM behind `cam_layer`.
    """

    features: nn.Sequential
    head: nn.Module
    style_layers: tuple[int, ...]
    cam_layer: int
    mean: Tensor
    std: Tensor
    source: str

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return the network's input for images in [0, 1]."""
        return (images_BCHW - self.mean.to(images_BCHW)) / self.std.to(images_BCHW)

    def averaging(self) -> nn.Sequential:
        """Return the features with average in place of maximum pooling, up to the last Gram."""
        layers = list(self.features)[: max(self.style_layers) + 1]
        return nn.Sequential(
            *(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers)
        )

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.features.to(device)
        self.head.to(device)


def vgg19_network(weights: Path) -> FeatureNetwork:
    """Build VGG-19 from a weights file, .safetensors or .pth read as plain tensors.

    ValueError when the file does not fit torchvision's architecture.
    """
    from torchvision.models import vgg19  # type: ignore[import-untyped]

    state = read_tensors(weights)
    with torch.device("meta"):
        network = vgg19(weights=None)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit VGG-19: {str(error)[:300]}") from None
    network.eval().requires_grad_(False)
    return FeatureNetwork(
        features=network.features,
        head=nn.Sequential(network.avgpool, nn.Flatten(), network.classifier),
        style_layers=(1, 6, 11, 20, 29),
        cam_layer=35,
        mean=_column(IMAGENET_MEAN),
        std=_column(IMAGENET_STD),
        source="VGG-19",
    )


def small_network(scale: Scale, data: Data, *, seed: int, epochs: int) -> FeatureNetwork:
    """Train a three-convolution network on a scale's own train split; the seed fixes its bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        )
        # Averaged over the image before the last layer: so its Grad-CAM is the class's evidence.
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.class_names))
        )
    network = FeatureNetwork(
        features=features,
        head=head,
        style_layers=(1, 4, 7),
        cam_layer=7,
        mean=_column(scale.mean),
        std=_column(scale.std),
        source=f"a 3-convolution network trained on {data.name} (no VGG-19 weights at hand)",
    )
    _fit(network, data.train, seed=seed, epochs=epochs)
    return network


def _fit(network: FeatureNetwork, split: Split, *, seed: int, epochs: int) -> None:
    model = nn.Sequential(network.features, network.head)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    split = split.subset(FITTED_IMAGES, seed=seed)
    images, batch_size = network.normalised(to_unit(split.images[:])), 50
    for _ in range(epochs):
        order = torch.randperm(len(split), generator=generator)
        for chosen in torch.split(order, batch_size):
            loss = F.cross_entropy(model(images[chosen]), split.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            beat()
    model.eval().requires_grad_(False)


def build_dictionary(
    network: FeatureNetwork, split: Split, settings: TextureSettings, *, device: torch.device
) -> StoredTextures:
    """Build a dictionary: per class, cluster the Grams of its images and synthesise the centres.

    A class with fewer rightly classified images than clusters is left out; ValueError names the
    first where fewer than two classes are left.
    """
    network.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    labels = sorted(set(split.labels.tolist()))[: settings.classes]
    textures = []
    kept: list[int] = []
    lacking: list[TooFewImagesError] = []
    for first in range(0, len(labels), settings.classes_at_once):
        centres = []
        for label in labels[first : first + settings.classes_at_once]:
            try:
                centres.append(_gram_centres(network, split, label, settings, device))
                kept.append(label)
            except TooFewImagesError as error:
                logger.warning("left out of the texture dictionary: %s", error)
                lacking.append(error)
        if not centres:
            continue
        targets = [torch.cat(layer) for layer in zip(*centres, strict=True)]
        shown = split.images if isinstance(split.images, Tensor) else split.images[:COLOUR_SAMPLE]
        size = (_channels(shown), *split.images.shape[2:])
        textures.append(_synthesise(network, targets, size, settings, generator))
    if lacking and len(kept) < 2:
        raise lacking[0]
    flat = torch.cat(textures).cpu()
    stored = flat.view(len(kept), settings.clusters, *flat.shape[1:])
    return StoredTextures(stored, tuple(kept), network.source)


class TooFewImagesError(ValueError):
    """A class has fewer usable images than it is to have textures."""


def _channels(images_NCHW: Tensor) -> int:
    """Return 1 when the images are grey, as then their textures are, else 3."""
    return 1 if bool((images_NCHW == images_NCHW[:, :1]).all()) else 3


def _gram_centres(
    network: FeatureNetwork,
    split: Split,
    label: int,
    settings: TextureSettings,
    device: torch.device,
) -> list[Tensor]:
    """Return, per style layer, the KMeans centres_TCC of one class's Gram matrices."""
    from sklearn.cluster import KMeans

    grams = _class_grams(network, split, label, settings, device)
    if len(grams[0]) < settings.clusters:
        raise TooFewImagesError(
            f"class {label}: the feature network gets {len(grams[0])} of its images right and "
            f"finds evidence for them, too few for {settings.clusters} textures"
        )
    flat = torch.cat([gram.flatten(1) for gram in grams], dim=1).cpu().numpy()
    means = KMeans(settings.clusters, n_init=1, random_state=settings.seed).fit(flat)
    centres = torch.from_numpy(means.cluster_centers_.astype(np.float32)).to(device)
    parts = torch.split(centres, [g[0].numel() for g in grams], dim=1)
    return [p.reshape(-1, *g.shape[1:]) for p, g in zip(parts, grams, strict=True)]


def _class_grams(
    network: FeatureNetwork,
    split: Split,
    label: int,
    settings: TextureSettings,
    device: torch.device,
) -> list[Tensor]:
    """Return, per style layer, the masked Grams_NCC of a class's rightly classified images."""
    of_class = (split.labels == label).nonzero().flatten()[: settings.images]
    averaging = network.averaging()
    parts: list[list[Tensor]] = []
    for chosen in torch.split(of_class, 64):
        inputs_BCHW = network.normalised(to_unit(split.images[chosen].to(device)))
        cam_B1HW, right_B = grad_cam(network, inputs_BCHW, label)
        usable = right_B & (cam_B1HW.amax(dim=(1, 2, 3)) > 0)
        activations = _activations(averaging, network.style_layers, inputs_BCHW[usable])
        masks = (cam_mask(cam_B1HW[usable], a.shape[-1], settings) for a in activations)
        parts.append([gram(a, mask) for a, mask in zip(activations, masks, strict=True)])
        beat()
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def grad_cam(network: FeatureNetwork, inputs_BCHW: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Return cam_B1HW >= 0 of a class and whether each input is classified as it.

    Source: Selvaraju et al. (2017), equations 1 and 2.
    """
    split = network.cam_layer + 1
    activation = network.features[:split](inputs_BCHW).detach().requires_grad_(True)
    logits_BK = network.head(network.features[split:](activation))
    (gradient,) = torch.autograd.grad(logits_BK[:, label].sum(), activation)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * activation.detach()).sum(dim=1, keepdim=True))
    return cam, logits_BK.detach().argmax(dim=1) == label


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


def _activations(
    features: nn.Sequential, layers: Sequence[int], inputs_BCHW: Tensor
) -> list[Tensor]:
    found, current = [], inputs_BCHW
    for index, layer in enumerate(features):
        current = layer(current)
        if index in layers:
            found.append(current)
    return found


def _synthesise(
    network: FeatureNetwork,
    grams: Sequence[Tensor],
    size: tuple[int, ...],
    settings: TextureSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return textures_NCHW in [0, 1]: noise moved by Adam until its Grams are the given ones."""
    noise = torch.randn((len(grams[0]), *size), generator=generator).to(grams[0].device)
    inputs = noise.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=settings.rate)
    features = network.averaging()
    for _ in range(settings.steps):
        found = _activations(features, network.style_layers, inputs.expand(-1, 3, -1, -1))
        terms = [(gram(a) - g).square().sum() for a, g in zip(found, grams, strict=True)]
        (inputs.grad,) = torch.autograd.grad(torch.stack(terms).sum(), inputs)
        optimizer.step()
        beat()
    mean, std = network.mean.to(inputs), network.std.to(inputs)
    return (inputs.detach() * std + mean).clamp_(0, 1).expand(-1, 3, -1, -1).contiguous()


def own_settings(scale: Scale) -> TextureSettings:
    """Return how a scale's dictionary is built from its own data."""
    small = asdict(SMALL) | {"clusters": scale.patch.textures}
    return TextureSettings(**small)


def dictionary_identity(scale: Scale, data: Data) -> object:
    """Return what names the dictionary of `dictionary_for`, without building it."""
    stored = stored_dictionary(scale, data)
    return stored.digest if stored else own_identity(scale, data)


def stored_dictionary(scale: Scale, data: Data) -> PublishedTextures | None:
    """Open the dictionary stored with the data, None where there is none."""
    root = data.stored("textures")
    return open_dictionary(root, scale) if root else None


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


def own_identity(scale: Scale, data: Data) -> dict[str, object]:
    """Return what a scale's own dictionary follows from, without building it."""
    return {"settings": asdict(own_settings(scale)), "train": data.train.ids_hash()}


def dictionary_for(scale: Scale, data: Data) -> TextureDictionary:
    """Return the dictionary stored with the data, or the scale's own, built on first use."""
    if stored := stored_dictionary(scale, data):
        return stored
    return load_or_build(scale, data, data.cache) if data.cache else _own_dictionary(scale, data)


def _own_dictionary(scale: Scale, data: Data) -> StoredTextures:
    key = _key(scale, data)
    if key not in _built:
        settings = own_settings(scale)
        network = small_network(scale, data, seed=settings.seed, epochs=settings.network_epochs)
        _built[key] = build_dictionary(network, data.train, settings, device=torch.device("cpu"))
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
    dictionary = _own_dictionary(scale, data)
    write_atomically(path, _serialise(dictionary))
    return dictionary


def _key(scale: Scale, data: Data) -> str:
    identity = json.dumps([scale.name, own_identity(scale, data)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _serialise(dictionary: StoredTextures) -> bytes:
    metadata = {"source": dictionary.source, "classes": json.dumps(dictionary.classes)}
    return cast(bytes, save({"textures": dictionary.textures}, metadata=metadata))


def _load(path: Path) -> StoredTextures:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        classes = tuple(json.loads(metadata["classes"]))
        return StoredTextures(file.get_tensor("textures"), classes, metadata["source"])
