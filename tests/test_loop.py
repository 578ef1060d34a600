from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from scipy.stats import binom
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from tests.paper import CURRICULA
from trainables.data.augment import TrainBatches
from trainables.data.base import Split, to_unit
from trainables.layers import Classifier
from trainables.networks import build_classifier
from trainables.recipe import Distillation
from trainables.store.checkpoint import load_newest_checkpoint, save_checkpoint
from trainables.train.adversary import folded, training_attack
from trainables.train.loop import (
    PROBE,
    accuracy,
    chance_limit,
    collapse_reason,
    distillation_loss,
    divergence_loss,
    probe,
    train,
    training_loss,
)
from trainables.train.team import Team

CPU = torch.device("cpu")
ADVERSARY = {"epsilon": 16 / 255, "step_size": 16 / 255, "plain_start": 0.2}


VARIANTS = {
    "vanilla": ("resnet", {}),
    "strong AdamW": ("deit", {}),
    "ghost, accumulation, adversarial": (
        "resnet",
        {"norm": "ghost", "ghost_batch": 16, "micro_batch": 32, "adversary": ADVERSARY},
    ),
    "adversarial with curriculum": (
        "deit",
        {"adversary": ADVERSARY, "curriculum": CURRICULA["study"]},
    ),
    "TRADES by AutoPGD in L2, eased in, drop-path": (
        "deit",
        {
            "drop_path": 0.2,
            "adversary": {
                "norm": "l2",
                "attack": "apgd",
                "epsilon": 1.0,
                "steps": 2,
                "loss": "trades",
                "epsilon_epochs": 2,
            },
        },
    ),
    "layers dropped, attacked": (
        "deit",
        {"drop_path": 0.3, "dropout": 0.2, "micro_batch": 32, "adversary": ADVERSARY},
    ),
    "distilled": ("resnet", {}),
    "half precision": ("resnet", {"precision": "fp16"}),
    "timm's optimizer, clipped, binary cross-entropy, mean of weights": (
        "resnet",
        {
            "optimizer": "lamb",
            "clip_grad": 1.0,
            "loss": "bce",
            "ema_decay": 0.9,
            "lookahead": True,
            "scheduler": "poly",
            "layer_decay": 0.75,
        },
    ),
    "repeated augmentation, attacked": (
        "resnet",
        {
            "augmentations": "3augment+mixup",
            "color_jitter": 0.3,
            "least_crop": 0.5,
            "repeats": 3,
            "erasing": 0.5,
            "train_sizes": (8, 16),
            "adversary": ADVERSARY,
        },
    ),
}


def teacher_of(recipe):
    return build_classifier(recipe.teacher) if recipe.teacher else None


def weights(classifier):
    return {name: value.clone() for name, value in classifier.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_training_equals_uninterrupted_training(small, few_digits, tmp_path, variant):
    base, changes = VARIANTS[variant]
    recipe = small(base, epochs=3, **changes)
    if variant == "distilled":
        recipe = recipe.replace(distillation=Distillation(teacher=small("deit", epochs=1)))
    whole = build_classifier(recipe)
    reports, places = [], []
    arguments = {"device": CPU, "teacher": teacher_of(recipe)}
    for report in train(recipe, whole, few_digits, **arguments, due=lambda: True):
        if not report.forward:
            reports.append((report.metrics, report.outcome))
        if report.epoch == 1:
            places.append(tmp_path / str(report.forward))
            save_checkpoint(places[-1], 1, report.state, forward=report.forward)
    assert [metrics["epoch"] for metrics, _ in reports] == [1, 2, 3]
    expected = weights(whole)
    for place in places[:2]:  # after the first epoch, and after a step of the second one
        resumed = build_classifier(recipe.replace(seed=99)) if recipe.teacher is None else whole
        start = load_newest_checkpoint(place)
        again = list(train(recipe, resumed, few_digits, **arguments, start=start))
        assert [(r.metrics, r.outcome) for r in again] == reports[1:]
        assert all(torch.equal(value, expected[n]) for n, value in resumed.state_dict().items())


def test_the_mean_of_the_weights_is_timms_after_every_step(small, few_digits):
    recipe = small("resnet", epochs=1, ema_decay=0.75)
    classifier, first = build_classifier(recipe), build_classifier(recipe)
    expected, steps = ModelEmaV3(first, decay=0.75), 0
    optimizer_step = torch.optim.SGD.step

    def step(optimizer, *arguments):
        nonlocal steps
        result = optimizer_step(optimizer, *arguments)
        expected.update(classifier)
        steps += 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        (report,) = train(recipe, classifier, few_digits, device=CPU)
    assert steps > 1
    means = expected.module.state_dict()
    assert all(torch.equal(value, means[name]) for name, value in report.state["mean"].items())
    assert any(not torch.equal(value, means[name]) for name, value in weights(classifier).items())


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_accuracy_on_held_out_images_is_of_the_weights_that_are_judged(
    small, few_digits, evaluated
):
    recipe = small("resnet", epochs=1, ema_decay=0.999999, ema_evaluated=evaluated)
    classifier, plain = build_classifier(recipe), build_classifier(recipe)
    (report,) = train(recipe, classifier, few_digits, device=CPU)
    plain.load_state_dict(report.state["mean"])
    judged, other = (plain, classifier) if evaluated else (classifier, plain)
    own, others = (accuracy(m, few_digits.held_out, device=CPU) for m in (judged, other))
    assert report.metrics["held_out/accuracy"] == own != others


def test_binary_cross_entropy_is_the_hand_worked_one(small):
    recipe = small("resnet", loss="bce", bce_threshold=0.2)
    logits = torch.tensor([[0.0, math.log(3)]])
    # Soft targets above 0.2 count as 1: -ln(1/2) and -ln(3/4), and their mean.
    loss = training_loss(recipe, logits, torch.tensor([[0.3, 0.7]]))
    assert loss.item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    loss = training_loss(recipe, logits, torch.tensor([[0.1, 0.9]]))
    assert loss.item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    unlike = training_loss(recipe.replace(bce_threshold=None), logits, torch.tensor([[0.1, 0.9]]))
    # -0.1 ln(1/2) - 0.9 ln(1/2) and -0.9 ln(3/4) - 0.1 ln(1/4).
    expected = (math.log(2) - 0.9 * math.log(0.75) - 0.1 * math.log(0.25)) / 2
    assert unlike.item() == pytest.approx(expected)


def with_loss(small, loss, **changes):
    return small(adversary=ADVERSARY | {"plain_start": 0.0, "loss": loss, "beta": 2.0}, **changes)


def test_the_losses_of_trades_and_mart_are_the_hand_worked_ones(small):
    clean = torch.tensor([[6.0, 1.0, 1.0]], dtype=torch.double).log()
    adversarial = torch.tensor([[4.0, 1.0, 3.0]], dtype=torch.double).log()
    # Probabilities 3/4, 1/8, 1/8 and 1/2, 1/8, 3/8.
    divergence = 0.75 * math.log(1.5) - 0.125 * math.log(3)
    label = torch.tensor([0])
    trades = divergence_loss(with_loss(small, "trades"), clean, adversarial, label)
    assert trades.item() == pytest.approx(-math.log(0.75) + 2 * divergence)
    # The likeliest wrong class has 3/8; the clean image's label lacks 1/4.
    mart = divergence_loss(with_loss(small, "mart"), clean, adversarial, label)
    boosted = math.log(2) - math.log(1.0001 - 0.375)
    assert mart.item() == pytest.approx(boosted + 2 * 0.25 * divergence)
    soft = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.double)
    trades = divergence_loss(with_loss(small, "trades"), clean, adversarial, soft)
    expected = -0.5 * math.log(0.75) - 0.5 * math.log(0.125) + 2 * divergence
    assert trades.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["trades", "mart"])
def test_clean_and_attacked_images_are_learned_from_in_turn(small, few_digits, loss):
    recipe = with_loss(small, loss, epochs=1, batch_size=len(few_digits.train))
    ((images, places),) = TrainBatches(recipe, few_digits.train, workers=0).epoch(0)
    classifier, clean = build_classifier(recipe), to_unit(images)
    twin = folded(classifier.eval(), clean[:1])
    labels = few_digits.train.labels[places]
    adversarial = training_attack(
        recipe, classifier, clean, labels, places, epoch=0, step=0, twin=twin
    )
    classifier.train()
    expected = divergence_loss(recipe, classifier(clean), classifier(adversarial), labels)
    trained = build_classifier(recipe)
    (report,) = train(recipe, trained, few_digits, device=CPU)
    assert report.metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    mean = classifier.backbone.bn1.running_mean  # after the clean and then the attacked images
    assert torch.allclose(trained.backbone.bn1.running_mean, mean, rtol=1e-4)


def moved_by_one_step(small, data, **changes):
    """Return how far one step of SGD moves each parameter."""
    recipe = small(
        epochs=1, weight_decay=0.0, batch_size=len(data.train), scheduler="constant", **changes
    )
    classifier = build_classifier(recipe)
    before = [(name, p.detach().clone()) for name, p in classifier.named_parameters()]
    list(train(recipe, classifier, data, device=CPU))
    after = dict(classifier.named_parameters())
    return {name: after[name].detach() - value for name, value in before}


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_gradients_are_clipped_to_a_norm_before_the_step(small, few_digits, precision):
    rate, norm = 1.0, 1e-3
    moved = moved_by_one_step(
        small,
        few_digits,
        learning_rate=rate,
        optimizer_args={"momentum": 0.0, "nesterov": False},
        clip_grad=norm,
        precision=precision,
    )
    distance = torch.cat([difference.flatten() for difference in moved.values()]).norm()
    assert distance.item() == pytest.approx(rate * norm, rel=1e-3)


def test_layer_decay_halves_the_step_from_each_block_to_the_one_below(small, few_digits):
    """ResNet-18 has four blocks here: the head is five layers above the stem."""
    plain, decayed = (
        moved_by_one_step(small, few_digits, layer_decay=decay) for decay in (None, 0.5)
    )
    share = {name: float(decayed[name].norm() / plain[name].norm()) for name in plain}
    assert share["backbone.fc.weight"] == pytest.approx(1)
    assert share["backbone.layer4.0.conv1.weight"] == pytest.approx(1 / 2, rel=1e-3)
    assert share["backbone.layer1.0.conv1.weight"] == pytest.approx(1 / 16, rel=1e-3)
    assert share["backbone.conv1.weight"] == pytest.approx(1 / 32, rel=1e-3)


def test_a_batch_too_large_for_the_memory_names_the_trial_and_what_helps(small, few_digits):
    class Greedy(torch.nn.Module):
        def forward(self, images):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    recipe = small(batch_size=64, micro_batch=32)
    classifier = build_classifier(recipe)
    classifier.backbone.global_pool = Greedy()
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 32 images") as stopped:
        next(train(recipe, classifier, few_digits, device=CPU))
    said = str(stopped.value)
    assert recipe.digest() in said
    assert "--set micro_batch=16, which keeps the total batch of 64, or --set precision=" in said
    assert "[set] of a study file" in said


def test_training_learns_at_a_rate_that_falls_from_step_to_step(small, few_digits):
    recipe = small(epochs=8, scheduler="cosine", learning_rate=0.2, floor_rate=0.0)
    classifier = build_classifier(recipe)
    reports = list(train(recipe, classifier, few_digits, device=CPU))
    last = reports[-1].metrics
    assert last["train/loss"] < 0.5 * reports[0].metrics["train/loss"]
    # 192 images are three steps of 64: the last of eight epochs begins at 23/24 of the training.
    assert last["train/rate"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 23 / 24)))
    assert accuracy(classifier, few_digits.train, device=CPU) > 0.7
    held_out = accuracy(classifier, few_digits.held_out, device=CPU)
    assert last["held_out/accuracy"] == held_out


def test_every_accumulation_step_keeps_its_own_ghost_statistics(small, few_digits):
    recipe = small(epochs=1, norm="ghost", ghost_batch=16, micro_batch=32)
    model = build_classifier(recipe)
    list(train(recipe, model, few_digits, device=CPU))
    statistics = model.backbone.bn1.running_mean
    assert statistics.shape == (2, 2 * 8)
    assert len(statistics.view(4, 8).unique(dim=0)) == 4


def test_accumulation_reaches_the_total_batchs_gradient(small, few_digits):
    """SGD's steps are in proportion to the gradient, and in double precision sums are alike."""
    whole = small(
        "deit", augmentations="none", optimizer="sgd", learning_rate=0.1, batch_size=32, epochs=1
    )
    models, losses = [], []
    for recipe in (whole, whole.replace(micro_batch=8)):
        models.append(build_classifier(recipe).double())
        (report,) = train(recipe, models[-1], few_digits, device=CPU)
        losses.append(report.metrics["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_labels_are_smoothed_in_the_loss_and_mixed_targets_left_as_they_are(small):
    recipe = small(label_smoothing=0.2)
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.double)
    # -log softmax is log(1 + e^-2) for the true class and 2 more for the other.
    true = math.log1p(math.exp(-2))
    smoothed = 0.9 * true + 0.1 * (true + 2)
    assert float(training_loss(recipe, logits, torch.tensor([0]))) == pytest.approx(smoothed)
    soft = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    assert float(training_loss(recipe, logits, soft)) == pytest.approx(true)


def test_a_loss_that_is_not_finite_is_an_outcome_and_the_end(small, few_digits):
    recipe = small(epochs=3, learning_rate=1e30)
    reports = list(train(recipe, build_classifier(recipe), few_digits, device=CPU))
    assert [report.outcome for report in reports] == ["collapsed"]
    assert "the training loss became" in reports[-1].reason


class Brightness(torch.nn.Module):
    """Class 0 for an image brighter than the middle grey, class 1 for a darker one."""

    def forward(self, images):
        above = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([above, -above], dim=1)


def test_the_probe_attacks_within_the_recipes_radius(small):
    greys = torch.arange(140, 150, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    split = Split(images=greys, labels=torch.zeros(10, dtype=torch.long), ids=tuple("abcdefghij"))
    classifier = Classifier(Brightness(), (0.0,) * 3, (1.0,) * 3)
    # Darker by 16/255, those from 144/255 on are still above 127.5/255.
    assert probe(small(adversary=ADVERSARY), classifier, split, device=CPU) == 0.6
    # An image has 48 values, and in L2 all of them move by the same.
    in_l2 = ADVERSARY | {"norm": "l2", "epsilon": 16 / 255 * 48**0.5}
    assert probe(small(adversary=in_l2), classifier, split, device=CPU) == 0.6


def test_curriculum_and_probe_are_metrics(small, few_digits):
    recipe = small("deit", epochs=1, adversary=ADVERSARY, curriculum=CURRICULA["study"])
    (report,) = train(recipe, build_classifier(recipe), few_digits, device=CPU)
    assert report.metrics["curriculum/mix_probability"] == 0.5
    assert report.metrics["curriculum/randaug_magnitude"] == 1
    assert 0 <= report.metrics[PROBE] <= 1


class FewAtOnce(Classifier):
    """A classifier that has memory for a few images only, and counts those that it is shown."""

    def __init__(self, classifier, most):
        super().__init__(classifier, (0, 0, 0), (1, 1, 1))
        self.most, self.shown = most, []

    def forward(self, images):
        self.shown.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return self.backbone(images)


def test_the_probe_takes_a_forward_batch_at_most_and_halves_it_out_of_memory(small, digits):
    recipe = small(batch_size=512, micro_batch=64, adversary=ADVERSARY)
    classifier = build_classifier(recipe)
    split = digits.train.subset(300, seed=0)
    whole, few = FewAtOnce(classifier, 300), FewAtOnce(classifier, 30)
    expected = probe(recipe, whole, split, device=CPU)
    assert max(whole.shown) == 64
    assert probe(recipe, few, split, device=CPU) == expected
    assert max(shown for shown in few.shown if shown <= 30) == 22
    with pytest.raises(torch.OutOfMemoryError):
        probe(recipe, FewAtOnce(classifier, 0), split, device=CPU)


@pytest.mark.parametrize("most", [1, 30, 256])
def test_validation_takes_as_many_images_as_fit_and_finds_the_same(small, digits, most):
    classifier = build_classifier(small())
    split = digits.held_out.subset(300, seed=0)
    classifier.eval()
    with torch.inference_mode():
        right = classifier(split.images.float() / 255).argmax(dim=1) == split.labels
    few = FewAtOnce(classifier, most)
    assert accuracy(few, split, device=CPU) == int(right.sum()) / 300
    assert sum(shown for shown in few.shown if shown <= most) == 300


def test_a_teams_shares_of_a_validation_are_all_of_it(small, digits):
    class Rank(Team):
        def total(self, value):
            seen.append(int(value))
            return value

    classifier, seen = build_classifier(small()), []
    split = digits.held_out
    whole = accuracy(classifier, split, device=CPU)
    for rank in range(2):
        accuracy(FewAtOnce(classifier, 100 * (rank + 1)), split, device=CPU, team=Rank(rank, 2))
    assert len(seen) == 2
    assert sum(seen) / len(split) == whole


def histories(probes, losses):
    rows = zip(probes, losses, strict=True)
    return [{"epoch": e + 1.0, PROBE: p, "train/loss": x} for e, (p, x) in enumerate(rows)]


def reason(recipe, history):
    return collapse_reason(recipe, history, num_classes=10, n=50)


def test_collapse_is_a_probe_at_chance_while_the_loss_falls(small):
    recipe = small(epochs=12)
    fallen = histories([0.6, 0.5, 0.1, 0.0, 0.0], [2.0, 1.8, 1.5, 1.2, 1.0])
    assert "at chance (0.0%) in the 3 epochs up to 5" in reason(recipe, fallen)
    assert reason(recipe, fallen[:4]) == ""
    assert reason(recipe, histories([0.1] * 5, [2.0] * 5)) == ""
    assert reason(recipe, histories([0.5] * 5, [2.0, 1.8, 1.5, 1.2, 1.0])) == ""


@pytest.mark.parametrize(
    ("recipe", "patient", "collapsed"),
    [
        ({"epochs": 12, "warmup_epochs": 3.0}, 4, 6),
        ({"epochs": 12, "adversary": ADVERSARY | {"epsilon_epochs": 3.0}}, 4, 6),
        ({"epochs": 100}, 9, 11),
    ],
)
def test_patience_begins_after_the_warm_up_and_grows_with_the_training(
    small, recipe, patient, collapsed
):
    for epochs, is_collapse in ((patient, False), (collapsed, True)):
        history = histories([0.1] * epochs, [19.0 - epoch for epoch in range(epochs)])
        assert bool(reason(small(**recipe), history)) == is_collapse


@pytest.mark.parametrize(("classes", "n"), [(10, 50), (10, 500), (1000, 5000)])
def test_guessing_exceeds_the_chance_limit_in_one_of_twenty_cases(classes, n):
    above = binom.sf(math.floor(n * chance_limit(classes, n)), n, 1 / classes)
    assert 0.025 < above < 0.075


def test_distillation_is_the_blend_of_both_losses():
    torch.manual_seed(0)
    logits, taught, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = F.cross_entropy(logits, labels)
    teacher = Distillation.model_construct(teacher=None, alpha=0.3, tau=2.0)
    p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    by_hand = 0.7 * loss + 0.3 * 4 * divergence
    assert distillation_loss(teacher, loss, logits, taught) == pytest.approx(
        float(by_hand), rel=1e-5
    )


def test_a_student_follows_its_teacher(small, few_digits):
    teacher = small(epochs=8, seed=5, scheduler="cosine")
    taught = build_classifier(teacher)
    list(train(teacher, taught, few_digits, device=CPU))
    before = copy.deepcopy(taught.state_dict())
    student = teacher.replace(seed=6, distillation=Distillation(teacher=teacher, alpha=1.0))
    learner = build_classifier(student)
    list(train(student, learner, few_digits, device=CPU, teacher=taught))
    assert all(torch.equal(v, before[n]) for n, v in taught.state_dict().items())
    with torch.inference_mode():
        images = few_digits.train.images.float() / 255
        agreement = (learner(images).argmax(1) == taught(images).argmax(1)).float().mean()
    assert agreement > 0.7


def test_a_teacher_is_wanted_where_the_recipe_names_one(small, few_digits):
    student = small(distillation=Distillation(teacher=small()))
    with pytest.raises(ValueError, match="a teacher is needed"):
        next(train(student, build_classifier(student), few_digits, device=CPU))


def test_a_batch_larger_than_the_data_is_refused(small, few_digits):
    recipe = small(batch_size=256)
    with pytest.raises(ValueError, match="batch_size 256 exceeds the 192"):
        next(train(recipe, build_classifier(recipe), few_digits, device=CPU))


@pytest.mark.slow
def test_a_compiled_network_is_compiled_once_for_all_sets_of_ghosts(small, few_digits, monkeypatch):
    """Twelve forward batches a step: one compilation each would exceed torch's limit of eight."""
    recipe = small(
        epochs=1, warmup_epochs=0.0, batch_size=96, micro_batch=8, norm="ghost", ghost_batch=4
    )
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    losses, sets = [], []
    for compiled in (False, True):
        network = build_classifier(recipe)
        (report,) = train(recipe, network, few_digits, device=CPU, compiled=compiled)
        losses.append(report.metrics["train/loss"])
        sets.append(network.backbone.bn1.running_mean)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(sets[1], sets[0], rtol=1e-3, atol=1e-4)
    assert len(sets[1]) == 12
    assert 1 <= counter.frame_count <= 2
