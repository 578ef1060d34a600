"""The options of `python -m evaluators`."""

from __future__ import annotations

import ast
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator

from evaluators import EVALUATORS, LARGEST_RADIUS, PGD_LENGTHS
from trainables.models import FORMS, MODELS
from trainables.options import Address, Count, DataOptions, Split, Words, fraction, option
from trainables.recipe import ACTIVATIONS, check_model, one_of
from trainables.scale import scale_named, scale_names

# Single lengths of pgd take its shorter trajectory.
NAMES = (*EVALUATORS, *PGD_LENGTHS)
Activation = Annotated[str, one_of("activation", ACTIVATIONS)]
Name = Annotated[str, one_of("evaluator", NAMES)]
ScaleName = Annotated[
    str, AfterValidator(lambda name: name if name in scale_names() else scale_named(name).name)
]
ModelName = Annotated[str, AfterValidator(check_model)]
Radius = Annotated[
    Fraction,
    BeforeValidator(
        lambda word: fraction(word, "radius for pixels in [0, 1]", "4/255", most=LARGEST_RADIUS)
    ),
]
Area = Annotated[
    float, BeforeValidator(lambda word: float(fraction(word, "share of an image", "0.025")))
]


class JudgeOptions(DataOptions):
    """Ask evaluators' questions of a checkpoint of any origin; print the scores."""

    prog: ClassVar[str] = "python -m evaluators"
    groups: ClassVar[dict[str, str]] = {**DataOptions.groups, "epsilon": "attacks"}

    weights: Address | None = option(
        None,
        "a .safetensors file, or torch's .pth, .pt, .th or .bin, whatever prefix its names have; "
        "an https:// URL of one with --sha256; hf://ORG/REPO[/FILE]; timm:NAME.TAG",
        "FILE",
    )
    model: ModelName | None = option(
        None,
        f"{', '.join(MODELS)}, or {', '.join(FORMS)}; FILE, MODULE and REPO are code, which is run "
        "(default: as the weights file's header says)",
        "NAME",
    )
    model_arg: Words = option((), "arguments of the model, like drop_rate=0.1", "NAME=VALUE")
    pretrained: bool = option(False, "timm's own weights of --model timm:NAME[.TAG]")
    sha256: str = option("", "that the file of the weights must have", "HEX", advanced=True)
    activation: Activation | None = option(
        None, f"replaces the network's own activation: {', '.join(ACTIVATIONS)}", "NAME"
    )
    evaluators: Annotated[tuple[Name, ...], Split] = option(
        ("clean",), ", ".join(NAMES), "NAME", min_length=1
    )
    scale: ScaleName | None = option(
        None, f"{', '.join(scale_names())} (default: the file's, or digits)", "NAME"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: cuda where there is one)", "DEVICE")
    ledger: Path | None = option(
        None, "where the ledgers go (default: results/ledgers/FILE-DIGEST-SCALE)", "DIR"
    )
    epsilon: Annotated[tuple[Radius, ...], Split] = option(
        (), "radii of attacks but tpa: 4/255 0.5/255, in L2 0.5 (default: the scale's)", "RADIUS"
    )
    attack_images: Count | None = option(
        None, "images that attacks take, drawn by a fixed seed (default: the scale's)", "N"
    )
    jpeg: Count | None = option(
        None, "store generated corruptions at a quality, as ImageNet-C's at 85", "N", le=100
    )
    attacks_in: Literal["float32", "bf16"] = option(
        "float32",
        "precision in which pgd and autoattack seek; what they find counts where float32 errs, too",
        "PRECISION",
        advanced=True,
    )
    patches: Count | None = option(None, "of tpa, at most, per image (default: the scale's)", "N")
    patch_area: Area | None = option(None, "a patch's share (default: the scale's)", "SHARE")

    def arguments(self) -> dict[str, Any]:
        """Return the model's arguments: Python's values where they read as such, or text."""
        values: dict[str, Any] = {}
        for name, equals, text in (word.partition("=") for word in self.model_arg):
            if not (equals and name.isidentifier()):
                word = f"{name}{equals}{text}"
                raise ValueError(f"--model-arg: {word!r} is not NAME=VALUE, like num_classes=10")
            values[name] = text
            with suppress(SyntaxError, ValueError):
                values[name] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        return values
