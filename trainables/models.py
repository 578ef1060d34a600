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

    Models of other origins (`FORMS`) count as the largest of each cost. arguments: keyword
    arguments of what builds such a model.
    """
    if name in MODELS:
        model = MODELS[name]
        return replace(model, build=partial(model.build, **arguments)) if arguments else model
    largest = Cost(*map(max, zip(*(model.cost for model in MODELS.values()), strict=True)))
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
