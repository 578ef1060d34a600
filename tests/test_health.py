"""Each red flag fires where it should, and none on a sound model."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from evaluators.autoattack import AutoAttack
from evaluators.base import Batch, judge_images, verdicts
from evaluators.health import Health, is_checked, red_flags
from evaluators.pgd import PGD
from tests.tiny import trained_classifier
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS


@pytest.fixture(scope="module")
def classifier():
    return trained_classifier()


class Wrapped(nn.Module):
    """A classifier behind or before a function of its logits or images."""

    def __init__(self, inner, *, images=lambda x: x, logits=lambda x: x):
        super().__init__()
        self.inner, self.of_images, self.of_logits = inner, images, logits

    def forward(self, images):
        return self.of_logits(self.inner(self.of_images(images)))


def wrapped(classifier, **functions):
    return Classifier(Wrapped(classifier, **functions), (0.0,) * 3, (1.0,) * 3).eval()


def asked(evaluator, classifier):
    return judge_images(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))


def hand_made(question, survived, stage=None):
    n = len(survived)
    batch = Batch(torch.zeros(n, 1), torch.zeros(n, dtype=torch.long), tuple(map(str, range(n))))
    return verdicts(batch, question, ~torch.tensor(survived), stage=stage)


def test_a_sound_model_raises_no_flag(classifier):
    attack = AutoAttack(replace(DIGITS, square_queries=30), radii=[24 / 255])
    attack.subset_size = 10
    ledgers = [asked(e, classifier) for e in (Health(DIGITS), PGD(DIGITS), attack)]
    assert red_flags(ledgers) == []


def test_saturated_logits_raise_the_gradient_flag(classifier):
    # So large that float32 cross-entropy has no gradient.
    flags = red_flags([asked(Health(DIGITS), wrapped(classifier, logits=lambda x: 1e4 * x))])
    assert any("input gradient is zero" in flag for flag in flags)


def test_a_masked_model_raises_every_flag_of_its_gradients(classifier, caplog):
    caplog.set_level(logging.ERROR)
    # Much the same answers, through a quantiser whose gradient is zero everywhere.
    masked = wrapped(classifier, images=lambda x: (x * 8).round() / 8)
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
    few, many = ([False] * 3 + [True] * 97, [True] * 99 + [False])
    assert red_flags([hand_made("pgd-5", few), hand_made("pgd-10", many)]) == []


def test_lengths_are_compared_in_each_norm():
    fooled, holds = [False] * 12 + [True] * 88, [True] * 100
    (flag,) = red_flags([hand_made("pgd-l2-5", fooled), hand_made("pgd-l2-10", holds)])
    assert flag.startswith("PGD-L2-10 is weaker than PGD-L2-5: 12 images")
    assert red_flags([hand_made("pgd-l2-5", fooled), hand_made("pgd-l1-10", holds)]) == []


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


def test_one_image_in_a_hundred_broken_by_square_is_no_flag():
    stages = ["square", *["apgd-ce"] * 49, *[None] * 50]
    ledger = hand_made("autoattack", [stage is None for stage in stages], stages)
    assert red_flags([ledger]) == []
    stages[1:10] = ["square"] * 9
    (flag,) = red_flags([hand_made("autoattack", [s is None for s in stages], stages)])
    assert "breaks 10 of 100" in flag
