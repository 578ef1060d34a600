"""Checkpoints and weights: whole or absent, checked by sha256 where they are read, never run."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from trainables.layers import Classifier
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
from trainables.store.tensors import RECIPE_ENTRY, metadata_of, read_safetensors, sealed, unpickled

CHECKPOINTS = 2  # of a trial, the newest
DIGEST = "digest"  # in a checkpoint: of the trial that it belongs to

logger = logging.getLogger(__name__)


def save_checkpoint(
    where: str | Path, epoch: int, state: dict[str, Any], *, forward: int = 0
) -> str:
    """Save the state after `epoch` epochs and drop all but the newest two checkpoints.

    `where` is a path or URI; forward: batches done of the next epoch. Returns the name.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    within = f".{forward:07d}" if forward else ""  # "." sorts behind "-"
    name = f"epoch-{epoch:05d}{within}-{_short_hash(content)}.pt"
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
    content = sealed(save(tensors, metadata={RECIPE_ENTRY: recipe_json}))
    write_file(str(where), content)
    return hashlib.sha256(content).hexdigest()


def read_weights(content: bytes, path: str | Path, digest: str) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the tensors that `save_weights` wrote of the trial with the digest.

    DamagedError names the file where it is damaged, or of another trial.
    """
    tensors, recipe = read_safetensors(content, path), recipe_of(content, path)
    if digest != (other := recipe.digest()):
        raise DamagedError(f"{path} holds the weights of trial {other}, not of trial {digest}")
    return recipe, tensors


def stored_weights(where: str, digest: str) -> dict[str, Tensor] | None:
    """Return a trial's weights at a path or URI, None where there are none; or DamagedError."""
    content = read_file(where)
    return None if content is None else read_weights(content, where, digest)[1]


def weights_of_epoch(epoch: int) -> str:
    """Return the name of the file of a trial's weights after an epoch."""
    return f"weights-{epoch:05d}.safetensors"


def weights_along(where: str | Path, epochs: Iterable[int], last: int) -> dict[int, str]:
    """Return where a trial's weights lie after those epochs, up to `last`, that were stored."""
    names = {weights_of_epoch(epoch): epoch for epoch in epochs if epoch <= last}
    there = Folder(where).names()
    return {epoch: below(str(where), name) for name, epoch in names.items() if name in there}


def recipe_of(content: bytes, path: str | Path) -> Recipe:
    """Return the recipe in a weights file's header; ValueError where there is none."""
    metadata = metadata_of(content, path)
    try:
        return Recipe.model_validate_json(metadata[RECIPE_ENTRY])
    except (KeyError, ValueError):
        raise ValueError(f"{path} names no recipe of this project: give --model") from None


def classifier_of(path: Path, digest: str) -> Classifier:
    """Build the model that a weights file's header names, with its weights; or DamagedError."""
    from trainables.networks import build_classifier  # timm, which a driver spares
    from trainables.weights import fit_weights

    recipe, tensors = read_weights(path.read_bytes(), path, digest)
    classifier = build_classifier(recipe)
    fit_weights(tensors, classifier, str(path))
    return classifier


class PackagedClassifier:
    """Answers float32 images_BCHW in [0, 1] with logits_BK; normalisation is inside."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    @torch.inference_mode()
    def predict(self, images_BCHW: np.ndarray, params: object = None) -> np.ndarray:
        return np.asarray(self.classifier(torch.from_numpy(images_BCHW)))


def _load_pyfunc(folder: str) -> PackagedClassifier:
    """Build the model of a run: `mlflow.pyfunc.load_model("runs:/RUN_ID/")` calls this."""
    recipe = Recipe.model_validate_json(Path(folder, RECIPE).read_text())
    return PackagedClassifier(classifier_of(Path(folder, WEIGHTS), recipe.digest()))


def _newest_first(folder: Folder) -> list[str]:
    names = (n for n in folder.names() if n.startswith("epoch-") and n.endswith(".pt"))
    return sorted(names, reverse=True)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
