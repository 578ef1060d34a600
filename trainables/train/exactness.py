"""How a process computes: exact, whose bits repeat, or fast; and random numbers by image."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

UNREPEATABLE = ".*does not have a deterministic implementation.*"
FUSED = ("flash", "mem_efficient", "cudnn")  # kinds of fused attention
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
AT_ONCE = {"cpu": 2**18}  # numbers drawn together: they stay in a core's cache
AT_ONCE_ELSEWHERE = 2**24
MANTISSA = 24  # bits of a float32 in [0, 1)


def exact(device: torch.device) -> None:
    """Make this process compute in full float32 and deterministically on a GPU; no-op on a CPU.

    Call it before the first computation: cuBLAS reads its workspace's size once. Operations without
    a repeatable kernel still run, without torch's warning.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        warnings.filterwarnings("ignore", message=UNREPEATABLE)
        _compute(repeatably=True)


def fast(device: torch.device) -> None:
    """Let a GPU compute in TF32 by whichever kernels are fastest; no-op on a CPU.

    TF32 rounds to 10 bits, and sums are in any order. New memory is not filled.
    """
    if device.type == "cuda":
        _compute(repeatably=False)


def _compute(*, repeatably: bool) -> None:
    # By default convolutions round to 10 bits and matrix products do not: CNNs would lose more.
    torch.backends.cudnn.allow_tf32 = not repeatably
    torch.backends.cuda.matmul.allow_tf32 = not repeatably
    torch.backends.cudnn.deterministic = repeatably
    torch.backends.cudnn.benchmark = not repeatably
    torch.use_deterministic_algorithms(repeatably, warn_only=repeatably)
    # With `warn_only` the gradients of fused attention are still summed in any order.
    for kind in FUSED:
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(not repeatably)


@contextmanager
def settings_restored(device: torch.device) -> Iterator[None]:
    """Put back on leaving what `exact` and `fast` set in this process."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul, cuda = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.cuda
    tf32, repeatable = matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fused = {kind: getattr(cuda, f"{kind}_sdp_enabled")() for kind in FUSED}
    flags = {n: getattr(cudnn, n) for n in ("enabled", "benchmark", "deterministic", "allow_tf32")}
    with warnings.catch_warnings(), cudnn.flags(**flags):
        try:
            yield
        finally:
            matmul.allow_tf32 = tf32
            torch.use_deterministic_algorithms(repeatable, warn_only=warn_only)
            for kind, was in fused.items():
                getattr(cuda, f"enable_{kind}_sdp")(was)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return Philox4x32-10 of four int64 counters of 32 bits each, all of one shape.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
    """
    a, b, c, d = counter
    keys = key
    for _ in range(ROUNDS):
        # A product overflows as it does in unsigned arithmetic, so its upper word is right.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a = (second >> 32).bitwise_xor_(b).bitwise_xor_(keys[0]).bitwise_and_(WORD)
        c = (first >> 32).bitwise_xor_(d).bitwise_xor_(keys[1]).bitwise_and_(WORD)
        b, d = second.bitwise_and_(WORD), first.bitwise_and_(WORD)
        keys = ((keys[0] + KEY_STEPS[0]) & WORD, (keys[1] + KEY_STEPS[1]) & WORD)
    return [a, b, c, d]


def uniform(images_B: Tensor, shape: Sequence[int], *, key: Sequence[int | str]) -> Tensor:
    """Return float32 numbers (B, *shape) from [0, 1), each image's from a stream of its own.

    images_B: int64 numbers that name the images; key: what else the draw is for. An image's numbers
    are the same bits on every device and beside whichever other images they are drawn.
    """
    digest, count = hashlib.sha256(repr(tuple(key)).encode()).digest(), math.prod(shape)
    words = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    drawn = torch.empty(len(images_B), count, device=images_B.device)
    at_once = AT_ONCE.get(images_B.device.type, AT_ONCE_ELSEWHERE)
    rows = max(1, at_once // max(1, count))
    blocks = torch.arange(math.ceil(count / 4), device=images_B.device)
    for first in range(0, len(images_B), rows):
        part = slice(first, first + rows)
        low, high = (images_B[part] & WORD)[:, None], ((images_B[part] >> 32) & WORD)[:, None]
        counter = (blocks, low, high, torch.zeros_like(low))
        numbers = philox([word.expand(len(low), len(blocks)) for word in counter], words)
        whole = torch.stack(numbers, dim=-1).flatten(1)[:, :count]
        drawn[part] = (whole >> (32 - MANTISSA)).float().mul_(2.0**-MANTISSA)
    return drawn.view(len(images_B), *shape)


def image_numbers(ids: Sequence[str]) -> Tensor:
    """Return the int64 numbers (B,) by which `uniform` knows images of these ids."""
    digests = (hashlib.sha256(image_id.encode()).digest()[:8] for image_id in ids)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])


def seed_of(key: str) -> int:
    """Return the seed of a generator that follows from a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
