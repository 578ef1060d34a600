"""Weights that a study names: where they lie, what they are, and rows that need no training."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from trainables.models import TIMM_PREFIX
from trainables.pretrained import HF_PREFIX, preprocessing_of
from trainables.recipe import Preprocessing, Recipe, nearest, unknown

REMOTE = ("http://", "https://", HF_PREFIX)
SHA256 = re.compile("[0-9a-f]{64}")
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
    origin = located(values["weights"], values.get("sha256", ""), folder)
    fields: dict[str, Any] = {"scale": scale, "activation": "own"}
    stated = {key: values[key] for key in ("model", "activation") if key in values}
    if origin["init"].startswith(TIMM_PREFIX):
        fields["model"] = origin["init"]
    elif "model" not in stated and (header := _header(origin["init"])):
        names = ("model", "activation", "pixel_range", "preprocessing")
        fields |= {name: getattr(header, name) for name in names}
    fields |= stated
    if not isinstance(fields.get("model"), str):
        raise ValueError(f"{values['weights']} does not say whose weights it is: add model")
    known = preprocessing_of(fields["model"]).chosen()
    inherited = fields.get("preprocessing", Preprocessing()).chosen()
    own = Preprocessing.model_validate(values.get("preprocessing", {})).chosen()
    preprocessing = Preprocessing(**(known | inherited | own))
    return Recipe(**(NO_TRAINING | fields | origin | {"preprocessing": preprocessing}))


def with_origin(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return axes with the place and sha256 of `init` and what the weights bring along.

    Unless stated: the network's own activation, and the preprocessing that timm has for them.
    """
    if not (init := values.get("init")):
        return dict(values)
    origin = located(init, values.get("init_sha256", ""), folder)
    brought: dict[str, Any] = {"activation": "own"}
    if origin["init"].startswith(TIMM_PREFIX):
        brought["preprocessing"] = preprocessing_of(origin["init"])
    return brought | dict(values) | origin


def located(where: Any, sha256: Any, folder: Path) -> dict[str, str]:
    """Return the fields `init` and `init_sha256` for weights that a file in `folder` names.

    Of a file the sha256 is computed where none is stated. ValueError where there can be none.
    """
    if not isinstance(where, str):
        raise ValueError(f"weights are named by a text, not {where!r}")
    if sha256 and not SHA256.fullmatch(str(sha256)):
        raise ValueError(f"sha256 is 64 digits from 0 to f, not {sha256!r}")
    if where.startswith(TIMM_PREFIX):
        _check_timm(where)
    elif where.startswith(("http://", "https://")) and not sha256:
        raise ValueError(f'{where} needs the sha256 of the file: sha256 = "..."')
    elif not where.startswith(REMOTE):
        path = (folder / where).resolve()
        where, sha256 = str(path), sha256 or _sha256(path, path.stat() if path.is_file() else None)
    return {"init": where, "init_sha256": sha256}


def _check_timm(model: str) -> None:
    """Raise ValueError where timm knows no such model, or has no weights of it."""
    preprocessing_of(model)
    from timm.models import is_model_pretrained

    if not is_model_pretrained(model.removeprefix(TIMM_PREFIX)):
        raise ValueError(f"timm has no weights of {model}: name a file of them, and its model")


@cache
def _sha256(path: Path, stamp: Any) -> str:
    if stamp is None:
        near = nearest(path.name, sorted(entry.name for entry in path.parent.glob("*")))
        raise ValueError(f"weights {path} are not there; those of timm are timm:NAME.TAG{near}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: str) -> Recipe | None:
    """Return the recipe in the header of a weights file of this project; None in any other."""
    if not path.endswith(".safetensors") or path.startswith(REMOTE):
        return None
    from trainables.store.checkpoint import recipe_of

    with suppress(ValueError):
        return recipe_of(Path(path).read_bytes(), path)
    return None
