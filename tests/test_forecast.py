"""What a plan takes, against figures worked out by hand; passes against those of real cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from evaluators import EVALUATORS, evaluator_named
from evaluators.base import evaluate
from grid.forecast import (
    PARAMETERS,
    PARAMETERS_DIGITS,
    Calibration,
    Throughput,
    affordable,
    disk_bytes,
    forecast,
    kind_of,
    needs_of_tables,
)
from grid.passes import Passes, held_out_images, passes
from grid.plan import build_plan
from grid.studies import load_study
from tests.pictures import CLASSES, write_folder
from trainables.data.listing import EMBEDDED, DataSource, scale_of
from trainables.models import Classifier, classifier_named, count_parameters
from trainables.scale import DIGITS, IMAGENET, PatchBudget

THRIFTY = replace(
    DIGITS,
    attack_subset=12,
    autoattack_subset=6,
    square_queries=20,
    patch=PatchBudget(images=10, patches=2, textures=2, samples=4, steps=4),
)


class Counting(nn.Module):
    """A linear network that is sure of class 0 whatever it is shown, and counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 10)
        with torch.no_grad():
            self.linear.weight.mul_(1e-3)
            self.linear.bias.copy_(10.0 * torch.eye(10)[0])
        self.forward_only = self.gradient = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            self.gradient += len(images)
        else:
            self.forward_only += len(images)
        return self.linear(images.flatten(1))


@pytest.fixture(scope="module")
def zeros(digits):
    """The digits, of which all held-out ones but one are called zeros: no attack succeeds."""
    labels = torch.zeros_like(digits.held_out.labels)
    labels[-1] = 1
    return replace(digits, held_out=replace(digits.held_out, labels=labels))


@pytest.mark.parametrize("name", EVALUATORS)
def test_passes_are_those_that_an_evaluator_takes_of_an_unbreakable_model(name, zeros):
    network = Counting()
    question = evaluator_named(name, THRIFTY)
    evaluate(
        question,
        Classifier(network, DIGITS.mean, DIGITS.std),
        zeros,
        device=torch.device("cpu"),
    )
    most = passes(name, THRIFTY, held_out=597, adversarial=False, at_most=True)
    asked = passes(name, THRIFTY, held_out=597, adversarial=False)
    assert network.gradient == pytest.approx(most.gradient, rel=0.03)
    # The learning half of the patch search stops where its rewards are level.
    least = 0.5 if name == "tpa" else 0.95
    assert least * most.forward <= network.forward_only <= 1.02 * most.forward
    assert asked.forward + asked.gradient <= most.forward + most.gradient


def test_passes_at_imagenet_by_hand():
    ask = {"held_out": 50_000, "adversarial": False}
    assert passes("clean", IMAGENET, **ask) == Passes(50_000)
    assert passes("natural", IMAGENET, **ask) == Passes(7_500)
    assert passes("corruptions", IMAGENET, **ask) == Passes(3_750_000)
    assert passes("pgd", IMAGENET, **ask) == Passes(20_000, 500_000)
    assert passes("tpa", IMAGENET, **ask, at_most=True).forward == 5_000 * (1 + 200_000)


def test_held_out_images_are_known_or_listed(digits, tmp_path):
    assert held_out_images(DIGITS, EMBEDDED) == len(digits.held_out)
    source = DataSource(root=write_folder(tmp_path))
    assert held_out_images(scale_of("folder", source, image_size=32), source) == 2 * CLASSES


@pytest.mark.parametrize(
    ("scale", "known"), [(DIGITS, PARAMETERS_DIGITS), (IMAGENET, PARAMETERS)], ids=lambda x: ""
)
def test_parameters_are_those_of_the_models(scale, known):
    with torch.device("meta"):
        built = {name: count_parameters(classifier_named(name, scale)) for name in scale.epoch_cost}
    assert built == known


def test_disk_holds_four_checkpoints_and_the_weights_twice():
    plan = build_plan(load_study("paper"), DIGITS, tables=["T6"])
    # Weights and one moment (SGD) or two (AdamW), four times; then the weights, twice.
    sgd, adamw = 4 * 147_794 * (4 * 2 + 2), 4 * 147_794 * (4 * 3 + 2)
    assert disk_bytes(plan) == 2 * sgd + adamw


def test_seconds_follow_from_what_was_measured_or_from_the_unit():
    plan = build_plan(load_study("paper"), IMAGENET, tables=["T6"], evaluators=["pgd"])
    by_unit = forecast(plan, IMAGENET, Throughput(seconds_per_unit=2.0), held_out=50_000)
    assert by_unit.training == pytest.approx(3 * 100 * 4.1 * 2)
    # 5,000 images x (4 forward + 100 forward and back, which is two of three parts of training).
    a_third = 4.1 * 2 / 1_281_167 / 3
    assert by_unit.judging == pytest.approx(3 * 5_000 * (4 + 200) * a_third)
    measured = Throughput(
        seconds_per_unit=2.0, epochs={"resnet50": 7.0}, passes={"resnet50": (1.0, 3.0)}
    )
    found = forecast(plan, IMAGENET, measured, held_out=50_000)
    assert (found.training, found.judging) == (3 * 100 * 7, 3 * 5_000 * (4 + 300))
    job = found.jobs(workers=2)[0]
    assert (job.training, job.epochs, len(job.shards)) == (350, 100, 10)


def test_a_kind_names_model_adversary_teacher_and_precision():
    plan = build_plan(load_study("paper"), DIGITS, tables=["T2", "T9"])
    assert {kind_of(trial.recipe) for trial in plan} == {
        "resnet50",
        "deit_small",
        "resnet50 AT-1",
        "deit_small AT-1",
        "resnet50 teacher deit_small",
        "deit_small teacher resnet50",
    }
    half = replace(load_study("paper"), settings={"precision": "bf16"})
    found = {kind_of(trial.recipe) for trial in build_plan(half, DIGITS, tables=["T1"])}
    assert found == {"resnet50 bf16", "deit_small bf16"}


def test_tables_that_share_a_training_pay_for_it_once():
    needs = {"A": ["x", "y"], "B": ["y", "z"], "C": ["w"]}
    seconds = {"w": 9.0, "x": 1.0, "y": 5.0, "z": 2.0}
    assert affordable(needs, seconds, 17.0) == (("A", "B", "C"), 17.0)
    assert affordable(needs, seconds, 16.9) == (("A", "B"), 8.0)
    assert affordable(needs, seconds, 7.0) == (("A",), 6.0)
    assert affordable(needs, seconds, 1.0) == ((), 0.0)


def test_a_table_needs_its_teachers_and_only_its_own_questions():
    plan = build_plan(load_study("paper"), DIGITS)
    needs = needs_of_tables(load_study("paper"), DIGITS, plan)
    assert sum(not name for _, name in needs["T9"]) == 4
    assert {name for _, name in needs["T6"]} == {
        "",
        "clean",
        "pgd",
        "health",
        "natural",
        "stylized",
        "corruptions",
    }
    everything = {(trial.digest, name) for trial in plan for name in ("", *trial.evaluators)}
    assert set().union(*needs.values()) == everything


def test_a_calibration_is_read_as_it_was_written(tmp_path):
    calibration = Calibration(
        scale="digits",
        machine="a machine",
        versions={"torch": "2"},
        measured="today",
        throughput=Throughput(seconds_per_unit=1.5, passes={"resnet50": (1.0, 2.0)}, start_up=20.0),
    )
    path = tmp_path / "results" / "calibration.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration
    path.write_text('{"scale": 1}')
    with pytest.raises(ValueError, match="is no calibration: remove it, or --calibrate"):
        Calibration.load(path)
