"""The Robust-ResNets of Wang et al. (2023): residual networks made of depthwise convolutions.

Layers have the names of the source, so that its checkpoints load: UCSC-VLAA/RobustCNN,
timm/models/robust_resnet.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

import torch
from timm.layers import DropPath, SelectAdaptivePool2d, calculate_drop_path_rates
from torch import Tensor, nn

from trainables.scale import STUDY_SIZE, Scale

WIDTH = 96  # of the first stage
PATCH = 16  # pixels a side, of the source's stem
RATIO = 4  # of a block's widths
LAYER_SCALE = 1e-6
# A block's layers in order. Activation act3 comes behind the shortcut.
ORDERS = {
    "dw": ("pwconv1", "norm1", "conv_dw", "pwconv2"),
    "inverted-dw": ("pwconv1", "norm1", "act1", "conv_dw", "pwconv2"),
    "up-inverted-dw": ("conv_dw", "norm1", "pwconv1", "act2", "pwconv2"),
    "down-inverted-dw": ("pwconv1", "norm2", "act2", "pwconv2", "conv_dw"),
}
NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """One residual block; images_BCHW -> (B, `outputs`, H / stride, W / stride)."""

    def __init__(
        self,
        kind: str,
        inputs: int,
        width: int,
        norm_layer: NormLayer,
        *,
        kernel: int,
        stride: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.order = ORDERS[kind]
        self.outputs = RATIO * width if kind == "dw" else width
        inner = width if kind == "dw" else RATIO * width
        channels = inputs
        for name in self.order:
            layer: nn.Module = nn.ReLU(inplace=True)
            if name == "conv_dw":
                before, channels = channels, width if name == self.order[0] else channels
                padding = kernel // 2
                layer = nn.Conv2d(before, channels, kernel, stride, padding, groups=before)
            elif name.startswith("pwconv"):
                before, channels = channels, inner if name == "pwconv1" else self.outputs
                layer = nn.Conv2d(before, channels, 1)
            elif name.startswith("norm"):
                layer = norm_layer(channels)
            self.add_module(name, layer)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if inputs != channels or stride > 1:
            shortcut = nn.Conv2d(inputs, channels, 1, stride)
            self.downsample = nn.Sequential(shortcut, norm_layer(channels))
        self.act3 = nn.ReLU(inplace=True) if kind == "dw" else nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        branch = images_BCHW
        for name in self.order:
            branch = self.get_submodule(name)(branch)
        branch = self.drop_path(branch * self.gamma.view(1, -1, 1, 1))
        return cast(Tensor, self.act3(branch + self.downsample(images_BCHW)))


def robust_resnet(
    kind: str,
    depths: Sequence[int],
    kernel: int,
    strided_stage: int,
    scale: Scale,
    norm_layer: NormLayer,
    *,
    drop_rate: float = 0,
    drop_path_rate: float = 0,
) -> nn.Module:
    """Build a Robust-ResNet at a scale's depth, widths and patches; one stage has stride 2.

    Where the stem leaves a smaller map than the source's, kernels span the same share of it.
    """
    depths = [scale.depth(count) for count in depths]
    share = min(1.0, (scale.image_size // scale.patch_size) / (STUDY_SIZE // PATCH))
    kernel = 2 * math.ceil((kernel * share - 1) / 2) + 1
    rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
    channels = WIDTH // scale.resnet_width_divisor
    stem = nn.Conv2d(3, channels, scale.patch_size, scale.patch_size)
    stages = nn.Sequential()
    for stage, depth in enumerate(depths):
        width = WIDTH * 2**stage // scale.resnet_width_divisor
        strided_block = depth - 1 if kind == "down-inverted-dw" else 0
        blocks: list[Block] = []
        for place, rate in enumerate(rates[stage]):
            stride = 2 if (stage, place) == (strided_stage, strided_block) else 1
            shape = {"kernel": kernel, "stride": stride}
            blocks.append(Block(kind, channels, width, norm_layer, **shape, drop_path=rate))
            channels = blocks[-1].outputs
        stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
    head = OrderedDict(
        global_pool=SelectAdaptivePool2d(flatten=True),
        drop=nn.Dropout(drop_rate),
        fc=nn.Linear(channels, scale.num_classes),
    )
    network = nn.Sequential(OrderedDict(stem=stem, stages=stages, head=nn.Sequential(head)))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
    return network
