from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, RandAugment

from grid.studies import STRONG, deit, with_axis
from trainables.augment import (
    CACHED_BYTES,
    KEPT_BYTES,
    _rand_augment,
    augmented,
    augmented_epoch,
    epoch_order,
    library_randomness,
    mix,
    randaugment,
    shift,
)
from trainables.images import ImageFiles
from trainables.scale import DIGITS, IMAGENET


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    orders = [epoch_order(100, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[1], epoch_order(100, seed=0, epoch=1))


def test_shift_moves_whole_images_by_at_most_a_sixteenth():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 8, 8] = 200
    moves = {
        tuple((shift(image, seed=0, epoch=e)[0, 0] == 200).nonzero()[0].tolist()) for e in range(60)
    }
    assert moves == {(r, c) for r in (7, 8, 9) for c in (7, 8, 9)}


def test_randaugment_of_an_image_depends_on_seed_epoch_and_image_alone(few_digits):
    images, fill = few_digits.train.images[:20], (76, 76, 76)
    once = randaugment(images, magnitude=9, fill=fill, seed=0, epoch=3)
    assert torch.equal(once[:5], randaugment(images[:5], magnitude=9, fill=fill, seed=0, epoch=3))
    assert not torch.equal(once, randaugment(images, magnitude=9, fill=fill, seed=0, epoch=4))
    assert not torch.equal(once, randaugment(images, magnitude=9, fill=fill, seed=1, epoch=3))


def test_randaugment_is_timms_of_the_studys_strength():
    transform = _rand_augment(9, 16, (0, 0, 0))
    assert transform.num_layers == 2
    assert {type(op) for op in transform.ops} == {AugmentOp}
    assert {op.magnitude for op in transform.ops} == {9}
    assert {op.magnitude_std for op in transform.ops} == {0.5}
    assert any(op.name == "PosterizeIncreasing" for op in transform.ops)


def test_randaugment_of_files_is_the_studys_in_every_setting(tmp_path, monkeypatch):
    transform = create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        mean=IMAGENET.mean,
    )
    (studys,) = (step for step in transform.transforms if isinstance(step, RandAugment))
    made = []
    monkeypatch.setattr(
        "trainables.augment._rand_augment",
        lambda *given, **named: made.append(_rand_augment(*given, **named)) or made[-1],
    )
    Image.new("RGB", (240, 240)).save(tmp_path / "black.png")
    files = ImageFiles(tmp_path, ["black.png"], size=224)
    recipe = IMAGENET.shrink(deit())
    augmented(recipe, files, 0, torch.tensor([0]))
    assert [op.hparams for op in made[0].ops] == [op.hparams for op in studys.ops]
    assert made[0].ops[0].hparams["interpolation"] == Image.Resampling.BICUBIC


def test_randaugment_of_images_in_memory_draws_how_it_resamples():
    assert "interpolation" not in _rand_augment(9, 16, (0, 0, 0)).ops[0].hparams


def test_posterize_to_no_bits_is_black_as_in_the_studys_pillow(few_digits):
    transform = _rand_augment(10, 16, (0, 0, 0))
    posterize = next(op for op in transform.ops if op.name == "PosterizeIncreasing")
    image = Image.fromarray(few_digits.train.images[0].permute(1, 2, 0).numpy())
    assert np.asarray(posterize.aug_fn(image, 0)).max() == 0


def test_library_randomness_is_put_back():
    random.seed(1)
    np.random.seed(1)
    expected = (random.random(), np.random.random())
    random.seed(1)
    np.random.seed(1)
    with library_randomness() as reseed:
        reseed(3, 4)
        random.random()
        np.random.random()
    assert (random.random(), np.random.random()) == expected


def test_mixing_keeps_label_mass_and_follows_from_the_step():
    recipe = DIGITS.shrink(deit()).replace(mix_probability=1.0)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)

    def mixed(step):
        return mix(recipe, images.clone(), labels, num_classes=10, epoch=0, step=step)

    inputs, targets = mixed(1)
    assert torch.allclose(targets.sum(dim=1), torch.ones(8))
    assert torch.equal(inputs, mixed(1)[0])
    assert not torch.equal(inputs, mixed(2)[0])


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_one_kind_of_mixing_stays_that_kind(small, name):
    recipe = small(augmentations=name, mix_probability=1.0)
    black_and_white = torch.cat([torch.zeros(4, 3, 16, 16), torch.ones(4, 3, 16, 16)])
    labels = torch.arange(8)
    blended = False
    for step in range(10):
        inputs, _ = mix(recipe, black_and_white.clone(), labels, num_classes=10, epoch=0, step=step)
        blended |= bool(((inputs > 0) & (inputs < 1)).any())
    assert blended == (name == "mixup")


def test_without_mixing_a_batch_is_left_alone(small):
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    inputs, targets = mix(small(), images, labels, num_classes=10, epoch=0, step=0)
    assert inputs is images
    assert targets is labels


def test_curriculum_sets_the_strength_of_an_epoch(few_digits):
    eased = with_axis(DIGITS.shrink(with_axis(deit(), "curriculum", "study")), "seed", 0)
    assert [eased.curriculum_row(e).randaug_magnitude for e in (0, 11)] == [0, 2]
    plain = eased.replace(curriculum=(), randaug_magnitude=0)
    split = few_digits.train.images
    assert torch.equal(augmented_epoch(eased, split, 0), augmented_epoch(plain, split, 0))
    assert not torch.equal(augmented_epoch(eased, split, 11), augmented_epoch(plain, split, 11))


def test_equal_augmentation_is_made_once_for_many_trials(few_digits, small):
    one = small(augmentations=STRONG, epochs=3)
    other = small("deit", epochs=3)
    images = few_digits.train.images
    assert augmented_epoch(one, images, 0) is augmented_epoch(other, images, 0)


def test_augmented_epochs_are_kept_up_to_a_bound(small):
    recipe = small(augmentations="none", epochs=20)
    images = torch.zeros(5400, 3, 32, 32, dtype=torch.uint8)
    assert 20 * images.nbytes > KEPT_BYTES
    assert images.nbytes <= CACHED_BYTES
    made = [weakref.ref(augmented_epoch(recipe, images, epoch)) for epoch in range(20)]
    kept = sum(images.nbytes for epoch in made if epoch() is not None)
    assert KEPT_BYTES - images.nbytes < kept <= KEPT_BYTES
    assert augmented_epoch(recipe, images, 19) is made[19]()


def test_a_second_training_at_digits_finds_every_epoch_of_the_first(digits, small):
    images = digits.train.images
    one, other = small(augmentations="none", epochs=30), small("deit", augmentations="none")
    first = [augmented_epoch(one, images, epoch) for epoch in range(30)]
    assert all(augmented_epoch(other, images, epoch) is first[epoch] for epoch in range(30))
