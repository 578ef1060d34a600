"""Images in files: as the study's transforms show them, decoded once, damaged ones named."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from tests.pictures import KINDS, write_folder, write_picture
from trainables.data.images import ImageFiles, as_rgb, in_threads, keep_decoded, keep_originals
from trainables.data.listing import DataSource, list_splits, scale_of
from trainables.data.load import load_data
from trainables.scale import CIFAR10, IMAGENET, scale_for

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
    return ImageFiles(root, train.paths, size=32)


def test_validation_equals_the_studys_transforms_on_the_same_files(tmp_path):
    sizes = ((500, 375), (224, 224), (150, 301), (333, 999))
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        path = tmp_path / f"{number}.jpg"
        image.save(path)
        paths.append(path.name)
    expected = torch.stack([RELEASED(pil_loader(str(tmp_path / path))) for path in paths])
    found = ImageFiles(tmp_path, paths, size=IMAGENET.image_size)[:]
    assert torch.equal(found.float().div(255), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_is_what_the_study_makes_of_it_upright(tmp_path, kind):
    path = write_picture(tmp_path, KINDS.index(kind), 3, side=260)
    stored = pil_loader(str(path))
    upright = stored.transpose(Image.Transpose.ROTATE_270) if kind == "turned" else stored
    found = ImageFiles(tmp_path, [path.name], size=224)[:]
    assert torch.equal(found[0].float().div(255), RELEASED(upright))


def test_indexing_gives_uint8_batches_by_slice_and_by_places(files):
    assert files.shape == (72, 3, 32, 32)
    batch = files[4:9]
    assert batch.dtype == torch.uint8
    assert batch.shape == (5, 3, 32, 32)
    assert torch.equal(files[torch.tensor([8, 4])], batch[[4, 0]])
    assert torch.equal(files.at(np.array([8, 4]))[:], batch[[4, 0]])


def test_every_mode_of_image_comes_as_rgb_and_upright(files):
    for place in range(6):
        image = files.original(place)
        assert image.mode == "RGB"
        with Image.open(files.path(place)) as file:
            assert image.size == ImageOps.exif_transpose(file).size


DEEP = np.array([[0, 257, 128 * 257, 65535], [128, 129, 65406, 65407]])
SHALLOW = [[0, 1, 128, 255], [0, 1, 254, 255]]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "ppm")],
)
def test_grey_of_16_bits_is_brought_to_8(tmp_path, mode, suffix):
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "i4"}
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(DEEP.astype(kinds[mode])).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
        image = as_rgb(file)
    assert image.mode == "RGB"
    assert all(np.asarray(image)[..., channel].tolist() == SHALLOW for channel in range(3))


@pytest.mark.parametrize(("mode", "kind"), [("I", "i4"), ("F", "f4")])
def test_grey_whose_white_is_not_known_is_refused_by_name(tmp_path, mode, kind):
    path = tmp_path / "class-00" / "deep.tif"
    path.parent.mkdir()
    Image.fromarray(DEEP.astype(kind)).save(path)
    files = ImageFiles(tmp_path, ["class-00/deep.tif"], size=32)
    said = rf"deep.tif \(class class-00\) cannot be read: its pixels are of mode {mode}, .*16 bits"
    with pytest.raises(ValueError, match=said):
        files.original(0)


def test_several_threads_read_what_one_reads(files):
    expected = files[:]
    torch.set_num_threads(2)
    try:
        assert torch.equal(files[:], expected)
    finally:
        torch.set_num_threads(1)


def test_data_workers_are_threads_that_read_beside_a_training(root, monkeypatch):
    met = threading.Barrier(3, timeout=30)  # broken unless three read at once
    source = DataSource(root=root, workers=3)
    data = load_data(scale_of("folder", source, image_size=32), source)
    expected = data.held_out.images[:3]
    monkeypatch.setattr("trainables.data.images.as_rgb", lambda file: (met.wait(), as_rgb(file))[1])
    assert torch.get_num_threads() == 1
    assert torch.equal(data.held_out.images[:3], expected)
    assert torch.equal(data.held_out.at(np.array([2, 1, 0])).images[:], expected.flip(0))


def test_originals_kept_in_memory_are_those_in_the_files(files, tmp_path):
    decoded = keep_originals(files, tmp_path, BUDGET)
    assert decoded is not None
    kept = files.out_of(decoded)
    for place in (0, 3, 4, 71):
        assert kept.original(place).tobytes() == files.original(place).tobytes()
    few = kept.at(np.array([71, 4]))
    assert few.original(1).tobytes() == files.original(4).tobytes()
    again = pickle.loads(pickle.dumps(kept))
    assert len(pickle.dumps(kept)) < 20_000
    assert torch.equal(again[:3], files[:3])


def test_decoded_files_are_written_once_and_anew_when_an_image_changes(tmp_path):
    path = write_picture(tmp_path / "train" / "a", 0, 0, side=40)
    files = ImageFiles(tmp_path, ["train/a/picture 0.JPEG"], size=32)
    cache = tmp_path / "cache"
    first = keep_decoded(files, cache, BUDGET)
    written = {p.name: p.stat().st_ino for p in cache.glob("*.u8")}
    assert torch.equal(first, keep_decoded(files, cache, BUDGET))
    assert written == {p.name: p.stat().st_ino for p in cache.glob("*.u8")}
    Image.new("RGB", (50, 50)).save(path)
    assert not keep_decoded(files, cache, BUDGET).any()
    assert len(list(cache.glob("*.u8"))) == 2


DAMAGES = {
    "flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "flipped in its hash": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "truncated": lambda content: content[:-1],
    "emptied": lambda content: b"",
}


@pytest.mark.parametrize("keep", [keep_originals, keep_decoded])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_decoded_images_are_said_and_decoded_again(files, tmp_path, caplog, keep, damage):
    keep(files, tmp_path, BUDGET)
    (path,) = tmp_path.glob("*.u8")
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    keep(files, tmp_path, BUDGET)
    assert path.read_bytes() == content
    assert f"{path} is damaged" in caplog.text


def test_decoded_images_under_anothers_name_are_decoded_again(files, tmp_path):
    for part in (files.at(np.arange(3)), files.at(np.arange(3, 6))):
        keep_decoded(part, tmp_path, BUDGET)
    first, second = tmp_path.glob("*.u8")
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    for part in (files.at(np.arange(3)), files.at(np.arange(3, 6))):
        assert torch.equal(keep_decoded(part, tmp_path, BUDGET), part[:])
    assert (first.read_bytes(), second.read_bytes()) == contents


def test_what_a_killed_writer_left_is_cleared_by_the_next_who_opens_the_cache(
    files, tmp_path, monkeypatch
):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    keep_originals(files, tmp_path, BUDGET)
    whole = {path.name for path in tmp_path.iterdir()}
    child = os.fork()
    if child == 0:
        monkeypatch.setattr("trainables.data.images.validated", die)
        try:
            keep_decoded(files, tmp_path, BUDGET)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (left,) = {path.name for path in tmp_path.iterdir()} - whole
    assert left.startswith(".validated-")
    keep_originals(files, tmp_path, BUDGET)
    assert {path.name for path in tmp_path.iterdir()} == whole


def test_what_nobody_asked_for_in_a_month_leaves_the_cache(files, tmp_path):
    stale, fresh = tmp_path / "originals-0.u8", tmp_path / "originals-1.u8"
    for file, days in ((stale, 31), (fresh, 29)):
        file.touch()
        os.utime(file, (time.time() - days * 86400,) * 2)
    assert keep_decoded(files, tmp_path, BUDGET) is not None
    assert (stale.exists(), fresh.exists()) == (False, True)


def test_a_budget_that_is_too_small_leaves_images_in_their_files(files, tmp_path):
    assert keep_originals(files, tmp_path, 100_000) is None
    assert keep_originals(files, tmp_path, 300_000) is None
    assert keep_decoded(files, tmp_path, files.nbytes - 1) is None
    assert not list(tmp_path.glob("*.u8"))


def test_memory_that_is_mapped_is_not_written_back(files, tmp_path):
    kept = keep_decoded(files, tmp_path, BUDGET)
    before = kept[0].clone()
    kept[0] = 0
    assert torch.equal(keep_decoded(files, tmp_path, BUDGET)[0], before)


def test_data_in_memory_and_in_files_are_the_same(root, tmp_path):
    source = DataSource(root=root)
    scale = scale_of("folder", source, image_size=32)
    lazy = load_data(scale, source)
    kept = load_data(scale, DataSource(root=root, cache=tmp_path / "cache"))
    assert isinstance(kept.held_out.images, torch.Tensor)
    assert isinstance(lazy.held_out.images, ImageFiles)
    assert torch.equal(kept.held_out.images, lazy.held_out.images[:])
    assert torch.equal(kept.train.images[:], lazy.train.images[:])
    assert kept.held_out.ids_hash() == lazy.held_out.ids_hash()
    assert load_data(scale, source) is lazy


def test_a_subset_of_files_keeps_images_labels_and_ids_together(root):
    source = DataSource(root=root)
    data = load_data(scale_of("folder", source, image_size=32), source)
    subset = data.train.subset(10, seed=0)
    where = data.train.ids.index(subset.ids[7])
    assert torch.equal(subset.images[7:8], data.train.images[where : where + 1])
    assert subset.labels[7] == data.train.labels[where]


def test_a_cache_that_cannot_be_written_says_what_to_do(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be kept in .*--data-memory 0 does without"):
        keep_decoded(files, tmp_path / "file" / "cache", BUDGET)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_truncated_image_is_named_with_its_class(tmp_path, in_memory):
    root = write_folder(tmp_path, per_class=1, held_out=1)
    path = root / "train" / "class-05" / "picture 0.JPEG"
    path.write_bytes(path.read_bytes()[:-300])
    source = DataSource(root=root, cache=tmp_path / "cache" if in_memory else None)
    scale = scale_of("folder", source, image_size=32)
    with pytest.raises(ValueError, match=r"picture 0\.JPEG \(class class-05\) cannot be read"):
        load_data(scale, source).train.images[:]


def test_a_folder_of_other_classes_than_the_scales_is_refused(root):
    cut = replace(CIFAR10.data_set, name="cut", archive="", classes=())
    with pytest.raises(ValueError, match="has 12 classes, and scale 'cut' has 10: --sc"):
        load_data(scale_for(cut), DataSource(root=root))
    said = (
        "is not ImageNet: it lacks 1000 of 1000 classes, the first 'n01440764', and has 12 foreig"
    )
    with pytest.raises(ValueError, match=said):
        load_data(IMAGENET, DataSource(root=root))


def test_threads_decode_no_further_than_a_few_images_ahead():
    started = []
    results = in_threads(lambda item: started.append(item) or item, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 3 + 4 * 2
    assert list(results) == list(range(3, 1000))
