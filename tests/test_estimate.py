"""What a plan takes, against figures worked out by hand; costs against the passes of real cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from evaluators import EVALUATORS, evaluator_named
from evaluators.base import judge_images
from grid.estimate import disk_bytes, work_of
from grid.plan import build_plan
from grid.run import main
from grid.study import load_study
from tests.made_up import record
from trainables.data.listing import EMBEDDED
from trainables.layers import Classifier
from trainables.models import MODELS
from trainables.networks import classifier_named
from trainables.scale import DIGITS, IMAGENET, PatchBudget

THRIFTY = replace(
    DIGITS,
    attack_subset=12,
    autoattack_subset=6,
    square_queries=20,
    smoothing_samples=20,
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
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with_gradient = images.requires_grad and torch.is_grad_enabled()
        self.passes += len(images) * (2 if with_gradient else 1)
        return self.linear(images.flatten(1))


@pytest.fixture(scope="module")
def zeros(digits):
    """The digits, of which all held-out ones but one are called zeros: no attack succeeds."""
    labels = torch.zeros_like(digits.held_out.labels)
    labels[-1] = 1
    return replace(digits, held_out=replace(digits.held_out, labels=labels))


@pytest.mark.parametrize("name", sorted(EVALUATORS.keys() - EMBEDDED.missing(DIGITS.data_set)))
def test_a_cost_is_the_passes_that_an_evaluator_takes_of_an_unbreakable_model(name, zeros):
    network = Counting()
    evaluator = evaluator_named(name, THRIFTY)
    classifier = Classifier(network, DIGITS.data_set.mean, DIGITS.data_set.std)
    judge_images(evaluator, classifier, zeros, device=torch.device("cpu"))
    cost = evaluator.cost(597, withstanding=1.0)
    # The learning half of the patch search stops where its rewards are level.
    least = 0.5 if name == "tpa" else 0.95
    assert least * cost <= network.passes <= 1.03 * cost
    assert evaluator.cost(597, withstanding=0.2) <= cost


def test_costs_at_imagenet_by_hand():
    def cost(name, withstanding=1.0):
        return evaluator_named(name, IMAGENET).cost(50_000, withstanding=withstanding)

    assert cost("clean") == 50_000
    assert cost("natural") == 7_500
    assert cost("stylized") == 100_000
    assert cost("corruptions") == 3_750_000
    assert cost("pgd") == 5_000 * (4 + 2 * 100)
    assert cost("tpa") == 5_000 * (1 + 200_000)
    # 101 steps of APGD-CE, and of 9 targets two of APGD-T and three of FAB-T; 5,000 queries.
    assert cost("autoattack") == 5_000 * (2 + 202 + 9 * 101 * 5 + 5_000)
    assert cost("autoattack", withstanding=0.0) == 5_000 * (2 + 2 * 10)
    assert cost("autoattack-small", withstanding=0.0) == cost("autoattack", withstanding=0.9)


@pytest.mark.parametrize("scale", [DIGITS, IMAGENET], ids=lambda scale: scale.name)
def test_parameters_are_at_least_those_of_the_models_and_seldom_far_above(scale):
    with torch.device("meta"):
        built = {
            name: sum(p.numel() for p in classifier_named(name, scale).parameters())
            for name in MODELS
        }
    share = scale.parameter_divisor
    assert all(
        1 <= MODELS[name].cost.parameters / share / count < 2.1 for name, count in built.items()
    )


def test_disk_holds_two_checkpoints_and_the_weights_twice():
    plan = build_plan(load_study("bai2021"), IMAGENET, tables=["T6"])
    # Weights and one moment (SGD) or two (AdamW), two times; then the weights, twice.
    sgd, adamw = 4 * 25_557_032 * (2 * 2 + 2), 4 * 25_557_032 * (2 * 3 + 2)
    assert disk_bytes(plan) == 2 * sgd + adamw


def test_work_is_trainings_and_cells_in_the_units_of_the_scale():
    plan = build_plan(load_study("bai2021"), IMAGENET, tables=["T6"], evaluators=["pgd"])
    work = work_of(plan, IMAGENET, 50_000)
    assert len(work) == 6
    assert sum(work[trial.digest, ""] for trial in plan) == pytest.approx(3 * 100 * 4.1)
    a_pass = 4.1 / 1_281_167 / 3
    judged = sum(work[trial.digest, "pgd"] for trial in plan)
    assert judged == pytest.approx(3 * 5_000 * (4 + 200) * a_pass)


def test_the_longest_chain_is_of_a_student_and_its_teacher():
    plan = build_plan(load_study("bai2021"), DIGITS, tables=["T9"])
    students = [trial for trial in plan if trial.recipe.teacher]
    costs = {trial.digest: trial.cost for trial in plan}
    chains = [costs[t.recipe.teacher.digest()] + t.cost for t in students]
    assert plan.longest_chain == max(chains)


def test_finished_trials_of_the_plan_tell_the_seconds_of_a_unit(tmp_path, capsys):
    study = load_study("bai2021")
    plan = build_plan(study, DIGITS, tables=["T6"], evaluators=["clean"])
    record(tmp_path, study, plan)
    asked = ["--plan", "--tables", "T6", "T7", "--evaluators", "clean"]
    assert main([*asked, "--results", str(tmp_path), "--trials-at-once", "2"]) == 0
    printed = capsys.readouterr().out
    # Each made-up cell took 0.1 s.
    rate = 0.3 / sum(work_of(plan, DIGITS, 597).values())
    assert f"({rate:.3g} s a unit: 3 finished trials)" in printed
    assert "with 2 trials at once" in printed
