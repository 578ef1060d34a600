"""Weights of any origin: files of this project, of timm, and of the original study."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from trainables.layers import Classifier
from trainables.store.checkpoint import fit_weights, read_safetensors, unpickled

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin")
BACKBONE = "backbone."
SEVERAL_SETS = re.compile(r"(?P<norm>.+)\.bn(?P<set>\d+)\.proxy_bn\.")
STATISTICS = ("running_mean", "running_var")


def load_any_weights(path: Path, classifier: Classifier) -> None:
    """Load a file's weights into a classifier; ValueError says what does not fit or is refused."""
    model = classifier.state_dict()
    tensors = plain_names(read_tensors(path))
    if not any(name.startswith(BACKBONE) for name in tensors):
        tensors = {BACKBONE + name: value for name, value in tensors.items()}
    fitted = {
        name: _fitted(name, value, model[name]) if name in model else value
        for name, value in tensors.items()
    }
    # How many batches a norm has seen is no part of its answer, and ours do not count them.
    counts = {name: value for name, value in model.items() if name.endswith("num_batches_tracked")}
    fit_weights(counts | fitted, classifier, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or one of torch's, of dense tensors of real numbers.

    Of a training checkpoint the entry `model` or `state_dict` is taken. Raises ValueError.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no weights file: its name ends in none of {SUFFIXES}")
    read = read_safetensors if path.suffix == SUFFIXES[0] else unpickled
    loaded = read(read_content(path), path)
    for entry in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict):
            loaded = loaded[entry]
    if not isinstance(loaded, dict) or not all(map(is_plain, loaded.values())):
        raise ValueError(f"{path} is no dictionary of dense tensors of real numbers")
    return {str(name): value for name, value in loaded.items()}


def read_content(path: Path) -> bytes:
    """Return a file's bytes; ValueError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Tell a dense tensor of real numbers in memory from all else that a file may hold."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under timm's names, as the released checkpoints do not have it.

    `module.` is DataParallel's. A GhostBN `X.proxy_bn.*` is X's. Where X holds several sets of
    statistics, `X.bn0.proxy_bn.*` is X's and the other sets, which evaluation never reads, are
    left out; their shared affine is X's: `X.aff.bnconv.weight` or `X.aff.weight`.
    Source: STUDY section 3, GhostBN: evaluation uses set 0.
    """
    named = {name.removeprefix("module."): value for name, value in tensors.items()}
    return {
        _plain_name(name): value
        for name, value in named.items()
        if (several := SEVERAL_SETS.match(name)) is None
        or several["set"] == "0"
        or f"{several['norm']}.bn0.proxy_bn.running_mean" not in named
    }


def _plain_name(name: str) -> str:
    name = re.sub(r"\.bn0\.proxy_bn\.", ".", name)
    name = re.sub(r"\.aff(\.bnconv)?\.(weight|bias)$", r".\2", name)
    return name.replace(".proxy_bn.", ".")


def _fitted(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """Return a norm's (C, 1, 1, 1) or (1, C, 1, 1) affine as (C,).

    Of statistics (G * C,) or (S, G * C): ghost 0 of set 0.
    """
    if wanted.ndim != 1:
        return value
    if value.numel() == wanted.numel():
        return value.reshape(wanted.shape)
    ghosts = name.endswith(STATISTICS) and value.numel() % wanted.numel() == 0
    return value.flatten()[: len(wanted)] if ghosts else value
