"""The registry of models: one entry says all that the project has to know of a model.

It imports no torch: a plan needs names, families and costs only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

TIMM = "timm"  # the family of all its models
TIMM_PREFIX = f"{TIMM}:"
HUB_PREFIX = "torchhub:"
STUDY_FAMILIES = ("resnet", "deit", "hybrid")
OWN = "own"  # the family of models that a user's own code builds
_CODE_FORMS = "FILE.py:FUNCTION", "PACKAGE.MODULE:FUNCTION", "torchhub:REPO:NAME", "FILE.pt2"
FORMS = ("timm:NAME", *_CODE_FORMS)
USER_CODE = re.compile(rf"{HUB_PREFIX}.+:[\w-]+|.+\.pt2|(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")
NORMED = ("resnet", "hybrid", "robust_resnet")  # what uses batch normalisation
VIT_MEDIUM: dict[str, Any] = {"init_values": 1e-6, "no_embed_class": True}
Settings = Literal["cnn", "transformer", "timm"]
Build = Callable[..., Any]


class Cost(NamedTuple):
    """What a model costs.

    parameters: with ImageNet's classes. macs: 10^9 multiply-accumulates of one image of 224 px.
    seconds: of an epoch of scale `digits` on one core of a 2.5 GHz Xeon.
    """

    parameters: int
    macs: float
    seconds: float


@dataclass(frozen=True)
class Model:
    """One model.

    build: (scale, norm_layer) -> an untrained nn.Module of images_BCHW -> logits_BK, where
    `norm_layer(channels)` makes a batch normalisation. settings: whose rates and batches it is
    trained with. batch_norm: whether it uses `norm_layer`.
    """

    name: str
    size: str
    build: Build
    cost: Cost
    family: str
    settings: Settings = "cnn"
    batch_norm: bool = True


def _network(
    function: str, *arguments: Any, room: str = "networks", normed: bool = False, **options: Any
) -> Build:
    """Return the builder that calls a function of a file of `trainables`, imported only then.

    normed: it uses the norm layer.
    """

    def build(scale: Any, norm_layer: Callable[[int], Any], **more: Any) -> Any:
        module = import_module(f"trainables.{room}")
        norms = {"norm_layer": norm_layer} if normed else {}
        return getattr(module, function)(*arguments, scale, **norms, **options, **more)

    return build


def _model(
    name: str,
    size: str,
    cost: tuple[int, float, float],
    function: str,
    *arguments: Any,
    family: str = "",
    **options: Any,
) -> Model:
    """Return the entry of what a function of `networks`, or of the file of its name, builds."""
    room, normed = function if family else "networks", function in NORMED
    build = _network(function, *arguments, room=room, normed=normed, **options)
    settings: Settings = "cnn" if function == "resnet" else "transformer"
    return Model(name, size, build, Cost(*cost), family or function, settings, normed)


def _robust(kind: str, cost: tuple[int, float, float], *arguments: Any) -> Model:
    name = f"robust_resnet_{kind.replace('-', '_')}"
    return _model(name, "base", cost, "robust_resnet", kind, *arguments, family=name)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _model("resnet18", "small", (11_689_512, 1.8, 0.33), "resnet", "basic", (2, 2, 2, 2)),
        _model("resnet50", "base", (25_557_032, 4.1, 0.48), "resnet", "bottleneck", (3, 4, 6, 3)),
        _model("resnet101", "large", (44_549_160, 7.8, 0.7), "resnet", "bottleneck", (3, 4, 23, 3)),
        _model(
            "resnet200", "huge", (64_673_832, 15.1, 1.2), "resnet", "bottleneck", (3, 24, 36, 3)
        ),
        _model("deit_mini", "small", (9_982_184, 2.1, 0.5), "deit", 256),
        _model("deit_small", "base", (22_050_664, 4.6, 0.74), "deit", 384),
        _model("deit_base", "large", (86_567_656, 17.6, 1.6), "deit", 768),
        _model("hybrid_deit", "base", (21_055_528, 3.9, 0.9), "hybrid"),
        # Wang et al. 2023: UCSC-VLAA/RobustCNN, timm/models/robust_resnet.py, *_small.
        _robust("dw", (38_590_312, 4.49, 1.0), (3, 4, 12, 3), 11, 3),
        _robust("inverted-dw", (33_626_824, 4.59, 0.9), (3, 4, 14, 3), 7, 3),
        _robust("up-inverted-dw", (34_441_288, 4.43, 0.91), (3, 4, 14, 3), 11, 3),
        _robust("down-inverted-dw", (34_325_896, 4.55, 0.85), (3, 4, 15, 3), 11, 2),
        # Singh et al. 2023: nmndeep/revisiting-at, utils_architecture.py; model_args.stem = "conv".
        _model("vit_small", "base", (22_050_664, 4.6, 0.74), "vit", 384),
        _model("vit_medium", "medium", (38_849_512, 8.0, 1.2), "vit", 512, **VIT_MEDIUM),
        _model("vit_base", "large", (86_567_656, 17.6, 1.6), "vit", 768),
        _model("convnext_tiny", "base", (28_589_128, 4.5, 0.62), "convnext", 9, 96),
        _model("convnext_small", "large", (50_223_688, 8.7, 0.84), "convnext", 27, 96),
        _model("convnext_base", "huge", (88_591_464, 15.4, 1.0), "convnext", 27, 128),
        _model("convnext_large", "giant", (197_767_336, 34.4, 1.4), "convnext", 27, 192),
        _model("convnext_iso", "base", (22_308_712, 4.3, 0.67), "convnext_iso"),
        # Beyer et al. 2022: google-research/big_vision, configs/vit_s16_i1k.py.
        _model("plain_vit_small", "base", (22_197_736, 4.6, 0.74), "plain_vit", 384),
    )
}


def register(model: Model) -> None:
    """Add a model; ValueError where its name, or its family's size, is taken."""
    taken = {name for name, m in MODELS.items() if (m.family, m.size) == (model.family, model.size)}
    if taken or model.name in MODELS:
        there = f"{next(iter(taken), model.name)!r} is there already"
        said = f"model {model.name!r} ({model.family}, {model.size})"
        raise ValueError(f"{said} cannot be added: {there}")
    MODELS[model.name] = model


def check_family(name: str) -> str:
    """Return the name of a family; ValueError where no model is of it."""
    families = {model.family: None for model in MODELS.values()} | {TIMM: None}
    if name not in families:
        raise ValueError(f"unknown family {name!r}; one of {', '.join(families)}")
    return name


def model_named(name: str, **arguments: Any) -> Model:
    """Return a model's entry; ValueError where no model has the name.

    Models of other origins (`FORMS`) count as the study's largest of each cost. arguments: keyword
    arguments of what builds such a model.
    """
    if name in MODELS:
        model = MODELS[name]
        return replace(model, build=partial(model.build, **arguments)) if arguments else model
    costs = [model.cost for model in MODELS.values() if model.family in STUDY_FAMILIES]
    largest = Cost(*map(max, zip(*costs, strict=True)))
    if name.startswith(TIMM_PREFIX):
        build = _network("from_timm", name.removeprefix(TIMM_PREFIX), **arguments)
        return Model(name, "-", build, largest, TIMM, "timm")
    if not USER_CODE.fullmatch(name):
        raise ValueError(f"unknown model {name!r}; one of {', '.join((*MODELS, *FORMS))}")
    build = _network("from_user_code", name, room="user_code", **arguments)
    return Model(name, "-", build, largest, OWN, "timm")


def model_of(family: str, size: str) -> str:
    """Return the name of a family's model of one size; ValueError names the family's sizes."""
    sizes = {model.size: name for name, model in MODELS.items() if model.family == family}
    if size not in sizes:
        raise ValueError(f"family {family!r} has no size {size!r}; one of {sorted(sizes)}")
    return sizes[size]
