from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluators.weights import load_any_weights
from trainables.networks import build_classifier
from trainables.store.checkpoint import (
    fit_weights,
    load_newest_checkpoint,
    recipe_json_of,
    save_checkpoint,
    save_weights,
    stored_weights,
)
from trainables.store.storage import write_atomically


def state(value):
    return {"model": {"w": torch.full((3,), float(value))}, "history": [{"epoch": 1.0}]}


def test_newest_checkpoint_is_loaded_and_two_are_kept(tmp_path):
    assert load_newest_checkpoint(tmp_path / "none") is None
    for epoch in (1, 2, 10):
        save_checkpoint(tmp_path, epoch, state(epoch))
    assert torch.equal(load_newest_checkpoint(tmp_path)["model"]["w"], torch.full((3,), 10.0))
    assert sorted(p.name[:11] for p in tmp_path.iterdir()) == ["epoch-00002", "epoch-00010"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_is_used(tmp_path, damage, caplog):
    save_checkpoint(tmp_path, 1, state(1))
    newest = tmp_path / save_checkpoint(tmp_path, 2, state(2))
    content = newest.read_bytes()
    flipped = content[:50] + bytes([content[50] ^ 1]) + content[51:]
    newest.write_bytes({"truncated": content[:-9], "flipped": flipped, "emptied": b""}[damage])
    assert load_newest_checkpoint(tmp_path)["model"]["w"][0] == 1
    assert newest.with_suffix(".damaged").exists()
    assert "is damaged" in caplog.text


def of_trial(digest, value):
    return state(value) | {"digest": digest}


def test_swapped_checkpoints_are_set_aside_and_both_trials_are_named(tmp_path, caplog):
    first, second = (tmp_path / name for name in ("aaa", "bbb"))
    save_checkpoint(first, 1, of_trial("aaa", 1))
    own = first / save_checkpoint(first, 2, of_trial("aaa", 2))
    other = second / save_checkpoint(second, 2, of_trial("bbb", 3))
    other.rename(first / other.name)
    own.rename(second / own.name)
    assert load_newest_checkpoint(first, "aaa")["model"]["w"][0] == 1
    assert load_newest_checkpoint(second, "bbb") is None
    assert (first / other.name).with_suffix(".foreign").exists()
    assert "belongs to trial bbb, not to aaa" in caplog.text
    assert "belongs to trial aaa, not to bbb" in caplog.text


def test_a_checkpoint_that_names_no_trial_is_not_taken_for_anyones(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, state(1))
    assert load_newest_checkpoint(tmp_path, "aaa") is None
    assert "belongs to trial that it does not name, not to aaa" in caplog.text


def test_what_a_killed_writer_left_is_removed(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / ".epoch-00002-0.pt.0").write_bytes(b"half")
    assert load_newest_checkpoint(tmp_path)["model"]["w"][0] == 1
    assert [path.name[:11] for path in tmp_path.iterdir()] == ["epoch-00001"]


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_can_not_run_code(tmp_path):
    planted = tmp_path / "planted"
    save_checkpoint(tmp_path, 1, {"outcome": Planted(planted)})
    with pytest.raises(ValueError, match=r"epoch-00001-.* holds more than weights"):
        load_newest_checkpoint(tmp_path)
    assert not planted.exists()


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


def test_weights_survive_with_their_recipe(tmp_path, small):
    recipe = small()
    trained = build_classifier(recipe)
    sha256 = save_weights(tmp_path / "w.safetensors", trained, recipe.model_dump_json())
    again = build_classifier(recipe.replace(seed=9))
    load_any_weights(tmp_path / "w.safetensors", again)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items()
    )
    assert recipe_json_of(tmp_path / "w.safetensors") == recipe.model_dump_json()
    assert save_weights(tmp_path / "v.safetensors", again, recipe.model_dump_json()) == sha256


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
    found = load_file(path)
    assert all(torch.equal(found[name], v) for name, v in classifier.state_dict().items())


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
            lambda: load_any_weights(path, classifier),
        ):
            with pytest.raises(ValueError, match=r"w\.safetensors"):
                load()


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_truncated_weights_are_refused_by_name(weights, kept):
    path, digest, _ = weights
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        stored_weights(str(path), digest)


def test_weights_of_another_trial_are_refused_by_both_digests(weights, small):
    path, digest, _ = weights
    other = small(seed=1).digest()
    assert stored_weights(str(path), digest) is not None
    with pytest.raises(ValueError, match=f"weights of trial {digest}, not of trial {other}"):
        stored_weights(str(path), other)


def test_weights_that_name_a_recipe_but_no_sha256_are_refused_and_foreign_ones_are_not(
    weights, tmp_path
):
    path, _, classifier = weights
    tensors, older = load_file(path), tmp_path / "older.safetensors"
    save_file(tensors, older, metadata={"recipe": recipe_json_of(path)})
    with pytest.raises(ValueError, match="is damaged, or of an older version"):
        load_any_weights(older, classifier)
    foreign = tmp_path / "foreign.safetensors"
    save_file(tensors, foreign, metadata={"format": "pt"})
    load_any_weights(foreign, classifier)


def test_weights_of_another_model_are_refused_by_their_keys(tmp_path, small):
    path = tmp_path / "w.safetensors"
    save_weights(path, build_classifier(small()), "{}")
    with pytest.raises(ValueError, match=r"first keys that differ: \['backbone"):
        fit_weights(load_file(path), build_classifier(small("deit")), path)
