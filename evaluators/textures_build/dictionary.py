"""Builds a dictionary of a data set's textures, class after class, into a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from evaluators.base import device_named
from evaluators.textures import StoredTextures, has_class, own_settings, write_published
from evaluators.textures_build.builder import (
    FULL,
    TextureSettings,
    TooFewImagesError,
    build_textures,
)
from evaluators.textures_build.networks import FeatureNetwork, small_network, vgg19_network
from trainables.data.base import Data
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data


def build_dictionary(
    source: DataSource,
    scale_name: str,
    *,
    image_size: int | None,
    weights: Path | None,
    folder: Path,
    device: str | None,
) -> None:
    """Build the textures of a scale's train images, by VGG-19's features where it has weights."""
    scale = scale_of(scale_name, source, image_size=image_size)
    data = load_data(scale, source)
    settings = FULL if weights else own_settings(scale)
    settings = replace(settings, clusters=scale.patch.textures, classes_at_once=1)
    network = (
        vgg19_network(weights)
        if weights
        else small_network(scale, data, seed=settings.seed, epochs=settings.network_epochs)
    )
    print(f"features: {network.source}; {settings}")
    _build(network, data, settings, folder, device_named(device))


def _build(
    network: FeatureNetwork,
    data: Data,
    settings: TextureSettings,
    folder: Path,
    device: torch.device,
) -> None:
    """Build class after class into a folder in the published layout, but for those it holds."""
    for label in track(range(len(data.class_names)), "classes"):
        if has_class(folder, label, settings.clusters):
            continue
        of_class = data.train.at((data.train.labels == label).nonzero().flatten().numpy())
        try:
            built = build_textures(network, of_class, settings, device=device)
        except TooFewImagesError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        write_published(StoredTextures(*built, network.source), folder)
