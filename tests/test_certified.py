"""Certificates by randomised smoothing, against what is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pyarrow as pa
import pytest
import torch
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from evaluators import evaluate, evaluator_named
from evaluators.base import Batch
from evaluators.ledger import from_parquet, in_order, to_parquet
from trainables.scale import DIGITS

MANY = replace(DIGITS, smoothing_samples=10_000)


class Linear(torch.nn.Module):
    """Class 1 where the mean of the 3 x 4 x 4 values is above 0.5: w has length 48 ** -0.5."""

    def forward(self, images):
        above = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-above, above], dim=1)


def greys(*distances):
    """Images of class 1 so far, in L2, from the boundary: a grey d above 0.5 is 48 ** 0.5 d."""
    images = torch.stack([torch.full((3, 4, 4), 0.5 + d / 48**0.5) for d in distances])
    ids = tuple(f"image-{place}" for place in range(len(distances)))
    return Batch(images, torch.ones(len(distances), dtype=torch.long), ids)


def certificates(batch, scale=MANY, **settings):
    evaluator = evaluator_named("certified", scale, **settings)
    ledger = in_order(evaluator.judge(Linear(), batch))
    return ledger, {score.name: score for score in evaluator.summarize(ledger)}


def test_a_linear_models_certificate_reaches_its_distance_from_the_boundary_and_no_further():
    """Its smoothed class holds up to that distance, so its share is Phi(distance / sigma)."""
    distances = [0.05 * step for step in range(1, 13)]
    ledger, _ = certificates(greys(*distances))
    radii = dict(zip(ledger["image_id"].to_pylist(), ledger["radius"].to_pylist(), strict=True))
    for place, distance in enumerate(distances):
        share = norm.cdf(distance / 0.25)
        # At four standard deviations of the count below what is expected.
        count = round(10_000 * share - 4 * (10_000 * share * (1 - share)) ** 0.5)
        least = proportion_confint(count, 10_000, alpha=0.002, method="beta")[0]
        assert 0.25 * norm.ppf(least) < radii[f"image-{place}"] <= distance


def test_where_all_samples_agree_the_certificate_follows_from_their_number():
    """0.001 ** (1 / 1000) is 0.99312, whose quantile is 2.463: 0.616 at sigma 0.25."""
    ledger, scores = certificates(greys(5.0), DIGITS)
    assert ledger["radius"][0].as_py() == pytest.approx(0.6159, abs=1e-4)
    names = [f"certified@{eighth / 8:g}" for eighth in range(9)]
    assert [scores[name].value for name in names] == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert scores["certified"].value == (0.5 + 0.625) / 2
    assert ledger["stage"].to_pylist() == [None] * 5 + ["radius"] * 4


def test_it_abstains_at_the_boundary_and_wrong_answers_are_never_certified():
    ledger, scores = certificates(greys(0.0, 0.001, -0.5, 0.5))
    assert ledger["stage"].to_pylist()[:4] == ["abstained", "abstained", "clean", None]
    assert ledger["predicted"].to_pylist()[2:4] == [0, 1]
    assert [r > 0 for r in ledger["radius"].to_pylist()[:4]] == [False, False, True, True]
    assert scores["certified/abstained"].value == 0.5
    assert scores["certified@0"].value == 0.25


def test_draws_follow_from_the_image_alone_and_differ_between_images():
    batch = greys(0.1, 0.1, 0.2, 0.3)
    ledger, _ = certificates(batch, DIGITS)
    evaluator = evaluator_named("certified", DIGITS)
    parts = pa.concat_tables(evaluator.judge(Linear(), part) for part in batch.parts(3))
    assert in_order(parts).equals(ledger)
    assert ledger["radius"][0] != ledger["radius"][1]
    assert from_parquet(to_parquet(ledger, seconds=1.0))[0].equals(ledger)


def test_more_noise_certifies_further_and_radii_are_chosen():
    data = greys(3.4).images, [1]
    scores = evaluate(Linear(), data, ["certified", "certified-1"], epsilon=[1, 2], progress=False)
    names = ["certified@1", "certified@2", "certified-1@1", "certified-1@2"]
    assert [scores[name].value for name in names] == [0, 0, 1, 1]
    assert any("certified-1: L2 radius 1, 2" in note for note in scores.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sigma": 64}, r"sigma 64 is no noise on pixels in \[0, 1\]: above 0 and at most 4"),
        ({"sigma": -0.25}, "sigma -0.25 is no noise"),
        ({"sigma": float("nan")}, "sigma nan is no noise"),
        ({"alpha": 0.5}, "alpha 0.5, of wrong certificates, is above 0 and below 1/2"),
        ({"alpha": 0.0}, "alpha 0, of wrong"),
        ({"selection": 0}, "0 to choose a class and 10000 to certify it are too few samples"),
        ({"samples": 9}, "at alpha 0.001 1 and 10 or more can"),
        ({"radii": [Fraction(4, 255)]}, "0.0157 is no radius in L2"),
    ],
)
def test_settings_that_cannot_certify_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        evaluator_named("certified", MANY, **settings)
    assert evaluator_named("certified", MANY, samples=10).samples == 10
