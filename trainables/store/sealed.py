"""Safetensors files whose header begins with the file's own sha256, taken with its digits as 0."""

from __future__ import annotations

import hashlib

LENGTH_BYTES = 8  # of the header's length, in front of it
OPENING = b'{"__metadata__":{'
OWN_SHA256 = "own_sha256"
FIELD = f'"{OWN_SHA256}":"'.encode()
ZEROS = b"0" * 64
FIRST = LENGTH_BYTES + len(OPENING) + len(FIELD)  # of the digits


def sealed(content: bytes) -> bytes:
    """Return a safetensors file that has metadata with its own sha256 as the first entry."""
    start = LENGTH_BYTES + len(OPENING)
    assert content[LENGTH_BYTES:start] == OPENING
    entry = FIELD + ZEROS + b'",'
    assert len(entry) % 8 == 0  # the tensors' bytes stay aligned
    length = int.from_bytes(content[:LENGTH_BYTES], "little") + len(entry)
    whole = length.to_bytes(LENGTH_BYTES, "little") + OPENING + entry + content[start:]
    return whole[:FIRST] + _own_sha256(whole) + whole[FIRST + len(ZEROS) :]


def is_sealed(content: bytes) -> bool:
    """Tell whether a file is, to the last bit, as `sealed` made it."""
    return content[FIRST : FIRST + len(ZEROS)] == _own_sha256(content)


def _own_sha256(content: bytes) -> bytes:
    counted = hashlib.sha256(content[:FIRST] + ZEROS)
    counted.update(memoryview(content)[FIRST + len(ZEROS) :])
    return counted.hexdigest().encode()
