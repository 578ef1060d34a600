"""CIFAR-10 as torchvision stores it or as class folders, CIFAR-10-C and CIFAR-10.1 as published."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10 as TORCHVISION

from evaluators.base import cell_digest, judge_images
from evaluators.corruptions import Corruptions
from evaluators.natural import Natural
from tests.paper import deit, resnet50
from trainables.data.listing import DataSource
from trainables.data.load import load_data
from trainables.data.registry import KINDS
from trainables.networks import build_classifier
from trainables.scale import CIFAR10

CPU = torch.device("cpu")
PER_BATCH = 20
CLASSES = CIFAR10.data_set.classes


def write_archive(root, monkeypatch):
    """Write files of torchvision's form, and have torchvision take them for the published."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()]

    def batch(name):
        labels = [k % 10 for k in range(PER_BATCH)]
        pixels = rng.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": labels})

    monkeypatch.setattr(TORCHVISION, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(TORCHVISION, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(TORCHVISION, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def write_classes(root, *, names=CLASSES, side=32):
    for split, count in (("train", 3), ("val", 1)):
        for label, name in enumerate(names):
            for number in range(count):
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), (20 * label, number, 0)).save(path)


def test_torchvisions_archive_is_read(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch)
    data = load_data(CIFAR10, DataSource(root=tmp_path))
    assert data.train.images.shape == (100, 3, 32, 32)
    assert data.held_out.ids[:2] == ("cifar10/test/00000", "cifar10/test/00001")
    expected = TORCHVISION(tmp_path, train=False).data[7]
    assert np.array_equal(data.held_out.images[7].permute(1, 2, 0).numpy(), expected)
    assert data.class_names == CLASSES
    with pytest.raises(ValueError, match="archive has its own: leave out --labels"):
        load_data(CIFAR10, DataSource(root=tmp_path, hold_out=0.2))


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """The packed archive, which torchvision takes for the published one."""
    folder = write_archive(tmp_path / "made", monkeypatch)
    packed = tmp_path / "served" / "cifar-10-python.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    md5 = hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(TORCHVISION, "tgz_md5", md5)
    return packed


def test_a_packed_archive_is_unpacked_without_a_network(packed, monkeypatch):
    monkeypatch.setattr(TORCHVISION, "url", "http://127.0.0.1:9/cifar.tar.gz")
    assert len(load_data(CIFAR10, DataSource(root=packed.parent)).train) == 100


def test_the_archive_is_fetched_where_it_is_asked_for(packed, tmp_path, monkeypatch):
    root = tmp_path / "fetched"
    monkeypatch.setattr(TORCHVISION, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz or .* is not CIFAR-10 as publ"):
        load_data(CIFAR10, DataSource(root=root, download=True))
    handler = partial(SimpleHTTPRequestHandler, directory=packed.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{packed.name}"
        monkeypatch.setattr(TORCHVISION, "url", url)
        assert len(load_data(CIFAR10, DataSource(root=root, download=True)).train) == 100
        server.shutdown()


def test_an_archive_that_is_not_the_published_one_is_never_unpickled(tmp_path, monkeypatch):
    folder = write_archive(tmp_path, monkeypatch)
    (folder / "data_batch_3").write_bytes(b"not as published")
    with pytest.raises(ValueError, match="not CIFAR-10 as published"):
        load_data(CIFAR10, DataSource(root=tmp_path))


def test_class_folders_do_as_well(tmp_path):
    write_classes(tmp_path)
    data = load_data(CIFAR10, DataSource(root=tmp_path))
    assert (len(data.train), len(data.held_out)) == (30, 10)
    assert data.train.images[-1, :, 0, 0].tolist() == [180, 2, 0]
    cache = tmp_path / "cache"
    shared = load_data(CIFAR10, DataSource(root=tmp_path, cache=cache))
    assert torch.equal(shared.train.images, data.train.images)
    assert torch.equal(shared.held_out.labels, data.held_out.labels)
    assert len(list(cache.glob("*.u8"))) == 2


def test_recipes_have_the_fields_usual_values():
    recipe = CIFAR10.shrink(resnet50())
    settings = (recipe.learning_rate, recipe.weight_decay, recipe.batch_size, recipe.epochs)
    assert settings == (0.1, 5e-4, 128, 100)
    network = build_classifier(recipe.replace(model="resnet18")).backbone
    assert (network.conv1.kernel_size, network.conv1.stride) == ((3, 3), (1, 1))
    assert build_classifier(CIFAR10.shrink(deit())).backbone.patch_embed.num_patches == 64
    assert 11.1e6 < sum(p.numel() for p in network.parameters()) < 11.3e6


def write_arrays(root):
    """Write CIFAR-10-C of two images and CIFAR-10.1 of three."""
    for name in ("cifar10-c", "cifar10.1"):
        (root / name).mkdir(parents=True)
    for kind in KINDS:
        np.save(root / "cifar10-c" / f"{kind}.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(root / "cifar10-c" / "labels.npy", np.array([3, 5] * 5))
    newer = np.full((3, 32, 32, 3), 9, dtype=np.uint8)
    np.save(root / "cifar10.1" / "cifar10.1_v6_data.npy", newer)
    np.save(root / "cifar10.1" / "cifar10.1_v6_labels.npy", np.array([5, 5, 1]))


@pytest.fixture
def stored(tmp_path):
    write_classes(tmp_path)
    write_arrays(tmp_path)
    return load_data(CIFAR10, DataSource(root=tmp_path))


class Always5(torch.nn.Module):
    def forward(self, images):
        return torch.eye(10)[5].expand(len(images), -1)


def test_stored_cifar_10_c_is_judged_by_kind_and_severity(stored):
    evaluator = Corruptions(CIFAR10)
    assert evaluator.identity(stored)["data"] == "CIFAR-10-C"
    ledger = judge_images(evaluator, Always5(), stored, device=CPU)
    assert ledger.num_rows == 15 * 5 * 2
    assert {"fog-1", "fog-5"} <= set(ledger["question"].to_pylist())
    scores = {score.name: score.value for score in evaluator.summarize(ledger)}
    assert (scores["corruptions"], scores["corruptions/fog"]) == pytest.approx((0.5, 0.5))
    assert "corruptions/mCE" not in scores


def test_stored_cifar_10_1_is_the_natural_set(stored):
    evaluator = Natural(CIFAR10)
    assert evaluator.identity(stored)["data"] == "CIFAR-10.1"
    ledger = judge_images(evaluator, Always5(), stored, device=CPU)
    (score,) = evaluator.summarize(ledger)
    assert (score.name, score.value, score.n) == ("natural", pytest.approx(2 / 3), 3)


def test_without_stored_sets_the_counterparts_are_generated(stored):
    bare = replace(stored, roots={})
    assert Corruptions(CIFAR10).identity(bare)["data"] == "corruptions (cifar10)"
    assert cell_digest(Natural(CIFAR10), bare) != cell_digest(Natural(CIFAR10), stored)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.npy", np.array([3, 5] * 4), "does not hold 10 labels"),
        ("labels.npy", np.array([3, 50] * 5), "labels from 0 to 9"),
        ("gaussian_noise.npy", np.zeros((10, 32, 32)), "not uint8"),
        ("gaussian_noise.npy", np.zeros((9, 32, 32, 3), np.uint8), "does not hold 9 labels"),
        ("labels.npy", np.array([{}]), "cannot be read"),
        ("snow.npy", np.zeros((10, 16, 16, 3), np.uint8), "snow.npy holds uint8 .10, 16, 16, 3."),
        ("fog.npy", np.zeros((5, 32, 32, 3), np.uint8), "does not hold 5 labels"),
    ],
)
def test_a_damaged_cifar_10_c_is_refused(stored, name, content, message):
    np.save(stored.roots["cifar10-c"] / name, content)
    with pytest.raises(ValueError, match=message):
        Corruptions(CIFAR10).identity(stored)
