"""Every benchmark, small: both sides must compute the same thing. No time is looked at."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import autoattack, corruptions, loader, pgd, training
from benchmarks.__main__ import BENCHMARKS, KEPT, figures, main, table
from benchmarks.measure import DisagreementError, Figure, require
from evaluators.base import Batch
from tests.paper import deit, resnet50
from trainables.scale import DIGITS, IMAGENET

ROOT = Path(__file__).parents[1]
SLOWER = Figure(name="a", values=(1.0, 2.0, 3.0, 4.0, 6.0), target=3.5, same="all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_sides_compute_the_same(name):
    if name == "pgd":
        pytest.importorskip("torchattacks")
    found = list(figures(name, quick=True))
    assert found
    for figure in found:
        assert figure.same
        assert all(math.isfinite(value) for value in figure.values)


def test_a_figure_is_a_median_with_quartiles_beside_its_target():
    assert SLOWER.spread() == "3.00 [1.50, 5.00]"
    assert not SLOWER.reached
    less = Figure(name="b", values=(3.0,), target=3.5, better="less", unit="s", same="all")
    assert less.reached
    assert less.spread() == "3.00"


def test_sides_that_differ_are_an_error():
    with pytest.raises(DisagreementError, match="3 of 4 verdicts"):
        require(False, "3 of 4 verdicts")


def test_the_table_says_what_was_not_reached():
    row = vars(SLOWER) | {"date": "2026-01-31", "commit": "abc"}
    last = table({"pgd": [row]}).splitlines()[-1]
    assert (
        last
        == "| a | 3.00 [1.50, 5.00] x | 5 | at least 3.5, not reached | all | 2026-01-31, abc |"
    )


def test_the_published_speeds_are_those_that_are_stored():
    kept = table(json.loads(KEPT.read_text()))
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = re.findall(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", page)
    assert len(shown) > 10
    assert [figure for figure in shown if figure not in kept] == []


def test_an_unknown_benchmark_is_refused_with_the_list():
    with pytest.raises(SystemExit, match="unknown benchmark 'fast'; one of training"):
        main(["fast"])


def only(outcomes):
    """Return a side of AutoAttack's benchmark of which so many images survive, whatever it gets."""
    return lambda *_, **__: outcomes


def test_as_many_survivors_of_autoattack_are_not_the_same_survivors(monkeypatch):
    monkeypatch.setattr(autoattack, "trained", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(autoattack, "attacked_here", only([True, False] * 4))
    monkeypatch.setattr(autoattack, "attacked_plainly", only([False, True] * 4))
    with pytest.raises(DisagreementError, match="8 of 8 verdicts differ; 4 and 4 images survive"):
        next(autoattack.compare(quick=True))


def idle(*_):
    """Train nothing, epoch by epoch."""
    while True:
        yield


def slower(side):
    """Return a side of the training benchmark that steps at another rate."""
    return lambda *given: side(*given[:-3], given[-3].replace(learning_rate=0.01), *given[-2:])


@pytest.mark.parametrize("broken", [lambda _: idle, slower])
def test_a_bare_loop_that_does_not_train_alike_is_noticed(monkeypatch, broken):
    monkeypatch.setattr(training, "bare_epochs", broken(training.bare_epochs))
    with pytest.raises(DisagreementError, match="weights after the same batches"):
        training.beside_bare(*training.small(8), batch=4, repeats=1)


@pytest.mark.parametrize("broken", [lambda _: idle, slower])
def test_timms_loop_that_does_not_train_alike_is_noticed(monkeypatch, tmp_path, broken):
    monkeypatch.setattr(training, "timm_epochs", broken(training.timm_epochs))
    with pytest.raises(DisagreementError, match="weights after the same batches"):
        next(training.beside_timm(tmp_path, repeats=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "compiled", "same"),
    [
        (lambda: training.full_size(resnet50(), "bf16", 4), False, "the same weights, each bit,"),
        (lambda: training.small(8), True, r"weights within \de-\d\d of their way"),
    ],
)
def test_what_is_measured_on_a_gpu_trains_alike_here(sides, compiled, same):
    found = training.beside_bare(*sides(), batch=2, repeats=1, compiled=compiled)
    assert ("compiled" in found.name) == compiled
    assert re.match(rf"{same} after \d steps of 2 images, ours .* a second on ", found.same)


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_attacks_alike_here():
    pytest.importorskip("torchattacks")
    recipes = [DIGITS.shrink(recipe) for recipe in (resnet50(), deit())]
    for recipe in recipes:
        classifier, images, labels = pgd.untrained(recipe, 2)
        batch = Batch(images, labels, ("0", "1"))
        attack = pgd.Attack(classifier, batch, IMAGENET, epsilon=4 / 255, step_size=1 / 255)
        found = pgd.beside_torchattacks(recipe.model, attack, repeats=1)
        assert found.same.startswith(
            "0 of 8 verdicts differ, 0 of theirs from start to start, ours "
        )
    standing = replace(autoattack.unbreakable(recipes[1], 2), queries=5)
    found = autoattack.beside_pyautoattack("deit_small", standing, repeats=1)
    assert found.same.startswith("0 of 2 verdicts differ; 2 and 2 images survive, ours ")


class Shorter(training.TimmBatches):
    def __iter__(self):
        return iter(list(super().__iter__())[1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fewer_images_on_one_side_of_a_training_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "TimmBatches", Shorter)
    with pytest.raises(DisagreementError, match="trained on"):
        next(training.beside_timm(tmp_path, repeats=1))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two batches of JPEGs of 32 px, their recipe and train images."""
    root = tmp_path_factory.mktemp("files")
    loader.write_images(root, 2 * loader.BATCH, (32, 32))
    return root, *loader.from_files(root, side=32)


def epoch_of(files, change=lambda images, labels: (images, labels)):
    """Return timm's epoch of the files, each batch changed."""
    return [change(*batch) for batch in loader.timm_batches(files[0], 32, shifted=False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda images, labels: (images[:, :, ::2], labels), "batches of"),
        (lambda images, labels: (images.float(), labels), "batches of"),
        (lambda images, labels: (images, labels * 0), "the labels"),
        (lambda images, labels: (images * 0, labels), "mean pixel"),
    ],
)
def test_a_loader_that_delivers_otherwise_is_noticed(files, change, differs):
    assert "64 images" in loader.require_same_delivery(epoch_of(files), epoch_of(files), side=32)
    with pytest.raises(DisagreementError, match=differs):
        loader.require_same_delivery(epoch_of(files, change), epoch_of(files), side=32)


@pytest.mark.filterwarnings("ignore")
def test_other_pixels_or_labels_behind_a_loader_are_noticed(files):
    root, _, train = files
    kept = loader.in_memory(train)
    loader.require_same_images(kept, root)
    kept.images[7, 0, 0, 0] += 1
    with pytest.raises(DisagreementError, match=f"pixels of {train.ids[7]}"):
        loader.require_same_images(kept, root)
    train.labels[3] += 1
    with pytest.raises(DisagreementError, match=f"the label of {train.ids[3]}"):
        loader.require_same_images(train, root)


@pytest.mark.parametrize(("kind", "moved"), [("pixelate", 0.02), ("fog", 0.1)])
def test_a_corruption_that_differs_is_named(kind, moved):
    clean = torch.full((1, 3, 32, 32), 0.5)
    found, asked = [clean + 0.2], [(kind, 3)]
    assert corruptions.require_alike(clean, asked, found, found)
    with pytest.raises(DisagreementError, match=f"{kind}-3"):
        corruptions.require_alike(clean, asked, [found[0] + moved], found)


@pytest.mark.slow
def test_the_cost_of_trials_is_measured_to_its_end():
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--trials", "10", "--without-ray"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    row = r"^ +10( +[\d.]+){6} +- +-$"
    assert re.search(row, ended.stdout, re.MULTILINE), ended.stdout
