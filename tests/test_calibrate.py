"""The strengths of digits' attacks tell models apart, on references that the choice never saw."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.calibrate import References
from evaluators.autoattack import AutoAttack, SmallAutoAttack
from evaluators.natural import Natural
from evaluators.texture_patch import TexturePatchAttack
from trainables.data.load import load_data
from trainables.scale import DIGITS

pytestmark = pytest.mark.slow
SCALE = replace(DIGITS, attack_subset=60, autoattack_subset=60)
FRESH = (3,)  # the values were chosen by seeds 0 to 2


@pytest.fixture(scope="module")
def references():
    return References(SCALE, load_data(SCALE), FRESH)


@pytest.mark.parametrize(
    ("evaluator", "question"),
    [
        (SmallAutoAttack, "autoattack-small"),
        (TexturePatchAttack, "tpa/patches-1"),
        (Natural, "natural"),
    ],
)
def test_a_fresh_clean_reference_survives_a_quarter_to_three(references, evaluator, question):
    survival = references.survivals("resnet50", evaluator(SCALE))[question]
    assert survival.low <= 0.75
    assert survival.high >= 0.25


def test_the_standard_radius_leaves_an_adversarially_trained_reference_alone(references):
    clean, robust = (
        references.survivals(base, AutoAttack(SCALE))["autoattack"]
        for base in ("resnet50", "adversarial_resnet50_gelu")
    )
    assert clean.low <= 0.05
    assert robust.low <= 0.75
    assert robust.high >= 0.25
