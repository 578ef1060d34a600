from __future__ import annotations

import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2

from tests.paper import CURRICULA, STRONG, deit, resnet50, with_axis
from tests.pictures import write_folder
from tests.tiny import RECIPE
from trainables.data import augment
from trainables.data.augment import (
    CACHED_BYTES,
    KEPT_BYTES,
    TrainBatches,
    _changes_of,
    augmented,
    augmented_epoch,
    color_changes,
    epoch_order,
    flipped,
    library_randomness,
    mix,
    original,
    shift,
)
from trainables.data.images import ResizedImages
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.recipe import POLICIES, Preprocessing
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.train.team import Team

EXTRAS = {"color_jitter": 0.4, "least_crop": 0.5, "erasing": 0.5, "train_sizes": (16, 32)}


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    orders = [epoch_order(100, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[1], epoch_order(100, seed=0, epoch=1))


@pytest.mark.parametrize(("count", "repeats"), [(300, 3), (100, 4), (7, 3), (5, 8)])
def test_a_repeating_epoch_visits_the_images_that_timms_sampler_takes(count, repeats):
    """Below 256 images timm's sampler keeps the epoch's length, above in steps of 256."""
    sampler = RepeatAugSampler(
        range(count), num_replicas=1, rank=0, shuffle=False, num_repeats=repeats
    )
    theirs = epoch_order(count, seed=0, epoch=3)[list(sampler)]
    views = epoch_order(count, seed=0, epoch=3, repeats=repeats)
    assert len(set(views.tolist())) == len(views) == count
    assert torch.equal(views[: len(theirs)] % count, theirs)
    assert (views[: 2 * repeats] // count).tolist() == [*range(repeats), *range(repeats)][:count]


def test_shift_moves_whole_images_by_at_most_a_sixteenth():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    image[..., 8, 8] = 200
    moved = [shift(image, torch.tensor([0]), seed=0, epoch=e)[0, 0] for e in range(60)]
    moves = {tuple((shown == 200).nonzero()[0].tolist()) for shown in moved}
    assert moves == {(r, c) for r in (7, 8, 9) for c in (7, 8, 9)}


def test_flips_mirror_half_of_the_images_and_follow_from_seed_and_epoch():
    ramps = torch.arange(16, dtype=torch.uint8).expand(400, 3, 16, 16)

    def mirrored(**draw):
        shown = flipped(ramps, torch.arange(400), count=400, **draw)
        whole = torch.where((shown[:, :1, :1, :1] == 15), ramps.flip(-1), ramps)
        assert torch.equal(shown, whole)
        return shown[:, 0, 0, 0] == 15

    draws = [mirrored(seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(0.4 < float(draw.float().mean()) < 0.6 for draw in draws)
    differing = [float((draws[0] != other).float().mean()) for other in draws[1:]]
    assert all(0.4 < share < 0.6 for share in differing)
    assert torch.equal(draws[0], mirrored(seed=0, epoch=0))


def test_shifts_follow_from_seed_and_epoch():
    images = torch.rand(60, 3, 16, 16)
    draws = [shift(images, torch.arange(60), seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    still = [(draws[0] == other).flatten(1).all(dim=1).float().mean() for other in draws[1:]]
    assert all(share < 0.3 for share in still)  # one in nine by chance


@pytest.mark.parametrize(
    "fields", [{"augmentations": name} for name in POLICIES] + [{"color_jitter": 0.4}]
)
def test_an_image_is_changed_by_seed_epoch_and_image_alone(few_digits, small, fields):
    images, recipe = few_digits.train.images[:20].clone(), small(**fields)
    images[:, 0] //= 2  # colours, for the jitter of saturation
    every, plain = torch.arange(20), small(augmentations="none")
    whole = augmented(recipe, images, 1, every)
    assert torch.equal(whole[:5], augmented(recipe, images, 1, every[:5]))
    assert not torch.equal(whole, augmented(plain, images, 1, every))
    # Images that are moved alike by two draws, and so differ by their changes alone.
    for seed, epoch in ((0, 0), (1, 1)):
        moved = [augmented(r.replace(seed=seed), images, epoch, every) for r in (recipe, plain)]
        still = (moved[1] == augmented(plain, images, 1, every)).flatten(1).all(dim=1)
        assert not torch.equal(whole[still], moved[0][still])


def timms(auto_augment, *, color_jitter=0.4, size=32):
    """Return what timm's create_transform does between the flip and the normalisation."""
    steps = create_transform(
        size,
        is_training=True,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        interpolation="bicubic",
        mean=IMAGENET.data_set.mean,
    ).transforms
    names = [type(step).__name__ for step in steps]
    return steps[2 : names.index("MaybeToTensor")]


def test_randaugment_of_files_is_the_studys_in_every_setting():
    """The study: --aa rand-m9-mstd0.5-inc1, and timm then leaves the jitter out."""
    (studys,) = timms("rand-m9-mstd0.5-inc1", size=224)
    changes = _changes_of(IMAGENET.shrink(deit()), 0)
    (ours,) = color_changes(224, *changes, interpolation="bicubic").transforms
    for op, theirs in zip(ours.ops, studys.ops, strict=True):
        for field in ("name", "prob", "magnitude", "magnitude_std", "hparams"):
            assert getattr(op, field) == getattr(theirs, field)
    assert ours.num_layers == studys.num_layers == 2
    assert ours.ops[0].hparams["interpolation"] == Image.Resampling.BICUBIC
    in_memory = color_changes(16, *changes).transforms[0]  # draws how it resamples
    assert "interpolation" not in in_memory.ops[0].hparams


def test_posterize_to_no_bits_is_black_as_in_the_studys_pillow(few_digits):
    (transform,) = color_changes(16, "rand-m10-mstd0.5-inc1", 0.0, (0.0, 0.0, 0.0)).transforms
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


def grey_images(count=8):
    """Return images of the grey i / 10 and their labels i: a mix's grey tells what is in it."""
    labels = torch.arange(count)
    return (labels / 10).view(-1, 1, 1, 1).repeat(1, 3, 16, 16), labels


def mixed(recipe, *, step=0, epoch=0):
    """Return the mixed grey images and their soft targets."""
    return mix(recipe, *grey_images(), num_classes=10, epoch=epoch, step=step)


def kind_of_mix(inputs):
    """Tell how grey images were mixed: not at all, blended (mixup) or with a piece (cutmix)."""
    if torch.equal(inputs, grey_images()[0]):
        return "none"
    return "mixup" if (inputs.flatten(1).std(dim=1) < 1e-6).all() else "cutmix"


@pytest.mark.parametrize("name", ["mixup", "cutmix", "mixup+cutmix"])
def test_targets_say_what_is_in_a_mixed_image(small, name):
    recipe = small(augmentations=name, mix_probability=1.0)
    for step in range(10):
        inputs, targets = mixed(recipe, step=step)
        greys = torch.arange(10) / 10
        assert torch.allclose(inputs.mean(dim=(1, 2, 3)), targets @ greys, atol=1e-5)
        assert (targets > 1e-6).sum(dim=1).max() <= 2
        assert torch.equal(inputs, mixed(recipe, step=step)[0])
    assert not torch.equal(inputs, mixed(recipe, step=0)[0])
    assert not torch.equal(inputs, mixed(recipe.replace(seed=1), step=9)[0])


def test_mixed_targets_are_smoothed(small):
    recipe = small(augmentations="mixup", label_smoothing=0.1, mix_probability=0.0)
    _, targets = mixed(recipe)
    # 0.1 is spread over all ten classes, the true one too.
    assert torch.allclose(targets[3], torch.full((10,), 0.01).index_fill(0, torch.tensor(3), 0.91))


@pytest.mark.parametrize(
    ("name", "switch", "kind"),
    [
        ("mixup", 0.5, "mixup"),
        ("cutmix", 0.5, "cutmix"),
        ("mixup+cutmix", 0.0, "mixup"),
        ("mixup+cutmix", 1.0, "cutmix"),
    ],
)
def test_names_and_switch_probability_choose_the_kind_of_mixing(small, name, switch, kind):
    recipe = small(augmentations=name, mix_probability=1.0, switch_probability=switch)
    assert {kind_of_mix(mixed(recipe, step=step)[0]) for step in range(10)} == {kind}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_alpha_is_how_even_a_mix_is(small, kind):
    """Of a small alpha half of the draws and more leave one image whole, of a large one none."""
    whole = []
    for alpha in (0.01, 100.0):
        recipe = small(augmentations=kind, mix_probability=1.0, **{f"{kind}_alpha": alpha})
        highest = torch.stack([mixed(recipe, step=step)[1].max() for step in range(20)])
        whole.append(float((highest > 0.99).float().mean()))
    assert whole[0] >= 0.4
    assert whole[1] == 0


def test_a_curriculum_rules_the_mixing_of_each_epoch(small):
    """Rows of epochs without mixing, with Mixup alone, with CutMix alone, and with both."""
    values = ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 0.5))
    rows = [
        {
            "epoch": epoch,
            "randaug_magnitude": 0,
            "mix_probability": probability,
            "cutmix_alpha": alpha,
            "switch_probability": switch,
        }
        for epoch, (probability, alpha, switch) in enumerate(values)
    ]
    recipe = small("deit", epochs=4, curriculum=rows, curriculum_epochs=4)
    kinds = [
        {kind_of_mix(mixed(recipe, step=step, epoch=epoch)[0]) for step in range(20)}
        for epoch in range(4)
    ]
    assert kinds == [{"none"}, {"mixup"}, {"cutmix"}, {"mixup", "cutmix"}]


def test_the_studys_curriculum_is_that_of_its_released_loop():
    """Source: main_adv_deit.py, the branches on the epoch, here as rules."""
    rows = CURRICULA["study"]
    assert [row.epoch for row in rows] == list(range(11))
    assert [row.randaug_magnitude for row in rows] == [min(max(e, 1), 9) for e in range(11)]
    risen = [0.5 + 0.1 * e for e in range(6)]
    chances = [*risen, 1.0, 1.0, 0.9, 0.95, 1.0]
    assert [row.mix_probability for row in rows] == pytest.approx(chances)
    assert [row.cutmix_alpha for row in rows] == [float(e >= 6) for e in range(11)]
    switches = [max(e - 5, 0) / 10 for e in range(11)]
    assert [row.switch_probability for row in rows] == pytest.approx(switches)


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


# Batches.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return DataSource(root=write_folder(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def scale(source):
    return scale_of("folder", source, image_size=32)


@pytest.fixture(scope="module")
def data(scale, source):
    return load_data(scale, source)


@pytest.fixture(scope="module")
def recipe(scale):
    return scale.shrink(resnet50()).replace(augmentations=STRONG, micro_batch=4)


def epochs(recipe, split, *, workers):
    batches = TrainBatches(recipe, split, workers=workers)
    return [list(batches.epoch(epoch)) for epoch in (0, 1)]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("fields", [{}, {"repeats": 3, **EXTRAS}])
def test_two_workers_and_none_give_the_same_batches(recipe, data, monkeypatch, in_memory, fields):
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    split, recipe = data.train, recipe.replace(**fields)
    if in_memory:
        split = replace(split, images=split.images[:])
    alone, helped = (epochs(recipe, split, workers=n) for n in (0, 2))
    assert all(equal(a, h) for a, h in zip(alone, helped, strict=True))
    assert not equal(*alone)
    images, places = alone[1][0]
    side = recipe.train_size(1) or 32
    assert images.shape == (4, 3, side, side)
    assert len({int(p) for _, chosen in alone[0] for p in chosen}) == 72
    assert places.tolist() != sorted(places.tolist())


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("fields", [{}, {"repeats": 3, **EXTRAS}])
def test_a_team_sees_the_batches_of_one(recipe, data, in_memory, fields):
    split, recipe = data.train, recipe.replace(**fields)
    if in_memory:
        split = replace(split, images=split.images[:])
    whole = list(TrainBatches(recipe, split, workers=0).epoch(1))
    for rank in (0, 1):
        part = list(TrainBatches(recipe, split, workers=0, team=Team(rank, 2)).epoch(1))
        assert equal(part, [(images[rank::2], views[rank::2]) for images, views in whole])


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_image_shown_again_has_a_draw_of_its_own(recipe, data, in_memory):
    images = data.train.images[:] if in_memory else data.train.images
    recipe = recipe.replace(repeats=3, augmentations="none")
    shown = [augmented(recipe, images, 0, torch.arange(72) + 72 * turn) for turn in range(3)]
    alike = (shown[0] == shown[1]).flatten(1).all(dim=1)
    assert float(alike.float().mean()) < 0.3
    # All three are of one image: its colour is its class's.
    greys = [turn.float().mean(dim=(2, 3)) for turn in shown]
    assert all(torch.allclose(greys[0], other, atol=60) for other in greys)


def test_memory_and_files_give_the_same_batches(recipe, data, scale, source, tmp_path):
    kept = load_data(scale, DataSource(root=source.root, cache=tmp_path))
    one, other = (epochs(recipe, d.train, workers=0) for d in (data, kept))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_image_is_augmented_alike_in_any_company(recipe, data):
    together = augmented(recipe, data.train.images, 3, torch.arange(8))
    alone = augmented(recipe, data.train.images, 3, torch.tensor([5]))
    assert torch.equal(together[5], alone[0])
    assert not torch.equal(alone, augmented(recipe, data.train.images, 4, torch.tensor([5])))


@pytest.mark.parametrize(("least", "in_memory"), [(None, False), (0.6, False), (0.6, True)])
def test_crops_and_flips_are_torchvisions_transforms_to_the_bit(scale, data, least, in_memory):
    """Images in memory are cropped where the recipe states the least crop."""
    images = data.train.images[:] if in_memory else data.train.images
    recipe = scale.shrink(resnet50()).replace(least_crop=least)
    preset = v2.Compose(
        [
            v2.RandomResizedCrop(
                32, scale=(least or 0.08, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
        ]
    )
    found = augmented(recipe, images, 2, torch.arange(12))
    for place, image in enumerate(found):
        with library_randomness() as reseed:
            reseed(recipe.seed, 2, 5, place)
            assert torch.equal(image, preset(original(images, place)))


@pytest.mark.parametrize(
    ("fields", "auto_augment"),
    [
        ({"augmentations": "randaug"}, "rand-m9-mstd0.5-inc1"),
        (
            {"augmentations": "randaug", "randaug_layers": 3, "randaug_std": 0.0},
            "rand-m9-n3-inc1",
        ),
        ({"augmentations": "augmix"}, "augmix-m3-w3"),
        ({"augmentations": "3augment", "color_jitter": 0.3}, "3a"),
        ({"color_jitter": 0.3}, None),
        ({"augmentations": "randaug", "color_jitter": 0.3}, "rand-m9-mstd0.5-inc1"),
    ],
)
def test_policies_and_jitter_are_timms_to_the_bit(scale, data, fields, auto_augment):
    images = data.train.images
    recipe = scale.shrink(resnet50()).replace(augmentations="none").replace(**fields)
    crop = v2.RandomResizedCrop(32, scale=(0.08, 1), interpolation=InterpolationMode.BICUBIC)
    steps = [crop, v2.RandomHorizontalFlip(0.5), *timms(auto_augment, color_jitter=0.3)]
    if auto_augment == "rand-m9-mstd0.5-inc1" and recipe.color_jitter:  # timm leaves it out
        steps += timms(None, color_jitter=0.3)
    found = augmented(recipe, images, 2, torch.arange(24))
    with library_randomness() as reseed:
        for place, image in enumerate(found):
            reseed(recipe.seed, 2, 5, place)
            shown = v2.Compose([*steps, v2.PILToTensor()])(images.original(place))
            assert torch.equal(image, shown)


def test_without_flip_no_image_is_mirrored():
    """CIFAR-10's images are mirrored by an even chance unless the recipe says no."""
    ramps = torch.arange(32, dtype=torch.uint8).expand(40, 3, 32, 32)
    recipe = CIFAR10.shrink(resnet50())
    for flip, share in ((True, 0.5), (False, 0)):
        shown = augmented(recipe.replace(flip=flip), ramps, 0, torch.arange(40))
        mirrored = shown[:, 0, 16, 8] > shown[:, 0, 16, 24]
        assert abs(float(mirrored.float().mean()) - share) < 0.2


def test_at_digits_a_stated_crop_cuts_off_a_quarter_of_the_studys():
    assert DIGITS.shrink(deit().replace(least_crop=0.08)).least_crop == pytest.approx(0.77)
    assert IMAGENET.shrink(deit().replace(least_crop=0.08)).least_crop == pytest.approx(0.08)


@pytest.mark.parametrize("fields", [{}, {"pixel_range": "half"}])
def test_erasing_is_timms_on_normalised_images(scale, data, fields):
    """timm: RandomErasing in mode pixel after the normalisation, on the same draws."""
    recipe = scale.shrink(resnet50()).replace(augmentations="none", erasing=0.5, **fields)
    images, views = data.train.images, torch.arange(40)
    plain = augmented(recipe.replace(erasing=0.0), images, 1, views).float() / 255
    mean, std = ([0.5] * 3, [0.5] * 3) if fields else (scale.data_set.mean, scale.data_set.std)
    normalise = v2.Normalize(mean, std)
    erase, found = (
        RandomErasing(0.5, mode="pixel", device="cpu"),
        augmented(recipe, images, 1, views),
    )
    erased = []
    with library_randomness() as reseed:
        for image, shown, view in zip(plain, found, views.tolist(), strict=True):
            reseed(recipe.seed, 1, 7, view)
            torch.testing.assert_close(normalise(shown), erase(normalise(image)), rtol=0, atol=1e-5)
            changed = (shown != image).any(dim=0)
            erased.append(bool(changed.any()))
            assert changed.sum() <= 0.35 * 32 * 32
    assert 10 <= sum(erased) <= 30
    assert found.min() < 0
    assert found.max() > 1


def test_erased_pixels_stay_in_range_under_an_adversary(scale, data):
    recipe = scale.shrink(resnet50()).replace(augmentations="none", erasing=1.0)
    views = torch.arange(10)
    plain = augmented(recipe, data.train.images, 0, views)
    adversary = {"epsilon": 4 / 255, "step_size": 4 / 255}
    shown = augmented(recipe.replace(adversary=adversary), data.train.images, 0, views)
    assert torch.equal(shown, plain.clamp(0, 1))
    assert not torch.equal(shown, plain)


def test_train_sizes_share_the_training_first_to_last(recipe, data):
    """Files are cropped to the size; images in memory are augmented and then resized."""
    recipe = recipe.replace(train_sizes=(16, 24, 32), epochs=7, warmup_epochs=0.0)
    assert [recipe.train_size(epoch) for epoch in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    stored, views = data.train.images[:], torch.arange(6)
    for epoch in range(7):
        for images in (data.train.images, stored):
            side = recipe.train_size(epoch)
            assert augmented(recipe, images, epoch, views).shape == (6, 3, side, side)
    whole = augmented(recipe.replace(train_sizes=()), stored, 3, views)
    resized = v2.functional.resize(Image.fromarray(whole[2].permute(1, 2, 0).numpy()), [24, 24])
    shown = augmented(recipe, stored, 3, views)[2]
    assert torch.equal(shown, v2.functional.pil_to_tensor(resized))


def test_images_of_another_preprocessing_are_resized_to_a_train_size_once(recipe, data):
    stored, views = data.train.images[:], torch.arange(6)
    images = ResizedImages(stored, Preprocessing(size=48, interpolation="nearest"))
    assert augmented(recipe, images, 0, views).shape == (6, 3, 48, 48)
    shown = augmented(recipe.replace(train_sizes=(64,)), images, 0, views)
    plain = augmented(recipe, stored, 0, views)
    assert torch.equal(shown, plain.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_batch_by_batch_is_what_whole_epochs_are(monkeypatch):
    recipe = CIFAR10.shrink(resnet50()).replace(augmentations=STRONG)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    places = torch.tensor([3, 39, 0])
    whole = augmented_epoch(recipe, images, 2)[places]
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    assert torch.equal(augmented(recipe, images, 2, places), whole)
    moved = (augmented_epoch(recipe.replace(augmentations="none"), images, 2) != images).any()
    assert moved


def test_a_damaged_image_is_named_through_a_worker(recipe, tmp_path):
    root = write_folder(tmp_path, per_class=2, held_out=1)
    path = root / "train" / "class-05" / "picture 0.JPEG"
    path.write_bytes(path.read_bytes()[:-300])
    source = DataSource(root=root)
    data = load_data(scale_of("folder", source, image_size=32), source)
    with pytest.raises(ValueError, match=r"\(class class-05\) cannot be read"):
        epochs(recipe.replace(batch_size=4), data.train, workers=1)


def test_the_pace_is_the_share_of_time_in_which_batches_were_waited_for(few_digits, monkeypatch):
    split, recipe = few_digits.train.at(np.arange(70)), RECIPE.replace(batch_size=30)
    kept = TrainBatches(recipe, split, workers=0)
    assert len(list(kept.epoch(0))) == 2
    assert kept.pace == (0.0, 0.0)
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    # As the epoch begins, and twice a batch: when it has come, and when the next one is wanted.
    monkeypatch.setattr(augment, "perf_counter", iter([0.0, 3.0, 4.0, 7.0, 8.0]).__next__)
    served = TrainBatches(recipe, split, workers=0)
    assert served.pace == (0.0, 0.0)
    assert len(list(served.epoch(0))) == 2
    assert served.pace == (6 / 8, 60 / 8)
