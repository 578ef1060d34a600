"""Designs: how many images and trainings tell a difference, by hand and beside simulations."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.power import drawn_study
from evaluators.intervals import compare, of_gained_and_lost
from grid.power import (
    ALPHA,
    Goal,
    Noise,
    detectable,
    images_for,
    power_of,
    trainings_for,
    unbroken_share,
)
from grid.table import Claim

AHEAD = Claim(says="a", test="ahead", row="T/a", of="T/b", column="clean")
NONE = Claim(says="n", test="none survive", row="T/a", column="autoattack")


def test_connors_example_by_hand():
    """Of 25 % discordant answers 10 points are told with power 0.8 by 194 images.

    (1.960 * 0.5 + 0.842 * sqrt(0.25 - 0.01))^2 / 0.1^2 = (0.980 + 0.412)^2 / 0.01 = 193.9.
    """
    assert images_for(0.1, (), Noise(0.25), ALPHA, 0.8) == 194
    assert power_of(0.1, 194, (), Noise(0.25), ALPHA) == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize("discordance", [0.15, 0.25])
@pytest.mark.parametrize("claims", [1, 22])
def test_the_promised_power_is_that_of_the_interval_within_three_points(discordance, claims):
    """4,000 studies of models that differ by 10 points, decided as the report decides."""
    noise, alpha = Noise(discordance), ALPHA / claims
    images = images_for(0.1, (), noise, alpha, 0.8)
    shares = [(discordance + 0.1) / 2, (discordance - 0.1) / 2, 1 - discordance]
    rng = np.random.default_rng(0)
    counts = rng.multinomial(images, shares, size=4000)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    told = [
        of_gained_and_lost(gained, lost, images, confidence=1 - alpha)[0] > 0
        for gained, lost, _ in kinds.tolist()
    ]
    assert np.average(told, weights=times) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("spread", "difference"), [(0.01, 0.1), (0.03, 0.15)])
def test_the_promised_power_takes_in_the_spread_of_three_trainings(spread, difference):
    noise, rng = Noise(0.25, spread), np.random.default_rng(0)
    promised = power_of(difference, 300, (3, 3), noise, ALPHA)
    told = [compare(*drawn_study(rng, difference, 300, 3, noise)).low > 0 for _ in range(1000)]
    assert 0.85 < promised < 0.95
    assert np.mean(told) == pytest.approx(promised, abs=0.03)


def test_a_spread_over_trainings_can_outweigh_every_number_of_images():
    noise = Noise(0.25, 0.02)
    # Two sides of three trainings reach, in the mean over their variances, beyond 10 points.
    assert images_for(0.1, (3, 3), noise, ALPHA / 22, 0.8) is None
    needed = trainings_for(0.1, 597, 2, noise, ALPHA / 22, 0.8)
    assert power_of(0.1, 597, (needed, needed), noise, ALPHA / 22) >= 0.8
    assert power_of(0.1, 597, (needed - 1, needed - 1), noise, ALPHA / 22) < 0.8


def test_what_is_detectable_is_told_with_the_power_and_what_is_less_is_not():
    least = detectable(150, (), Noise(0.25), ALPHA, 0.8)
    assert images_for(least, (), Noise(0.25), ALPHA, 0.8) <= 150
    assert images_for(least - 0.001, (), Noise(0.25), ALPHA, 0.8) > 150


def test_models_that_differ_disagree_at_least_as_often():
    # 20 points apart they disagree on a fifth of the images, whatever was measured.
    assert images_for(0.2, (), Noise(0.01), ALPHA, 0.8) == images_for(
        0.2, (), Noise(0.2), ALPHA, 0.8
    )
    assert images_for(0.1, (), Noise(0.02, binary=False), ALPHA, 0.8) == 14  # mean errors need not


def test_what_is_measured_on_few_images_is_weighed_with_what_is_assumed():
    """Of 30 images with a discordance of 0.1 and 20 assumed ones with 0.25 it is 8 / 50."""
    updated = Noise(0.25, 0.02).updated(Noise(0.1, 0.0, images=30))
    assert (updated.discordance, updated.spread) == (pytest.approx(0.16), 0.02)


def test_none_of_73_survive_where_the_limit_is_five_points():
    # 1.96^2 / (n + 1.96^2) < 0.05 from n = 73 on, 3.05^2 / (n + 3.05^2) from 177 on.
    assert unbroken_share(73, ALPHA) < 0.05 < unbroken_share(72, ALPHA)
    assert Goal.of_claims(0.1, 0.8, 1).design(NONE, (1,), Noise(), 597).images == 73
    assert Goal.of_claims(0.1, 0.8, 22).design(NONE, (1,), Noise(), 597).images == 177


def test_a_claim_gets_the_images_that_it_needs_and_no_more_than_there_are():
    goal = Goal.of_claims(0.1, 0.8, 1)
    design = goal.design(AHEAD, (1, 1), Noise(0.25), 597)
    assert (design.images, design.needed, design.needed_trainings) == (194, 194, None)
    assert design.detectable == pytest.approx(0.1)
    few = goal.design(AHEAD, (1, 1), Noise(0.25), 50)
    assert (few.images, few.needed) == (50, 194)
    assert few.detectable > 0.1


def test_level_models_are_told_from_both_ends():
    level = Claim(says="l", test="level", row="T/a", of="T/b", column="clean")
    goal = Goal.of_claims(0.1, 0.8, 1)
    assert goal.design(level, (1, 1), Noise(), 597).images == images_for(
        0.1, (), Noise(), ALPHA, 0.9
    )


def test_where_no_images_decide_it_a_claim_says_how_many_trainings_do():
    design = Goal.of_claims(0.1, 0.8, 22).design(AHEAD, (3, 3), Noise(0.25, 0.02), 597)
    assert design.needed is None
    assert design.needed_trainings > 3
    # More than these images would tell less than a fifth more.
    all_tell = detectable(597, (3, 3), Noise(0.25, 0.02), ALPHA / 22, 0.8)
    assert design.images < 250
    assert all_tell < design.detectable <= 1.2 * all_tell
