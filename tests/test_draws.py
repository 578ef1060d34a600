from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from trainables.networks import build_classifier
from trainables.train.draws import BatchDraws, draws
from trainables.train.loop import train

CPU = torch.device("cpu")


def seeded():
    return torch.Generator().manual_seed(3)


def test_stochastic_depth_is_timms_on_the_same_draws():
    layer = DropPath(0.4).train()
    images = torch.randn(16, 5, 4)
    torch.manual_seed(3)
    theirs = layer(images)
    with BatchDraws(seeded(), batch=16):
        ours = layer(images)
    assert torch.equal(ours, theirs)
    assert 0 < int((ours == 0).all(dim=(1, 2)).sum()) < 16


def test_dropout_keeps_its_share_and_its_mean():
    with BatchDraws(seeded(), batch=100):
        dropped = F.dropout(torch.ones(100, 1000), 0.25)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("rows", [1, 4], ids=["images", "windows of images"])
@pytest.mark.parametrize("layer", [DropPath(0.5), nn.Dropout(0.5)], ids=["path", "dropout"])
def test_members_of_a_team_draw_their_rows_of_the_whole_batch(layer, rows):
    images = torch.randn(12, rows, 7)
    with BatchDraws(seeded(), batch=12):
        whole = layer(images.flatten(0, 1)).view(12, rows, 7)
    for rank in range(3):
        own = slice(rank, None, 3)
        with BatchDraws(seeded(), batch=12, own=own):
            part = layer(images[own].flatten(0, 1)).view(4, rows, 7)
        assert torch.equal(part, whole[own])


def test_networks_in_eval_mode_draw_nothing():
    images = torch.randn(4, 7)
    with BatchDraws(seeded(), batch=4):
        assert torch.equal(nn.Dropout(0.5).eval()(images), images)
        assert torch.equal(DropPath(0.5).eval()(images), images)


def test_draws_that_no_seed_reaches_are_refused():
    query = torch.randn(2, 1, 3, 4)
    with BatchDraws(seeded(), batch=2), pytest.raises(ValueError, match="no seed reaches"):
        F.scaled_dot_product_attention(query, query, query, dropout_p=0.1)


@pytest.mark.parametrize("dropped", [{"drop_path": 0.2}, {"dropout": 0.2}])
@pytest.mark.parametrize("family", ["resnet", "deit"])
def test_a_training_that_draws_follows_from_its_seed_alone(small, few_digits, family, dropped):
    recipe = small(family, epochs=1, warmup_epochs=0.0, **dropped)
    assert draws(build_classifier(recipe).backbone)
    assert not draws(build_classifier(small(family)).backbone)
    losses = {}
    for name, other, globally in (("first", {}, 1), ("again", {}, 2), ("plain", dropped, 1)):
        torch.manual_seed(globally)
        changed = recipe.replace(**dict.fromkeys(other, 0.0))
        (report,) = train(changed, build_classifier(changed), few_digits, device=CPU)
        losses[name] = report.metrics["train/loss"]
    assert losses["first"] == losses["again"] != losses["plain"]


def test_a_compiled_training_that_draws_follows_from_its_seed(small, few_digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network.forward)  # in place of a minute
    recipe = small("deit", epochs=1, warmup_epochs=0.0, drop_path=0.2)
    losses = []
    for globally in (1, 2):
        torch.manual_seed(globally)
        before = torch.random.get_rng_state()
        network = build_classifier(recipe)
        (report,) = train(recipe, network, few_digits, device=CPU, compiled=True)
        losses.append(report.metrics["train/loss"])
        assert torch.equal(before, torch.random.get_rng_state())
    assert losses[0] == losses[1]


def test_every_forward_batch_of_every_epoch_has_its_own_draws(small, few_digits, monkeypatch):
    seeds = []
    init = BatchDraws.__init__

    def spied(self, generator, batch, own):
        seeds.append(generator.initial_seed())
        init(self, generator, batch, own)

    monkeypatch.setattr(BatchDraws, "__init__", spied)
    recipe = small(epochs=2, warmup_epochs=0.0, micro_batch=32, drop_path=0.1)
    list(train(recipe, build_classifier(recipe), few_digits, device=CPU))
    assert len(set(seeds)) == len(seeds) == 2 * len(few_digits.train) // 32
