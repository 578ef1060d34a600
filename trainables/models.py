"""Classifiers: timm's networks, cut to a scale, with the normalisation inside."""

from __future__ import annotations

from typing import cast

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from trainables.recipe import TIMM_PREFIX, Recipe
from trainables.scale import PUBLISHED_DEIT_WIDTH, Scale, scale_named

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}
DEITS: dict[str, tuple[int, int]] = {  # published width, depth
    "deit_mini": (256, 12),
    "deit_small": (PUBLISHED_DEIT_WIDTH, 12),
    "deit_base": (768, 12),
}
ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


class Classifier(nn.Module):
    """Map images in [0, 1] to logits; the normalisation is part of the model.

    images_BCHW float32 in [0, 1] -> logits_BK. The contract of every attack and evaluator.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return cast(Tensor, self.backbone((images_BCHW - self.mean) / self.std))


def build_classifier(recipe: Recipe) -> Classifier:
    """Build a recipe's untrained classifier; its initial weights follow from the seed alone."""
    scale = scale_named(recipe.scale)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return classifier_named(recipe.model, scale, activation=recipe.activation)


def classifier_named(model: str, scale: Scale, *, activation: str | None = None) -> Classifier:
    """Build a model by name, untrained; without `activation` it keeps its network's own."""
    backbone = _backbone(model, scale)
    if activation:
        swap_activation(backbone, activation)
    classifier = Classifier(backbone, scale.mean, scale.std)
    return classifier.to(memory_format=torch.channels_last)


def swap_activation(module: nn.Module, name: str) -> None:
    """Replace every activation layer below `module`; a gate's Sigmoid or Tanh is not one."""
    for child_name, child in module.named_children():
        if isinstance(child, tuple(ACTIVATION_LAYERS.values())):
            setattr(module, child_name, ACTIVATION_LAYERS[name]())
        else:
            swap_activation(child, name)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _backbone(model: str, scale: Scale) -> nn.Module:
    if model in RESNETS:
        return cast(nn.Module, _resnet(model, scale))
    if model in DEITS:
        return cast(nn.Module, _deit(model, scale))
    return _from_timm(model.removeprefix(TIMM_PREFIX), scale)


def _resnet(model: str, scale: Scale) -> ResNet:
    block, layers = RESNETS[model]
    channels = scale.resnet_channels()
    small = scale.stem == "small"
    network = ResNet(
        block,
        tuple(scale.depth(blocks) for blocks in layers),
        num_classes=scale.num_classes,
        channels=channels,
        # timm's plain stem is 64 wide; its deep stem takes any width and is replaced below.
        stem_type="deep" if small else "",
        stem_width=channels[0] // 2 if small else 64,
    )
    if small:
        network.conv1 = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _deit(model: str, scale: Scale) -> VisionTransformer:
    published_width, depth = DEITS[model]
    heads = scale.vit_heads(published_width)
    network = VisionTransformer(
        img_size=scale.image_size,
        patch_size=scale.patch_size,
        embed_dim=heads * scale.head_width,
        depth=scale.depth(depth),
        num_heads=heads,
        num_classes=scale.num_classes,
    )
    if scale.stem == "small":
        _rescale_init(network, scale)
    return network


def _rescale_init(network: VisionTransformer, scale: Scale) -> None:
    for name, parameter in network.blocks.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=scale.init_std)
    nn.init.trunc_normal_(network.pos_embed, std=scale.position_std)


def _from_timm(name: str, scale: Scale) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.partition('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name!r}; similar names: {close}")
    return cast(nn.Module, timm.create_model(name, num_classes=scale.num_classes))
