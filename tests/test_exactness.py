"""Whole float32 and repeatable kernels: set for a GPU, which the flags need not have, alone."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from trainables.networks import build_classifier
from trainables.train.exactness import exact
from trainables.train.loop import train

CUDA = torch.backends.cuda
ROUNDED = {
    "convolutions in TF32": True,
    "products in TF32": True,
    "deterministic convolutions": False,
    "benchmarked convolutions": True,
    "deterministic algorithms": False,
    "raised where there is none": False,
    "fused attention": True,
    "cuBLAS": None,
}
EXACT = {
    "convolutions in TF32": False,
    "products in TF32": False,
    "deterministic convolutions": True,
    "benchmarked convolutions": False,
    "deterministic algorithms": True,
    "raised where there is none": False,
    "fused attention": False,
    "cuBLAS": ":4096:8",
}


def flags():
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fused = CUDA.flash_sdp_enabled(), CUDA.mem_efficient_sdp_enabled(), CUDA.cudnn_sdp_enabled()
    assert len(set(fused)) == 1
    return {
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "products in TF32": CUDA.matmul.allow_tf32,
        "deterministic convolutions": torch.backends.cudnn.deterministic,
        "benchmarked convolutions": torch.backends.cudnn.benchmark,
        "deterministic algorithms": deterministic,
        "raised where there is none": deterministic and not warned,
        "fused attention": fused[0],
        "cuBLAS": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def put(values):
    torch.backends.cudnn.allow_tf32 = values["convolutions in TF32"]
    CUDA.matmul.allow_tf32 = values["products in TF32"]
    torch.backends.cudnn.deterministic = values["deterministic convolutions"]
    torch.backends.cudnn.benchmark = values["benchmarked convolutions"]
    torch.use_deterministic_algorithms(values["deterministic algorithms"])
    for enable in (CUDA.enable_flash_sdp, CUDA.enable_mem_efficient_sdp, CUDA.enable_cudnn_sdp):
        enable(values["fused attention"])


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    """Flags as a process has them that was told the contrary, put back afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = flags()
    put(ROUNDED)
    with warnings.catch_warnings():
        yield
    put(before)


def test_a_gpu_computes_in_whole_float32_and_repeatably():
    exact(torch.device("cuda", 0))
    assert flags() == EXACT


def test_a_cpu_is_left_alone():
    exact(torch.device("cpu"))
    assert flags() == ROUNDED


def test_what_has_no_repeatable_kernel_is_computed_unsaid():
    exact(torch.device("cuda"))
    warnings.warn("cumsum does not have a deterministic implementation, but ...", stacklevel=1)
    with pytest.raises(UserWarning, match="anything else"):
        warnings.warn("anything else", stacklevel=1)


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
