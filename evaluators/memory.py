"""How many images fit in memory while a model is attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainables.data.listing import GIBIBYTE

CPU_BYTES = GIBIBYTE * 3 // 2  # of the 2 GiB that an attack at 224 px may add to a process
GPU_SHARE = 0.5  # of a GPU's free memory: training and other evaluators may come to want the rest
WORKING_COPIES = 4  # of the largest activation, while a layer is computed
HELD_AT_MOST = 1000  # images' bytes, for an image: ResNet-200 at 224 px holds 420
STATE_IMAGES = 40  # what an attack holds for each image, in images: FAB's projection holds most


def images_at_once(model: nn.Module, images_BCHW: Tensor, *, most: int) -> int:
    """Return how many such images may be attacked at once, from 1 to `most`.

    Where they might not fit, one image is put through the model, which must be in eval mode, and
    what autograd holds for it is counted.
    """
    image_bytes = images_BCHW[0].numel() * images_BCHW.element_size()
    budget = CPU_BYTES
    if (device := images_BCHW.device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and does not use is free for it as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int(GPU_SHARE * (free + unused))
    if most * image_bytes * HELD_AT_MOST <= budget:
        return most
    activations, largest = _held_activations(model, images_BCHW[:1])
    each = activations + WORKING_COPIES * largest + STATE_IMAGES * image_bytes
    return max(1, min(most, budget // each))


def _held_activations(model: nn.Module, image_1CHW: Tensor) -> tuple[int, int]:
    """Return the bytes of all tensors that the gradient by the image needs, and of the largest."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
        graph = model(image_1CHW.detach().clone().requires_grad_(True))
    del graph
    return sum(held.values()), max(held.values(), default=0)
