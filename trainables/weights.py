"""Weights of any origin: files of this project, of timm, and of the original study."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from trainables.layers import Classifier
from trainables.store.tensors import fit_weights, read_safetensors, unpickled

ENTRIES = ("model", "state_dict", "model_state_dict", "net")  # of a training checkpoint
SEVERAL_SETS = re.compile(r"(?P<norm>.+)\.bn(?P<set>\d+)\.proxy_bn\.")
STATISTICS = ("running_mean", "running_var")


def fit_any_weights(
    tensors: dict[str, Tensor], module: nn.Module, origin: str, *, new_head: bool = False
) -> tuple[str, ...]:
    """Load weights of whatever names into a module or a classifier's backbone; say what was mapped.

    A head of another number of classes becomes as wide as the weights', or with `new_head` stays as
    it is. ValueError names what else does not fit.
    """
    backbone = module.backbone if isinstance(module, Classifier) else module
    model = backbone.state_dict()
    named, notes = _without_prefix(plain_names(tensors), model)
    fitted = {
        name: _fitted(name, value, model[name]) if name in model else value
        for name, value in named.items()
    }
    # How many batches a norm has seen is no part of its answer, and ours do not count them.
    counts = {name: value for name, value in model.items() if name.endswith("num_batches_tracked")}
    fitted = counts | fitted
    if head := _other_head(fitted, model):
        outputs, built = len(fitted[head[0]]), len(model[head[0]])
        if new_head:
            fitted |= {name: model[name] for name in head}
            notes.append(f"the head of {outputs} classes is left out: a new one of {built} stays")
        else:
            for layer, _, parameter in (name.rpartition(".") for name in head):
                empty = nn.Parameter(torch.empty_like(fitted[f"{layer}.{parameter}"]))
                setattr(backbone.get_submodule(layer), parameter, empty)
            notes.append(f"the head has the weights' {outputs} classes, not {built}")
    fit_weights(fitted, backbone, origin)
    return tuple(notes)


def _without_prefix(
    tensors: dict[str, Tensor], model: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors below the prefix that most of the model's names have, and notes on it."""
    prefixes = Counter(
        name[: part.end()]
        for name in tensors
        for part in re.finditer(r"^|\.", name)
        if name[part.end() :] in model
    )
    prefix = min(prefixes, key=lambda word: (-prefixes[word], len(word)), default="")
    others = [name for name in tensors if not name.startswith(prefix)]
    notes = [f"the names' prefix {prefix!r} is left out"] if prefix else []
    if others:
        named = f"{', '.join(others[:3])}{', ...' if others[3:] else ''}"
        notes.append(f"not read, as it lies beside that prefix: {named} ({len(others)} in all)")
    below = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return below, notes


def _other_head(tensors: dict[str, Tensor], model: dict[str, Tensor]) -> list[str]:
    """Return the names of a head of another number of classes, where nothing else differs."""
    if tensors.keys() != model.keys():
        return []
    names = [name for name, value in model.items() if tensors[name].shape != value.shape]
    sizes = {(tensors[name].shape[:1], model[name].shape[:1]) for name in names}
    first_axis = all(tensors[name].shape[1:] == model[name].shape[1:] for name in names)
    return names if len(sizes) == 1 and first_axis else []


def read_tensors(path: Path, sha256: str = "") -> dict[str, Tensor]:
    """Read a .safetensors file, or one of torch's, of dense tensors of real numbers.

    Of a training checkpoint the first of the `ENTRIES` is taken. Raises ValueError, also where the
    file's sha256 is not the one stated.
    """
    read = read_safetensors if path.suffix == ".safetensors" else unpickled
    loaded = read(read_content(path, sha256), path)
    for entry in ENTRIES:
        if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict):
            loaded = loaded[entry]
    if not isinstance(loaded, dict) or not all(map(is_plain, loaded.values())):
        raise ValueError(f"{path} is no dictionary of dense tensors of real numbers")
    return {str(name): value for name, value in loaded.items()}


def read_content(path: Path, sha256: str = "") -> bytes:
    """Return a file's bytes; ValueError where it cannot be read or its sha256 is another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if sha256 and (actual := hashlib.sha256(content).hexdigest()) != sha256.lower():
        raise ValueError(f"{path} has the sha256 {actual}, not {sha256}: fetch it again")
    return content


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

    A GhostBN `X.proxy_bn.*` is X's. Where X holds several sets of
    statistics, `X.bn0.proxy_bn.*` is X's and the other sets, which evaluation never reads, are
    left out; their shared affine is X's: `X.aff.bnconv.weight` or `X.aff.weight`.
    Source: STUDY section 3, GhostBN: evaluation uses set 0.
    """
    return {
        _plain_name(name): value
        for name, value in tensors.items()
        if (several := SEVERAL_SETS.match(name)) is None
        or several["set"] == "0"
        or f"{several['norm']}.bn0.proxy_bn.running_mean" not in tensors
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
