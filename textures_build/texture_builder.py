"""The command line that builds a texture dictionary: `python -m texture_builder`.

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.models import vgg19  # type: ignore[import-untyped]

from evaluators.base import device_named
from evaluators.textures import (
    FeatureNetwork,
    TextureSettings,
    build_textures,
    channels,
    file_names,
    own_settings,
    small_network,
)
from trainables.data.listing import scale_of
from trainables.data.load import load_data
from trainables.data.registry import IMAGENET_MEAN, IMAGENET_STD
from trainables.options import DataOptions, option
from trainables.store.storage import write_atomically
from trainables.store.tensors import read_content, read_tensors


class BuildOptions(DataOptions):
    """Build the texture patch attack's dictionary from a data set's train images."""

    prog: ClassVar[str] = "python -m texture_builder"

    out: Path = option(..., "where it goes", "DIR")
    weights: Path | None = option(
        None,
        "VGG-19's, .safetensors or .pth (default: a small network trained on the data)",
        "FILE",
    )
    scale: str | None = option(None, "as for grid/run.py", "NAME")
    device: str | None = option(None, "cpu, cuda, ... (default: cuda where there is one)", "DEVICE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 wrong options, 130 interrupted. A second run continues."""
    options = BuildOptions.read(arguments)
    try:
        _build(options)
    except ValueError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        return 130
    return 0


def _build(options: BuildOptions) -> None:
    """Build class after class into the folder, but for the classes that it holds."""
    source = options.source()
    scale = scale_of(options.scale, source, image_size=options.image_size)
    scale = scale.preprocessed(options.preprocessing())
    data, device = load_data(scale, source), device_named(options.device)
    settings = TextureSettings() if options.weights else own_settings(scale)
    settings = replace(settings, clusters=scale.patch.textures, classes_at_once=1)
    if options.weights:
        network = vgg19_network(options.weights)
    else:
        network = small_network(scale, data, settings)
    print(f"features: {'VGG-19' if options.weights else 'a small network'}; {settings}")
    for label in track(range(len(data.class_names)), "classes"):
        names = file_names(label, settings.clusters)
        if not all((options.out / name).is_file() for name in names):
            of_class = data.train.at((data.train.labels == label).nonzero().flatten().numpy())
            built = build_textures(network, of_class, settings, device=device)
            for built_label, textures_TCHW in built.items():
                write_class(options.out, built_label, textures_TCHW)


def vgg19_network(weights: Path) -> FeatureNetwork:
    """Build VGG-19 from a weights file, .safetensors or .pth read as plain tensors.

    ValueError when the file does not fit torchvision's architecture.
    """
    state = read_tensors(read_content(weights), weights)
    with torch.device("meta"):
        network = vgg19(weights=None)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit VGG-19: {str(error)[:300]}") from None
    network.eval().requires_grad_(False)
    return FeatureNetwork(
        layers=nn.Sequential(*network.features, network.avgpool, nn.Flatten(), *network.classifier),
        style_layers=(1, 6, 11, 20, 29),
        cam_layer=35,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def write_class(root: Path, label: int, textures_TCHW: Tensor) -> None:
    """Write a class's textures in the published layout: ImageNet-normalised tensors, one a file."""
    normalised_TCHW = (textures_TCHW - channels(IMAGENET_MEAN)) / channels(IMAGENET_STD)
    for name, texture_CHW in zip(
        file_names(label, len(textures_TCHW)), normalised_TCHW, strict=True
    ):
        buffer = io.BytesIO()
        torch.save(texture_CHW.clone(), buffer)
        write_atomically(root / name, buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
