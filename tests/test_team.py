"""A trial trained by several workers: what each takes, and that the result is that of one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.teams import begun, compiled, ended, in_a_team, through_norms, trained
from trainables.recipe import Adversary, Distillation, check_team

# Sums over the workers round otherwise than sums over the batch, and AdamW and batch normalisation
# amplify that ten thousand times in two epochs: in double precision it stays far below any other
# difference, on every processor.
TOLERANCE = 1e-9
IN_DOUBLE = {"dtype": torch.double}
STOPS = (None, 1, 1.5)  # not at all, after an epoch, within one


@pytest.fixture
def recipes(small):
    adversary = Adversary(epsilon=16 / 255, step_size=16 / 255, plain_start=0.2)
    deit, resnet = small("deit"), small()
    sgd = deit.replace(optimizer="sgd", learning_rate=0.1)
    mixed = deit.replace(augmentations="mixup+cutmix")
    return {
        "deit sgd": sgd,
        "deit adamw": mixed,
        "deit attacked as published": sgd.replace(adversary=adversary, protocol="as-published"),
        "student": deit.replace(distillation=Distillation(teacher=resnet)),
        "resnet": resnet,
        "resnet attacked": resnet.replace(adversary=adversary),
        "resnet by TRADES in L2": resnet.replace(
            adversary=Adversary(norm="l2", epsilon=1.0, step_size=1.0, loss="trades")
        ),
        "deit by MART and AutoPGD": sgd.replace(
            augmentations=(),
            drop_path=0.2,
            adversary=Adversary(attack="apgd", epsilon=16 / 255, steps=2, loss="mart"),
        ),
        "resnet with ghosts, accumulated": resnet.replace(
            norm="ghost", ghost_batch=8, micro_batch=32
        ),
        "resnet, layers dropped": resnet.replace(drop_path=0.3, dropout=0.2, micro_batch=32),
        # The accuracy is that of the mean of the weights.
        "resnet, clipped, by LAMB, mean judged": resnet.replace(
            optimizer="lamb", clip_grad=0.5, ema_decay=0.5, loss="bce"
        ),
        "resnet with ghosts, attacked": resnet.replace(
            norm="ghost", ghost_batch=16, adversary=adversary
        ),
    }


@pytest.mark.slow
def test_two_workers_train_what_one_does(recipes, tmp_path):
    jobs = [partial(trained, recipe, **IN_DOUBLE) for recipe in recipes.values()]
    first, second = in_a_team(tmp_path, 2, jobs)
    for index, (name, recipe) in enumerate(recipes.items()):
        alone, metrics = trained(recipe, **IN_DOUBLE)
        weights, metrics_of_two = first[index]
        assert metrics_of_two == second[index][1], name
        assert all(torch.equal(weights[k], second[index][0][k]) for k in weights), name
        assert weights.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=name)
        for own, of_two in zip(metrics, metrics_of_two, strict=True):
            assert of_two == pytest.approx(own, rel=1e-6), name


@pytest.mark.slow
def test_a_training_that_goes_on_with_fewer_workers_ends_as_with_one(recipes, tmp_path):
    chosen = ("deit sgd", "deit adamw", "resnet", "resnet with ghosts, accumulated")
    jobs = [partial(begun, recipes[name], **IN_DOUBLE) for name in chosen]
    states, _ = in_a_team(tmp_path, 2, jobs)
    for name, state in zip(chosen, states, strict=True):
        alone, _ = trained(recipes[name], **IN_DOUBLE)
        weights, history = ended(begun(recipes[name], start=state, end=2, **IN_DOUBLE))
        assert [entry["epoch"] for entry in history] == [1, 2]
        for key, value in alone.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.slow
def test_two_workers_train_in_bf16_about_what_one_does(recipes, tmp_path):
    chosen = [
        recipes[n].replace(precision="bf16") for n in ("resnet", "resnet with ghosts, attacked")
    ]
    (first, _) = in_a_team(tmp_path, 2, [partial(trained, recipe) for recipe in chosen])
    for recipe, (_, metrics_of_two) in zip(chosen, first, strict=True):
        for alone, of_two in zip(trained(recipe)[1], metrics_of_two, strict=True):
            assert of_two["train/loss"] == pytest.approx(alone["train/loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_train_compiled_and_in_bf16_about_what_one_does_without(recipes, tmp_path):
    chosen = [recipes[n].replace(precision="bf16") for n in ("deit sgd", "resnet attacked")]
    (first, _) = in_a_team(tmp_path, 2, [partial(compiled, recipe) for recipe in chosen])
    for recipe, loss in zip(chosen, first, strict=True):
        assert loss == pytest.approx(trained(recipe)[1][-1]["train/loss"], rel=0.05)


def test_shared_norms_are_those_of_the_whole_batch(tmp_path):
    whole = through_norms()
    for rank, (found,) in enumerate(in_a_team(tmp_path, 2, [through_norms])):
        assert found.keys() == whole.keys()
        for name, value in found.items():
            per_image = name.startswith(("outputs", "inputs"))
            expected = whole[name][rank::2] if per_image else whole[name]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_a_team_of_three_that_is_cut_short_ends_with_the_same_bits(small, tmp_path):
    adversary = Adversary(epsilon=16 / 255, step_size=16 / 255, plain_start=0.2)
    recipes = [
        small(batch_size=48),
        small("deit", batch_size=48, precision="fp16"),
        small(batch_size=96, micro_batch=48, norm="ghost", ghost_batch=8, adversary=adversary),
    ]
    jobs = [partial(trained, recipe, stop=stop) for recipe in recipes for stop in STOPS]
    for answers in in_a_team(tmp_path, 3, jobs):
        for index, resumed in enumerate(answers):
            whole = answers[index - index % len(STOPS)]
            assert resumed[1] == whole[1]
            assert all(torch.equal(resumed[0][name], value) for name, value in whole[0].items())


def test_each_image_is_loaded_by_one_worker_and_sent_to_that_of_its_mirror_image(tmp_path):
    """Of a batch of 6 images, 0 is mixed with 5, 1 with 4, and 2 with 3."""
    answers = in_a_team(tmp_path, 3, [mirrored])
    own, seen, own_again = zip(*(answer[0] for answer in answers), strict=True)
    assert own == own_again == ([0, 3], [1, 4], [2, 5])
    assert seen == ([0, 2, 3, 5], [1, 4], [0, 2, 3, 5])


def mirrored(team):
    own = torch.arange(6)[team.own]
    seen = team.with_mirror(own)
    return own.tolist(), seen.tolist(), team.own_of(seen, mirrored=True).tolist()


def test_batches_that_do_not_divide_are_refused_with_what_does(small):
    check_team(small(batch_size=64), 4)
    with pytest.raises(ValueError, match=r"forward batch of 64 .* 3 workers; .* 1, 2, 4, 8, 16"):
        check_team(small(batch_size=64), 3)
    ghosts = small(batch_size=64, norm="ghost", ghost_batch=32)
    with pytest.raises(ValueError, match="2 ghost batches of 32 cannot be shared by 4 workers"):
        check_team(ghosts, 4)
