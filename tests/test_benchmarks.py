"""Every benchmark, small: both sides must compute the same thing. No time is looked at."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import autoattack, corruptions, loader, training
from benchmarks.__main__ import BENCHMARKS, KEPT, figures, main, table
from benchmarks.measure import DisagreementError, Figure
from benchmarks.preemption import mean_lost
from tests.paper import resnet50
from trainables.running import MIDWAY_SECONDS

ROOT = Path(__file__).parents[1]


def test_checkpoints_within_epochs_and_notice_save_most_of_what_spot_instances_cost():
    # 0.4 losses an hour: of an hour's epochs each costs half an hour, and then some.
    assert 0.2 < mean_lost(3600.0, 0.0, studies=20) < 0.3
    assert mean_lost(MIDWAY_SECONDS, 0.9, studies=20) < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_sides_compute_the_same(name):
    if name == "pgd":
        pytest.importorskip("torchattacks")
    results = list(figures(name, quick=True))
    assert results
    for figure in results:
        assert figure.same
        assert all(math.isfinite(value) for value in figure.values)


def test_the_table_has_the_median_with_quartiles_and_says_if_the_target_is_not_reached():
    slower = Figure(name="a", values=(1.0, 2.0, 3.0, 4.0, 6.0), target=3.5, same="all")
    less = Figure(name="b", values=(3.0,), target=3.5, better="less", unit="s", same="all")
    rows = [vars(figure) | {"date": "2026-01-31", "commit": "abc"} for figure in (slower, less)]
    assert table({"pgd": rows}).splitlines()[2:] == [
        "| a | 3.00 [1.50, 5.00] x | 5 | at least 3.5, not reached | all | 2026-01-31, abc |",
        "| b | 3.00 s | 1 | at most 3.5 | all | 2026-01-31, abc |",
    ]


def test_the_published_speeds_are_those_that_are_stored():
    stored = table(json.loads(KEPT.read_text()))
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = re.findall(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", page)
    assert len(shown) > 10
    assert [figure for figure in shown if figure not in stored] == []


def test_an_unknown_benchmark_is_refused_with_the_list():
    with pytest.raises(SystemExit, match="unknown benchmark 'fast'; one of training"):
        main(["fast"])


def test_as_many_survivors_of_autoattack_are_not_the_same_survivors(monkeypatch):
    monkeypatch.setattr(autoattack, "trained", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(autoattack, "attacked_here", lambda _: [True, False] * 4)
    monkeypatch.setattr(autoattack, "attacked_plainly", lambda _: [False, True] * 4)
    with pytest.raises(DisagreementError, match="8 of 8 verdicts differ; 4 and 4 images survive"):
        next(autoattack.compare(quick=True))


def idle(*_):
    """Train nothing, epoch by epoch."""
    while True:
        yield


def test_a_loop_that_does_not_train_alike_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "bare_epochs", idle)
    monkeypatch.setattr(training, "timm_epochs", idle)
    with pytest.raises(DisagreementError, match="weights after the same batches"):
        training.beside_bare(*training.small(8), batch=4, repeats=1)
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
def test_training_measured_on_a_gpu_is_the_same_here(sides, compiled, same):
    figure = training.beside_bare(*sides(), batch=2, repeats=1, compiled=compiled)
    assert ("compiled" in figure.name) == compiled
    assert re.match(rf"{same} after \d steps of 2 images, ours .* a second on ", figure.same)


@pytest.mark.filterwarnings("ignore")
def test_a_loader_that_delivers_other_images_is_noticed(tmp_path):
    loader.write_images(tmp_path, 2 * loader.BATCH, (32, 32))
    _, train = loader.from_files(tmp_path, side=32)

    def epoch(change=lambda images, labels: (images, labels)):
        return [change(*batch) for batch in loader.timm_batches(tmp_path, 32)]

    assert "64 images" in loader.require_same_delivery(epoch(), epoch(), side=32)
    for change, differs in (
        (lambda images, labels: (images.float(), labels), "batches of"),
        (lambda images, labels: (images, labels * 0), "the labels"),
        (lambda images, labels: (images * 0, labels), "mean pixel"),
    ):
        with pytest.raises(DisagreementError, match=differs):
            loader.require_same_delivery(epoch(change), epoch(), side=32)
    loader.require_same_images(train, tmp_path)
    train.labels[3] += 1
    with pytest.raises(DisagreementError, match=f"the label of {train.ids[3]}"):
        loader.require_same_images(train, tmp_path)


@pytest.mark.parametrize(("kind", "moved"), [("pixelate", 0.02), ("fog", 0.1)])
def test_a_corruption_that_differs_is_named(kind, moved):
    clean = torch.full((1, 3, 32, 32), 0.5)
    corrupted, kinds = [clean + 0.2], [(kind, 3)]
    assert corruptions.require_alike(clean, kinds, corrupted, corrupted)
    with pytest.raises(DisagreementError, match=f"{kind}-3"):
        corruptions.require_alike(clean, kinds, [corrupted[0] + moved], corrupted)


@pytest.mark.slow
def test_the_cost_of_trials_is_measured_to_its_end():
    command = [sys.executable, "-m", "benchmarks.scale", "--trials", "10"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^ +10( +[\d.]+){9}$", ended.stdout, re.MULTILINE), ended.stdout
