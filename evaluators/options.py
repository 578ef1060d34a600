"""The options of `python -m evaluators`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, field_validator

from evaluators import EVALUATORS, PGD_STEPS
from trainables.models import MODELS, TIMM_PREFIX
from trainables.options import Count, DataOptions, Names, Split, Words, fraction, option
from trainables.recipe import ACTIVATIONS, Activation, unknown
from trainables.scale import scale_named, scale_names

# Single lengths of pgd take its shorter trajectory.
NAMES = (*EVALUATORS, *(f"pgd-{steps}" for steps in PGD_STEPS))
Radius = Annotated[
    Fraction, BeforeValidator(lambda word: fraction(word, "radius for pixels in [0, 1]", "4/255"))
]
Area = Annotated[
    float, BeforeValidator(lambda word: float(fraction(word, "share of an image", "0.025")))
]


class JudgeOptions(DataOptions):
    """Ask evaluators' questions of a checkpoint of any origin; print the scores."""

    prog: ClassVar[str] = "python -m evaluators"
    groups: ClassVar[dict[str, str]] = {**DataOptions.groups, "epsilon": "attacks"}

    weights: Path = option(..., ".safetensors, or torch's .pth, .pt, .th or .bin", "FILE")
    model: str | None = option(
        None,
        f"{', '.join(MODELS)} or timm:NAME (default: as the weights file's header says)",
        "NAME",
    )
    activation: Activation | None = option(
        None, f"replaces the network's own activation: {', '.join(ACTIVATIONS)}", "NAME"
    )
    evaluators: Names = option(("clean",), ", ".join(NAMES), "NAME")
    scale: str | None = option(
        None, f"{', '.join(scale_names())} (default: the file's, or digits)", "NAME"
    )
    mean: float | None = option(
        None,
        "the normalisation's mean, all channels, pixels in [0, 1] (default: the file's recipe's, "
        "or the scale's)",
        "MEAN",
    )
    std: float | None = option(None, "the normalisation's deviation, as --mean", "DEVIATION", gt=0)
    device: str | None = option(None, "cpu, cuda, ... (default: cuda where there is one)", "DEVICE")
    ledger: Path | None = option(
        None, "where the ledgers go (default: results/ledgers/NAME-OF-THE-FILE-ITS-DIGEST)", "DIR"
    )
    epsilon: Annotated[tuple[Radius, ...], Split] = option(
        (),
        "radii of pgd and autoattack in the max-norm, of pixels in [0, 1], e.g. 4/255 0.5/255 "
        "(default: the scale's)",
        "RADIUS",
    )
    attack_images: Count | None = option(
        None,
        "images that pgd, autoattack and tpa attack, drawn by a fixed seed (default: the scale's)",
        "N",
    )
    patches: Count | None = option(None, "of tpa, at most, per image (default: the scale's)", "N")
    patch_area: Area | None = option(
        None, "share of the image that one patch covers (default: the scale's)", "SHARE"
    )

    @field_validator("evaluators")
    @classmethod
    def _are_known(cls, names: Words) -> Words:
        for name in names or ("",):
            if name not in NAMES:
                raise ValueError(unknown("evaluator", name, NAMES))
        return names

    @field_validator("model")
    @classmethod
    def _is_known(cls, model: str) -> str:
        if model not in MODELS and not model.startswith(TIMM_PREFIX):
            raise ValueError(unknown("model", model, [*MODELS, "timm:NAME"]))
        return model

    @field_validator("scale")
    @classmethod
    def _is_a_scale(cls, name: str) -> str:
        if name not in scale_names():
            scale_named(name)
        return name
