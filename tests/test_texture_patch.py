from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor, nn

from evaluators import textures
from evaluators.base import Batch, cell_digest, evaluate, verdicts
from evaluators.texture_patch import (
    ACTIONS,
    LSTMPolicy,
    Outcome,
    PatchSearch,
    PolicyOf,
    Task,
    TexturePatchAttack,
    UniformPolicy,
    _lstm,
    paste,
)
from evaluators.textures import StoredTextures
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.networks import Classifier
from trainables.scale import PatchBudget, scale_named

SIDE = 8
DIGITS = scale_named("digits")
# Two patches of 2 x 2 px on 8 x 8 px: 0.0625 * 64 = 4 px each.
BUDGET = PatchBudget(images=4, patches=2, area=0.0625, textures=2, samples=10, steps=6)
BLACK_AND_WHITE = torch.stack([torch.zeros(3, SIDE, SIDE), torch.ones(3, SIDE, SIDE)])[None]


class Counting(nn.Module):
    """A backbone that counts the images put to it and answers by a function of them."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.seen = 0
        self.largest = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        self.largest = max(self.largest, len(images_BCHW))
        return self.answer(images_BCHW)


def classifier_of(answer: Callable[[Tensor], Tensor]) -> tuple[Classifier, Counting]:
    backbone = Counting(answer)
    return Classifier(backbone, (0.0,) * 3, (1.0,) * 3).eval(), backbone


def task_of(images_MCHW: Tensor, *, label: int = 0, stored: Tensor = BLACK_AND_WHITE) -> Task:
    count = len(images_MCHW)
    return Task(
        images=images_MCHW,
        labels=torch.full((count,), label),
        textures=stored,
        palette=torch.zeros(count, dtype=torch.long),
        generators=tuple(torch.Generator().manual_seed(i) for i in range(count)),
    )


def run(
    answer: Callable[[Tensor], Tensor],
    task: Task,
    *,
    policy_of: PolicyOf = LSTMPolicy,
    budget: PatchBudget = BUDGET,
) -> tuple[Outcome, Counting]:
    classifier, backbone = classifier_of(answer)
    search = PatchSearch(classifier=classifier, budget=budget)
    clean = answer(task.images).argmax(dim=1)
    return search.run(task, clean, policy_of), backbone


def grey(count: int) -> Tensor:
    return torch.full((count, 3, SIDE, SIDE), 0.5)


def unmoved(images_BCHW: Tensor) -> Tensor:
    return torch.tensor([3.0, 0.0]).expand(len(images_BCHW), 2)


def window(images_BCHW: Tensor) -> Tensor:
    """Linear: class 0 by twice the sum of the 2 x 2 window at (3, 4), against a constant 1.

    Grey, the window holds 12 * 0.5 = 6, so 12 : 1. All black it is 0 : 1; half black 6 : 1.
    """
    evidence = 2 * images_BCHW[:, :, 3:5, 4:6].sum(dim=(1, 2, 3))
    return torch.stack([evidence, torch.ones_like(evidence)], dim=1)


def test_search_finds_the_one_patch_that_breaks_a_linear_model() -> None:
    budget = replace(BUDGET, patches=1, samples=60, steps=40)
    outcome, _ = run(window, task_of(grey(3)), budget=budget)
    assert outcome.success.all()
    assert (outcome.predicted == 1).all()
    wanted = grey(1)[0]
    wanted[:, 3:5, 4:6] = 0
    for image_CHW in outcome.images:
        assert torch.equal(image_CHW, wanted)


def test_policy_learns_the_best_actions_and_moves_towards_them() -> None:
    task = task_of(grey(2))
    best = torch.tensor([1, 4, 0, 2, 5])
    policy = LSTMPolicy(task, task.spaces(2))
    rewards = []
    for _ in range(60):
        draws = torch.stack([torch.rand(100, ACTIONS, generator=g) for g in task.generators])
        hits = (policy.sample(draws) == best).float().mean(dim=2)
        rewards.append(hits.mean(dim=1))
        policy.learn(hits)
    assert (rewards[0] < 0.4).all()
    assert (rewards[-1] > 0.95).all()


@pytest.mark.parametrize(("factor", "more"), [(1.0, 5.0), (3.0, 0.0)])
def test_a_policy_learns_from_differences_of_rewards_alone(factor: float, more: float) -> None:
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


@pytest.mark.parametrize(("policy_of", "steps"), [(LSTMPolicy, 3), (UniformPolicy, 6)])
def test_unmoved_model_costs_the_hand_counted_queries(policy_of: PolicyOf, steps: int) -> None:
    outcome, backbone = run(unmoved, task_of(grey(4)), policy_of=policy_of)
    # Level rewards end REINFORCE at step 3; random search has no such end. 2 patches, 10 samples.
    assert outcome.queries.tolist() == [2 * steps * 10] * 4
    assert backbone.seen == 4 * 2 * steps * 10
    assert outcome.stages() == [None] * 4


def fragile_unless_white(images_BCHW: Tensor) -> Tensor:
    """Class 0 for an untouched grey image and for one with any white; else class 1."""
    pixels = images_BCHW.flatten(1)
    sturdy = (pixels.amax(dim=1) > 0.9) | (pixels == 0.5).all(dim=1)
    return torch.where(sturdy[:, None], torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]))


def test_finished_image_leaves_the_batch_and_costs_nothing_more() -> None:
    images = grey(4)
    images[2:] = 1.0
    task = task_of(images, stored=BLACK_AND_WHITE[:, :1])
    outcome, backbone = run(fragile_unless_white, task, policy_of=UniformPolicy)
    assert outcome.queries.tolist() == [30, 30, 120, 120]
    assert outcome.stages() == ["patch-1", "patch-1", None, None]
    assert backbone.seen == 300


def test_image_broken_without_a_patch_costs_no_query() -> None:
    outcome, backbone = run(unmoved, task_of(grey(2), label=1))
    assert backbone.seen == 0
    assert outcome.stages() == ["clean", "clean"]
    assert outcome.queries.tolist() == [0, 0]


def test_patches_lie_inside_and_cover_exactly_their_area() -> None:
    task = task_of(grey(1))
    places = task.spaces(2)[0]
    assert places == 6
    corners = [[r, c, t, 5, 0] for r in (0, 5) for c in (0, 5) for t in (0, 1)]
    actions = torch.tensor(corners)
    pasted = paste(task, actions, torch.zeros(len(corners), dtype=torch.long), side=2)
    for (row, column, texture, *_), image_CHW in zip(corners, pasted, strict=True):
        assert int((image_CHW != 0.5).sum()) == 3 * 2 * 2
        assert (image_CHW[:, row : row + 2, column : column + 2] == texture).all()


def test_a_patch_stays_where_it_is_when_the_next_is_placed() -> None:
    task = task_of(grey(8), stored=BLACK_AND_WHITE[:, :1])
    outcome, _ = run(unmoved, task, policy_of=UniformPolicy)
    black = (outcome.images[:, 0] == 0).sum(dim=(1, 2))
    # Two patches of four pixels, which may overlap.
    assert black.max() == 8
    assert black.min() >= 4


def test_paste_shows_the_crop_that_the_actions_name() -> None:
    stored = torch.arange(2 * 3 * 64, dtype=torch.float32).view(1, 2, 3, 8, 8)
    task = task_of(grey(1), stored=stored)
    pasted = paste(task, torch.tensor([[1, 2, 1, 3, 4]]), torch.tensor([0]), side=2)
    assert torch.equal(pasted[0, :, 1:3, 2:4], stored[0, 1, :, 3:5, 4:6])


@pytest.mark.parametrize(("size", "area", "side"), [(224, 0.025, 35), (16, 0.025, 2)])
def test_patch_side_is_the_studys(size: int, area: float, side: int) -> None:
    assert PatchBudget(area=area).side(size) == side


def black_tempts(images_BCHW: Tensor) -> Tensor:
    """True class 0.4 (reward log 0.6) with any black, but still first; white: 0.45, but second."""
    pixels = images_BCHW.flatten(1)
    grey_p = torch.tensor([0.9, 0.05, 0.05])
    white_p, black_p = torch.tensor([0.45, 0.54, 0.01]), torch.tensor([0.4, 0.3, 0.3])
    white = (pixels == 1).any(dim=1, keepdim=True)
    black = (pixels == 0).any(dim=1, keepdim=True)
    return torch.where(black, black_p, torch.where(white, white_p, grey_p)).log()


def test_a_success_comes_before_a_sample_of_better_reward() -> None:
    budget = replace(BUDGET, patches=1, samples=20)
    outcome, _ = run(black_tempts, task_of(grey(3)), budget=budget)
    assert outcome.success.all()
    assert (outcome.predicted == 1).all()
    assert outcome.queries.tolist() == [60] * 3


def random_network() -> Callable[[Tensor], Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    return network.requires_grad_(False)


def random_task(count: int) -> Task:
    """Images of a random network's own classes, so that each is right before it is attacked."""
    draw = torch.Generator().manual_seed(7)
    images = torch.rand(count, 3, SIDE, SIDE, generator=draw)
    stored = torch.rand(2, 3, 3, SIDE, SIDE, generator=draw)
    labels = random_network()(images).argmax(dim=1)
    palette = torch.arange(count) % 2
    return replace(task_of(images, stored=stored), labels=labels, palette=palette)


@pytest.mark.parametrize("policy_of", [LSTMPolicy, UniformPolicy])
def test_the_search_never_loses_a_success_it_has_seen(policy_of: PolicyOf) -> None:
    network = random_network()
    task = random_task(12)
    budget = replace(BUDGET, patches=1)
    for image in range(12):
        alone, met = task.rows(torch.tensor([image])), []

        def spy(
            images_BCHW: Tensor, label: int = int(alone.labels), met: list[bool] = met
        ) -> Tensor:
            logits = network(images_BCHW)
            met.append(bool((logits.argmax(dim=1) != label).any()))
            return logits

        outcome, _ = run(spy, alone, policy_of=policy_of, budget=budget)
        assert bool(outcome.success) == any(met)


@pytest.mark.parametrize("policy_of", [LSTMPolicy, UniformPolicy])
def test_image_fares_the_same_alone_as_in_a_batch(policy_of: PolicyOf) -> None:
    together, _ = run(random_network(), random_task(8), policy_of=policy_of)
    assert together.success.any()
    for image in range(8):
        own = random_task(8).rows(torch.tensor([image]))
        alone, _ = run(random_network(), own, policy_of=policy_of)
        assert alone.stages() == together.stages()[image : image + 1]
        assert int(alone.queries) == int(together.queries[image])
        assert torch.equal(alone.images[0], together.images[image])


def test_stacked_cell_is_torchs_lstm_cell() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cells = [nn.LSTMCell(30, 30) for _ in range(2)]
        inputs, hidden, state = torch.randn(3, 2, 4, 30)
    order = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    stacked = [torch.stack([getattr(c, name) for c in cells]) for name in order]
    found = _lstm(stacked, inputs, hidden, state)
    for index, cell in enumerate(cells):
        wanted = cell(inputs[index], (hidden[index], state[index]))
        torch.testing.assert_close(found[0][index], wanted[0])
        torch.testing.assert_close(found[1][index], wanted[1])


def test_out_of_memory_halves_the_forward_batch_and_changes_nothing() -> None:
    def cramped(images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) > 16:
            raise torch.OutOfMemoryError("too many images")
        return window(images_BCHW)

    calm, _ = run(window, task_of(grey(3)))
    classifier, _ = classifier_of(cramped)
    search = PatchSearch(classifier=classifier, budget=BUDGET)
    tight = search.run(task_of(grey(3)), torch.zeros(3, dtype=torch.long), LSTMPolicy)
    assert torch.equal(calm.images, tight.images)
    assert calm.queries.tolist() == tight.queries.tolist()


def small_evaluator(**options: object) -> TexturePatchAttack:
    draw = torch.Generator().manual_seed(0)
    stored = StoredTextures(torch.rand(3, 2, 3, 16, 16, generator=draw), (0, 1, 2), "a test")
    budget = PatchBudget(images=6, patches=2, textures=2, samples=5, steps=4)
    return TexturePatchAttack(DIGITS, dictionary=stored, budget=budget, **options)  # type: ignore[arg-type]


def nearest_mean(images_BCHW: Tensor) -> Tensor:
    """Linear: the train images' class means, the nearest one wins."""
    train = load_data(DIGITS).train
    pixels = to_unit(train.images).flatten(1)
    means_KD = torch.stack([pixels[train.labels == k].mean(dim=0) for k in range(10)])
    return images_BCHW.flatten(1) @ means_KD.T - means_KD.square().sum(dim=1) / 2


def test_ledger_holds_both_searches_beside_clean() -> None:
    evaluator, (classifier, backbone) = small_evaluator(), classifier_of(nearest_mean)
    ledger = evaluate(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))
    assert pc.unique(ledger["question"]).to_pylist() == ["tpa/clean", "tpa", "tpa-random"]
    assert ledger.num_rows == 18
    assert backbone.seen == 6 + pc.sum(ledger["queries"]).as_py()
    for row in ledger.to_pylist()[6:]:
        assert row["survived"] == (row["stage"] is None)
        assert (row["queries"] == 0) == (row["stage"] == "clean")
        assert row["survived"] == (row["label"] == row["predicted"])


def test_summary_states_survival_by_patches_and_mean_queries() -> None:
    evaluator = small_evaluator()
    classifier, _ = classifier_of(nearest_mean)
    ledger = evaluate(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))
    scores = {score.name: score for score in evaluator.summarize(ledger)}
    assert scores["tpa/clean"].n == 6
    assert scores["tpa"].value <= scores["tpa/patches-1"].value <= scores["tpa/clean"].value
    rows = [r for r in ledger.to_pylist() if r["question"] == "tpa" and r["queries"]]
    assert scores["tpa/queries"].value == pytest.approx(sum(r["queries"] for r in rows) / len(rows))
    assert scores["tpa/queries"].n == len(rows)


def test_survival_after_a_patch_leaves_out_what_it_broke() -> None:
    stages = ("clean", "patch-1", "patch-1", "patch-2", None)
    batch = Batch(torch.zeros(5, 3, 4, 4), torch.zeros(5, dtype=torch.long), tuple("abcde"))
    wrong = torch.tensor([stage is not None for stage in stages]).long()
    ledger = pa.concat_tables(
        verdicts(batch, question, wrong, stage=stages) for question in ("tpa", "tpa-random")
    )
    scores = {score.name: score.value for score in small_evaluator().summarize(ledger)}
    assert (scores["tpa/patches-1"], scores["tpa"]) == (2 / 5, 1 / 5)


def test_verdict_does_not_depend_on_the_batch() -> None:
    evaluator, (classifier, _) = small_evaluator(), classifier_of(nearest_mean)
    data, device = load_data(DIGITS), torch.device("cpu")
    whole = evaluate(evaluator, classifier, data, device=device).to_pylist()
    parts = evaluate(evaluator, classifier, data, device=device, batch_size=2).to_pylist()

    def verdicts_of(rows: list[dict[str, object]]) -> list[tuple[object, ...]]:
        # Not the example's picture: of two samples alike but for rounding, either may stay.
        return sorted((r["question"], r["image_id"], r["survived"], r["queries"]) for r in rows)

    assert verdicts_of(whole) == verdicts_of(parts)


def test_identity_names_the_settings_and_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "_built", {})
    data = load_data(DIGITS)
    plain, seeded = TexturePatchAttack(DIGITS), TexturePatchAttack(DIGITS, seed=1)
    assert json.loads(json.dumps(plain.identity(data)))["budget"]["samples"] == 25
    assert textures._built == {}
    digests = {cell_digest(e, data) for e in (plain, seeded, small_evaluator())}
    assert len(digests) == 3


def test_bad_settings_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="does not fit 16 px"):
        PatchBudget(area=0.001).side(16)
    alone = StoredTextures(torch.rand(1, 2, 3, 16, 16), (3,), "a test")
    batch = Batch(torch.rand(1, 3, 16, 16), torch.tensor([3]), ("digits/0000",))
    evaluator = TexturePatchAttack(DIGITS, dictionary=alone)
    with pytest.raises(ValueError, match="no class but the true one, 3"):
        evaluator.judge(classifier_of(nearest_mean)[0], batch)
    large = StoredTextures(torch.rand(1, 2, 3, 24, 24), (0,), "a test")
    evaluator = TexturePatchAttack(DIGITS, dictionary=large)
    with pytest.raises(ValueError, match=r"textures are \(24, 24\)"):
        evaluator.judge(classifier_of(nearest_mean)[0], batch)
