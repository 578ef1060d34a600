from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from texture_builder import write_class
from torch import nn

from evaluators import column_named
from evaluators.base import Batch, judge_images, verdicts
from evaluators.texture_patch import (
    ACTIONS,
    LSTMPolicy,
    Outcome,
    PatchSearch,
    Task,
    TexturePatchAttack,
    _lstm,
    paste,
    uniform_actions,
)
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import PatchBudget, scale_named

SIDE = 8
CPU = torch.device("cpu")
# Two patches of 2 x 2 px on 8 x 8 px: 0.0625 * 64 = 4 px each.
BUDGET = PatchBudget(images=4, patches=2, area=0.0625, textures=2, samples=10, steps=6)
SMALL_BUDGET = PatchBudget(images=6, patches=2, textures=2, samples=5, steps=4)
SMALL = replace(scale_named("digits"), patch=SMALL_BUDGET)
BLACK_AND_WHITE = torch.stack([torch.zeros(3, SIDE, SIDE), torch.ones(3, SIDE, SIDE)])[None]
both_searches = pytest.mark.parametrize("learns", [True, False])


class Counting(nn.Module):
    """A backbone that counts the images put to it and answers by a function of them."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.images = answer, 0

    def forward(self, images_BCHW):
        self.images += len(images_BCHW)
        return self.answer(images_BCHW)


def classifier_of(answer):
    backbone = Counting(answer)
    return Classifier(backbone, (0.0,) * 3, (1.0,) * 3).eval(), backbone


def task_of(images_MCHW, *, label=0, stored=BLACK_AND_WHITE):
    count = len(images_MCHW)
    return Task(
        images=images_MCHW,
        labels=torch.full((count,), label),
        textures=stored,
        palette=torch.zeros(count, dtype=torch.long),
        generators=tuple(torch.Generator().manual_seed(i) for i in range(count)),
    )


def run(answer, task, *, learns=True, budget=BUDGET):
    classifier, backbone = classifier_of(answer)
    search = PatchSearch(classifier=classifier, budget=budget, learns=learns)
    return search.run(task, answer(task.images).argmax(dim=1)), backbone.images


def grey(count):
    return torch.full((count, 3, SIDE, SIDE), 0.5)


def unmoved(images_BCHW):
    return torch.tensor([3.0, 0.0]).expand(len(images_BCHW), 2)


def window(images_BCHW):
    """Linear: class 0 by twice the sum of the 2 x 2 window at (3, 4), against a constant 1.

    Grey, the window holds 12 * 0.5 = 6, so 12 : 1. All black it is 0 : 1; half black 6 : 1.
    """
    evidence = 2 * images_BCHW[:, :, 3:5, 4:6].sum(dim=(1, 2, 3))
    return torch.stack([evidence, torch.ones_like(evidence)], dim=1)


def test_search_finds_the_one_patch_that_breaks_a_linear_model():
    outcome, _ = run(window, task_of(grey(3)), budget=replace(BUDGET, samples=60, steps=40))
    assert outcome.stages(torch.zeros(3)) == ["patch-1"] * 3
    patched = grey(3)
    patched[:, :, 3:5, 4:6] = 0
    assert torch.equal(outcome.images, patched)


def test_policy_learns_the_best_actions_and_moves_towards_them():
    task = task_of(grey(2))
    best = torch.tensor([1, 4, 0, 2, 5])
    policy = LSTMPolicy(task, task.spaces(2))
    rewards = []
    for _ in range(60):
        hits = (policy.sample(task.uniforms(100)) == best).float().mean(dim=2)
        rewards.append(hits.mean(dim=1))
        policy.learn(hits)
    assert (rewards[0] < 0.4).all()
    assert (rewards[-1] > 0.95).all()


@pytest.mark.parametrize(("factor", "more"), [(1.0, 5.0), (3.0, 0.0)])
def test_a_policy_learns_from_differences_of_rewards_alone(factor, more):
    draw = torch.Generator().manual_seed(0)
    draws, rewards = torch.rand(2, 20, ACTIONS, generator=draw), torch.rand(2, 20, generator=draw)
    sampled = []
    for shown in (rewards, factor * rewards + more):
        task = task_of(grey(2))
        policy = LSTMPolicy(task, task.spaces(2))
        for _ in range(5):
            policy.sample(draws)
            policy.learn(shown)
        sampled.append(policy.sample(draws))
    assert torch.equal(*sampled)


@pytest.mark.parametrize(("learns", "steps"), [(True, 3), (False, 6)])
def test_unmoved_model_costs_the_hand_counted_queries(learns, steps):
    outcome, images = run(unmoved, task_of(grey(4)), learns=learns)
    # Level rewards end REINFORCE at step 3; random search has no such end. 2 patches, 10 samples.
    assert outcome.queries.tolist() == [2 * steps * 10] * 4
    assert images == 4 * 2 * steps * 10
    assert outcome.stages(torch.zeros(4)) == [None] * 4


def fragile_unless_white(images_BCHW):
    """Class 0 for an untouched grey image and for one with any white; else class 1."""
    pixels = images_BCHW.flatten(1)
    sturdy = (pixels.amax(dim=1) > 0.9) | (pixels == 0.5).all(dim=1)
    return torch.where(sturdy[:, None], torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]))


def test_finished_image_leaves_the_batch_and_costs_nothing_more():
    images = grey(4)
    images[2:] = 1.0
    task = task_of(images, stored=BLACK_AND_WHITE[:, :1])
    outcome, queried = run(fragile_unless_white, task, learns=False)
    assert outcome.queries.tolist() == [30, 30, 120, 120]
    assert outcome.stages(task.labels) == ["patch-1", "patch-1", None, None]
    assert queried == 300


def test_patches_lie_inside_and_cover_exactly_their_area():
    task = task_of(grey(1))
    assert task.spaces(2) == (6, 6, 2, 6, 6)
    ends = [[0.0] * ACTIONS, [1 - 1e-7] * ACTIONS]
    assert uniform_actions(torch.tensor([ends]), (6, 6, 2, 6, 6)).tolist() == [
        [[0] * ACTIONS, [5, 5, 1, 5, 5]]
    ]
    corners = [[r, c, t, 5, 0] for r in (0, 5) for c in (0, 5) for t in (0, 1)]
    pasted = paste(task, torch.tensor(corners), torch.zeros(8, dtype=torch.long), side=2)
    for (row, column, texture, *_), image_CHW in zip(corners, pasted, strict=True):
        assert int((image_CHW != 0.5).sum()) == 3 * 2 * 2
        assert (image_CHW[:, row : row + 2, column : column + 2] == texture).all()


def test_a_patch_stays_where_it_is_when_the_next_is_placed():
    task = task_of(grey(8), stored=BLACK_AND_WHITE[:, :1])
    outcome, _ = run(unmoved, task, learns=False)
    black = (outcome.images[:, 0] == 0).sum(dim=(1, 2))
    # Two patches of four pixels, which may overlap.
    assert black.max() == 8
    assert black.min() >= 4


def test_paste_shows_the_crop_that_the_actions_name():
    stored = torch.arange(2 * 3 * 64, dtype=torch.float32).view(1, 2, 3, 8, 8)
    task = task_of(grey(1), stored=stored)
    pasted = paste(task, torch.tensor([[1, 2, 1, 3, 4]]), torch.tensor([0]), side=2)
    assert torch.equal(pasted[0, :, 1:3, 2:4], stored[0, 1, :, 3:5, 4:6])


@pytest.mark.parametrize(("size", "area", "side"), [(224, 0.025, 35), (16, 0.025, 2)])
def test_patch_side_is_the_studys(size, area, side):
    assert PatchBudget(area=area).side(size) == side
    with pytest.raises(ValueError, match="does not fit 16 px"):
        PatchBudget(area=0.001).side(16)


def black_tempts(images_BCHW):
    """True class 0.4 (reward log 0.6) with any black, but still first; white: 0.45, but second."""
    pixels = images_BCHW.flatten(1)
    grey_p = torch.tensor([0.9, 0.05, 0.05])
    white_p, black_p = torch.tensor([0.45, 0.54, 0.01]), torch.tensor([0.4, 0.3, 0.3])
    white = (pixels == 1).any(dim=1, keepdim=True)
    black = (pixels == 0).any(dim=1, keepdim=True)
    return torch.where(black, black_p, torch.where(white, white_p, grey_p)).log()


def test_a_success_comes_before_a_sample_of_better_reward():
    budget = replace(BUDGET, patches=1, samples=20)
    outcome, _ = run(black_tempts, task_of(grey(3)), budget=budget)
    assert (outcome.predicted == 1).all()
    assert outcome.queries.tolist() == [60] * 3


@both_searches
def test_without_a_success_the_patch_that_hurts_the_true_class_most_stays(learns):
    def sturdy(images_BCHW):
        """The true class has 0.6 with any black, 0.97 with white alone, and 0.9 on grey."""
        low, high = images_BCHW.flatten(1).aminmax(dim=1)
        true_p = torch.where(low == 0, 0.6, torch.where(high == 1, 0.97, 0.9))
        return torch.stack([true_p, 1 - true_p], dim=1).log()

    budget = replace(BUDGET, patches=1)
    outcome, _ = run(sturdy, task_of(grey(3)), learns=learns, budget=budget)
    assert outcome.stages(torch.zeros(3)) == [None] * 3
    assert (outcome.images.amin(dim=(1, 2, 3)) == 0).all()
    assert outcome.images.max() == 0.5


def random_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    return network.requires_grad_(False)


def random_task(count):
    """Images of a random network's own classes, so that each is right before it is attacked."""
    draw = torch.Generator().manual_seed(7)
    images = torch.rand(count, 3, SIDE, SIDE, generator=draw)
    stored = torch.rand(2, 3, 3, SIDE, SIDE, generator=draw)
    labels = random_network()(images).argmax(dim=1)
    palette = torch.arange(count) % 2
    return replace(task_of(images, stored=stored), labels=labels, palette=palette)


@both_searches
def test_image_fares_the_same_alone_as_in_a_batch(learns):
    task = random_task(8)
    together, _ = run(random_network(), task, learns=learns)
    assert (together.predicted != task.labels).any()
    for image in range(8):
        alone, _ = run(random_network(), random_task(8).rows(torch.tensor([image])), learns=learns)
        assert int(alone.predicted) == int(together.predicted[image])
        assert int(alone.patches) == int(together.patches[image])
        assert int(alone.queries) == int(together.queries[image])
        assert torch.equal(alone.images[0], together.images[image])


def test_stacked_cell_is_torchs_lstm_cell():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cells = [nn.LSTMCell(30, 30) for _ in range(2)]
        inputs, hidden, state = torch.randn(3, 2, 4, 30)
    order = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    stacked = [torch.stack([getattr(c, name) for c in cells]) for name in order]
    ours = _lstm(stacked, inputs, hidden, state)
    for index, cell in enumerate(cells):
        theirs = cell(inputs[index], (hidden[index], state[index]))
        torch.testing.assert_close(tuple(part[index] for part in ours), theirs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The digits beside a stored dictionary of three classes."""
    root, draw = tmp_path_factory.mktemp("textures"), torch.Generator().manual_seed(0)
    for label in range(3):
        write_class(root, label, torch.rand(2, 3, 16, 16, generator=draw))
    digits = load_data(SMALL)
    data_set = replace(digits.data_set, counterparts=("textures",))
    return replace(digits, data_set=data_set, roots={"textures": root})


def nearest_mean(images_BCHW):
    """Linear: the train images' class means, the nearest one wins."""
    train = load_data(SMALL).train
    pixels = to_unit(train.images).flatten(1)
    means_KD = torch.stack([pixels[train.labels == k].mean(dim=0) for k in range(10)])
    return images_BCHW.flatten(1) @ means_KD.T - means_KD.square().sum(dim=1) / 2


def test_ledger_holds_both_searches_beside_clean(data):
    evaluator, (classifier, backbone) = TexturePatchAttack(SMALL), classifier_of(nearest_mean)
    ledger = judge_images(evaluator, classifier, data, device=CPU)
    names = ["tpa/clean", "tpa", "tpa/patches-1", "tpa-random"]
    assert pc.unique(ledger["question"]).to_pylist() == names
    assert ledger.num_rows == 24
    # Six clean answers, and one that shows how wide the head is.
    assert backbone.images == 6 + 1 + pc.sum(ledger["queries"]).as_py()
    for row in ledger.to_pylist()[6:]:
        assert row["survived"] == (row["stage"] is None)
        assert row["queries"] is None or (row["queries"] == 0) == (row["stage"] == "clean")
        assert row["survived"] == (row["label"] == row["predicted"])
    stages, first = (
        ledger.filter(pc.equal(ledger["question"], name))["stage"].to_pylist()
        for name in names[1:3]
    )
    assert first == [None if stage == "patch-2" else stage for stage in stages]
    parts = judge_images(evaluator, classifier, data, device=CPU, batch_size=2)
    # Not the example's picture: of two samples alike but for rounding, either may stay.
    assert parts.drop_columns(["image"]).equals(ledger.drop_columns(["image"]))


def test_summary_states_survival_by_patches_and_mean_queries():
    stages = ("clean", "patch-1", "patch-1", "patch-2", None)
    batch = Batch(torch.zeros(5, 3, 4, 4), torch.zeros(5, dtype=torch.long), tuple("abcde"))
    wrong = torch.tensor([stage is not None for stage in stages]).long()
    ledger = pa.concat_tables(
        verdicts(batch, question, wrong, stage=stages, queries=[0, 20, 10, 30, 40])
        for question in ("tpa", "tpa-random")
    )
    scores = {score.name: score for score in TexturePatchAttack(SMALL).summarize(ledger)}
    assert (scores["tpa/patches-1"].value, scores["tpa"].value) == (2 / 5, 1 / 5)
    assert (scores["tpa/queries"].value, scores["tpa/queries"].n) == (25, 4)


def test_a_search_ends_after_its_first_patch_with_the_images_that_it_broke_by_then():
    # Broken by none, by one, by two patches; four leave the last one standing. All have label 0.
    predicted, patches = torch.tensor([5, 6, 7, 0]), torch.tensor([0, 1, 2, 4])
    labels = torch.zeros_like(predicted)
    outcome = Outcome(torch.zeros(4, 3, 4, 4), predicted, torch.zeros_like(patches), patches)
    assert outcome.stages(labels) == ["clean", "patch-1", "patch-2", None]
    first = outcome.after_first(labels)
    assert first.stages(labels) == ["clean", "patch-1", None, None]
    assert first.predicted.tolist() == [5, 6, 0, 0]


def test_digits_claims_are_about_one_patch_and_imagenets_about_all():
    shown = [column_named("tpa").at(scale) for scale in ("imagenet", "digits")]
    assert [column.title for column in shown] == ["TPA", "TPA, 1 patch (digits)"]
    assert [column.score for column in shown] == ["tpa", "tpa/patches-1"]
    beside = column_named("tpa/patches-1").at("digits")
    assert (beside.title, beside.score) == ("TPA, 4 patches (digits)", "tpa")


def test_each_image_meets_the_textures_of_another_class(data):
    evaluator = TexturePatchAttack(SMALL)
    ids = tuple(f"digits/{number:04d}" for number in range(30))
    (batch, *_) = evaluator.batches(data, batch_size=6)
    shown = Batch(torch.zeros(30, 3, 16, 16), torch.arange(30) % 3, ids)
    task = evaluator._task(shown)
    pairs = zip(shown.labels.tolist(), task.palette.tolist(), strict=True)
    assert set(pairs) == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    large = replace(batch, images=torch.zeros(6, 3, 24, 24))
    with pytest.raises(ValueError, match=r"textures are \(16, 16\)"):
        evaluator.judge(classifier_of(unmoved)[0], large)


def test_the_identity_names_the_budget_and_the_dictionary_and_builds_nothing(data, monkeypatch):
    monkeypatch.setattr("evaluators.textures.build_textures", None)
    own = TexturePatchAttack(SMALL).identity(load_data(SMALL))
    assert own["budget"]["samples"] == 5
    assert own["dictionary"]["settings"]["clusters"] == 2
    assert len(TexturePatchAttack(SMALL).identity(data)["dictionary"]) == 12
