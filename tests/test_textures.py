from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators import textures
from evaluators.textures import (
    LAYOUT,
    StoredTextures,
    dictionary_for,
    load_or_build,
    open_dictionary,
    own_settings,
    read_published,
    write_published,
)
from evaluators.textures_build import builder, networks
from evaluators.textures_build.builder import SMALL, build_textures, cam_mask, grad_cam, gram
from evaluators.textures_build.networks import FeatureNetwork, small_network, vgg19_network
from trainables.data.base import Data
from trainables.data.load import load_data
from trainables.scale import scale_named

DIGITS = scale_named("digits")
CPU = torch.device("cpu")
QUICK = replace(SMALL, images=30, clusters=2, steps=4)


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(DIGITS)


@pytest.fixture(scope="module")
def two(data: Data) -> Data:
    """The digits 0 and 1 alone."""
    return replace(data, train=data.train.at(np.flatnonzero(data.train.labels < 2)))


@pytest.fixture(scope="module")
def network(data: Data) -> FeatureNetwork:
    return small_network(DIGITS, data, seed=0, epochs=4)


@pytest.fixture
def published(tmp_path: Path) -> tuple[StoredTextures, Path]:
    draw = torch.Generator().manual_seed(0)
    stored = StoredTextures(torch.rand(2, 3, 3, 8, 8, generator=draw), (0, 7), "a test")
    write_published(stored, tmp_path)
    return stored, tmp_path


def test_published_layout_round_trip(published: tuple[StoredTextures, Path]) -> None:
    stored, root = published
    found = read_published(root, classes=(0, 7), clusters=3)
    assert found.classes == (0, 7)
    for label in (0, 7):
        torch.testing.assert_close(found.of_class(label), stored.of_class(label))


def test_published_textures_are_imagenet_normalised(tmp_path: Path) -> None:
    grey = StoredTextures(torch.full((1, 1, 3, 2, 2), 0.5), (4,), "a test")
    write_published(grey, tmp_path)
    folder = tmp_path / "attention-style_t-label_4/conv_5_cam-thred_0.8_n-clusters_30"
    stored = torch.load(folder / "cls-w_0_scale_1/cluster_0/iter_9999.pt", weights_only=True)
    assert float(stored[0, 0, 0]) == pytest.approx((0.5 - 0.485) / 0.229)


@pytest.mark.parametrize("cluster", [0, 2])
def test_a_class_with_some_of_its_textures_is_not_left_out_unsaid(published, cluster) -> None:
    _, root = published
    (root / LAYOUT.format(label=7, cluster=cluster)).unlink()
    scale = replace(DIGITS, patch=replace(DIGITS.patch, textures=3))
    with pytest.raises(ValueError, match=rf"lacks 1 of 6 textures; .*_7.*cluster_{cluster}/"):
        open_dictionary(root, scale)


def test_holes_in_a_dictionary_are_named(published: tuple[StoredTextures, Path]) -> None:
    _, root = published
    hole = LAYOUT.format(label=7, cluster=1)
    (root / hole).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 6 textures; first: .*t-label_7.*cluster_1/"):
        read_published(root, classes=(0, 7), clusters=3)


def test_digest_changes_with_a_texture(published: tuple[StoredTextures, Path]) -> None:
    _, root = published
    before = read_published(root, classes=(0, 7), clusters=3).digest
    assert before == read_published(root, classes=(0, 7), clusters=3).digest
    torch.save(torch.zeros(3, 8, 8), root / LAYOUT.format(label=0, cluster=2))
    assert read_published(root, classes=(0, 7), clusters=3).digest != before


class Trap:
    """A pickle that makes a file when it is loaded by a reader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_pickle_with_code_is_refused(published: tuple[StoredTextures, Path]) -> None:
    _, root = published
    marker, path = root / "ran", root / LAYOUT.format(label=0, cluster=1)
    torch.save(Trap(marker), path)
    with pytest.raises(ValueError, match=r"cluster_1/iter_9999.pt holds more than weights"):
        read_published(root, classes=(0, 7), clusters=3).of_class(0)
    assert not marker.exists()


@pytest.mark.parametrize("content", [torch.zeros(8, 8), torch.zeros(4, 8, 8), {"a": 1}])
def test_texture_of_another_shape_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / LAYOUT.format(label=0, cluster=0)
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"is not one tensor of shape \(3, H, W\)"):
        read_published(tmp_path, classes=(0,), clusters=1).of_class(0)


def test_truncated_texture_is_named(published: tuple[StoredTextures, Path]) -> None:
    _, root = published
    path = root / LAYOUT.format(label=0, cluster=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cluster_1/iter_9999.pt is damaged"):
        read_published(root, classes=(0, 7), clusters=3).of_class(0)


def test_gram_is_the_mean_product_inside_the_mask() -> None:
    activation = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])[None]
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None]
    # Kept pixels hold (1, 1) and (4, 2); over 2 channels x 2 pixels.
    wanted = torch.tensor([[17.0, 9.0], [9.0, 5.0]]) / 4
    torch.testing.assert_close(gram(activation, mask)[0], wanted)
    torch.testing.assert_close(gram(activation)[0, 0, 0], torch.tensor(30.0 / 8))


def test_cam_mask_keeps_what_reaches_the_threshold() -> None:
    cam = torch.tensor([[0.1, 0.79], [0.8, 1.0]])[None, None] * 5
    assert cam_mask(cam, 2, SMALL)[0, 0].tolist() == [[0, 0], [1, 1]]
    lone = torch.zeros(1, 1, 4, 4)
    lone[0, 0, 1, 2] = 3.0
    assert cam_mask(lone, 16, SMALL).sum() > 0


def test_grad_cam_is_the_weighted_activation() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2, bias=False))
    head[2].weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    plain = FeatureNetwork(
        features=nn.Sequential(nn.ReLU()),
        head=head.requires_grad_(False),
        style_layers=(0,),
        cam_layer=0,
        mean=torch.zeros(3, 1, 1),
        std=torch.ones(3, 1, 1),
        source="a test",
    )
    inputs = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cam, right = grad_cam(plain, inputs, 0)
    # The mean over 16 pixels makes each channel's weight its head weight / 16.
    torch.testing.assert_close(cam[:, 0], (inputs[:, 0] - inputs[:, 1]).relu() / 16)
    assert right.tolist() == (head(inputs).argmax(dim=1) == 0).tolist()


def test_build_is_the_same_bits_each_time(data: Data, two: Data, network: FeatureNetwork) -> None:
    first, classes = build_textures(network, two.train, QUICK, device=CPU)
    assert (first.shape, classes) == ((2, 2, 3, 16, 16), (0, 1))
    again = small_network(DIGITS, data, seed=0, epochs=4)
    for other in (network, again):
        assert torch.equal(first, build_textures(other, two.train, QUICK, device=CPU)[0])


def test_synthesis_brings_the_grams_nearer(two: Data, network: FeatureNetwork) -> None:
    def distance(steps: int) -> float:
        settings = replace(QUICK, steps=steps)
        built, _ = build_textures(network, two.train, settings, device=CPU)
        centres = builder._gram_centres(network, two.train, 0, settings, CPU)
        inputs = network.normalised(built[0])
        found = builder._activations(network.averaging(), network.style_layers, inputs)
        return sum(float((gram(a) - g).square().sum()) for a, g in zip(found, centres, strict=True))

    assert distance(60) < 0.5 * distance(0)


def test_building_is_a_sign_of_life_to_the_watchdog(
    data: Data, two: Data, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[None] = []
    for module in (networks, builder):
        monkeypatch.setattr(module, "beat", lambda: beats.append(None))
    small_network(DIGITS, data, seed=0, epochs=2)
    assert len(beats) == 2 * 1200 // 50
    beats.clear()
    build_textures(network, two.train, QUICK, device=CPU)
    assert len(beats) == 2 + QUICK.steps  # a batch of images per class, and the synthesis


def test_textures_of_grey_images_are_grey(two: Data, network: FeatureNetwork) -> None:
    built, _ = build_textures(network, two.train, QUICK, device=CPU)
    assert torch.equal(built[:, :, :1].expand_as(built), built)
    assert 0 <= float(built.min()) <= float(built.max()) <= 1


def test_too_few_images_for_the_clusters_are_refused(data: Data, network: FeatureNetwork) -> None:
    with pytest.raises(ValueError, match=r"class 0: .* too few for 99 textures"):
        build_textures(network, data.train, replace(QUICK, clusters=99), device=CPU)


def test_a_class_with_too_few_images_is_left_out(
    data: Data, network: FeatureNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    few = data.train.at(np.concatenate([np.arange(200), np.flatnonzero(data.train.labels == 7)]))
    several = replace(QUICK, clusters=18, images=100, steps=1)
    built, classes = build_textures(network, few, several, device=CPU)
    assert 7 in classes
    assert 2 <= len(classes) < 10
    assert built.shape[:2] == (len(classes), 18)
    assert "left out of the texture dictionary: class" in caplog.text


def test_own_dictionary_is_built_once_and_kept_in_a_file(
    two: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textures, "own_settings", lambda scale: QUICK)
    monkeypatch.setattr(textures, "_built", {})
    first = load_or_build(DIGITS, two, tmp_path)
    assert dictionary_for(DIGITS, two) is first
    assert "no VGG-19 weights" in first.source
    textures._built.clear()
    second = load_or_build(DIGITS, two, tmp_path)
    assert textures._built == {}
    assert (second.digest, second.source, second.classes) == (first.digest, first.source, (0, 1))


def test_data_with_a_cache_have_their_dictionary_built_once_for_all_processes(
    two: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textures, "own_settings", lambda scale: QUICK)
    monkeypatch.setattr(textures, "_built", {})
    cached = replace(two, cache=tmp_path / "cache")
    first = dictionary_for(DIGITS, cached)
    textures._built.clear()
    monkeypatch.setattr(textures, "build_textures", None)
    assert dictionary_for(DIGITS, cached).digest == first.digest
    with pytest.raises(TypeError):
        dictionary_for(DIGITS, two)


def test_damaged_file_is_reported_and_built_again(
    two: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(textures, "own_settings", lambda scale: QUICK)
    monkeypatch.setattr(textures, "_built", {})
    first = load_or_build(DIGITS, two, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert load_or_build(DIGITS, two, tmp_path).digest == first.digest
    assert "is damaged" in caplog.text
    assert path.stat().st_size > 100


def test_digits_have_the_scales_number_of_textures() -> None:
    assert own_settings(DIGITS).clusters == DIGITS.patch.textures == 5


def vgg19_file(folder: Path) -> Path:
    from torchvision.models import vgg19

    with torch.device("meta"):
        names = {name: value.shape for name, value in vgg19(weights=None).state_dict().items()}
    # One stored zero stands for each tensor: 143 million of them would fill 570 MB.
    path = folder / "vgg19.pth"
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in names.items()}, path)
    return path


def test_vgg19_is_read_from_a_file_and_grams_follow_each_blocks_first_relu(tmp_path: Path) -> None:
    network = vgg19_network(vgg19_file(tmp_path))
    widths = [network.features[i - 1].out_channels for i in network.style_layers]
    assert widths == [64, 128, 256, 512, 512]
    for layer in (*network.style_layers, network.cam_layer):
        assert isinstance(network.features[layer], nn.ReLU)
    assert len(network.averaging()) == 30
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in network.averaging())


def test_weights_that_do_not_fit_vgg19_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"other.pth does not fit VGG-19"):
        vgg19_network(path)


def test_the_command_builds_a_dictionary_that_is_read_again_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evaluators.textures_build.__main__ import main

    assert main(["--out", str(tmp_path)]) == 0
    assert "features: " in capsys.readouterr().out
    built = open_dictionary(tmp_path, DIGITS)
    assert built.classes == tuple(range(10))
    assert built.of_class(3).shape == (DIGITS.patch.textures, 3, 16, 16)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    gone = sorted(files)[0]
    gone.unlink()
    assert main(["--out", str(tmp_path)]) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    changed = {path for path in files if again[path] != files[path]}
    assert changed == {path for path in files if path.parents[3] == gone.parents[3]}


def test_weights_that_are_no_vgg19_are_refused(tmp_path: Path) -> None:
    from evaluators.textures_build.__main__ import main

    (tmp_path / "vgg19.pth").write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--weights", str(tmp_path / "vgg19.pth")])
