"""The command line that builds a texture dictionary: `python -m evaluators.textures_build`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainables.data.listing import scale_of
from trainables.options import DataOptions, option

if TYPE_CHECKING:
    import torch

    from evaluators.textures_build.builder import TextureSettings
    from evaluators.textures_build.networks import FeatureNetwork
    from trainables.data.base import Data


class BuildOptions(DataOptions):
    """Build the texture patch attack's dictionary from a data set's train images."""

    prog: ClassVar[str] = "python -m evaluators.textures_build"

    out: Path = option(..., "where it goes", "DIR")
    weights: Path | None = option(
        None,
        "VGG-19's, .safetensors or .pth (default: a small network trained on the data)",
        "FILE",
    )
    scale: str = option("digits", "as for grid/run.py", "NAME")
    device: str | None = option(None, "cpu, cuda, ... (default: cuda where there is one)", "DEVICE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 asked wrongly, 130 interrupted. Again, it goes on."""
    options = BuildOptions.read(arguments)
    try:
        _run(options)
    except ValueError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: BuildOptions) -> None:
    from evaluators.base import device_named
    from evaluators.textures import own_settings
    from evaluators.textures_build.builder import FULL
    from evaluators.textures_build.networks import small_network, vgg19_network
    from trainables.data.load import load_data

    source = options.source()
    scale = scale_of(options.scale, source, image_size=options.image_size)
    data = load_data(scale, source)
    settings = FULL if options.weights else own_settings(scale)
    settings = replace(settings, clusters=scale.patch.textures, classes_at_once=1)
    device = device_named(options.device)
    network = (
        vgg19_network(options.weights)
        if options.weights
        else small_network(scale, data, seed=settings.seed, epochs=settings.network_epochs)
    )
    print(f"features: {network.source}; {settings}")
    build(network, data, settings, options.out, device)


def build(
    network: FeatureNetwork,
    data: Data,
    settings: TextureSettings,
    folder: Path,
    device: torch.device,
) -> None:
    """Build class after class into a folder in the published layout, but for those it holds."""
    from rich.progress import track

    from evaluators.textures import StoredTextures, has_class, write_published
    from evaluators.textures_build.builder import TooFewImagesError, build_textures

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


if __name__ == "__main__":
    sys.exit(main())
