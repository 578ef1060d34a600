"""Adversarial images of one model that others judge: made, kept, read, and laid out as a matrix."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction

import pandas as pd
import pyarrow.compute as pc
import pytest
import torch

from evaluators import evaluator_named
from evaluators.base import judge_images
from evaluators.ledger import from_parquet, in_order, to_parquet
from evaluators.transfer import received, whole_255ths
from grid.estimate import work_of
from grid.plan import build_plan
from grid.record import Recorder
from grid.report.build import write_report
from grid.report.transfer import kind_of
from grid.status import ProgressLine, open_tracker
from grid.study import base_named, load_study
from tests.made_up import record
from tests.test_damaged_ledgers import ledger_of, run_again
from trainables.data.base import Data, Shard, Split
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.scale import DIGITS

CPU = torch.device("cpu")
EPSILON = 27  # of 255, at scale digits
STUDY = """
name = "pair"
base = ["resnet50", "deit_small"]
evaluators = ["clean", "transfer"]
"""


class OfChannel(torch.nn.Module):
    """Class 1 where the mean of one channel is above 0.5; it counts the images that it sees."""

    def __init__(self, channel):
        super().__init__()
        self.channel, self.seen = channel, 0

    def forward(self, images):
        self.seen += len(images)
        above = images[:, self.channel].mean(dim=(1, 2)) - 0.5
        return 100 * torch.stack([-above, above], dim=1)


def model(channel):
    return Classifier(OfChannel(channel), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def greys():
    """Four images of class 1: within the radius of the boundary, wrong, and twice beyond it."""
    values = torch.tensor([140, 120, 200, 250], dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).repeat(1, 3, 16, 16)
    split = Split(images=images, labels=torch.ones(4, dtype=torch.long), ids=tuple("abcd"))
    return Data(data_set=DIGITS.data_set, train=split, held_out=split, class_names=("0", "1"))


def of(data, channel=0):
    """Return the ledger of a model's own adversarial images."""
    return judge_images(evaluator_named("transfer", DIGITS), model(channel), data, device=CPU)


def receiving(contents, scale=DIGITS):
    sources = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    settings = {"sources": sources, "read": contents.__getitem__}
    return evaluator_named("transfer", scale, **settings)


def survived(ledger, question):
    rows = in_order(ledger.filter(pc.equal(ledger["question"], question)))
    return rows["survived"].to_pylist()


def test_images_transfer_to_the_model_of_the_same_channel_and_not_to_that_of_another(greys):
    """The attack moves one channel to the edge of the ball; the others keep their random start."""
    own = of(greys)
    assert survived(own, "transfer/clean") == [True, False, True, True]
    assert survived(own, "transfer") == [False, False, True, True]
    contents = {"first": to_parquet(own, seconds=1.0), "other": to_parquet(of(greys, 1), seconds=1)}
    evaluator, judge = receiving(contents), model(0)
    assert evaluator.total(greys) == 3
    ledger = judge_images(evaluator, judge, greys, device=CPU)
    assert survived(ledger, "transfer/clean") == [True, False, True, True]
    assert survived(ledger, "transfer/first") == [False, False, True, True]
    assert survived(ledger, "transfer/other") == [True, False, True, True]
    # One pass an image: as they are, and of both sources; and one that shows how wide the head is.
    assert judge.backbone.seen == 3 * 4 + 1
    shards = (Shard(0, 1), Shard(1, 3))
    parts = [judge_images(evaluator, model(0), greys, device=CPU, shard=s) for s in shards]
    together = in_order(type(ledger).from_batches([b for p in parts for b in p.to_batches()]))
    by_question = [("question", "ascending"), ("image_id", "ascending")]
    assert together.sort_by(by_question).equals(ledger.sort_by(by_question))


def test_kept_images_are_judged_as_they_are_kept_and_lie_within_the_ball(greys):
    evaluator = receiving({"first": to_parquet(of(greys), seconds=1.0)})
    kept = evaluator._images_of("first", greys)
    moved = kept.images.int() - greys.held_out.images.int()
    assert kept.images.dtype == torch.uint8
    assert int(moved.abs().max()) == EPSILON
    assert moved[:, 0].unique().tolist() == [-EPSILON]


def test_the_nearest_whole_255ths_lie_within_the_ball_and_from_black_to_white():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 8, 8, generator=generator)  # floats of a user, and bytes
    images[:8] = (255 * images[:8]).round() / 255
    for epsilon in (1 / 255, 8.5 / 255, 27 / 255):
        points = images + epsilon * (2 * torch.rand(images.shape, generator=generator) - 1)
        points = points.clamp(0, 1)
        whole = whole_255ths(images, points, epsilon)
        assert torch.equal((255 * whole).round() / 255, whole)
        assert 0 <= whole.min() <= whole.max() <= 1
        assert float((whole - images).abs().max()) <= epsilon + 4e-6
        assert float((whole - points).abs().max()) <= 1.01 / 255
    inside = torch.full((1, 1, 1, 1), 100.4 / 255)
    assert float(whole_255ths(inside, inside + 0.7 / 255, 1 / 255)) == pytest.approx(101 / 255)


def test_images_of_other_classes_or_another_size_and_too_small_a_radius_are_refused(greys):
    content = {"other": to_parquet(of(greys), seconds=1.0)}
    held_out = replace(greys.held_out, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="has label 1 there and is of label 0 here; judge both"):
        judge_images(receiving(content), model(0), replace(greys, held_out=held_out), device=CPU)
    held_out = replace(greys.held_out, ids=tuple("wxyz"))
    with pytest.raises(ValueError, match="a has label 1 there and is unknown here"):
        judge_images(receiving(content), model(0), replace(greys, held_out=held_out), device=CPU)
    larger = replace(DIGITS, data_set=replace(DIGITS.data_set, image_size=32))
    with pytest.raises(ValueError, match=r"other have 16 x 16 px, and this model takes 32"):
        judge_images(receiving(content, larger), model(0), greys, device=CPU)
    with pytest.raises(ValueError, match=r"within 0\.255/255 no other image has whole 255ths"):
        evaluator_named("transfer", replace(DIGITS, epsilon=Fraction(1, 1000)))


def test_a_plan_counts_the_passes_of_the_attack_and_of_every_models_images(recorded):
    *_, plan = recorded
    work = work_of(plan, DIGITS, 597)
    for trial in plan:
        # Ten steps of two, the image before and after; then as it is, and of two models.
        passes = 64 * (20 + 2 + 1 + 2)
        third = DIGITS.epoch_cost(trial.recipe) / DIGITS.data_set.train_images / 3
        assert work[trial.digest, "transfer"] == pytest.approx(passes * third)


def received_of(plan):
    return received(trial.digest for trial in plan)


def recorder(tracker, study, plan):
    line = ProgressLine()
    return Recorder(
        tracker, plan, study=study.name, scale=DIGITS, data=load_data(DIGITS), line=line
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    path = folder / "pair.toml"
    path.write_text(STUDY)
    study = load_study(str(path))
    plan = build_plan(study, DIGITS)
    return folder, record(folder / "results", study, plan), study, plan


def test_every_model_judges_all_once_all_have_kept_theirs(recorded):
    folder, tracker, study, plan = recorded
    for run in tracker.trials().values():
        assert {*run.cells} == {"clean", "transfer", received_of(plan)}
    assert recorder(tracker, study, plan).is_all_done
    write_report(tracker, study, plan, DIGITS, folder)
    pairs = pd.read_csv(folder / "transfer.csv")
    assert [*pairs["kinds"]] == ["CNN to CNN", "transformer to CNN", "CNN to transformer",
                                 "transformer to transformer"]  # fmt: skip
    cnn, transformer = sorted(plan, key=lambda trial: kind_of(trial.recipe))
    verdicts, _ = from_parquet(tracker.ledger(tracker.trials()[cnn.digest], received_of(plan)))
    right = survived(verdicts, "transfer/clean")
    theirs = survived(verdicts, f"transfer/{transformer.digest}")
    broken = [not s for s, was_right in zip(theirs, right, strict=True) if was_right]
    assert pairs["n"][1] == len(broken) == sum(right) < 64
    assert pairs["value"][1] == pytest.approx(sum(broken) / len(broken))
    page = (folder / "index.html").read_text()
    assert f"transformer to CNN: {100 * sum(broken) / len(broken):.1f} % [" in page
    assert (folder / "plots" / "transfer-matrix.svg").exists()


def test_damaged_images_are_made_again(recorded, tmp_path):
    folder, tracker, study, plan = recorded
    path = ledger_of(tracker, plan.trials[0], "transfer")
    path.write_bytes(path.read_bytes()[:-9])
    write_report(tracker, study, plan, DIGITS, tmp_path)
    tracker = open_tracker(folder / "results", None, DIGITS)
    assert not recorder(tracker, study, plan).is_all_done
    # Their ledger is the one from before, to the bit: nobody need judge it again.
    assert run_again(tracker, study, plan) == 1
    assert recorder(tracker, study, plan).is_all_done


def test_another_model_is_judged_by_all_and_one_that_collapsed_by_none(recorded, tmp_path):
    folder, *_ = recorded
    path = tmp_path / "three.toml"
    path.write_text(STUDY.replace('"deit_small"', '"deit_small", "hybrid_deit"'))
    study = load_study(str(path))
    plan = build_plan(study, DIGITS)
    tracker = record(folder / "results", study, plan)
    runs = tracker.trials().values()
    assert all({"clean", "transfer", received_of(plan)} <= {*run.cells} for run in runs)
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert len(pd.read_csv(tmp_path / "transfer.csv")) == 9
    tracker = record(tmp_path / "results", study, plan, collapsed=1)
    write_report(tracker, study, plan, DIGITS, tmp_path)
    assert len(pd.read_csv(tmp_path / "transfer.csv")) == 4
    name = plan.trials[-1].name
    assert f"Not judged, so missing here: {name}." in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("base", "kind"),
    [("resnet50", "CNN"), ("deit_small", "transformer"), ("hybrid_deit", "transformer")],
)
def test_models_are_of_a_kind_by_their_names(base, kind):
    assert kind_of(base_named(base)) == kind
    convnext = base_named("resnet50").replace(model="convnext_tiny")
    assert kind_of(convnext) == "CNN"
