"""Published sets that nothing stands in for: read as published, and named where they lack."""

import os
from dataclasses import replace

import pytest
import timm.data
import torch
from PIL import Image
from torch import nn

from evaluators import column_named, evaluator_named
from evaluators.base import judge_images
from grid.check import check
from grid.plan import build_plan
from grid.report.tables import tables_of
from grid.study import load_study
from tests.test_shifts import CPU, classifier
from trainables.data.base import Data, Split
from trainables.data.listing import DataSource, class_list
from trainables.data.registry import STORED_SETS
from trainables.layers import Classifier
from trainables.scale import DIGITS, IMAGENET
from trainables.store.tracking import TrialRun

CONTEST = load_study("pretrained-contest")
CLASSES = tuple(timm.data.ImageNetInfo().label_names())
ALONE = {name: stored for name, stored in STORED_SETS.items() if stored.alone}
NONE = Split(images=torch.empty(0), labels=torch.empty(0), ids=())
IMAGENET_16 = replace(IMAGENET.data_set, image_size=16)


# The likeliest class is 0, the tench, of which ImageNet-R has no renditions; then the goldfish, 1.
TENCH = classifier(2.0, 1.0, *[0.0] * 998)


def write_set(root, names, *, per_class=1):
    """Write hard links of one image in folders of these names."""
    root.mkdir()
    Image.new("RGB", (16, 16)).save(root / "one.png")
    for folder in (root / name for name in names):
        folder.mkdir()
        for number in range(per_class):
            os.link(root / "one.png", folder / f"{number}.png")
    return root


def imagenet(**roots):
    """Return ImageNet's classes at 16 px, with no images but those of stored sets."""
    held_out = Split(
        images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8), labels=torch.tensor([0]), ids=("a",)
    )
    names = {name.replace("_", "-"): path for name, path in roots.items()}
    return Data(
        data_set=IMAGENET_16, train=NONE, held_out=held_out, class_names=CLASSES, roots=names
    )


def test_renditions_are_judged_among_their_200_classes_and_among_all(tmp_path):
    renditions = class_list("imagenet_r_synsets.txt")
    data = imagenet(imagenet_r=write_set(tmp_path / "r", renditions, per_class=2))
    evaluator = evaluator_named("imagenet-r", IMAGENET)
    ledger = judge_images(evaluator, TENCH, data, device=CPU)
    scores = {score.name: (score.value, score.n) for score in evaluator.summarize(ledger)}
    assert scores == {"imagenet-r": (2 / 400, 400), "imagenet-r-1000": (0.0, 400)}
    assert evaluator.identity(data)["data"] == "ImageNet-R"
    assert column_named("imagenet-r-1000").title == "ImageNet-R, among all 1,000"


def test_renditions_are_scored_as_their_authors_score_them(tmp_path):
    """eval.py of hendrycks/imagenet-r: the logits under a mask, and folders numbered by name."""
    renditions = sorted(class_list("imagenet_r_synsets.txt"))
    root = write_set(tmp_path / "r", renditions)
    draw = torch.Generator().manual_seed(0)
    colours_N3 = torch.randint(0, 256, (200, 3), generator=draw)
    for name, colour in zip(renditions, colours_N3.tolist(), strict=True):
        (root / name / "0.png").unlink()
        Image.new("RGB", (16, 16), tuple(colour)).save(root / name / "0.png")
    linear = nn.Linear(3, 1000, bias=False)
    linear.weight.data = torch.randn(1000, 3, generator=draw)
    model = Classifier(nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), linear), (0,) * 3, (1,) * 3)
    mask = torch.tensor([name in renditions for name in CLASSES])
    with torch.no_grad():
        answers_N = linear(colours_N3 / 255)[:, mask].argmax(dim=1)
    evaluator, data = evaluator_named("imagenet-r", IMAGENET), imagenet(imagenet_r=root)
    ledger = judge_images(evaluator, model, data, device=CPU)
    rows = {r["image_id"]: r for r in ledger.to_pylist() if r["question"] == "imagenet-r"}
    ours = [rows[f"{name}/0"]["predicted"] for name in renditions]
    assert ours == [CLASSES.index(renditions[answer]) for answer in answers_N]
    assert len(set(ours)) > 4


def test_folders_of_imagenet_v2_are_the_numbers_of_their_classes(tmp_path):
    """Sorted as text, folder 10 would be the third."""
    root = write_set(tmp_path / "v2", map(str, range(1000)), per_class=10)
    evaluator, data = evaluator_named("imagenet-v2", IMAGENET), imagenet(imagenet_v2=root)
    split = evaluator.images(data)
    labels = dict(zip(split.ids, split.labels.tolist(), strict=True))
    assert (labels["2/0"], labels["10/9"], labels["999/0"]) == (2, 10, 999)
    assert len(labels) == evaluator.total(data) == 10_000
    some = replace(data, class_names=CLASSES[10:12])
    assert set(evaluator.images(some).ids) == {f"{c}/{n}" for c in (10, 11) for n in range(10)}
    (root / "10" / "0.png").unlink()
    with pytest.raises(ValueError, match="holds 9999 images instead of 10000: fetch it again"):
        evaluator.images(data)
    (root / "10").rename(root / "1000")
    with pytest.raises(ValueError, match=r"lacks 1 classes; first: \['n01530575'\]"):
        evaluator.images(data)


@pytest.mark.parametrize("name", ALONE)
def test_a_set_in_its_own_folders_is_judged_whole(tmp_path, name):
    known = class_list(ALONE[name].classes)
    data = imagenet(**{name: write_set(tmp_path / name, known)})
    data = replace(data, data_set=replace(IMAGENET_16, generated=True))
    evaluator = evaluator_named(name, IMAGENET)
    scores = evaluator.summarize(judge_images(evaluator, TENCH, data, device=CPU))
    assert (scores[0].name, scores[0].value, scores[0].n) == (name, 1 / len(known), len(known))
    assert evaluator.cost(50_000, withstanding=0.5) == ALONE[name].images


def test_what_is_wrong_with_a_set_is_found_before_a_run(tmp_path):
    for part in ("train", "val"):
        write_set(tmp_path / part, CLASSES)
    root = write_set(tmp_path / "imagenet-r", class_list("imagenet_r_synsets.txt"))
    source, plan = DataSource(root=tmp_path), build_plan(CONTEST, IMAGENET)

    def said():
        findings, _ = check(IMAGENET, source, plan, results=tmp_path / "results")
        return {level: text for subject, level, text in findings if subject == "imagenet-r"}

    assert said() == {"warning": "200 images of 200 classes (as published: 30,000)"}
    damaged = root / "n01443537" / "cut.png"
    damaged.write_bytes((root / "one.png").read_bytes()[:40])
    unreadable = f"1 unreadable images in 1 classes, the first {damaged} (class n01443537)"
    assert unreadable in said()["error"]
    damaged.unlink()
    (root / "n01443537").rename(root / "n01440764")
    wrong = "is not ImageNet-R: it lacks 1 of 200 classes, the first 'n01443537', and has 1 foreign"
    assert wrong in said()["error"]


def test_a_scale_without_a_set_judges_nothing_by_it_and_says_so():
    plan = build_plan(CONTEST, DIGITS)
    assert not {name for trial in plan for name in trial.evaluators} & ALONE.keys()
    (note,) = [note for note in plan.notes if "images are not there" in note]
    assert note.endswith("judged by imagenet-r, imagenet-sketch, imagenet-v2")
    trial = next(t for t in plan if "resnet50.tv_in1k" in t.name and not t.recipe.seed)
    run = TrialRun("id", trial.digest, "finished", "", "", 0, 0, "")
    (filled,) = tables_of(CONTEST, plan, {run.digest: run})
    place = filled.columns.index("ImageNet-R")
    cell = next(row for row in filled.rows if row.label == "resnet50.tv_in1k").cells[place]
    assert (cell.text(), cell.published, cell.kind) == ("needs ImageNet-R", 36.157, "needs")
    with pytest.raises(ValueError, match="images of imagenet-v2 are not there: --stored imagenet"):
        build_plan(CONTEST, DIGITS, evaluators=["imagenet-v2"])


def test_a_cell_that_waits_is_not_said_to_need_its_images():
    plan = build_plan(CONTEST, IMAGENET)
    run = TrialRun("id", plan.trials[0].digest, "finished", "", "", 0, 0, "")
    (filled,) = tables_of(CONTEST, plan, {run.digest: run})
    place = filled.columns.index("ImageNet-R")
    assert {row.cells[place].text() for row in filled.rows} == {"not judged yet", "not run yet"}


def test_a_set_that_data_lack_is_left_out_and_one_that_is_there_is_judged(tmp_path):
    write_set(tmp_path / "elsewhere", ["0"])
    source = DataSource(root=tmp_path, stored=(("imagenet-v2", tmp_path / "elsewhere"),))
    plan = build_plan(CONTEST, IMAGENET, source=source)
    judging = {name for trial in plan for name in trial.evaluators}
    assert judging & ALONE.keys() == {"imagenet-v2"}
    whole = build_plan(CONTEST, IMAGENET)  # without data, a plan is of all
    assert {name for trial in whole for name in trial.evaluators} >= ALONE.keys()
    with pytest.raises(ValueError, match="imagenet-r needs ImageNet-R: --stored imagenet-r=DIR"):
        evaluator_named("imagenet-r", IMAGENET).images(imagenet())
