"""The command line that builds a texture dictionary: `python -m evaluators.textures_build`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainables.data.listing import scale_of
from trainables.options import add_data_options, source_of

if TYPE_CHECKING:
    import torch

    from evaluators.textures_build.builder import TextureSettings
    from evaluators.textures_build.networks import FeatureNetwork
    from trainables.data.base import Data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 asked wrongly, 130 interrupted. Again, it goes on."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ValueError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    from evaluators.base import device_named
    from evaluators.textures import own_settings
    from evaluators.textures_build.builder import FULL
    from evaluators.textures_build.networks import small_network, vgg19_network
    from trainables.data.load import load_data

    source = source_of(options)
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
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluators.textures_build",
        description="Build the texture patch attack's dictionary from a data set's train images.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="VGG-19's, .safetensors or .pth (default: a small network trained on the data)",
    )
    parser.add_argument("--scale", default="digits", help="as for grid/run.py (default: digits)")
    parser.add_argument("--device", metavar="D", help="default: cuda where there is one, or cpu")
    add_data_options(parser)
    return parser


def _refuse(message: str) -> NoReturn:
    print(f"python -m evaluators.textures_build: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
