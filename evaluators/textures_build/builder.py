"""How textures are made: cluster the Grams of a class's images, synthesise the centres.

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluators.textures_build.networks import FeatureNetwork
from trainables.data.base import Split, to_unit
from trainables.watchdog import beat

COLOUR_SAMPLE = 256  # of images in files: are they grey?
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextureSettings:
    """How a dictionary is built; the published one's unless stated.

    images: how many training images per class are looked at. network_epochs: how long the scale's
    own feature network is trained where there are no VGG-19 weights. classes_at_once: how many
    classes' textures are synthesised in one batch; it does not change them beyond rounding.
    """

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


class TooFewImagesError(ValueError):
    """A class has fewer usable images than it is to have textures."""


def build_textures(
    network: FeatureNetwork, split: Split, settings: TextureSettings, *, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """Return textures_KTCHW float32 in [0, 1] and their classes.

    A class with fewer rightly classified images than clusters is left out; TooFewImagesError names
    the first where fewer than two classes are left.
    """
    network.to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    shown = split.images if isinstance(split.images, Tensor) else split.images[:COLOUR_SAMPLE]
    size = (_channels(shown), *split.images.shape[2:])
    classes: list[int] = []
    textures, lacking = [], []
    labels = sorted(set(split.labels.tolist()))
    for first in range(0, len(labels), settings.classes_at_once):
        centres = {}
        for label in labels[first : first + settings.classes_at_once]:
            try:
                centres[label] = _gram_centres(network, split, label, settings, device)
            except TooFewImagesError as error:
                logger.warning("left out of the texture dictionary: %s", error)
                lacking.append(error)
        if centres:
            targets = [torch.cat(layer) for layer in zip(*centres.values(), strict=True)]
            textures.append(_synthesise(network, targets, size, settings, generator))
            classes += centres
    if lacking and len(classes) < 2:
        raise lacking[0]
    flat = torch.cat(textures).cpu()
    return flat.view(len(classes), settings.clusters, *flat.shape[1:]), tuple(classes)


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
    activations, current = [], inputs_BCHW
    for index, layer in enumerate(features):
        current = layer(current)
        if index in layers:
            activations.append(current)
    return activations


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
        layers = _activations(features, network.style_layers, inputs.expand(-1, 3, -1, -1))
        terms = [(gram(a) - g).square().sum() for a, g in zip(layers, grams, strict=True)]
        (inputs.grad,) = torch.autograd.grad(torch.stack(terms).sum(), inputs)
        optimizer.step()
        beat()
    mean, std = network.mean.to(inputs), network.std.to(inputs)
    return (inputs.detach() * std + mean).clamp_(0, 1).expand(-1, 3, -1, -1).contiguous()
