"""Checkpoints that are whole or absent: written aside, synced, renamed, named by their sha256."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

KEPT = 2
SOUND = "sound"
logger = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the machine stops, it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], *, sound: bool = True) -> Path:
    """Save the state after `epoch` epochs; drop all but the newest two and the newest sound one.

    `sound` is False for a state in which the training may have begun to collapse.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    judged = SOUND if sound else "doubtful"
    path = folder / f"epoch-{epoch:05d}-{judged}-{_short_hash(content)}.pt"
    write_atomically(path, content)
    newest = _newest_first(folder)
    kept = {*newest[:KEPT], *[p for p in newest if f"-{SOUND}-" in p.name][:1]}
    for old in newest:
        if old not in kept:
            old.unlink(missing_ok=True)
    return path


def load_newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Load the newest whole checkpoint, or None; a damaged one is reported and kept aside.

    Nothing is unpickled but tensors and plain values (`weights_only`).
    """
    for path in _newest_first(folder):
        content = path.read_bytes()
        if path.stem.rsplit("-", 1)[-1] == _short_hash(content):
            state: dict[str, Any] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
            return state
        kept = path.with_suffix(".damaged")
        path.rename(kept)
        logger.warning("%s is damaged; it is kept as %s and the one before is used", path, kept)
    return None


def save_weights(path: Path, module: nn.Module, recipe_json: str) -> str:
    """Write a model's weights as safetensors with its recipe in the header; return the sha256."""
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    content = save(tensors, metadata={"recipe": recipe_json})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path, module: nn.Module) -> None:
    """Load safetensors weights into a model; ValueError names the first keys that do not fit."""
    fit_weights(load_file(path), module, path)


def fit_weights(tensors: dict[str, Tensor], module: nn.Module, path: Path) -> None:
    """Give a model the weights of a file; ValueError names the first keys that do not fit."""
    wanted = module.state_dict()
    odd = sorted(set(tensors) ^ set(wanted))
    odd += [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape]
    if odd:
        raise ValueError(f"{path} does not fit the model; first keys that differ: {odd[:3]}")
    module.load_state_dict(tensors)


def recipe_json_of(path: Path) -> str:
    """Return the recipe stored in a weights file's header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(header["__metadata__"]["recipe"])


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.pt"), reverse=True)


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
