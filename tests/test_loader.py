"""The images of a training: the same bits from files, from memory, and through workers."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from tests.paper import STRONG, resnet50
from tests.pictures import write_folder
from trainables.data import augment
from trainables.data.augment import augmented, augmented_epoch, library_randomness
from trainables.data.base import Split
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.loader import TrainBatches
from trainables.scale import CIFAR10


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


def test_two_workers_and_none_give_the_same_batches(recipe, data):
    alone, helped = (epochs(recipe, data.train, workers=n) for n in (0, 2))
    assert all(equal(a, h) for a, h in zip(alone, helped, strict=True))
    assert not equal(*alone)
    images, places = alone[0][0]
    assert images.shape == (4, 3, 32, 32)
    assert len({int(p) for _, chosen in alone[0] for p in chosen}) == 72
    assert places.tolist() != sorted(places.tolist())


def test_memory_and_files_give_the_same_batches(recipe, data, scale, source, tmp_path):
    kept = load_data(scale, DataSource(root=source.root, cache=tmp_path))
    one, other = (epochs(recipe, d.train, workers=0) for d in (data, kept))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_image_is_augmented_alike_in_any_company(recipe, data):
    together = augmented(recipe, data.train.images, 3, torch.arange(8))
    alone = augmented(recipe, data.train.images, 3, torch.tensor([5]))
    assert torch.equal(together[5], alone[0])
    assert not torch.equal(alone, augmented(recipe, data.train.images, 4, torch.tensor([5])))


def test_crops_cover_between_a_twelfth_and_all_and_half_are_mirrored(data, scale, tmp_path):
    from PIL import Image

    from trainables.data.images import ImageFiles

    ramp = torch.arange(240, dtype=torch.uint8).expand(3, 240, 240).permute(1, 2, 0)
    Image.fromarray(ramp.numpy()).save(tmp_path / "ramp.png")
    recipe = scale.shrink(resnet50())
    files = ImageFiles(tmp_path, ["ramp.png"] * 300, size=32)
    rows = augmented(recipe, files, 0, torch.arange(300))[:, 0, 16].float()
    mirrored = rows[:, 0] > rows[:, -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    width = (rows[:, -1] - rows[:, 0]).abs() / 240
    # sqrt(0.08 * 3/4) is the narrowest crop.
    assert 0.2 < width.min() < 0.4
    assert width.max() > 0.9


def test_crops_and_flips_are_torchvisions_transforms_to_the_bit(scale, data):
    images, recipe = data.train.images, scale.shrink(resnet50())
    preset = v2.Compose(
        [
            v2.RandomResizedCrop(
                images.size, scale=(0.08, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
        ]
    )
    found = augmented(recipe, images, 2, torch.arange(12))
    for place, image in enumerate(found):
        with library_randomness() as reseed:
            reseed(recipe.seed, 2, 5, place)
            assert torch.equal(image, preset(images.original(place)))


def test_batch_by_batch_is_what_whole_epochs_are(monkeypatch):
    recipe = CIFAR10.shrink(resnet50()).replace(augmentations=STRONG)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    places = torch.tensor([3, 39, 0])
    whole = augmented_epoch(recipe, images, 2)[places]
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    assert torch.equal(augmented(recipe, images, 2, places), whole)
    moved = (augmented_epoch(recipe.replace(augmentations="none"), images, 2) != images).any()
    assert moved


def test_workers_augment_images_in_memory_too(monkeypatch):
    monkeypatch.setattr(augment, "CACHED_BYTES", 0)
    recipe = CIFAR10.shrink(resnet50()).replace(augmentations=STRONG, batch_size=8)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    split = Split(images=images, labels=torch.zeros(20).long(), ids=tuple(map(str, range(20))))
    alone, helped = (epochs(recipe, split, workers=n) for n in (0, 2))
    assert all(equal(a, h) for a, h in zip(alone, helped, strict=True))


def test_a_damaged_image_is_named_through_a_worker(recipe, tmp_path):
    root = write_folder(tmp_path, per_class=2, held_out=1)
    path = root / "train" / "class-05" / "picture 0.JPEG"
    path.write_bytes(path.read_bytes()[:-300])
    source = DataSource(root=root)
    data = load_data(scale_of("folder", source, image_size=32), source)
    with pytest.raises(ValueError, match=r"\(class class-05\) cannot be read"):
        epochs(recipe.replace(batch_size=4), data.train, workers=1)
