"""Files of tensors: whole or refused, checked by the sha256 that they hold, never run."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load
from torch import Tensor

from trainables.store.storage import DamagedError

RECIPE_ENTRY = "recipe"  # of a weights file's header
ENTRIES = ("model", "state_dict", "model_state_dict", "net")  # of a training checkpoint

# A weights file's header begins with the file's own sha256, computed with its digits as zeros.
LENGTH_BYTES = 8  # of the header's length, in front of it
OPENING = b'{"__metadata__":{'
OWN_SHA256 = "own_sha256"
ZEROS = b"0" * 64


def read_content(path: Path, sha256: str = "") -> bytes:
    """Return a file's bytes; ValueError where it cannot be read or its sha256 is another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if sha256 and (actual := hashlib.sha256(content).hexdigest()) != sha256.lower():
        raise ValueError(f"{path} has the sha256 {actual}, not {sha256}: fetch it again")
    return content


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of one of torch's: dense, of real numbers.

    Of a training checkpoint the first of the `ENTRIES` is taken. Raises ValueError.
    """
    read = read_safetensors if path.suffix == ".safetensors" else unpickled
    loaded = read(content, path)
    for entry in ENTRIES:
        if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict):
            loaded = loaded[entry]
    if not isinstance(loaded, dict) or not all(map(is_plain, loaded.values())):
        raise ValueError(f"{path} is no dictionary of dense tensors of real numbers")
    return {str(name): value for name, value in loaded.items()}


def is_plain(value: object) -> TypeGuard[Tensor]:
    """Tell a dense tensor of real numbers in memory from all else that a file may hold."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def read_safetensors(content: bytes, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of any origin; DamagedError names its path.

    One that `save_weights` wrote must be, to the last bit, as it was written.
    """
    try:
        tensors: dict[str, Tensor] = load(content)
    except Exception as error:  # SafetensorError, or what torch says of a strange type or shape
        raise DamagedError(f"{path} is damaged: {_reason(error)}") from None
    metadata_of(content, path)
    return tensors


def unpickled(content: bytes, path: str | Path) -> Any:
    """Unpickle tensors and plain values, nothing that could run code; ValueError for the rest."""
    try:
        # Training scripts save their parsed options beside the weights: a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message says how to run it all the same
        raise ValueError(
            f"{path} is not opened: it holds more than weights, or is no pickle; write it by "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # unpicklers raise all kinds of errors on bytes that are no pickle
        raise DamagedError(f"{path} is damaged: {_reason(error)}") from None


def metadata_of(content: bytes, path: str | Path) -> dict[str, str]:
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
    if metadata.keys() & {RECIPE_ENTRY, OWN_SHA256}:
        digits = str(metadata.get(OWN_SHA256, "")).encode()
        if not digits or _sha256(content.replace(digits, ZEROS, 1)) != digits:
            raise DamagedError(f"{path} is damaged, or of an older version: its sha256 is another")
    return metadata


def sealed(content: bytes) -> bytes:
    """Return a safetensors file that has metadata with its own sha256 as the first entry."""
    start = LENGTH_BYTES + len(OPENING)
    assert content[LENGTH_BYTES:start] == OPENING
    entry = f'"{OWN_SHA256}":"'.encode() + ZEROS + b'",'
    assert len(entry) % 8 == 0  # the tensors' bytes stay aligned
    length = int.from_bytes(content[:LENGTH_BYTES], "little") + len(entry)
    whole = length.to_bytes(LENGTH_BYTES, "little") + OPENING + entry + content[start:]
    return whole.replace(ZEROS, _sha256(whole), 1)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
