"""What a study says of weights: rows that need no training, and first weights of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainables.models import TIMM_PREFIX
from trainables.pretrained import REMOTE, located, preprocessing_of
from trainables.recipe import Preprocessing, Recipe, unknown

KEYS = ("label", "weights", "sha256", "model", "activation", "preprocessing")  # of a row
# What a recipe has to state, and nothing follows from without a training.
NO_TRAINING: dict[str, Any] = {
    **{"epochs": 0, "optimizer": "sgd", "scheduler": "step"},
    **{"learning_rate": 1.0, "weight_decay": 0.0, "batch_size": 1},
}


def recipe_of_weights(values: Mapping[str, Any], folder: Path, scale: str) -> Recipe:
    """Return the recipe of a row of weights, which a study's file in `folder` states.

    The model, its activation and its preprocessing are as stated, else as the weights say: those of
    timm by their name, those of this project by their header. ValueError teaches what is wrong.
    """
    if wrong := [key for key in values if key not in KEYS]:
        raise ValueError(f"{unknown('key', wrong[0], KEYS)} (weights are not trained; `init` is)")
    origin = _origin(values["weights"], values.get("sha256", ""), folder)
    fields: dict[str, Any] = {"scale": scale, "activation": "own"} | NO_TRAINING | origin
    if origin["init"].startswith(TIMM_PREFIX):
        fields["model"] = origin["init"]
    elif "model" not in values:
        fields |= _fields_of_header(origin["init"])
    fields |= {key: values[key] for key in ("model", "activation") if key in values}
    stated = Preprocessing.model_validate(values.get("preprocessing", {}))
    of_weights = fields.get("preprocessing", Preprocessing())
    fields["preprocessing"] = preprocessing_of(str(fields["model"])) | of_weights | stated
    return Recipe(**fields)


def with_origin(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return axes with the place and sha256 of `init` and what the weights bring along.

    Unless stated: the network's own activation, and the preprocessing that timm has for them.
    """
    if not (init := values.get("init")):
        return dict(values)
    origin = _origin(init, values.get("init_sha256", ""), folder)
    brought: dict[str, Any] = {"activation": "own"}
    if origin["init"].startswith(TIMM_PREFIX):
        brought["preprocessing"] = preprocessing_of(origin["init"])
    return brought | dict(values) | origin


def _origin(where: Any, sha256: Any, folder: Path) -> dict[str, str]:
    """Return a recipe's fields that say which weights are its first."""
    return dict(zip(("init", "init_sha256"), located(str(where), str(sha256), folder), strict=True))


def _fields_of_header(init: str) -> dict[str, Any]:
    """Return what the header of a weights file of this project says of its model; ValueError."""
    from trainables.store.checkpoint import recipe_of

    try:
        header = recipe_of(b"" if init.startswith(REMOTE) else Path(init).read_bytes(), init)
    except ValueError:
        raise ValueError(f"{init} does not say whose weights it is: add model") from None
    names = ("model", "activation", "pixel_range", "preprocessing")
    return {name: getattr(header, name) for name in names}
