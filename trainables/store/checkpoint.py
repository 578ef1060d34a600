"""Checkpoints and weights: whole or absent, checked by sha256 where they are read, never run."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from trainables.recipe import Recipe
from trainables.store.storage import (
    ASIDE,
    RECIPE,
    WEIGHTS,
    DamagedError,
    Folder,
    below,
    read_file,
    write_file,
)

if TYPE_CHECKING:
    from trainables.layers import Classifier

CHECKPOINTS = 2  # of a trial, the newest
RECIPE_ENTRY = "recipe"  # of a weights file's header
DIGEST = "digest"  # in a checkpoint: of the trial that it belongs to

# A weights file's header begins with the file's own sha256, computed with its digits as zeros.
LENGTH_BYTES = 8  # of the header's length, in front of it
OPENING = b'{"__metadata__":{'
OWN_SHA256 = "own_sha256"
FIELD = f'"{OWN_SHA256}":"'.encode()
ZEROS = b"0" * 64
FIRST = LENGTH_BYTES + len(OPENING) + len(FIELD)  # of the digits
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
    for old in _newest_first(folder)[CHECKPOINTS:]:
        folder.remove(old)
    return name


def load_newest_checkpoint(
    where: str | Path, digest: str | None = None, *, say: Callable[[str], None] = logger.warning
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole and of the trial with the digest, if any; or None.

    Any other is reported and renamed; unfinished files of a killed writer are removed.
    ValueError where a checkpoint holds more than tensors and plain values.
    """
    folder = Folder(where)
    for name in folder.names():
        if name.startswith(ASIDE):
            folder.remove(name)
    for name in _newest_first(folder):
        content, path = folder.read(name), below(str(where), name)
        if _short_hash(content) not in name:
            problem = "is damaged"
        else:
            state: dict[str, Any] = unpickled(content, path)
            if digest in (None, state.get(DIGEST)):
                return state
            problem = f"belongs to trial {state.get(DIGEST)}, not to {digest}"
        folder.rename(name, f"{name}.damaged")
        say(f"{path} {problem}; it is renamed {name}.damaged; the one before, if any, is used")
    return None


def save_weights(where: str | Path, module: nn.Module, recipe_json: str) -> str:
    """Write a model's weights as safetensors with its recipe in the header; return the sha256.

    `where`: the path or URI of the file.
    """
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    content = _sealed(save(tensors, metadata={RECIPE_ENTRY: recipe_json}))
    write_file(str(where), content)
    return hashlib.sha256(content).hexdigest()


def read_weights(
    content: bytes, path: str | Path, digest: str | None = None
) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the tensors that `save_weights` wrote.

    DamagedError names the file where it is damaged, or of another trial than that of the digest.
    """
    tensors = read_safetensors(content, path)
    recipe = recipe_of(content, path)
    if digest not in (None, recipe.digest()):
        raise DamagedError(
            f"{path} holds the weights of trial {recipe.digest()}, not of trial {digest}"
        )
    return recipe, tensors


def stored_weights(where: str, digest: str) -> dict[str, Tensor] | None:
    """Return a trial's weights at a path or URI, None where there are none.

    Raises as `read_weights`.
    """
    content = read_file(where)
    return None if content is None else read_weights(content, where, digest)[1]


def recipe_of(content: bytes, path: str | Path) -> Recipe:
    """Return the recipe in a weights file's header; ValueError where there is none."""
    metadata = _metadata(content, path)
    try:
        return Recipe.model_validate_json(metadata[RECIPE_ENTRY])
    except (KeyError, ValueError):
        raise ValueError(f"{path} names no recipe of this project: give --model") from None


def classifier_of(path: Path, digest: str) -> Classifier:
    """Build the model that a weights file's header names, with its weights.

    ValueError where the file is damaged or of another trial than that of the digest.
    """
    from trainables.networks import build_classifier  # timm, which the driver can spare

    recipe, tensors = read_weights(path.read_bytes(), path, digest)
    classifier = build_classifier(recipe)
    fit_weights(tensors, classifier, path)
    return classifier


class PackagedClassifier:
    """Answers float32 images_BCHW in [0, 1] with logits_BK; normalisation is inside."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    @torch.inference_mode()
    def predict(self, images_BCHW: np.ndarray, params: object = None) -> np.ndarray:
        logits: np.ndarray = self.classifier(torch.from_numpy(images_BCHW)).numpy()
        return logits


def _load_pyfunc(folder: str) -> PackagedClassifier:
    """Build the model of a run: `mlflow.pyfunc.load_model("runs:/RUN_ID/")` calls this."""
    recipe = Recipe.model_validate_json(Path(folder, RECIPE).read_text())
    return PackagedClassifier(classifier_of(Path(folder, WEIGHTS), recipe.digest()))


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


def unpickled(content: bytes, path: str | Path) -> Any:
    """Unpickle tensors and plain values, nothing that could run code; ValueError for the rest."""
    try:
        # Training scripts save their parsed options beside the weights: a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message says how to run it all the same
        raise ValueError(
            f"{path} is not opened: it holds more than weights, or is no pickle"
        ) from None
    except Exception as error:  # unpicklers raise all kinds of errors on bytes that are no pickle
        raise DamagedError(f"{path} is damaged: {_reason(error)}") from None


def fit_weights(tensors: dict[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a file; ValueError names the first three that do not fit."""
    model = module.state_dict()
    problems = [f"{name} is missing" for name in model if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in model]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in model.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:3])}")
    module.load_state_dict(tensors)


def _metadata(content: bytes, path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file's header; empty where it is no such file.

    DamagedError where it is a file of this project and not as it was written.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    try:
        header = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = dict(header.get("__metadata__", {}))
    except (AttributeError, RecursionError, TypeError, ValueError):
        return {}
    # A flipped bit in the name of either entry must not pass for a file of another origin.
    if metadata.keys() & {RECIPE_ENTRY, OWN_SHA256} and not _is_sealed(content):
        raise DamagedError(f"{path} is damaged, or of an older version: its sha256 is another")
    return metadata


def _sealed(content: bytes) -> bytes:
    """Return a safetensors file that has metadata with its own sha256 as the first entry."""
    start = LENGTH_BYTES + len(OPENING)
    assert content[LENGTH_BYTES:start] == OPENING
    entry = FIELD + ZEROS + b'",'
    assert len(entry) % 8 == 0  # the tensors' bytes stay aligned
    length = int.from_bytes(content[:LENGTH_BYTES], "little") + len(entry)
    whole = length.to_bytes(LENGTH_BYTES, "little") + OPENING + entry + content[start:]
    return whole[:FIRST] + _own_sha256(whole) + whole[FIRST + len(ZEROS) :]


def _is_sealed(content: bytes) -> bool:
    return content[FIRST : FIRST + len(ZEROS)] == _own_sha256(content)


def _own_sha256(content: bytes) -> bytes:
    sha256 = hashlib.sha256(content[:FIRST] + ZEROS)
    sha256.update(memoryview(content)[FIRST + len(ZEROS) :])
    return sha256.hexdigest().encode()


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _newest_first(folder: Folder) -> list[str]:
    names = (n for n in folder.names() if n.startswith("epoch-") and n.endswith(".pt"))
    return sorted(names, reverse=True)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
