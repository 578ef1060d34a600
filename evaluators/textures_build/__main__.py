"""The command line that builds a texture dictionary: `python -m evaluators.textures_build`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from trainables.options import DataOptions, option


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
        from evaluators.textures_build.dictionary import build_dictionary

        build_dictionary(
            options.source(),
            options.scale,
            image_size=options.image_size,
            weights=options.weights,
            folder=options.out,
            device=options.device,
        )
    except ValueError as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
