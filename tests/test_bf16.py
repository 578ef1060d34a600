"""Attacks that seek in bfloat16: which passes are, and whose answer is a verdict."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pyarrow.compute as pc
import pytest
import torch
from torch import nn

from evaluators import evaluator_named
from evaluators.base import Batch, cell_digest, judge_images
from evaluators.judging import evaluators_named
from evaluators.pgd import PGD, PublishedPGD
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS

SMALL = replace(DIGITS, attack_subset=6, autoattack_subset=6, square_queries=5)
IN_BF16 = replace(SMALL, attacks_in="bf16")


class Noting(nn.Sequential):
    """A network that notes of each pass whether it is in half precision and has a gradient."""

    def forward(self, images_BCHW):
        self.passes.add((torch.is_autocast_enabled("cpu"), images_BCHW.requires_grad))
        return super().forward(images_BCHW)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    network = Noting(nn.Conv2d(3, 4, 5, 2), nn.Flatten(), nn.Linear(144, 10))
    return Classifier(network, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", ["pgd", "autoattack"])
def test_a_search_in_bf16_is_another_cell_whose_verdicts_are_float32s(classifier, name):
    data = load_data(DIGITS)
    digests, passes = set(), []
    for scale in (SMALL, IN_BF16):
        classifier.backbone.passes = set()
        evaluator = evaluator_named(name, scale)
        judge_images(evaluator, classifier, data, device=torch.device("cpu"))
        digests.add(cell_digest(evaluator, data))
        passes.append(classifier.backbone.passes)
    assert len(digests) == 2
    assert passes[0] == {(False, False), (False, True)}
    wrong = {(False, True)} | ({(True, False)} if name == "pgd" else set())  # with queries alone
    assert not passes[1] & wrong
    assert {(True, True), (False, False)} <= passes[1]


def test_attacks_that_do_not_seek_in_it_are_the_same_cell():
    data = load_data(DIGITS)
    assert "bf16" in str(PGD(IN_BF16).identity(data))
    for kind in (PublishedPGD, lambda scale: evaluator_named("clean", scale)):
        assert cell_digest(kind(SMALL), data) == cell_digest(kind(IN_BF16), data)


def test_an_audit_attacks_in_float32(classifier):
    images = to_unit(load_data(DIGITS).held_out.images[:4])
    classifier.backbone.passes = set()
    with torch.no_grad():
        labels = classifier(images).argmax(dim=1)
    weak = replace(IN_BF16, epsilon=Fraction(1, 25_500))  # every attack has its turn
    ledger = evaluator_named("audit", weak).judge(classifier, Batch(images, labels, (*"abcd",)))
    assert all(ledger.filter(pc.equal(ledger["question"], "audit"))["survived"].to_pylist())
    assert not any(is_half for is_half, _ in classifier.backbone.passes)


def test_bf16_is_refused_where_nothing_seeks_in_it():
    with pytest.raises(ValueError, match="pgd and autoattack seek in bf16: clean, audit does not"):
        evaluators_named(["clean", "audit"], IN_BF16, [])
    assert evaluators_named(["clean", "pgd-5"], IN_BF16, [])[1].is_bf16
