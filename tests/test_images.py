"""Images in files: as the study's transforms show them, decoded once, damaged ones named."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from tests.pictures import KINDS, write_folder, write_picture
from tests.tiny import RECIPE
from trainables.data.augment import augmented
from trainables.data.images import ImageFiles, ResizedImages, as_rgb, in_threads
from trainables.data.listing import DataSource, list_splits, scale_of
from trainables.data.load import load_data
from trainables.recipe import Preprocessing
from trainables.scale import DIGITS, IMAGENET

BUDGET = 2**30
# As the study's datasets.py has it for evaluation, without the normalisation.
RELEASED = transforms.Compose(
    [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def files(root):
    train, _ = list_splits(DataSource(root=root))
    return ImageFiles(root, train.paths, preprocessing=Preprocessing(size=32))


def test_validation_equals_the_studys_transforms_on_the_same_files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(((500, 375), (224, 224), (150, 301), (333, 999))):
        pixels = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{number}.jpg")
        paths.append(f"{number}.jpg")
    expected = torch.stack([RELEASED(pil_loader(str(tmp_path / path))) for path in paths])
    images = ImageFiles(tmp_path, paths, preprocessing=Preprocessing(size=IMAGENET.image_size))[:]
    assert torch.equal(images.float().div(255), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_is_what_the_study_makes_of_it_upright(tmp_path, kind):
    path = write_picture(tmp_path, KINDS.index(kind), 3, side=260)
    stored = pil_loader(str(path))
    upright = stored.transpose(Image.Transpose.ROTATE_270) if kind == "turned" else stored
    images = ImageFiles(tmp_path, [path.name], preprocessing=Preprocessing(size=224))[:]
    assert torch.equal(images[0].float().div(255), RELEASED(upright))


def test_indexing_gives_uint8_batches_by_slice_and_by_places(files):
    batch = files[4:9]
    assert batch.dtype == torch.uint8
    assert batch.shape == (5, 3, 32, 32)
    assert torch.equal(files[torch.tensor([8, 4])], batch[[4, 0]])
    assert torch.equal(files.at(np.array([8, 4]))[:], batch[[4, 0]])


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "<u2"), ("I", "i4"), ("F", "f4")])
def test_grey_of_more_than_8_bits_is_refused_by_name(tmp_path, mode, kind):
    path = tmp_path / "class-00" / "deep.tif"
    path.parent.mkdir()
    Image.fromarray(np.array([[0, 257, 65535]]).astype(kind)).save(path)
    files = ImageFiles(tmp_path, ["class-00/deep.tif"], preprocessing=Preprocessing(size=32))
    said = rf"deep.tif \(class class-00\) cannot be read: its pixels are of mode {mode}: .* 8 bits"
    with pytest.raises(ValueError, match=said):
        files.original(0)


def test_data_workers_are_threads_that_read_beside_a_training(root, monkeypatch):
    met = threading.Barrier(3, timeout=30)  # broken unless three read at once
    source = DataSource(root=root, workers=3)
    data = load_data(scale_of("folder", source, image_size=32), source)
    expected = data.held_out.images[:3]
    monkeypatch.setattr("trainables.data.images.as_rgb", lambda file: (met.wait(), as_rgb(file))[1])
    assert torch.get_num_threads() == 1
    assert torch.equal(data.held_out.images[:3], expected)
    assert torch.equal(data.held_out.at(np.array([2, 1, 0])).images[:], expected.flip(0))


def test_threads_decode_no_further_than_a_few_images_ahead():
    started = []
    results = in_threads(lambda item: started.append(item) or item, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 3 + 4 * 2
    assert list(results) == list(range(3, 1000))


def test_originals_in_the_cache_are_those_in_the_files(files, tmp_path):
    cached, taken = files.decoded_once(tmp_path, BUDGET)
    sizes = [files.original(place).size for place in range(len(files))]
    assert taken == sum(3 * width * height for width, height in sizes)
    for place in (0, 3, 4, 71):
        assert cached.original(place).tobytes() == files.original(place).tobytes()
    few = cached.at(np.array([71, 4]))
    assert few.original(1).tobytes() == files.original(4).tobytes()


def test_decoded_files_are_written_once_and_anew_when_an_image_changes(tmp_path):
    path = write_picture(tmp_path / "train" / "a", 0, 0, side=40)
    files = ImageFiles(tmp_path, ["train/a/picture 0.JPEG"], preprocessing=Preprocessing(size=32))
    cache = tmp_path / "cache"
    first = files.cropped_once(cache, BUDGET)
    written = {p.name: p.stat().st_ino for p in cache.glob("*.u8")}
    assert torch.equal(first, files.cropped_once(cache, BUDGET))
    assert written == {p.name: p.stat().st_ino for p in cache.glob("*.u8")}
    Image.new("RGB", (50, 50)).save(path)
    assert not files.cropped_once(cache, BUDGET).any()
    assert len(list(cache.glob("*.u8"))) == 2


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(files, tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        dying = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        monkeypatch.setattr("trainables.data.images.validated", dying)
        try:
            files.cropped_once(tmp_path, BUDGET)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == [".", "."]  # the lock, half a file
    assert torch.equal(files.cropped_once(tmp_path, BUDGET), files[:])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_budget_that_is_too_small_leaves_images_in_their_files(files, tmp_path):
    for budget in (100_000, 300_000):  # less than the files, less than their pixels
        assert files.decoded_once(tmp_path, budget) == (files, 0)
    assert files.cropped_once(tmp_path, files.nbytes - 1) is files
    assert not list(tmp_path.glob("*.u8"))


def test_memory_that_is_mapped_is_not_written_back(files, tmp_path):
    mapped = files.cropped_once(tmp_path, BUDGET)
    before = mapped[0].clone()
    mapped[0] = 0
    assert torch.equal(files.cropped_once(tmp_path, BUDGET)[0], before)


def test_data_in_memory_and_in_files_are_the_same(root, tmp_path):
    source = DataSource(root=root)
    scale = scale_of("folder", source, image_size=32)
    lazy = load_data(scale, source)
    cached = load_data(scale, DataSource(root=root, cache=tmp_path / "cache"))
    assert isinstance(cached.held_out.images, torch.Tensor)
    assert isinstance(lazy.held_out.images, ImageFiles)
    assert torch.equal(cached.held_out.images, lazy.held_out.images[:])
    assert torch.equal(cached.train.images[:], lazy.train.images[:])
    assert cached.held_out.ids_hash() == lazy.held_out.ids_hash()
    assert load_data(scale, source) is lazy


def test_a_cache_that_cannot_be_written_says_what_to_do(files):
    with pytest.raises(ValueError, match=r"cannot be kept in .*--data-memory 0 does without"):
        files.cropped_once(Path("/proc/none"), BUDGET)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_truncated_image_is_named_with_its_class(tmp_path, in_memory):
    root = write_folder(tmp_path, per_class=1, held_out=1)
    path = root / "train" / "class-05" / "picture 0.JPEG"
    path.write_bytes(path.read_bytes()[:-300])
    source = DataSource(root=root, cache=tmp_path / "cache" if in_memory else None)
    scale = scale_of("folder", source, image_size=32)
    with pytest.raises(ValueError, match=r"picture 0\.JPEG \(class class-05\) cannot be read"):
        load_data(scale, source).train.images[:]


# In memory, at another size than is stored.


def test_images_in_memory_are_resized_whole_when_indexed():
    stored = torch.arange(2 * 3 * 4).reshape(2, 3, 2, 2).byte()
    nearest = Preprocessing(size=4, crop=0.5, interpolation="nearest")
    images = ResizedImages(stored, nearest)
    assert images.shape == (2, 3, 4, 4)
    assert images[1:][0, 2].tolist() == [[20, 20, 21, 21]] * 2 + [[22, 22, 23, 23]] * 2
    assert torch.equal(images.at(np.array([1]))[:], images[torch.tensor([1])])


def test_digits_are_resized_for_a_model_of_another_size():
    scale = DIGITS.preprocessed(Preprocessing(size=32, interpolation="bicubic"))
    data, stored = load_data(scale), load_data(DIGITS)
    assert data.held_out.ids == stored.held_out.ids
    assert data.held_out.images.shape == (597, 3, 32, 32)
    digit = Image.fromarray(stored.held_out.images[5].permute(1, 2, 0).numpy())
    bicubic = np.array(digit.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(data.held_out.images[5:6][0].permute(1, 2, 0), bicubic)
    assert load_data(DIGITS.preprocessed(Preprocessing(size=16))) is stored


def test_a_training_shifts_at_the_stored_size_and_then_resizes():
    nearest = Preprocessing(size=32, interpolation="nearest")
    images = load_data(DIGITS.preprocessed(nearest)).train.images
    places = torch.arange(20)
    shown = augmented(RECIPE, images, 0, places)
    small = augmented(RECIPE, load_data(DIGITS).train.images, 0, places)
    assert shown.shape == (20, 3, 32, 32)
    assert torch.equal(shown, small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_images_of_an_exact_size_in_files_are_resized_too(tmp_path):
    pixels = np.array([[0, 255], [255, 0]], dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    nearest = Preprocessing(size=32, interpolation="nearest")
    images = ImageFiles(tmp_path, ["a.png"], preprocessing=nearest, native=16)[:]
    assert np.array_equal(images[0, 0], pixels.repeat(2, axis=0).repeat(2, axis=1))
    with pytest.raises(ValueError, match="16 x 16 px, not 32 x 32"):
        ImageFiles(tmp_path, ["a.png"], preprocessing=nearest, native=32)[:]
