"""What a GPU is asked for so that it computes as a CPU does: whole float32, and the same bits."""

from __future__ import annotations

import os
import warnings

import torch

UNREPEATABLE = ".*does not have a deterministic implementation.*"


def exact(device: torch.device) -> None:
    """Have this process compute in whole float32 and repeatably on a GPU; on a CPU do nothing.

    Call it before the first computation: cuBLAS reads its workspace's size once. What torch can
    do in no repeatable way it still does, unsaid.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # By default convolutions round to 10 bits and matrix products do not: CNNs would lose more.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("ignore", message=UNREPEATABLE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # With `warn_only` the gradients of fused attention are still summed in any order.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
