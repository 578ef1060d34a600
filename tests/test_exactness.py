"""Whole float32 and repeatable kernels on a GPU, and draws by image that no batch changes."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

from trainables.networks import build_classifier
from trainables.train.exactness import exact, fast, settings_restored
from trainables.train.loop import train

CUDA, CUDNN = torch.backends.cuda, torch.backends.cudnn
FAST = ((True, True, False, True), (False, False), (True,) * 3)
ROUNDED = ((True, True, False, True), (False, False), (True,) * 3, None)
EXACT = ((False, False, True, False), (True, True), (False,) * 3, ":4096:8")


def flags():
    """Return TF32 and cuDNN's choices, whether kernels repeat, fused attention, cuBLAS's space."""
    return (
        (CUDNN.allow_tf32, CUDA.matmul.allow_tf32, CUDNN.deterministic, CUDNN.benchmark),
        (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        (CUDA.flash_sdp_enabled(), CUDA.mem_efficient_sdp_enabled(), CUDA.cudnn_sdp_enabled()),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def put(values):
    rounding, (repeatable, warn_only), fused, _ = values
    CUDNN.allow_tf32, CUDA.matmul.allow_tf32, CUDNN.deterministic, CUDNN.benchmark = rounding
    torch.use_deterministic_algorithms(repeatable, warn_only=warn_only)
    enables = (CUDA.enable_flash_sdp, CUDA.enable_mem_efficient_sdp, CUDA.enable_cudnn_sdp)
    for enable, value in zip(enables, fused, strict=True):
        enable(value)


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    """Flags that are all set the wrong way, put back afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = flags()
    put(ROUNDED)
    with warnings.catch_warnings():
        yield
    put(before)


def test_a_gpu_computes_in_whole_float32_and_repeatably_and_a_cpu_is_left_alone():
    exact(torch.device("cpu"))
    assert flags() == ROUNDED
    exact(torch.device("cuda", 0))
    assert flags() == EXACT
    warnings.warn("cumsum does not have a deterministic implementation, but ...", stacklevel=1)


def test_fast_undoes_on_a_gpu_what_exact_does_and_leaves_a_cpu_alone():
    exact(torch.device("cuda"))
    fast(torch.device("cpu"))
    assert flags() == EXACT
    fast(torch.device("cuda"))
    assert flags()[:3] == FAST


def test_a_fast_training_that_was_cut_short_ends_like_one_that_was_not(small, few_digits):
    # On a GPU sums come in any order: here each gradient is a last bit off, by an unseeded draw.
    def last_losses(start=None):
        classifier = build_classifier(recipe)
        for parameter in classifier.parameters():
            parameter.register_hook(lambda g: g * (1 + 1e-6 * (torch.rand_like(g) - 0.5)))
        reports = train(
            recipe, classifier, few_digits, device=torch.device("cpu"), is_fast=True, start=start
        )
        return [(copy.deepcopy(r.state), r.metrics["train/loss"]) for r in reports]

    recipe = small("deit", epochs=4)
    whole = last_losses()
    assert (last_losses()[-1][1], last_losses(whole[1][0])[-1][1]) == pytest.approx(
        (whole[-1][1],) * 2, rel=1e-3
    )


def test_what_is_set_for_a_gpu_is_put_back():
    with settings_restored(torch.device("cuda")):
        exact(torch.device("cuda"))
        assert flags() == EXACT
    assert flags()[:3] == ROUNDED[:3]


def test_training_on_a_gpu_is_exact_before_anything_is_computed(small, few_digits, monkeypatch):
    class MovedError(Exception):
        pass

    def to(self, device):
        assert flags() == EXACT
        raise MovedError

    recipe = small()
    classifier = build_classifier(recipe)
    monkeypatch.setattr(type(classifier), "to", to)
    with pytest.raises(MovedError):
        next(train(recipe, classifier, few_digits, device=torch.device("cuda")))
