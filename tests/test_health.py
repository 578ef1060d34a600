"""Each red flag fires where it should, and none on a sound model."""

import logging
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from torch import nn

from evaluators.autoattack import AutoAttack
from evaluators.base import evaluate
from evaluators.health import Health, is_checked, red_flags
from evaluators.ledger import LEDGER
from evaluators.pgd import PGD
from tests.tiny import trained_classifier
from trainables.data.load import load_data
from trainables.networks import Classifier
from trainables.scale import DIGITS


@pytest.fixture(scope="module")
def classifier():
    return trained_classifier()


class Saturated(nn.Module):
    """The same answers, with logits so large that float32 cross-entropy has no gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return 1e4 * self.inner(images)


class Stepped(nn.Module):
    """Much the same answers, through a quantiser whose gradient is zero everywhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner((images * 8).round() / 8)


def wrapped(network):
    return Classifier(network, (0.0,) * 3, (1.0,) * 3).eval()


def asked(evaluator, classifier):
    return evaluate(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))


def hand_made(question, survived, stage=None):
    n = len(survived)
    columns = [
        [str(i) for i in range(n)],
        [question] * n,
        [0] * n,
        [0 if s else 1 for s in survived],
        survived,
        stage or [None] * n,
        [None] * n,
        [None] * n,
    ]
    arrays = [pa.array(c, type=f.type) for c, f in zip(columns, LEDGER, strict=True)]
    return pa.Table.from_arrays(arrays, schema=LEDGER)


def test_a_sound_model_raises_no_flag(classifier):
    attack = AutoAttack(replace(DIGITS, square_queries=30), radii=[24 / 255])
    attack.subset_size = 10
    ledgers = [asked(e, classifier) for e in (Health(DIGITS), PGD(DIGITS), attack)]
    assert red_flags(ledgers) == []


def test_saturated_logits_raise_the_gradient_flag(classifier):
    flags = red_flags([asked(Health(DIGITS), wrapped(Saturated(classifier)))])
    assert any("input gradient is zero" in flag for flag in flags)


def test_a_masked_model_raises_every_flag_of_its_gradients(classifier, caplog):
    caplog.set_level(logging.ERROR)
    masked = wrapped(Stepped(classifier))
    attack = AutoAttack(replace(DIGITS, square_queries=100), radii=[24 / 255])
    attack.subset_size = 8
    flags = red_flags([asked(Health(DIGITS), masked), asked(attack, masked)])
    assert any("survive PGD at epsilon 0.5" in flag for flag in flags)
    assert any("input gradient is zero at 50 of 50" in flag for flag in flags)
    assert any("Square, a black box, breaks" in flag for flag in flags)


def test_more_steps_that_help_the_model_are_flagged_beyond_noise():
    few = hand_made("pgd-5", [False] * 12 + [True] * 88)
    many = hand_made("pgd-10", [True] * 12 + [True] * 88)
    (flag,) = red_flags([few, many])
    assert flag.startswith("PGD-10 is weaker than PGD-5: 12 images survive only the longer")


def test_lengths_are_compared_at_each_of_several_radii():
    fooled, holds = [False] * 12 + [True] * 88, [True] * 100
    rising = [hand_made("pgd-5@4/255", fooled), hand_made("pgd-10@4/255", holds)]
    others = [hand_made("pgd-5@8/255", holds), hand_made("pgd-10@8/255", fooled)]
    (flag,) = red_flags(rising + others)
    assert flag.startswith("PGD-10@4/255 is weaker than PGD-5@4/255: 12 images")


def test_attacks_are_checked_where_both_health_questions_were_asked(classifier):
    pgd = hand_made("pgd-5", [True])
    assert is_checked([pgd, asked(Health(DIGITS), classifier)])
    assert not is_checked([pgd, hand_made("gradient", [True])])
    assert not is_checked([])


def test_a_few_images_either_way_are_noise():
    few = hand_made("pgd-5", [False] * 3 + [True] * 97)
    many = hand_made("pgd-10", [True] * 99 + [False])
    assert red_flags([few, many]) == []


def test_one_image_in_a_hundred_broken_by_square_is_no_flag():
    stages = ["square", *["apgd-ce"] * 49, *[None] * 50]
    ledger = hand_made("autoattack", [stage is None for stage in stages], stages)
    assert red_flags([ledger]) == []
    stages[1:10] = ["square"] * 9
    (flag,) = red_flags([hand_made("autoattack", [s is None for s in stages], stages)])
    assert "breaks 10 of 100" in flag
