"""Everything that determines a trial's weights, as one frozen, typed, validated value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Activation = Literal["relu", "gelu", "silu", "softplus"]
Augmentation = Literal["randaug", "mixup", "cutmix"]
Optimizer = Literal["sgd", "adamw"]
Scheduler = Literal["step", "cosine"]
Protocol = Literal["corrected", "as-published"]

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
MODELS: dict[str, tuple[str, str]] = {
    "resnet18": ("resnet", "small"),
    "resnet50": ("resnet", "base"),
    "resnet101": ("resnet", "large"),
    "resnet200": ("resnet", "huge"),
    "deit_mini": ("deit", "small"),
    "deit_small": ("deit", "base"),
    "deit_base": ("deit", "large"),
    "hybrid_deit": ("hybrid", "base"),
}
TIMM_PREFIX = "timm:"


def family_of(model: str) -> str:
    """Return the family of a model name: resnet, deit, hybrid or timm."""
    return "timm" if model.startswith(TIMM_PREFIX) else MODELS[model][0]


def model_of(family: str, size: str) -> str:
    """Return the model of one family and size; ValueError names the sizes the family has."""
    for model, key in MODELS.items():
        if key == (family, size):
            return model
    sizes = sorted(s for f, s in MODELS.values() if f == family)
    raise ValueError(f"family {family!r} has no size {size!r}; one of {sizes}")


def format_augmentations(augmentations: Iterable[str]) -> str:
    """Write a set of augmentations as users do: 'randaug+cutmix', or 'none'."""
    return "+".join(augmentations) or "none"


def _parse_augmentations(value: Any) -> Any:
    names = ([] if value in ("", "none") else value.split("+")) if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set | frozenset):
        return value
    unknown = sorted(set(map(str, names)) - set(AUGMENTATIONS))
    if unknown:
        raise ValueError(
            f"unknown augmentation {unknown[0]!r}; 'none' or a '+'-joined subset of "
            f"{', '.join(AUGMENTATIONS)}"
        )
    return tuple(name for name in AUGMENTATIONS if name in names)


def _check_model(value: Any) -> Any:
    if isinstance(value, str) and value not in MODELS and not value.startswith(TIMM_PREFIX):
        raise ValueError(f"unknown model {value!r}; one of {sorted(MODELS)} or 'timm:NAME'")
    return value


def parse_epsilon(value: Any) -> Any:
    """Read a max-norm radius for pixels in [0, 1], given as a number or as text like '4/255'."""
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            value = float(numerator) / float(denominator) if slash else float(numerator)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"epsilon {value!r} is neither a number nor like '4/255'") from None
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(
            f"epsilon {value:g} is outside (0, 1): pixels are in [0, 1], write {value:g}/255"
        )
    return value


Epsilon = Annotated[float, BeforeValidator(parse_epsilon)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Recipe(_Frozen):
    """Everything that determines the weights; equal digests mean equal weights.

    Rates are peak rates at the total batch; `warmup_epochs` may be fractional; magnitudes and
    alphas count only where their augmentation is on. Source of the values: STUDY section 3.
    """

    scale: str
    model: Annotated[str, BeforeValidator(_check_model)]
    activation: Activation = "relu"
    optimizer: Optimizer
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    scheduler: Scheduler
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_rate: float = Field(default=1e-6, ge=0)
    floor_rate: float = Field(default=1e-5, ge=0)
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    augmentations: Annotated[tuple[Augmentation, ...], BeforeValidator(_parse_augmentations)] = ()
    randaug_magnitude: int = Field(default=9, ge=0, le=10)
    mixup_alpha: float = Field(default=0.8, gt=0)
    cutmix_alpha: float = Field(default=1.0, gt=0)
    mix_probability: float = Field(default=1.0, ge=0, le=1)
    switch_probability: float = Field(default=0.5, ge=0, le=1)
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    protocol: Protocol = "corrected"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_be(self) -> Recipe:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warm-up of {self.warmup_epochs:g} epochs is longer than the training of "
                f"{self.epochs} epochs"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"batch_size {self.batch_size} is odd: mixup and cutmix pair the images of a batch"
            )
        return self

    @property
    def family(self) -> str:
        return family_of(self.model)

    @property
    def size(self) -> str:
        return MODELS[self.model][1] if self.model in MODELS else "-"

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that targets are soft."""
        return "mixup" in self.augmentations or "cutmix" in self.augmentations

    def replace(self, **changes: Any) -> Recipe:
        """Return this recipe with some fields changed, validated again."""
        return Recipe.model_validate(self.model_dump() | changes)

    def effective(self) -> dict[str, Any]:
        """Return the fields that can change the weights, as JSON values."""
        fields = self.model_dump(mode="json")
        inert = {
            "randaug_magnitude": "randaug" not in self.augmentations,
            "mixup_alpha": "mixup" not in self.augmentations,
            "cutmix_alpha": "cutmix" not in self.augmentations,
            "mix_probability": not self.mixes,
            "switch_probability": not {"mixup", "cutmix"} <= set(self.augmentations),
            "warmup_rate": self.warmup_epochs == 0,
            "floor_rate": self.scheduler != "cosine",
        }
        return {name: value for name, value in fields.items() if not inert.get(name, False)}

    def digest(self) -> str:
        """Return the trial's identity: 12 hex digits of the effective fields' canonical JSON."""
        canonical = json.dumps(self.effective(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Name the recipe as a person would, e.g. 'resnet50 relu sgd step none 16ep seed0'."""
        return (
            f"{self.model} {self.activation} {self.optimizer} {self.scheduler} "
            f"{format_augmentations(self.augmentations)} {self.epochs}ep seed{self.seed}"
        )
