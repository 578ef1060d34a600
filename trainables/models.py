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
FORMS = (
    "timm:NAME",
    "FILE.py:FUNCTION",
    "PACKAGE.MODULE:FUNCTION",
    "torchhub:REPO:NAME",
    "FILE.pt2",
)
USER_CODE = re.compile(
    rf"{HUB_PREFIX}.+:[\w-]+|.+\.pt2|(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*"  # the other forms
)
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


def _network(function: str, *arguments: Any, room: str = "networks", **options: Any) -> Build:
    """Return the builder that calls a function of a file of `trainables`, imported only then."""

    def build(scale: Any, norm_layer: Callable[[int], Any], **more: Any) -> Any:
        module = import_module(f"trainables.{room}")
        return getattr(module, function)(*arguments, scale, norm_layer, **options, **more)

    return build


def _resnet(name: str, size: str, block: str, blocks: tuple[int, ...], cost: Cost) -> Model:
    return Model(name, size, _network("resnet", block, blocks), cost, "resnet")


def _vit(name: str, size: str, width: int, cost: Cost, **options: Any) -> Model:
    build = _network("vit", width, **options)
    return Model(name, size, build, cost, "vit", "transformer", batch_norm=False)


def _convnext(name: str, size: str, depth: int, width: int, cost: Cost) -> Model:
    build = _network("convnext", (3, 3, depth, 3), width)
    return Model(name, size, build, cost, "convnext", "transformer", batch_norm=False)


def _robust(kind: str, depths: tuple[int, ...], kernel: int, stage: int, cost: Cost) -> Model:
    build = _network("robust_resnet", kind, depths, kernel, stage, room="robust_resnet")
    name = f"robust_resnet_{kind.replace('-', '_')}"
    return Model(name, "base", build, cost, name, "transformer")


def _deit(name: str, size: str, width: int, cost: Cost) -> Model:
    return Model(name, size, _network("deit", width), cost, "deit", "transformer", batch_norm=False)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _resnet("resnet18", "small", "basic", (2, 2, 2, 2), Cost(11_689_512, 1.8, 0.33)),
        _resnet("resnet50", "base", "bottleneck", (3, 4, 6, 3), Cost(25_557_032, 4.1, 0.48)),
        _resnet("resnet101", "large", "bottleneck", (3, 4, 23, 3), Cost(44_549_160, 7.8, 0.7)),
        _resnet("resnet200", "huge", "bottleneck", (3, 24, 36, 3), Cost(64_673_832, 15.1, 1.2)),
        _deit("deit_mini", "small", 256, Cost(9_982_184, 2.1, 0.5)),
        _deit("deit_small", "base", 384, Cost(22_050_664, 4.6, 0.74)),
        _deit("deit_base", "large", 768, Cost(86_567_656, 17.6, 1.6)),
        Model(
            name="hybrid_deit",
            size="base",
            build=_network("hybrid"),
            cost=Cost(21_055_528, 3.9, 0.9),
            family="hybrid",
            settings="transformer",
        ),
        # Wang et al. 2023: UCSC-VLAA/RobustCNN, timm/models/robust_resnet.py, *_small.
        _robust("dw", (3, 4, 12, 3), 11, 3, Cost(38_590_312, 4.49, 1.0)),
        _robust("inverted-dw", (3, 4, 14, 3), 7, 3, Cost(33_626_824, 4.59, 0.9)),
        _robust("up-inverted-dw", (3, 4, 14, 3), 11, 3, Cost(34_441_288, 4.43, 0.91)),
        _robust("down-inverted-dw", (3, 4, 15, 3), 11, 2, Cost(34_325_896, 4.55, 0.85)),
        # Singh et al. 2023: nmndeep/revisiting-at, utils_architecture.py; model_args.stem = "conv".
        _vit("vit_small", "base", 384, Cost(22_050_664, 4.6, 0.74)),
        _vit(
            *("vit_medium", "medium", 512, Cost(38_849_512, 8.0, 1.2)),
            init_values=1e-6,
            no_embed_class=True,
        ),
        _vit("vit_base", "large", 768, Cost(86_567_656, 17.6, 1.6)),
        _convnext("convnext_tiny", "base", 9, 96, Cost(28_589_128, 4.5, 0.62)),
        _convnext("convnext_small", "large", 27, 96, Cost(50_223_688, 8.7, 0.84)),
        _convnext("convnext_base", "huge", 27, 128, Cost(88_591_464, 15.4, 1.0)),
        _convnext("convnext_large", "giant", 27, 192, Cost(197_767_336, 34.4, 1.4)),
        Model(
            name="convnext_iso",
            size="base",
            build=_network("convnext_iso"),
            cost=Cost(22_308_712, 4.3, 0.67),
            family="convnext_iso",
            settings="transformer",
            batch_norm=False,
        ),
        # Beyer et al. 2022: google-research/big_vision, configs/vit_s16_i1k.py.
        Model(
            name="plain_vit_small",
            size="base",
            build=_network("plain_vit", 384),
            cost=Cost(22_197_736, 4.6, 0.74),
            family="plain_vit",
            settings="transformer",
            batch_norm=False,
        ),
    )
}


def register(model: Model) -> None:
    """Add a model; ValueError where its name, or its family's size, is taken."""
    taken = {name for name, m in MODELS.items() if (m.family, m.size) == (model.family, model.size)}
    if taken or model.name in MODELS:
        raise ValueError(
            f"model {model.name!r} ({model.family}, {model.size}) cannot be added: "
            f"{next(iter(taken), model.name)!r} is there already"
        )
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
    build = _network("from_user_code", name, room="pretrained", **arguments)
    return Model(name, "-", build, largest, OWN, "timm")


def model_of(family: str, size: str) -> str:
    """Return the name of a family's model of one size; ValueError names the family's sizes."""
    sizes = {model.size: name for name, model in MODELS.items() if model.family == family}
    if size not in sizes:
        raise ValueError(f"family {family!r} has no size {size!r}; one of {sorted(sizes)}")
    return sizes[size]
