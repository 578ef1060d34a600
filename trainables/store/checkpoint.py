"""Checkpoints that are whole or absent: written aside, synced, renamed, named by their sha256."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from trainables.recipe import Recipe
from trainables.store.sealed import LENGTH_BYTES, OWN_SHA256, is_sealed, sealed
from trainables.store.storage import ASIDE, DamagedError, Folder, below, read_file, write_file

KEPT = 2
RECIPE = "recipe"  # in a weights file's header
DIGEST = "digest"  # in a checkpoint: of the trial that it belongs to
logger = logging.getLogger(__name__)


def save_checkpoint(where: str | Path, epoch: int, state: dict[str, Any]) -> str:
    """Save the state after `epoch` epochs and drop all but the newest two checkpoints.

    `where` is a path or URI; returns the checkpoint's name in it.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    name = f"epoch-{epoch:05d}-{_short_hash(content)}.pt"
    folder = Folder(where)
    folder.write(name, content)
    for old in _newest_first(folder)[KEPT:]:
        folder.remove(old)
    return name


def load_newest_checkpoint(
    where: str | Path, digest: str | None = None, *, say: Callable[[str], None] = logger.warning
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole and the trial's own, or None.

    One that is damaged or, where a digest is given, another trial's is reported and kept aside.
    What a writer that was killed left half written is removed. ValueError where a checkpoint holds
    more than tensors and plain values.
    """
    folder = Folder(where)
    for name in folder.names():
        if name.startswith(ASIDE):
            folder.remove(name)
    for name in _newest_first(folder):
        content = folder.read(name)
        if name.removesuffix(".pt").rsplit("-", 1)[-1] != _short_hash(content):
            problem, ending = "is damaged", ".damaged"
        else:
            state: dict[str, Any] = unpickled(content, below(str(where), name))
            if digest is None or state.get(DIGEST) == digest:
                return state
            owner = state.get(DIGEST, "that it does not name")
            problem, ending = f"belongs to trial {owner}, not to {digest}", ".foreign"
        aside = name.removesuffix(".pt") + ending
        folder.rename(name, aside)
        say(f"{name} in {where} {problem}; it is kept as {aside}; the one before, if any, is used")
    return None


def save_weights(where: str | Path, module: nn.Module, recipe_json: str) -> str:
    """Write a model's weights as safetensors with its recipe in the header; return the sha256.

    `where`: the path or URI of the file.
    """
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    content = sealed(save(tensors, metadata={RECIPE: recipe_json}))
    write_file(str(where), content)
    return hashlib.sha256(content).hexdigest()


def read_weights(
    content: bytes, path: str | Path, digest: str | None = None
) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the tensors that `save_weights` wrote.

    DamagedError names the file where it is damaged, or belongs to another trial than the one with
    the digest, if one is given.
    """
    tensors = read_safetensors(content, path)
    try:
        recipe = Recipe.model_validate_json(_metadata(content, path)[RECIPE])
    except (KeyError, ValueError):
        raise ValueError(f"{path} names no recipe of this project") from None
    if digest not in (None, recipe.digest()):
        raise DamagedError(
            f"{path} holds the weights of trial {recipe.digest()}, not of trial {digest}"
        )
    return recipe, tensors


def stored_weights(where: str, digest: str) -> dict[str, Tensor] | None:
    """Return a trial's weights that `save_weights` left at a path or URI, None where it did not.

    Raises as `read_weights`.
    """
    content = read_file(where)
    return None if content is None else read_weights(content, where, digest)[1]


def read_safetensors(content: bytes, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of any origin; DamagedError names its path.

    One that `save_weights` wrote must be, to the last bit, as it was written.
    """
    try:
        tensors: dict[str, Tensor] = load(content)
    except Exception as error:  # SafetensorError, or what torch says of a strange type or shape
        raise DamagedError(f"{path} is damaged: {_reason(error)}") from None
    _metadata(content, path)
    return tensors


def _metadata(content: bytes, path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file's header, none where it is no such file.

    DamagedError where it is a file of this project and not as it was written.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    try:
        header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = dict(header.get("__metadata__", {}))
    except (AttributeError, RecursionError, TypeError, ValueError):
        return {}
    # One bit in its header makes a new file look like one of before it held its sha256.
    if metadata.keys() & {RECIPE, OWN_SHA256} and not is_sealed(content):
        raise DamagedError(f"{path} is damaged, or of an older version: its sha256 is another")
    return metadata


def unpickled(content: bytes, path: str | Path) -> Any:
    """Unpickle tensors and plain values, nothing that could run code; ValueError for the rest."""
    try:
        # Training scripts keep their parsed options beside the weights: a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).partition("WeightsUnpickler error: ")[2]
        # What follows is how to have it run all the same.
        cause = cause.partition("\n")[0].partition(" Please use")[0]
        raise ValueError(
            f"{path} holds more than weights and is not opened: {cause or 'not a pickle'}"
        ) from None
    except Exception as error:  # what bytes that are no pickle make an unpickler raise is anything
        raise DamagedError(f"{path} is damaged: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fit_weights(tensors: dict[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a file; ValueError names the first keys that do not fit."""
    weights = module.state_dict()
    odd = sorted(set(tensors) ^ set(weights))
    odd += [k for k in weights if k in tensors and tensors[k].shape != weights[k].shape]
    if odd:
        raise ValueError(f"{path} does not fit the model; first keys that differ: {odd[:3]}")
    module.load_state_dict(tensors)


def recipe_json_of(path: Path) -> str:
    """Return the recipe stored in a weights file's header; ValueError where there is none."""
    try:
        return str(_metadata(path.read_bytes(), path)[RECIPE])
    except KeyError:
        raise ValueError(f"{path} names no recipe of this project") from None


def _newest_first(folder: Folder) -> list[str]:
    names = (n for n in folder.names() if n.startswith("epoch-") and n.endswith(".pt"))
    return sorted(names, reverse=True)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
