"""Checkpoints and weights in a folder and on a real S3 server on loopback."""

from __future__ import annotations

import json

import pytest
import torch

from tests.servers import s3_bucket
from trainables.data.listing import EMBEDDED
from trainables.networks import build_classifier
from trainables.store.checkpoint import (
    load_newest_checkpoint,
    save_checkpoint,
    save_weights,
    stored_weights,
)
from trainables.store.storage import Folder, below, fetched, parted
from trainables.trial import RecipeTrial


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["folder", "s3"])
def where(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path)
    return below(request.getfixturevalue("bucket"), request.node.originalname)


def test_names_go_before_a_uris_query():
    assert below("/a/b/", "c", "d") == "/a/b/c/d"
    assert below("s3://grid?scheme=http", "c", "d") == "s3://grid/c/d?scheme=http"
    assert parted("s3://grid/c/d?scheme=http") == ("s3://grid/c?scheme=http", "d")
    assert parted("/a/b") == ("/a", "b")


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(where):
    place = below(where, "trial")
    assert load_newest_checkpoint(place) is None
    for epoch in (1, 2, 10):
        newest = save_checkpoint(place, epoch, {"epoch": epoch})
    folder = Folder(place)
    assert sorted(name[:11] for name in folder.names()) == ["epoch-00002", "epoch-00010"]
    folder.write(newest, folder.read(newest)[:-9])
    assert load_newest_checkpoint(place) == {"epoch": 2}
    assert newest.replace(".pt", ".damaged") in folder.names()


def test_a_checkpoint_and_weights_of_another_trial_are_refused(where, small):
    place, recipe, other = below(where, "trial"), small(), small(seed=1)
    kept = save_checkpoint(place, 1, {"digest": other.digest()})
    assert load_newest_checkpoint(place, recipe.digest()) is None
    assert kept.replace(".pt", ".foreign") in Folder(place).names()
    path = below(place, "weights.safetensors")
    save_weights(path, build_classifier(other), other.model_dump_json())
    with pytest.raises(ValueError, match=f"of trial {other.digest()}, not of trial"):
        stored_weights(path, recipe.digest())


def test_weights_are_stored_found_and_lent(where, small):
    path = below(where, "trial", "weights.safetensors")
    recipe = small()
    assert stored_weights(path, recipe.digest()) is None
    classifier = build_classifier(recipe)
    save_weights(path, classifier, recipe.model_dump_json())
    stored = stored_weights(path, recipe.digest())
    assert all(torch.equal(stored[k], v) for k, v in classifier.state_dict().items())
    with fetched(path) as here:
        assert here.name == "weights.safetensors"
        assert here.is_file()


def test_a_trial_goes_on_from_its_checkpoint_on_s3(
    bucket, small, few_digits, monkeypatch, tmp_path
):
    monkeypatch.setattr("trainables.data.load.load_data", lambda *_: few_digits)
    monkeypatch.setattr("trainables.running.CHECKPOINT_SECONDS", 0.0)
    recipe = small("deit", epochs=2)

    def actor(storage):
        trial = {
            "recipe": recipe.model_dump(mode="json"),
            "threads": 1,
            "device": "cpu",
            "compile": False,
            "hung_after": 60.0,
            "storage": storage,
        }
        return RecipeTrial({"trial": json.dumps(trial), "source": EMBEDDED})

    actor(bucket).step()
    resumed = actor(bucket).step()
    assert (resumed["epoch"], resumed["outcome"]) == (2, "finished")
    undisturbed = actor(str(tmp_path))
    undisturbed.step()
    assert undisturbed.step()["sha256"] == resumed["sha256"]


def test_storage_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="storage 'ftps://there' cannot be used"):
        Folder("ftps://there")
