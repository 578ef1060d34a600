"""Networks: timm's, cut to a scale; a recipe's classifier is built of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import LayerNorm2d, get_act_layer, lecun_normal_
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

from trainables.layers import Classifier, GhostBatchNorm2d
from trainables.models import TIMM_PREFIX, model_named
from trainables.pretrained import num_classes_of, timm_config
from trainables.recipe import ACTIVATIONS, Recipe
from trainables.scale import Scale, scale_named, scale_of_recipe
from trainables.train.draws import BatchDraws, draws
from trainables.train.optim import build_optimizer
from trainables.weights import load_weights

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
# Of the source's longest wave. On a map of 4 a side such waves are nearly constant: 9 epochs of the
# digits reached 58 % with them, and 91 % with waves as long as the side.
SINE_LENGTH = 10_000
CONVNEXT_PATCH = 4
Stem = Literal["patch", "conv"]
FEW_TOKENS = 16
FEW_PATCHES = 8  # a side
_TORCHS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus}
ACTIVATION_LAYERS: dict[str, type[nn.Module]] = {
    name: _TORCHS.get(name) or get_act_layer(name) for name in ACTIVATIONS
}
GATES = ("sigmoid", "tanh", "hard_sigmoid", "identity")  # of other uses in a network, which stay
SWAPPED: tuple[type[nn.Module], ...] = (
    timm.layers.GELU,
    *(layer for name, layer in ACTIVATION_LAYERS.items() if name not in GATES),
)


def build_classifier(recipe: Recipe) -> Classifier:
    """Build a recipe's untrained classifier; its initial weights follow from the seed alone."""
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d
    if recipe.norm == "ghost" and recipe.epochs:  # only training needs the other ghosts
        ghosts = recipe.forward_batch // recipe.ghost_batch
        norm_layer = partial(GhostBatchNorm2d, ghosts=ghosts, sets=recipe.accumulation)
    activation = None if recipe.activation == "own" else recipe.activation
    scale = scale_named(recipe.scale).preprocessed(recipe.input)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        settings: dict[str, Any] = {"activation": activation, "arguments": _arguments(recipe)}
        return classifier_named(recipe.model, scale, norm_layer=norm_layer, **settings)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the keyword arguments of a recipe's network; rates of 0 are left to it.

    Plain transformers resample their positions where images have several sizes, as timm does it.
    """
    rates = {"drop_path_rate": recipe.drop_path, "drop_rate": recipe.dropout}
    stated = {**{name: rate for name, rate in rates.items() if rate}, **recipe.model_args}
    if recipe.train_sizes:
        with torch.device("meta"):
            of_scale = classifier_named(recipe.model, scale_of_recipe(recipe), arguments=stated)
        if "dynamic_img_size" in signature(type(of_scale.backbone).__init__).parameters:
            return {"dynamic_img_size": True, **stated}
    return stated


def classifier_named(
    model: str,
    scale: Scale,
    *,
    activation: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Classifier:
    """Build a model by name; without `activation` it keeps its network's own."""
    arguments = arguments or {}
    try:
        backbone = model_named(model, **arguments).build(scale, norm_layer)
    except (TypeError, AssertionError) as error:
        stated = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ValueError(f"{model!r} cannot be built with {stated}: {error}") from None
    if activation:
        swap_activation(backbone, activation)
    classifier = Classifier(backbone, scale.data_set.mean, scale.data_set.std)
    return classifier.to(memory_format=torch.channels_last)


def first_classifier(recipe: Recipe) -> tuple[Classifier, tuple[str, ...]]:
    """Build a recipe's classifier with its first weights; return it and notes on these.

    Where the weights' head has other classes, a classifier that is trained further has a new one,
    and one that is not trained has the weights'.
    """
    classifier = build_classifier(recipe)
    if not recipe.init:
        return classifier, ()
    heads = {"new_head": recipe.epochs > 0, "reset_head": recipe.reset_head}
    return classifier, load_weights(recipe.init, classifier, sha256=recipe.init_sha256, **heads)


def check_model(recipe: Recipe) -> int:
    """Pass an image through a recipe's first model; return the number of its outputs.

    Weights that lie in a file are loaded; others are fetched by the trial. ValueError where the
    model cannot take the image.
    """
    in_file = Path(recipe.init).is_file()
    classifier = first_classifier(recipe)[0] if in_file else build_classifier(recipe)
    outputs = _outputs(recipe, classifier)
    return outputs if recipe.epochs else num_classes_of(recipe.init) or outputs


def check_sizes(recipe: Recipe) -> None:
    """Raise ValueError where a recipe's model cannot be built, take its images or be trained.

    Nothing is computed, unless the model needs an operation that torch's meta device lacks.
    """
    try:
        with torch.device("meta"):
            outputs = _outputs(recipe, classifier := build_classifier(recipe))
    except Exception:  # whose fault it is shows on the CPU
        outputs = _outputs(recipe, classifier := build_classifier(recipe))
    classes = scale_of_recipe(recipe).num_classes
    if recipe.epochs and outputs != classes:
        raise ValueError(f"{recipe.model!r} has {outputs} outputs: the data have {classes} classes")
    layer = ACTIVATION_LAYERS.get(recipe.activation)
    if layer and not any(type(module) is layer for module in classifier.modules()):
        raise ValueError(
            f"activation {recipe.activation!r} changes nothing in {recipe.model!r}: state 'own'"
        )
    if recipe.layer_decay:
        build_optimizer(recipe, classifier)


def _outputs(recipe: Recipe, classifier: Classifier) -> int:
    """Return a model's number of outputs; ValueError where it cannot take images of some size."""
    drawing = draws(classifier.backbone)
    if recipe.epochs and (recipe.drop_path or recipe.dropout) and not drawing:
        raise ValueError(
            f"drop_path and dropout change nothing in {recipe.model!r}: leave them out"
        )
    for side in (*recipe.train_sizes, scale_of_recipe(recipe).image_size):
        try:
            with torch.inference_mode():
                if drawing and recipe.epochs:
                    with BatchDraws(None, batch=2):
                        classifier.train()(torch.zeros(2, 3, side, side))
                _, outputs = classifier.eval()(torch.zeros(1, 3, side, side)).shape
        except Exception as error:  # networks raise all kinds of errors
            raise ValueError(f"{recipe.model!r} cannot take images of {side} px: {error}") from None
    return int(outputs)


def swap_activation(module: nn.Module, name: str) -> None:
    """Replace every activation layer below `module`; a gate's Sigmoid or Tanh is not one."""
    for child_name, child in module.named_children():
        if isinstance(child, SWAPPED):
            setattr(module, child_name, ACTIVATION_LAYERS[name]())
        else:
            swap_activation(child, name)


def resnet(
    block: str,
    blocks: Sequence[int],
    scale: Scale,
    norm_layer: Callable[[int], nn.Module],
    *,
    stem_stride: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a ResNet of so many blocks a stage, at a scale's depth and widths."""
    channels = scale.resnet_channels()
    small = scale.stem == "small"
    network = ResNet(
        BLOCKS[block],
        tuple(scale.depth(count) for count in blocks),
        channels=channels,
        norm_layer=norm_layer,
        zero_init_last=False,  # the study's ResNets: zero_init_residual=False
        # timm's plain stem is 64 wide; its deep stem takes any width and is replaced below.
        stem_type="deep" if small else "",
        stem_width=channels[0] // 2 if small else 64,
        **({"num_classes": scale.num_classes} | options),
    )
    if small:
        stride = scale.stem_stride if stem_stride is None else stem_stride
        network.conv1 = nn.Conv2d(3, channels[0], 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return cast(nn.Module, network)


def vit(width: int, scale: Scale, *, stem: Stem = "patch", **options: Any) -> nn.Module:
    """Build a plain transformer of a published width, at a scale's depth and width.

    stem conv: convolutions in place of the patches.
    """
    heads = scale.vit_heads(width)
    of_scale = {
        "img_size": scale.image_size,
        "patch_size": scale.patch_size,
        "embed_dim": heads * scale.head_width,
        "depth": scale.depth(12),
        "num_heads": heads,
        "num_classes": scale.num_classes,
    }
    network = VisionTransformer(**(of_scale | options))
    if scale.stem == "small" and "weight_init" not in options:
        for name, parameter in network.blocks.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=scale.init_std)
        nn.init.trunc_normal_(network.pos_embed, std=scale.position_std)
    if stem == "conv":
        network.patch_embed.proj = conv_patches(network.embed_dim, scale, scale.vit_width_divisor)
    if network.patch_embed.num_patches <= FEW_TOKENS:
        for block in network.blocks:
            # With a few tokens the fused kernel costs more than the attention it computes.
            block.attn.fused_attn = False
    return cast(nn.Module, network)


def deit(width: int, scale: Scale, **options: Any) -> nn.Module:
    """Build a DeiT of a published width, at a scale's depth and width.

    Every residual branch starts at zero: `_init_weights_2` of the study's
    models/vision_transformer.py.
    """
    network: Any = vit(width, scale, **options)
    nn.init.trunc_normal_(network.cls_token, std=0.02)
    for block in network.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    return cast(nn.Module, network)


def plain_vit(width: int, scale: Scale, **options: Any) -> nn.Module:
    """Build the plain transformer of Beyer et al. (2022), at a scale's depth and width.

    It averages its tokens, adds fixed positions, and has one more layer with tanh before a head
    that starts at zero. Source: google-research/big_vision, configs/vit_s16_i1k.py, models/vit.py.
    """
    fixed: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    network: Any = vit(width, scale, weight_init="jax", **fixed, **options)
    side, channels = scale.image_size // scale.patch_size, network.embed_dim
    longest = side if scale.stem == "small" else SINE_LENGTH
    positions = sine_positions(side, channels, longest=longest)
    network.pos_embed = nn.Parameter(positions, requires_grad=False)
    pre_logits = nn.Linear(channels, channels)
    lecun_normal_(pre_logits.weight)
    nn.init.zeros_(pre_logits.bias)
    network.fc_norm = nn.Sequential(pre_logits, nn.Tanh())
    return cast(nn.Module, network)


def sine_positions(side: int, channels: int, *, longest: float) -> Tensor:
    """Return the sines and cosines of the places of side x side tokens, (1, side^2, channels).

    Wavelengths run from 2 pi to `longest` times that (MoCo v3, as in big_vision's models/vit.py).
    """
    quarter = channels // 4
    frequencies = float(longest) ** -(torch.arange(quarter) / (quarter - 1))
    y, x = (
        places.reshape(-1, 1) * frequencies
        for places in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    )
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)[None]


def conv_stem(widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """Return 3 x 3 convolutions from colours to widths, each with a layer norm and a GELU.

    Source: Singh et al. 2023; nmndeep/revisiting-at, utils_architecture.py, ConvBlock*.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, strides, strict=False):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        layers += [conv, LayerNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*layers)


def conv_patches(width: int, scale: Scale, width_divisor: int) -> nn.Sequential:
    """Return convolutions of stride 2 that reduce images as much as a scale's patches do."""
    halvings = scale.patch_size.bit_length() - 1
    widths = [48 * 2**n // width_divisor for n in range(halvings)]
    stem = conv_stem(widths, [2] * halvings)
    return stem.append(nn.Conv2d(widths[-1], width, 1))


def convnext(
    depth: int, width: int, scale: Scale, *, stem: Stem = "patch", **options: Any
) -> nn.Module:
    """Build a ConvNeXt of a published third stage's depth and first stage's width.

    Small images keep the stages' strides behind a stem of the scale's stride. stem conv: two
    convolutions, or three where the model is wide, in place of the patches.
    """
    widths = [width * 2**stage // scale.resnet_width_divisor for stage in range(4)]
    depths = tuple(map(scale.depth, (3, 3, depth, 3)))
    network = ConvNeXt(depths=depths, dims=widths, **({"num_classes": scale.num_classes} | options))
    stride = scale.stem_stride if scale.stem == "small" else CONVNEXT_PATCH
    if stem == "conv":
        last = widths[:1] if width == 96 else [widths[0] * 3 // 4, widths[0]]
        strides = (min(2, stride), max(1, stride // 2), 1)
        network.stem = conv_stem([widths[0] // 2, *last], strides)
    elif stride != CONVNEXT_PATCH:
        network.stem[0] = _patches_of(stride, widths[0])
    return cast(nn.Module, network)


def _patches_of(side: int, width: int) -> nn.Conv2d:
    conv = nn.Conv2d(3, width, side, side)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


def convnext_iso(scale: Scale, *, stem: Stem = "patch", **options: Any) -> nn.Module:
    """Build the isotropic ConvNeXt-S, of one stage; source: Liu et al. (2022), section 3.3."""
    width = 384 // scale.resnet_width_divisor
    of_scale = {"depths": (scale.depth(18), 1, 1, 1), "num_classes": scale.num_classes}
    network = ConvNeXt(dims=(width,) * 4, ls_init_value=None, **(of_scale | options))
    network.stages = network.stages[:1]
    network.stem = _patches_of(scale.patch_size, width)
    if stem == "conv":
        network.stem = conv_patches(width, scale, scale.resnet_width_divisor)
    return cast(nn.Module, network)


def hybrid(scale: Scale, norm_layer: Callable[[int], nn.Module], **options: Any) -> nn.Module:
    """Hybrid-DeiT: a ResNet-18 trunk through its last stage feeds DeiT-Mini's blocks.

    Small images keep the trunk's stem at full size, so that more than one token is left.
    """
    whole: dict[str, Any] = {"stem_stride": 1, "num_classes": 0, "global_pool": ""}
    trunk = resnet("basic", (2, 2, 2, 2), scale, norm_layer, **whole)
    # HybridEmbed takes its patch size from the trunk's output.
    embed = partial(HybridEmbed, backbone=trunk)
    return deit(256, replace(scale, patch_size=1), embed_layer=embed, **options)


def from_timm(name: str, scale: Scale, **arguments: Any) -> nn.Module:
    """Build a model of timm, whole, with its own normalisation.

    Where its images have one size it takes the scale's, and a plain transformer of images too
    small for its patches takes the scale's patches. ValueError names the nearest model, or the
    argument that it does not take.
    """
    config = timm_config(f"{TIMM_PREFIX}{name}")
    assert config is not None
    side = scale.image_size
    fitting: dict[str, Any] = {"num_classes": scale.num_classes}
    if config["fixed_input_size"] and config["input_size"][1:] != (side, side):
        fitting |= {"img_size": side, **_patches(name, scale)}
    fitting |= arguments
    try:
        network = timm.create_model(name, **fitting)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        stated = ", ".join(f"{key}={value!r}" for key, value in fitting.items())
        raise ValueError(f"timm cannot build {name!r} with {stated}: {error}") from None
    network.built_with = fitting  # what timm needs to load its pretrained weights into the like
    return cast(nn.Module, network)


def _patches(name: str, scale: Scale) -> dict[str, int]:
    """Return the scale's patches for a plain transformer whose own leave under 8 a side, or {}."""
    with torch.device("meta"):
        network = timm.create_model(name)
    native = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    reductions = {stage["reduction"] for stage in getattr(network, "feature_info", [])}
    if not isinstance(native, tuple) or reductions - {native[0]}:
        return {}
    fits = scale.image_size % native[0] == 0 and scale.image_size // native[0] >= FEW_PATCHES
    return {} if fits else {"patch_size": scale.patch_size}
