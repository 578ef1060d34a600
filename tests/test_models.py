from __future__ import annotations

import copy
import re
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
from trainables.networks import ACTIVATION_LAYERS, SWAPPED, build_classifier
from trainables.scale import DIGITS, IMAGENET
from trainables.train.loop import train

PUBLISHED_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "deit_mini": 9_982_184,
    "deit_small": 22_050_664,
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
