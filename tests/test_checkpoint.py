"""Checkpoints and weights, in a folder and on a real S3 server: whole, their own, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.driver import ROOT
from tests.servers import s3_bucket
from trainables.data.listing import EMBEDDED
from trainables.networks import build_classifier
from trainables.running import next_result, open_trial
from trainables.store.checkpoint import (
    load_newest_checkpoint,
    recipe_of,
    save_checkpoint,
    save_weights,
    stored_weights,
)
from trainables.store.retries import OWN_FAULTS
from trainables.store.storage import Folder, below, write_atomically
from trainables.weights import load_weights


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["folder", "s3"])
def where(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path)
    return below(request.getfixturevalue("bucket"), uuid.uuid4().hex)


def state(value):
    return {"model": {"w": torch.full((3,), float(value))}, "history": [{"epoch": 1.0}]}


def test_names_go_before_a_uris_query():
    assert below("/a/b/", "c", "d") == "/a/b/c/d"
    assert below("s3://grid?scheme=http", "c", "d") == "s3://grid/c/d?scheme=http"


def test_storage_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="storage 'ftps://there' cannot be used"):
        Folder("ftps://there")


@pytest.mark.slow
def test_a_bucket_whose_region_nobody_can_say_now_is_tried_again_and_not_refused():
    code = (
        "from trainables.store.storage import Folder\n"
        "try: Folder('s3://bucket/place')\n"
        "except ConnectionError as error: print(error)"
    )
    alone = ["unshare", "--map-root-user", "--net", sys.executable, "-c", code]
    environment = os.environ | {"AWS_EC2_METADATA_DISABLED": "true"}
    said = subprocess.run(
        alone, check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if "unshare failed" in said.stderr:
        pytest.skip("needs leave to make network namespaces")
    assert said.stdout.startswith("storage 's3://bucket/place' does not answer"), said.stderr
    assert not issubclass(ConnectionError, OWN_FAULTS)


def test_the_newest_checkpoint_is_loaded_and_two_are_stored(where):
    place = below(where, "trial")
    assert load_newest_checkpoint(place) is None
    for epoch in (1, 2, 10):
        save_checkpoint(place, epoch, state(epoch))
    assert torch.equal(load_newest_checkpoint(place)["model"]["w"], torch.full((3,), 10.0))
    assert sorted(name[:11] for name in Folder(place).names()) == ["epoch-00002", "epoch-00010"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(where, damage):
    save_checkpoint(where, 1, state(1))
    newest = save_checkpoint(where, 2, state(2))
    folder = Folder(where)
    content = folder.read(newest)
    flipped = content[:50] + bytes([content[50] ^ 1]) + content[51:]
    folder.write(newest, {"truncated": content[:-9], "flipped": flipped, "emptied": b""}[damage])
    said = []
    assert load_newest_checkpoint(where, say=said.append)["model"]["w"][0] == 1
    assert f"{newest}.damaged" in folder.names()
    assert "is damaged" in said[0]


@pytest.mark.parametrize("owner", [{"digest": "bbb"}, {}])
def test_a_checkpoint_of_another_trial_is_set_aside_and_both_are_named(tmp_path, owner, caplog):
    save_checkpoint(tmp_path, 1, state(1) | {"digest": "aaa"})
    newest = save_checkpoint(tmp_path, 2, state(2) | owner)
    assert load_newest_checkpoint(tmp_path, "aaa")["model"]["w"][0] == 1
    assert (tmp_path / f"{newest}.damaged").exists()
    assert f"belongs to trial {owner.get('digest')}, not to aaa" in caplog.text


def test_what_a_killed_writer_left_is_removed(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / ".epoch-00002-0.pt.0").write_bytes(b"half")
    assert load_newest_checkpoint(tmp_path)["model"]["w"][0] == 1
    assert [path.name[:11] for path in tmp_path.iterdir()] == ["epoch-00001"]


def test_a_trial_goes_on_from_its_checkpoint_on_s3(
    bucket, small, few_digits, monkeypatch, tmp_path
):
    monkeypatch.setattr("trainables.data.load.load_data", lambda *_: few_digits)
    monkeypatch.setattr("trainables.running.CHECKPOINT_SECONDS", 0.0)
    recipe = small("deit", epochs=2)
    config = {"recipe": recipe.model_dump(mode="json"), "threads": 1, "device": "cpu"}
    config |= {"compile": False, "source": EMBEDDED}

    def opened(storage):
        return open_trial(config | {"storage": storage})

    next_result(opened(bucket))
    resumed = next_result(opened(bucket))
    assert (resumed["epoch"], resumed["outcome"]) == (2, "finished")
    undisturbed = opened(str(tmp_path))
    next_result(undisturbed)
    assert next_result(undisturbed)["sha256"] == resumed["sha256"]


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_is_synced_whole_before_it_has_its_name_and_then_its_folder_is(
    tmp_path, monkeypatch
):
    path, fsync, synced = tmp_path / "new" / "file", os.fsync, []

    def noted(descriptor):
        stat = os.fstat(descriptor)
        synced.append((stat.st_ino, stat.st_size, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(path, b"whole")
    (file, size, named), (folder, _, named_then) = synced
    assert (file, size, named) == (path.stat().st_ino, 5, False)
    assert (folder, named_then) == (path.parent.stat().st_ino, True)


def test_weights_come_back_with_their_recipe_and_equal_ones_have_one_sha256(where, small):
    recipe = small()
    trained = build_classifier(recipe)
    path = below(where, "trial", "weights.safetensors")
    assert stored_weights(path, recipe.digest()) is None
    sha256 = save_weights(path, trained, recipe.model_dump_json())
    stored = stored_weights(path, recipe.digest())
    assert all(torch.equal(stored[name], v) for name, v in trained.state_dict().items())
    content = Folder(below(where, "trial")).read("weights.safetensors")
    assert hashlib.sha256(content).hexdigest() == sha256
    assert recipe_of(content, path) == recipe
    again = build_classifier(recipe.replace(seed=9))
    again.load_state_dict(stored)
    assert save_weights(path, again, recipe.model_dump_json()) == sha256


@pytest.fixture
def weights(tmp_path, small):
    """A file of weights, its trial's digest, and a classifier that they fit."""
    path, recipe = tmp_path / "w.safetensors", small()
    save_weights(path, build_classifier(recipe), recipe.model_dump_json())
    return path, recipe.digest(), build_classifier(recipe)


def test_weights_are_a_safetensors_file_that_says_its_own_sha256(weights):
    path, _, classifier = weights
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    own = header["__metadata__"]["own_sha256"]
    assert content.count(own.encode()) == 1
    assert hashlib.sha256(content.replace(own.encode(), b"0" * 64)).hexdigest() == own
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], v) for name, v in classifier.state_dict().items())


def test_a_bit_flipped_anywhere_in_weights_is_noticed_wherever_they_are_loaded(weights):
    path, digest, classifier = weights
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    # Every byte that says something of the whole, a sample of what lists or holds tensors.
    places = [*range(160), *range(160, header, 97), *range(header, len(content), 4999)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        for load in (
            lambda: stored_weights(str(path), digest),
            lambda: load_weights(path, classifier),
        ):
            with pytest.raises(ValueError, match=r"w\.safetensors"):
                load()


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_truncated_weights_are_refused_by_name(weights, size):
    path, digest, _ = weights
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        stored_weights(str(path), digest)


def test_weights_of_another_trial_are_refused_by_both_digests(weights, small):
    path, digest, _ = weights
    other = small(seed=1).digest()
    with pytest.raises(ValueError, match=f"weights of trial {digest}, not of trial {other}"):
        stored_weights(str(path), other)


def test_weights_that_name_a_recipe_but_no_sha256_are_refused_and_foreign_ones_are_not(
    weights, tmp_path
):
    path, _, classifier = weights
    tensors, older = load_file(path), tmp_path / "older.safetensors"
    save_file(tensors, older, metadata={"recipe": "{}"})
    with pytest.raises(ValueError, match="is damaged, or of an older version"):
        load_weights(older, classifier)
    foreign = tmp_path / "foreign.safetensors"
    save_file(tensors, foreign, metadata={"format": "pt"})
    load_weights(foreign, classifier)
