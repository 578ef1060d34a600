"""Texture dictionaries: stored, a scale's own, and those of the builder in textures_build/."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from texture_builder import main, vgg19_network, write_class
from torch import nn

from evaluators import textures
from evaluators.textures import (
    LAYOUT,
    FeatureNetwork,
    build_textures,
    cam_mask,
    dictionary_for,
    gram,
    open_dictionary,
    own_settings,
    small_network,
)
from trainables.data.load import load_data
from trainables.scale import scale_named

DIGITS = scale_named("digits")
THREE = replace(DIGITS, patch=replace(DIGITS.patch, textures=3))
CPU = torch.device("cpu")
QUICK = replace(own_settings(DIGITS), images=30, clusters=2, steps=4)


@pytest.fixture(scope="module")
def data():
    return load_data(DIGITS)


@pytest.fixture(scope="module")
def two(data):
    """The digits 0 and 1 alone."""
    return replace(data, train=data.train.at(np.flatnonzero(data.train.labels < 2)))


@pytest.fixture(scope="module")
def network(data):
    return small_network(DIGITS, data, replace(QUICK, network_epochs=4))


@pytest.fixture
def stored(tmp_path):
    """Three textures of the classes 0 and 7, in the published layout."""
    dictionary = {k: torch.rand(3, 3, 8, 8, generator=torch.Generator()) for k in (0, 7)}
    for label, textures_TCHW in dictionary.items():
        write_class(tmp_path, label, textures_TCHW)
    return dictionary, tmp_path


def test_a_stored_dictionary_is_read_as_it_was_written(stored):
    written, root = stored
    dictionary = open_dictionary(root, THREE)
    assert list(dictionary) == [0, 7]
    for label in dictionary:
        torch.testing.assert_close(dictionary[label], written[label])


def test_stored_textures_are_imagenet_normalised(tmp_path):
    write_class(tmp_path, 4, torch.full((1, 3, 2, 2), 0.5))
    folder = tmp_path / "attention-style_t-label_4/conv_5_cam-thred_0.8_n-clusters_30"
    texture = torch.load(folder / "cls-w_0_scale_1/cluster_0/iter_9999.pt", weights_only=True)
    assert float(texture[0, 0, 0]) == pytest.approx((0.5 - 0.485) / 0.229)


@pytest.mark.parametrize("cluster", [0, 2])
def test_a_class_that_lacks_some_of_its_textures_is_refused(stored, cluster):
    _, root = stored
    (root / LAYOUT.format(label=7, cluster=cluster)).unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of 6 textures; .*_7.*cluster_{cluster}/"):
        open_dictionary(root, THREE)


def test_digest_changes_with_a_texture(stored):
    _, root = stored
    before = open_dictionary(root, THREE).digest
    assert before == open_dictionary(root, THREE).digest
    torch.save(torch.zeros(3, 8, 8), root / LAYOUT.format(label=0, cluster=2))
    assert open_dictionary(root, THREE).digest != before


@pytest.mark.parametrize("content", [torch.zeros(8, 8), torch.zeros(4, 8, 8), {"a": 1}])
def test_a_texture_of_another_shape_or_cut_short_is_named(stored, content):
    _, root = stored
    torch.save(content, root / LAYOUT.format(label=0, cluster=0))
    with pytest.raises(ValueError, match=r"is not one tensor of shape \(3, H, W\)"):
        open_dictionary(root, THREE)[0]
    os.truncate(root / LAYOUT.format(label=7, cluster=1), 200)
    with pytest.raises(ValueError, match=r"cluster_1/iter_9999.pt is damaged"):
        open_dictionary(root, THREE)[7]


def test_gram_is_the_mean_product_inside_the_mask():
    activation = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])[None]
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None]
    # The mask leaves the pixels (1, 1) and (4, 2); over 2 channels x 2 pixels.
    expected = torch.tensor([[17.0, 9.0], [9.0, 5.0]]) / 4
    torch.testing.assert_close(gram(activation, mask)[0], expected)
    torch.testing.assert_close(gram(activation)[0, 0, 0], torch.tensor(30.0 / 8))


def test_the_mask_is_where_the_map_reaches_the_threshold():
    cam = torch.tensor([[0.1, 0.79], [0.8, 1.0]])[None, None] * 5
    assert cam_mask(cam, 2, QUICK)[0, 0].tolist() == [[0, 0], [1, 1]]
    lone = torch.zeros(1, 1, 4, 4)
    lone[0, 0, 1, 2] = 3.0
    assert cam_mask(lone, 16, QUICK).sum() > 0


def test_grad_cam_is_the_weighted_activation():
    linear = nn.Linear(3, 2, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    layers = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    plain = FeatureNetwork(
        layers=layers, style_layers=(0,), cam_layer=0, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    inputs = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cam, right = plain.grad_cam(inputs, 0)
    # The mean over 16 pixels makes each channel's weight its head weight / 16.
    torch.testing.assert_close(cam[:, 0], (inputs[:, 0] - inputs[:, 1]).relu() / 16)
    assert right.tolist() == (layers(inputs).argmax(dim=1) == 0).tolist()


def test_grey_images_give_the_same_grey_textures_each_time(data, two, network):
    first = build_textures(network, two.train, QUICK, device=CPU)
    again = small_network(DIGITS, data, replace(QUICK, network_epochs=4))
    second = build_textures(again, two.train, QUICK, device=CPU)
    for label in (0, 1):
        assert first[label].shape == (2, 3, 16, 16)
        assert torch.equal(first[label], second[label])
        assert torch.equal(first[label][:, :1].expand(-1, 3, -1, -1), first[label])
        assert 0 <= float(first[label].min()) <= float(first[label].max()) <= 1


def test_synthesis_brings_the_grams_nearer_to_the_cluster(two, network):
    grams = textures._class_grams(network, two.train, 0, QUICK, CPU)
    centres = textures._gram_centres(grams, QUICK)

    def distance(steps):
        built = build_textures(network, two.train, replace(QUICK, steps=steps), device=CPU)
        activations = network.style_activations(network.inputs(built[0]))
        pairs = zip(activations, centres, strict=True)
        return sum(float((gram(a) - g).square().sum()) for a, g in pairs)

    assert distance(60) < 0.5 * distance(0)


def test_building_is_a_sign_of_life_to_the_watchdog(data, two, network, monkeypatch):
    beats = []
    monkeypatch.setattr(textures, "beat", lambda: beats.append(None))
    small_network(DIGITS, data, replace(QUICK, network_epochs=2))
    assert len(beats) == 2 * 1200 // 50
    beats.clear()
    build_textures(network, two.train, QUICK, device=CPU)
    assert len(beats) == 2 + QUICK.steps  # a batch of images per class, and the synthesis


def test_a_class_with_too_few_images_is_left_out(data, network, caplog):
    few = data.train.at(np.concatenate([np.arange(200), np.flatnonzero(data.train.labels == 7)]))
    built = build_textures(
        network, few, replace(QUICK, clusters=18, images=100, steps=1), device=CPU
    )
    assert 7 in built
    assert 2 <= len(built) < 10
    assert {len(textures_TCHW) for textures_TCHW in built.values()} == {18}
    assert "is left out of the texture dictionary" in caplog.text


def test_a_scale_without_textures_of_two_classes_is_refused(data, two, monkeypatch):
    monkeypatch.setattr(textures, "own_settings", lambda scale: replace(QUICK, clusters=99))
    with pytest.raises(ValueError, match="textures of two classes; 0 of digits have 99 images"):
        dictionary_for(DIGITS, two)


def test_own_dictionary_is_built_once_for_all_processes_and_again_if_damaged(
    two, tmp_path, monkeypatch
):
    monkeypatch.setattr(textures, "own_settings", lambda scale: QUICK)
    cached, built = replace(two, cache=tmp_path), []
    build = textures.build_textures
    for builder in (build, None, build):
        monkeypatch.setattr(textures, "build_textures", builder)
        monkeypatch.setattr(textures, "_built", {})
        built.append(dictionary_for(DIGITS, cached))
        assert dictionary_for(DIGITS, cached) is built[-1]
        (path,) = tmp_path.iterdir()
        if builder is None:
            os.truncate(path, 100)
    assert path.stat().st_size > 100
    assert all(torch.equal(built[0][label], each[label]) for each in built for label in (0, 1))


def test_the_stored_own_dictionary_has_its_classes_in_order(two, tmp_path, monkeypatch):
    ten_and_more = {label: torch.zeros(2, 3, 16, 16) for label in (0, 2, 10, 11)}
    monkeypatch.setattr(textures, "build_textures", lambda *_, **__: ten_and_more)
    for _process in range(2):
        monkeypatch.setattr(textures, "_built", {})
        assert list(dictionary_for(DIGITS, replace(two, cache=tmp_path))) == [0, 2, 10, 11]


def test_vgg19_is_read_from_a_file_and_grams_follow_each_blocks_first_relu(tmp_path):
    from torchvision.models import vgg19

    with torch.device("meta"):
        names = {name: value.shape for name, value in vgg19(weights=None).state_dict().items()}
    # One stored zero stands for each tensor: 143 million of them would fill 570 MB.
    path = tmp_path / "vgg19.pth"
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in names.items()}, path)
    network = vgg19_network(path)
    widths = [network.layers[i - 1].out_channels for i in network.style_layers]
    assert widths == [64, 128, 256, 512, 512]
    for layer in (*network.style_layers, network.cam_layer):
        assert isinstance(network.layers[layer], nn.ReLU)
    sides = [a.shape[-1] for a in network.style_activations(torch.zeros(1, 3, 32, 32))]
    assert all(larger == 2 * side for larger, side in pairwise(sides))


def test_the_command_builds_a_dictionary_that_is_read_again_and_goes_on(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0
    assert "features: " in capsys.readouterr().out
    built = open_dictionary(tmp_path, DIGITS)
    assert list(built) == list(range(10))
    assert built[3].shape == (DIGITS.patch.textures, 3, 16, 16)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    gone = sorted(files)[0]
    gone.unlink()
    assert main(["--out", str(tmp_path)]) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    changed = {path for path in files if again[path] != files[path]}
    assert changed == {path for path in files if path.parents[3] == gone.parents[3]}


def test_weights_that_are_no_vgg19_are_refused(tmp_path, capsys):
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--weights", str(path)])
    assert "other.pth does not fit VGG-19" in capsys.readouterr().err
