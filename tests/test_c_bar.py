"""The ten corruptions of ImageNet-C-bar: their published definitions, and c-bar's verdicts."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from evaluators import evaluator_named
from evaluators.base import judge_images
from evaluators.c_bar_kinds import C_BAR
from evaluators.corruption_kinds import Draws, corrupt
from evaluators.corruptions import CBar
from tests.test_corruptions import CPU, IDS, classifier, photographs
from trainables.data.load import load_data
from trainables.data.registry import SEVERITIES, STORED_SETS
from trainables.scale import DIGITS

SIDE = 64


def changed(kind, level, *, value=0.5, images=1, side=SIDE, channels=3):
    """Return even images before they are cut to [0, 1], by one kind at a level of 10."""
    even = torch.full((images, channels, side, side), value)
    return C_BAR[kind][0](even, level, Draws([f"{kind}/{i}" for i in range(images)], CPU))


def test_the_kinds_are_those_of_the_stored_set():
    assert tuple(C_BAR) == STORED_SETS["imagenet-c-bar"].kinds


@pytest.mark.parametrize("kind", C_BAR)
def test_severity_moves_images_further_within_the_range(kind):
    images = photographs(32).repeat(8, 1, 1, 1)
    ids = [f"photo/{i}" for i in range(len(images))]
    distances = []
    for severity in SEVERITIES:
        corrupted = corrupt(images, ids, kind=kind, severity=severity, kinds=C_BAR)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.float32
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        distances.append(float((corrupted - images).flatten(1).norm(dim=1).mean()))
    assert distances[0] > 1
    assert all(further > nearer for nearer, further in pairwise(distances))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", C_BAR)
def test_an_image_alone_is_corrupted_as_in_its_batch(kind, channels):
    images = photographs(16)[:, :channels, :15]  # oblong: an odd height
    together = corrupt(images, IDS, kind=kind, severity=5, kinds=C_BAR)
    assert not torch.equal(together[0], images[0])
    for place in (3, 1):
        part = slice(place, place + 1)
        alone = corrupt(images[part], IDS[part], kind=kind, severity=5, kinds=C_BAR)
        assert (alone[0] - together[place]).abs().max() * 255 < 1.01
    other = corrupt(images[:1], ("another",), kind=kind, severity=5, kinds=C_BAR)
    assert (other[0] - together[0]).abs().mean() > 1e-3


def spectrum_by_ring(noise_HW):
    """Return the mean amplitude at each whole distance from the middle of the spectrum."""
    amplitude = torch.fft.fft2(noise_HW).abs()
    line = torch.fft.fftfreq(SIDE) * SIDE
    ring = (line[:, None] ** 2 + line**2).sqrt().round().long().flatten()
    return torch.bincount(ring, amplitude.flatten()) / torch.bincount(ring)


def test_blue_noise_blackens_a_share_below_a_threshold_and_rises_with_frequency():
    # Level 5: 0.3 x 5 - 2.5 = -1 deviation, below which 15.9 % of a normal variable lies.
    black = 1 - changed("blue_noise_sample", 5, value=1.0, images=20)[:, 0]
    assert black.mean().item() == pytest.approx(0.159, abs=0.01)
    half = changed("blue_noise_sample", 25 / 3, value=1.0, images=20)[:, 0]  # at its mean, 0
    assert half.mean().item() == pytest.approx(0.5, abs=0.02)
    rings = torch.stack([spectrum_by_ring(mask) for mask in half]).mean(dim=0)
    assert rings[26:31].mean() > 1.5 * rings[2:7].mean()


def test_brownish_noise_has_a_deviation_and_falls_with_the_square_of_the_frequency():
    noise = changed("brownish_noise", 5)[0] - 0.5
    assert noise.std(dim=(1, 2), correction=0) * 255 == pytest.approx(32)  # 5 x 6.4
    rings = torch.stack([spectrum_by_ring(channel) for channel in noise]).mean(dim=0)
    assert rings[5] / rings[20] == pytest.approx(401 / 26, rel=0.35)


def test_the_refracted_middle_of_an_even_image_keeps_its_mean_and_level_0_its_pixels():
    still = changed("caustic_refraction", 0)
    assert torch.allclose(still, torch.full_like(still, 0.5), atol=1e-5)
    bent = changed("caustic_refraction", 5, side=224)[0, :, 80:144, 80:144]
    assert bent.std() > 0.01  # lit by the slope, of either sign
    assert bent.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_whole_checkerboard_greys_every_second_field():
    greyed = changed("checkerboard_cutout", 10, value=1.0, images=30)[:, 0] < 1
    assert greyed.float().mean().item() == pytest.approx(0.5, abs=0.03)
    some = changed("checkerboard_cutout", 2, value=1.0, images=200)
    assert set(some.unique().tolist()) == {torch.tensor(128 / 255).item(), 1.0}
    assert (some < 1).float().mean().item() == pytest.approx(0.1, abs=0.02)  # 0.2 of a half


def test_sine_rings_are_a_sawtooth_of_grey():
    rings = changed("cocentric_sine_waves", 10, images=50) - 0.5
    assert torch.equal(rings[:, 0], rings[:, 2])
    assert rings.abs().max().item() <= 64 / 255 + 1e-6  # 128 x (-1/2 .. 1/2)
    assert rings.std().item() * 255 == pytest.approx(128 / math.sqrt(12), rel=0.03)


def test_an_inverse_star_leaves_its_middle_and_whitens_the_corners():
    seen = 1 - changed("inverse_sparkles", 10, value=0.0, images=40)[:, 0]
    # Within a ray's length 1 - (f - 1/2)^2 of the image is seen, f in [0, 1] between two rays.
    assert seen[:, 32, 32].min() >= 0
    assert seen.flatten(1).amax(dim=1).min() > 0.99
    # At half the side the length is half the distance: (1/4)^1.3 x 11/12, rays' spread aside.
    assert seen[:, 0, 0].mean() < 0.25
    faint = 1 - changed("inverse_sparkles", 0, value=0.0, images=40)[:, 0]
    assert faint.mean().item() == pytest.approx(11 / 12, abs=0.01)


def test_turbulence_is_bright_and_vanishes_at_the_points_of_the_coarsest_lattice():
    noise = changed("perlin_noise", 10, value=0.0, images=4, side=112)[:, 0] * 2  # half of it
    assert noise.min() >= 0.5
    assert noise.max() <= 1
    assert torch.allclose(noise[:, ::16, ::16], torch.tensor(0.5))  # 112 / 7 pixels apart
    assert noise.mean() > 0.55


def test_plasma_takes_a_quarter_of_the_image_and_its_channels_differ():
    plasma = changed("plasma_noise", 10, value=0.0, images=30) * 255 / 64
    assert plasma.abs().max() <= 1
    assert plasma.abs().amax() > 0.99
    assert (plasma[:, 0] - plasma[:, 1]).abs().mean() > 0.1
    image = changed("plasma_noise", 10, value=1.0, images=30)
    assert torch.allclose(image * 255 - plasma * 64, torch.tensor(191.0), atol=1e-3)


def test_a_single_frequency_has_one_peak_on_each_side_of_the_middle_and_an_amplitude():
    waves = changed("single_frequency_greyscale", 5, images=10)[:, 0] - 0.5
    assert waves.abs().max().item() * 255 == pytest.approx(98, abs=1)  # 5 x 19.6
    power = (
        torch.fft.fft2(waves * torch.hann_window(SIDE).outer(torch.hann_window(SIDE))).abs() ** 2
    )
    # A window widens each of the two peaks to 5 x 5 bins at most.
    highest = power.flatten(1).sort(dim=1, descending=True).values
    assert (highest[:, :50].sum(dim=1) / highest.sum(dim=1)).min() > 0.99


def test_five_stars_are_white_to_their_radius():
    stars = changed("sparkles", 6, value=0.0, images=20)[:, 0]
    assert 0 <= stars.min() <= stars.max() <= 1
    # Each star: pi x (0.06 side)^2 pixels of at least 3/4 where rays are not short; five of them.
    white = (stars > 0.7).float().mean().item()
    assert white == pytest.approx(5 * math.pi * 0.06**2, rel=0.35)


def test_the_stored_sets_evaluator_names_the_generated_one():
    with pytest.raises(ValueError, match=r"needs ImageNet-C-bar .* c-bar generates its kinds"):
        evaluator_named("imagenet-c-bar", DIGITS).images(load_data(DIGITS))


def test_c_bar_judges_ten_kinds_at_five_severities_and_says_that_they_are_generated():
    evaluator, data = CBar(DIGITS), replace(load_data(DIGITS), corrupted=20)
    ledger = judge_images(evaluator, classifier(), data, device=CPU)
    assert len(ledger) == 20 * 10 * 5
    assert evaluator.identity(data)["data"] == "c-bar (digits)"
    assert evaluator.columns[0].label == "C-bar, generated"
    scores = {score.name: score for score in evaluator.summarize(ledger)}
    assert scores.keys() == {"c-bar", *(f"c-bar/{kind}" for kind in C_BAR)}
    right = sum(ledger["survived"].to_pylist()) / len(ledger)
    assert scores["c-bar"].value == pytest.approx(right)
    assert scores["c-bar"].low < right < scores["c-bar"].high
    assert scores["c-bar"].n == 20
