from __future__ import annotations

import copy
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F

from tests.paper import adversarial_resnet50, deit, resnet50, with_axis
from trainables.layers import GhostBatchNorm2d, by_own_ghost, use_set
from trainables.models import MODELS, model_named, register
from trainables.networks import (
    ACTIVATION_LAYERS,
    SWAPPED,
    build_classifier,
    classifier_named,
    sine_positions,
)
from trainables.robust_resnet import Block
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.train.loop import train

PUBLISHED_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "deit_mini": 9_982_184,
    "deit_small": 22_050_664,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}
# In millions: timm's results/results-imagenet.csv, and the docstrings of
# UCSC-VLAA/RobustCNN, timm/models/robust_resnet.py, where 34.3 stands as 24.3.
MILLIONS = {
    **{"convnext_tiny": 28.59, "convnext_small": 50.22, "convnext_base": 88.59},
    **{"convnext_large": 197.77, "vit_medium": 38.85},
    **{"robust_resnet_dw": 38.6, "robust_resnet_inverted_dw": 33.6},
    **{"robust_resnet_up_inverted_dw": 34.4, "robust_resnet_down_inverted_dw": 34.3},
}


def count_parameters(classifier):
    return sum(p.numel() for p in classifier.parameters())


@pytest.fixture
def plain():
    """The model that docs/model.md adds by one entry."""
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})  # noqa: S102 - the project's own page
    yield "plain"
    del MODELS["plain"]


@pytest.mark.parametrize(("base", "passes"), [(resnet50, 3), (adversarial_resnet50, 5)])
def test_the_documented_model_is_added_by_its_entry_alone(plain, base, passes, few_digits):
    study = base().replace(model=plain)
    recipe = DIGITS.shrink(study).replace(epochs=1)
    assert (recipe.family, recipe.size) == ("plain", "base")
    assert recipe.describe().startswith("plain relu sgd step")
    assert with_axis(resnet50(), "family", plain).model == plain
    assert DIGITS.cost(recipe) == pytest.approx(0.1 * passes / 3)
    assert IMAGENET.cost(study) == pytest.approx(0.72 * study.epochs * passes / 3)
    assert count_parameters(build_classifier(resnet50().replace(model=plain))) == 2_065_896
    classifier = build_classifier(recipe)
    before = copy.deepcopy(classifier.state_dict())
    (report,) = train(recipe, classifier, few_digits, device=torch.device("cpu"))
    assert report.outcome == "finished"
    assert any(not torch.equal(before[k], v) for k, v in classifier.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{"name": "resnet50", "size": "huge"}, {"name": "other", "family": "resnet"}]
)
def test_a_model_whose_name_or_place_is_taken_is_refused(plain, changes):
    with pytest.raises(ValueError, match="'resnet50' is there already"):
        register(replace(model_named(plain), **changes))


@pytest.mark.parametrize(("model", "count"), PUBLISHED_PARAMETERS.items())
def test_models_have_the_published_numbers_of_parameters(model, count):
    assert count_parameters(build_classifier(resnet50().replace(model=model))) == count


@pytest.mark.parametrize(("model", "millions"), MILLIONS.items())
def test_models_of_later_studies_have_the_published_millions_of_parameters(model, millions):
    with torch.device("meta"):
        count = count_parameters(classifier_named(model, IMAGENET))
    assert round(count / 1e6, len(str(millions).partition(".")[2])) == millions
    assert count == MODELS[model].cost.parameters


@pytest.mark.parametrize(
    ("model", "added"),
    # By hand: 3 x 3 convolutions with biases and layer norms, less the patches.
    [
        ("vit_small", 1_440 + 41_760 + 166_464 + 664_704 + 147_840 - 295_296),
        ("convnext_tiny", 1_344 + 96 + 41_568 + 192 - 4_704 - 192),
        ("convnext_base", 1_792 + 128 + 55_392 + 192 + 110_720 + 256 - 6_272 - 256),
    ],
)
def test_a_stem_of_convolutions_takes_the_place_of_the_patches(model, added):
    with torch.device("meta"):
        patch, conv = (
            count_parameters(classifier_named(model, IMAGENET, arguments={"stem": stem}))
            for stem in ("patch", "conv")
        )
    assert conv - patch == added


def test_the_plain_transformer_has_fixed_positions_and_one_layer_more_and_no_class_token():
    network = classifier_named("plain_vit_small", IMAGENET).backbone
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    # vit_small without its token and its positions of 197 tokens, and a layer of 384 x 384.
    assert learned == 22_050_664 - 384 - 197 * 384 + 384 * 384 + 384
    assert not network.pos_embed.requires_grad
    assert torch.equal(network.pos_embed, sine_positions(14, 384, longest=10_000))
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(network(images), torch.zeros(2, 1000))  # its head starts at zero
    tokens = network.forward_features(images)
    layer = network.fc_norm[0]
    by_hand = torch.tanh(F.linear(tokens.mean(1), layer.weight, layer.bias))
    assert torch.allclose(network.forward_head(tokens, pre_logits=True), by_hand, atol=1e-6)


def test_sine_positions_are_the_hand_worked_ones():
    first, right, below, _ = sine_positions(2, 8, longest=10_000)[0].tolist()
    slow = 1e-4
    assert first == [0, 0, 1, 1, 0, 0, 1, 1]
    assert right == pytest.approx([math.sin(1), slow, math.cos(1), 1, 0, 0, 1, 1])
    assert below == pytest.approx([0, 0, 1, 1, math.sin(1), slow, math.cos(1), 1])


@pytest.mark.parametrize(
    ("kind", "sides", "channels", "kernel"),
    [
        ("dw", [14, 14, 14, 7], [384, 768, 1536, 3072], 11),
        ("inverted_dw", [14, 14, 14, 7], [96, 192, 384, 768], 7),
        ("up_inverted_dw", [14, 14, 14, 7], [96, 192, 384, 768], 11),
        ("down_inverted_dw", [14, 14, 7, 7], [96, 192, 384, 768], 11),
    ],
)
def test_one_stage_of_a_robust_resnet_halves_the_map(kind, sides, channels, kernel):
    with torch.device("meta"):
        network = classifier_named(f"robust_resnet_{kind}", IMAGENET).backbone.eval()
        maps, image = [], torch.zeros(1, 3, 224, 224)
        for stage in network.stages:
            stage.register_forward_hook(lambda _, __, output: maps.append(output.shape))
        network(image)
    assert [tuple(shape) for shape in maps] == [
        (1, width, side, side) for width, side in zip(channels, sides, strict=True)
    ]
    assert network.stages[1].blocks[0].conv_dw.kernel_size == (kernel, kernel)


def test_a_robust_resnets_block_is_the_sources_one_with_its_order():
    torch.manual_seed(0)
    block = Block("up-inverted-dw", 8, 8, nn.BatchNorm2d, kernel=3, stride=1, drop_path=0).eval()
    nn.init.normal_(block.gamma)
    x = torch.randn(2, 8, 6, 6)
    inner = F.batch_norm(block.conv_dw(x), torch.zeros(8), torch.ones(8))
    inner = block.pwconv2(F.relu(block.pwconv1(inner)))
    assert torch.allclose(block(x), x + inner * block.gamma.view(1, 8, 1, 1), atol=1e-5)
    assert block.conv_dw.groups == 8


def test_kernels_keep_their_share_of_a_smaller_map():
    digits, imagenet = (
        {kind: robust_kernel(kind, scale) for kind in ("inverted_dw", "up_inverted_dw")}
        for scale in (DIGITS, IMAGENET)
    )
    assert imagenet == {"inverted_dw": 7, "up_inverted_dw": 11}
    assert digits == {"inverted_dw": 3, "up_inverted_dw": 5}  # of 4 places a side, not 14


def robust_kernel(kind, scale):
    network = classifier_named(f"robust_resnet_{kind}", scale).backbone
    return network.stages[0].blocks[0].conv_dw.kernel_size[0]


@pytest.mark.parametrize("model", ["deit_small", "plain_vit_small", "timm:deit3_small_patch16_224"])
def test_a_plain_transformer_trained_at_several_sizes_resamples_its_positions(model):
    recipe = DIGITS.shrink(resnet50()).replace(model=model, activation="gelu")
    one, several = (
        build_classifier(recipe.replace(train_sizes=sizes)).eval() for sizes in ((), (8, 24))
    )
    small, own, large = (torch.rand(2, 3, side, side) for side in (8, 16, 24))
    assert torch.equal(one(own), several(own))
    assert several(small).shape == several(large).shape == (2, 10)
    with pytest.raises(AssertionError, match="doesn't match model"):
        one(small)


def relatives():
    """The small relatives of timm's models that docs/model.md names."""
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    rows = re.findall(
        r"^\| `(timm:\w+)`.*\| `(\w+ = [^`]+=[^`]+)`.*\| (\d+) k \|$", page, re.MULTILINE
    )
    return [
        (model, tomllib.loads(f"a = {{{arguments}}}")["a"], int(thousands))
        for model, arguments, thousands in rows
    ]


@pytest.mark.parametrize(("model", "arguments", "thousands"), relatives())
@pytest.mark.parametrize("scale", [DIGITS, CIFAR10], ids=lambda scale: scale.name)
def test_documented_relatives_of_timms_models_take_small_images(model, arguments, thousands, scale):
    recipe = resnet50().replace(scale=scale.name, model=model, model_args=arguments)
    classifier = build_classifier(recipe).eval()
    assert count_parameters(classifier) / 1000 == pytest.approx(thousands, rel=0.03)
    side = scale.image_size
    assert classifier(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_the_documented_relatives_are_of_five_families():
    assert len(relatives()) == 5


@pytest.mark.parametrize("name", ["resnet50", "deit_small_patch16_224"])
def test_imagenet_models_are_timms_own(name):
    model = "deit_small" if "deit" in name else name
    ours = build_classifier(resnet50().replace(model=model, activation="relu")).backbone
    theirs = timm.create_model(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("model", "activation"),
    [
        *((model, name) for model in (*MODELS, "timm:resnet10t") for name in ("relu", "softplus")),
        *((model, name) for model in ("resnet18", "deit_mini") for name in ACTIVATION_LAYERS),
    ],
)
def test_every_model_runs_at_digits_with_every_activation_swapped_for_real(model, activation):
    recipe = DIGITS.shrink(resnet50().replace(model=model, activation=activation))
    classifier = build_classifier(recipe).eval()
    swapped = [m for m in classifier.modules() if isinstance(m, ACTIVATION_LAYERS[activation])]
    others = [m for m in classifier.modules() if isinstance(m, SWAPPED) and m not in swapped]
    assert swapped
    assert not others
    assert classifier(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_initial_weights_follow_from_the_seed_and_leave_global_randomness_alone(small):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = build_classifier(small(seed=3)), build_classifier(small(seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [p.flatten() for p in first.parameters()]
    assert torch.equal(torch.cat(weights), torch.cat([p.flatten() for p in second.parameters()]))
    other = build_classifier(small(seed=4))
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)


@pytest.mark.parametrize("pixel_range", ["data", "half"])
def test_normalisation_is_inside_the_model(small, pixel_range):
    classifier = build_classifier(small(pixel_range=pixel_range)).eval()
    images = torch.rand(2, 3, 16, 16)
    mean, std = (
        ((0.5,) * 3, (0.5,) * 3)
        if pixel_range == "half"
        else (DIGITS.data_set.mean, DIGITS.data_set.std)
    )
    by_hand = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.allclose(classifier(images), classifier.backbone(by_hand))


def test_imagenets_mean_and_deviation_are_timms():
    assert IMAGENET.data_set.mean == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert IMAGENET.data_set.std == pytest.approx(IMAGENET_DEFAULT_STD)


def test_an_unknown_timm_model_is_named_with_similar_ones():
    with pytest.raises(ValueError, match="timm has no model 'resnet49'"):
        build_classifier(resnet50().replace(model="timm:resnet49"))


def test_ghost_statistics_are_batch_norms_on_each_interleaved_slice():
    ghost = GhostBatchNorm2d(4, ghosts=2, sets=3)
    images = torch.randn(8, 4, 5, 5) * 3 + 1
    use_set(nn.Sequential(ghost), 1)
    out = ghost(images)
    for j in range(2):
        plain = nn.BatchNorm2d(4)
        assert torch.allclose(out[j::2], plain(images[j::2]), atol=1e-6)
        kept = slice(4 * j, 4 * j + 4)
        assert torch.allclose(ghost.running_mean[1, kept], plain.running_mean, atol=1e-6)
        assert torch.allclose(ghost.running_var[1, kept], plain.running_var, atol=1e-6)
    assert torch.equal(ghost.running_mean[0], torch.zeros(8))


def test_an_attacked_image_is_normalised_by_its_own_ghosts_running_statistics():
    ghost = GhostBatchNorm2d(4, ghosts=2, sets=2)
    ghost.running_mean.normal_()
    ghost.running_var.uniform_(0.5, 2)
    use_set(nn.Sequential(ghost), 1)
    ghost.eval()
    statistics = ghost.running_mean.clone(), ghost.running_var.clone()
    images = torch.randn(6, 4, 5, 5)
    with by_own_ghost(nn.Sequential(ghost)):
        out = ghost(images)
    for j in range(2):
        mean, var = (held[1, 4 * j : 4 * j + 4] for held in statistics)
        assert torch.allclose(out[j::2], F.batch_norm(images[j::2], mean, var), atol=1e-6)
    assert torch.equal(ghost.running_mean, statistics[0])
    assert torch.allclose(
        ghost(images), F.batch_norm(images, *(held[0, :4] for held in statistics)), atol=1e-6
    )


def test_residual_branches_start_with_a_gain_of_one_in_a_resnet_and_at_zero_in_a_deit():
    for recipe in (adversarial_resnet50(), resnet50()):
        weights = dict(build_classifier(DIGITS.shrink(recipe)).named_parameters())
        gains = [weight for name, weight in weights.items() if name.endswith("bn3.weight")]
        assert len(gains) == 5
        assert all((gain == 1).all() for gain in gains)
    for scale in (DIGITS, IMAGENET):
        network = build_classifier(scale.shrink(deit("small"))).backbone
        for block in network.blocks:
            assert not block.attn.proj.weight.any()
            assert not block.mlp.fc2.weight.any()
            assert block.attn.qkv.weight.any()
        assert float(network.cls_token.detach().std()) == pytest.approx(0.02, rel=0.35)


def test_ghost_says_when_a_batch_does_not_split():
    with pytest.raises(ValueError, match="a batch of 7 does not split into 2"):
        GhostBatchNorm2d(4, ghosts=2, sets=1)(torch.randn(7, 4, 5, 5))
