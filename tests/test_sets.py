"""Published sets that nothing stands in for: read as published, and named where they lack."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from evaluators import column_named, evaluator_named
from evaluators.base import judge_images
from evaluators.calibration import detection_scores
from evaluators.ledger import by_question
from grid.check import check
from grid.plan import build_plan
from grid.report.tables import tables_of
from grid.study import load_study
from tests.test_shifts import CPU, classifier
from trainables.data.base import Data, Split
from trainables.data.listing import DataSource, class_list
from trainables.data.load import CorruptedSet
from trainables.data.registry import KINDS, STORED_SETS, StoredSet, folder_data_set
from trainables.layers import Classifier
from trainables.scale import DIGITS, IMAGENET
from trainables.store.tracking import TrialRun

CONTEST = load_study("pretrained-contest")
CLASSES = tuple(timm.data.ImageNetInfo().label_names())
ALONE = {name: stored for name, stored in STORED_SETS.items() if stored.alone}
IN_FOLDERS = ("imagenet-r", "imagenet-sketch", "imagenet-v2")
OF_KINDS = ("imagenet-c-bar", "imagenet-3dcc")
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


@pytest.mark.parametrize("name", IN_FOLDERS)
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

    def said(*names):
        findings, _ = check(IMAGENET, source, plan, results=tmp_path / "results")
        levels = [{k: text for s, k, text in findings if s == name} for name in names]
        return levels if names else {k: text for s, k, text in findings if s == "imagenet-r"}

    assert said() == {"warning": "200 images of 200 classes (as published: 30,000)"}
    damaged = root / "n01443537" / "cut.png"
    damaged.write_bytes((root / "one.png").read_bytes()[:40])
    unreadable = f"1 unreadable images in 1 classes, the first {damaged} (class n01443537)"
    assert unreadable in said()["error"]
    damaged.unlink()
    (root / "n01443537").rename(root / "n01440764")
    wrong = "is not ImageNet-R: it lacks 1 of 200 classes, the first 'n01443537', and has 1 foreign"
    assert wrong in said()["error"]
    real_labels(tmp_path / "imagenet-real", [], 49_999)
    (tmp_path / "objectnet").mkdir()
    write_set(tmp_path / "objectnet" / "images", [*STORED_SETS["objectnet"].groups][:-1])
    for part in STORED_SETS["imagenet-d"].parts:
        write_colours(tmp_path / "imagenet-d" / part, [*STORED_SETS["imagenet-d"].groups, "dragon"])
    for kind in ("glitched", "mosaic"):
        write_colours(tmp_path / "laion-c" / kind / "intensity_level_1", ["dog"])
    write_colours(tmp_path / "ood", ["sky", "wall"])
    real, objectnet, imagenet_d, laion_c, ood = said(
        *("imagenet-real", "objectnet", "imagenet-d", "laion-c", "ood")
    )
    assert "real.json has labels of 49999 images, not of 50000" in real["error"]
    assert "lacks 1 classes; first: ['wok']" in objectnet["error"]
    assert "has 1 foreign ones, the first 'dragon'" in imagenet_d["error"]
    assert "lacks 28 of 30: glitched/intensity_level_2, " in laion_c["error"]
    assert "2 images are smaller than 224 px" in ood["warning"]


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
    assert {name for trial in whole for name in trial.evaluators} >= {*IN_FOLDERS}
    with pytest.raises(ValueError, match="imagenet-r needs ImageNet-R: --stored imagenet-r=DIR"):
        evaluator_named("imagenet-r", IMAGENET).images(imagenet())


# Sets whose classes are groups of ImageNet's, sets of kinds, and reassessed labels.


def write_colours(root, folders, *, border=0):
    """Write an image of one colour, maybe with a red border, into each folder; return the colours.

    The colours follow from the folders' number alone.
    """
    draw = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (len(folders), 3), generator=draw).tolist()
    for folder, colour in zip(folders, colours, strict=True):
        (root / folder).mkdir(parents=True)
        image = Image.new("RGB", (16 + 2 * border,) * 2, (255, 0, 0))
        image.paste(Image.new("RGB", (16, 16), tuple(colour)), (border, border))
        image.save(root / folder / "0.png")
    return torch.tensor(colours) / 255


def by_colour(groups=(), colours_N3=()):
    """Return a model of 1,000 classes that answers by the mean colour, and its linear layer.

    Every second group's last place knows the group's colour; the tench is taken for the second.
    """
    linear = nn.Linear(3, 1000, bias=False)
    linear.weight.data = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
    places = [[*known_places(ranges)][-1] for ranges in groups]
    for place, colour in [*zip(places, colours_N3, strict=True)][::2]:
        linear.weight.data[place] = 99 * nn.functional.normalize(colour, dim=0)
    if places:
        linear.weight.data[0] = 99 * nn.functional.normalize(colours_N3[1], dim=0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    return Classifier(model, (0,) * 3, (1,) * 3), linear


def judged(name, model, data):
    evaluator = evaluator_named(name, IMAGENET)
    ledger = judge_images(evaluator, model, data, device=CPU)
    assert len(next(iter(by_question(ledger).values()))) == evaluator.total(data)
    return ledger, {s.name: s for s in evaluator.summarize(ledger)}


def test_objectnet_is_answered_among_all_classes_and_mapped_as_its_authors_do(tmp_path):
    """objectnet_eval.py: the likeliest of 1,000 is mapped, or is -1; validate_and_score.py: ==."""
    known = STORED_SETS["objectnet"]
    folders = [*known.groups, "air_freshener"]  # one of the 200 that are no class of ImageNet
    colours_N3 = write_colours(tmp_path / "images", folders, border=2)[:-1]
    model, linear = by_colour(known.groups.values(), colours_N3)
    data = imagenet(objectnet=tmp_path)
    shown_N3 = evaluator_named("objectnet", IMAGENET).images(data).images[:][..., 0, 0] / 255
    assert torch.equal(shown_N3, colours_N3)  # nothing of the red border
    mapping = {
        place: name for name, places in known.groups.items() for place in known_places(places)
    }
    with torch.no_grad():
        answers = [mapping.get(place, -1) for place in linear(colours_N3).argmax(1).tolist()]
    right = sum(answer == name for answer, name in zip(answers, known.groups, strict=True))
    ledger, scores = judged("objectnet", model, data)
    assert (scores["objectnet"].value, scores["objectnet"].n) == (right / 113, 113)
    names = [*known.groups]
    ours = {row["image_id"].partition("/")[0]: row["predicted"] for row in ledger.to_pylist()}
    assert [ours[name] for name in names] == [names.index(a) if a != -1 else -1 for a in answers]
    assert -1 in ours.values()
    assert 57 <= right < 113


def known_places(ranges):
    """Read ranges otherwise than the product does."""
    for part in ranges.split():
        first, *last = map(int, part.split("-"))
        yield from range(first, (last or [first])[0] + 1)


def test_imagenet_d_is_right_where_the_answer_is_one_of_its_classes(tmp_path):
    """evaluate_imagenet_models.py: top 1 among all equals one of the folder's places, by part."""
    known = STORED_SETS["imagenet-d"]
    colours = {part: write_colours(tmp_path / part, [*known.groups]) for part in known.parts}
    model, linear = by_colour(known.groups.values(), colours["texture"])
    right = {}
    for part, colours_N3 in colours.items():
        with torch.no_grad():
            places = linear(colours_N3).argmax(1).tolist()
        pairs = zip(places, known.groups.values(), strict=True)
        right[part] = sum(place in known_places(ranges) for place, ranges in pairs)
    _, scores = judged("imagenet-d", model, imagenet(imagenet_d=tmp_path))
    assert scores["imagenet-d"].n == 3 * 113
    assert scores["imagenet-d"].value == pytest.approx(sum(right.values()) / 339)
    assert {p: scores[f"imagenet-d/{p}"].value * 113 for p in right} == pytest.approx(right)
    assert sum(right.values()) >= 3 * 57


def test_laion_c_is_answered_by_the_greatest_mean_probability(tmp_path):
    """evaluation.py: the mean of each superclass's probabilities, after a softmax over 1,000."""
    known = STORED_SETS["laion-c"]
    model, linear = by_colour()
    right = {}
    for kind in known.kinds:
        for level in range(1, 6):
            folder = tmp_path / kind / f"intensity_level_{level}"
            colours_N3 = write_colours(folder, [*known.groups])[torch.arange(16)]
            for name, image in zip(known.groups, colours_N3, strict=True):
                with torch.no_grad():
                    p_K = linear(image).softmax(0)
                means = {n: p_K[[*known_places(r)]].mean().item() for n, r in known.groups.items()}
                right[kind] = right.get(kind, 0) + (max(means, key=means.get) == name)
    _, scores = judged("laion-c", model, imagenet(laion_c=tmp_path))
    assert {k: scores[f"laion-c/{k}"].value * 80 for k in right} == pytest.approx(right)
    assert scores["laion-c"].value == pytest.approx(sum(right.values()) / 480)
    assert (scores["laion-c"].n, right["glitched"] > 0) == (16, True)


@pytest.mark.parametrize("name", OF_KINDS)
def test_a_set_of_kinds_is_the_mean_over_kinds_and_severities(tmp_path, name):
    """Of two classes the darker ones are right at severities 1 and 2 alone."""
    known = STORED_SETS[name]
    for kind in known.kinds:
        for severity in range(1, 6):
            for label, wordnet_id in enumerate(CLASSES[:2]):
                folder = tmp_path / kind / str(severity) / wordnet_id
                folder.mkdir(parents=True)
                value = 255 if label else 50 * severity  # the answer is 1 above 127
                Image.new("RGB", (16, 16), (value,) * 3).save(
                    folder / "ILSVRC2012_val_00000293.png"
                )
    linear = nn.Linear(1, 1000)
    linear.weight.data.zero_()[1] = 1.0
    linear.bias.data.fill_(-9.0)[:2] = torch.tensor([0.5, 0.0])
    layers = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), linear)
    data = replace(imagenet(**{name: tmp_path}), class_names=CLASSES[:2])
    data = replace(data, data_set=replace(IMAGENET_16, generated=True))
    _, scores = judged(name, Classifier(layers, (0,) * 3, (1,) * 3), data)
    assert len(scores) == 1 + len(known.kinds)
    assert all((s.value, s.n) == (pytest.approx(0.7), 2) for s in scores.values())
    evaluator = evaluator_named(name, IMAGENET)
    assert evaluator.cost(50_000, withstanding=0) == 50_000 * 5 * len(known.kinds)
    (tmp_path / known.kinds[0] / "3").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=f"lacks 1 of {5 * len(known.kinds)}: {known.kinds[0]}/3"):
        evaluator.identity(data)


def test_tiny_imagenet_c_is_the_corruptions_of_an_entry_that_names_it(tmp_path):
    for kind in KINDS:
        for severity in range(1, 6):
            write_colours(tmp_path / kind / str(severity), ["n01", "n02"])
    entry = folder_data_set(image_size=64, num_classes=2, train_images=9, content="0" * 8)
    data = Data(
        data_set=replace(entry, counterparts=("tiny-imagenet-c",)),
        **{"train": NONE, "held_out": NONE, "class_names": ("n01", "n02")},
        roots={"tiny-imagenet-c": tmp_path},
    )
    parts = CorruptedSet(*data.counterpart("corruptions"), data)
    with pytest.raises(ValueError, match="is 16 x 16 px, not 64 x 64"):
        next(parts.splits())[1].images[:]


def real_labels(tmp_path, first, images=50_000):
    """Write labels of the first images, none of the others."""
    tmp_path.mkdir(exist_ok=True)
    lists = [*first, *[[]] * (images - len(first))]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    return tmp_path


def test_reassessed_labels_are_each_right_and_images_without_any_are_left_out(tmp_path):
    """README of reassessed-imagenet: [pred in real[i] for i, pred in enumerate(...) if real[i]]."""
    names = [f"val/n{i}/ILSVRC2012_val_{i:08d}.JPEG" for i in (4, 2, 1, 3)]
    held_out = Split(
        images=torch.zeros(4, 3, 16, 16, dtype=torch.uint8), labels=torch.arange(4), ids=(*names,)
    )
    lists = [[], [970, 0], [1], [0]]  # of images 1 to 4; the answer to each is 0
    root = real_labels(tmp_path / "real", lists)
    data = replace(imagenet(imagenet_real=root), held_out=held_out)
    ledger, scores = judged("imagenet-real", TENCH, data)
    rows = {
        r["image_id"][-6:-5]: (r["survived"], r["label"], r["stage"]) for r in ledger.to_pylist()
    }
    assert rows == {"4": (True, 0, "0"), "2": (True, 1, "970 0"), "3": (False, 3, "1")}
    assert scores["imagenet-real"].value == 2 / 3
    evaluator = evaluator_named("imagenet-real", IMAGENET)
    flat = replace(held_out, ids=(*(f"{name}=n01440764" for name in names),))  # of --labels FILE
    assert len(evaluator.images(replace(data, held_out=flat))) == 3
    before = evaluator.identity(data)
    real_labels(root, [*lists[:3], [1]])
    assert evaluator.identity(data) != before
    other = replace(held_out, ids=("a/1.png", *names[1:]))
    with pytest.raises(ValueError, match=r"no labels for 'a/1.png', only for ILSVRC2012_val_0000"):
        evaluator.images(replace(data, held_out=other))


@pytest.mark.parametrize(
    ("lists", "images", "message"),
    [
        ([[1]], 49_999, "has labels of 49999 images, not of 50000: fetch it again"),
        (
            [[1], [7, 7]],
            50_000,
            r"image 2 has the labels \[7, 7\], not different ones from 0 to 999",
        ),
        ([[1000]], 50_000, r"image 1 has the labels \[1000\]"),
        ([3], 50_000, "real.json cannot be read: 1 validation error"),
    ],
)
def test_labels_that_are_not_as_published_are_refused(tmp_path, lists, images, message):
    data = imagenet(imagenet_real=real_labels(tmp_path / "real", lists, images))
    with pytest.raises(ValueError, match=message):
        evaluator_named("imagenet-real", IMAGENET).images(data)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"cat": "281-285", "dog": ""}, "Pets: class 'dog' has the places ''; give it some from 0"),
        ({"cat": "281-285", "dog": "285"}, "Pets: place 285 is of 'cat' and of 'dog': leave it to"),
        ({"cat": "999-1000"}, "class 'cat' has the places '999-1000'"),
    ],
)
def test_a_label_map_with_a_hole_or_a_double_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        StoredSet("pets", "Pets", "pets", groups=groups)


def test_a_packed_set_of_another_length_is_refused(tmp_path):
    for kind in KINDS:
        np.save(tmp_path / f"{kind}.npy", np.zeros((9, 16, 16, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(9, dtype=np.uint8))
    data = replace(imagenet(), class_names=("a", "b"))
    with pytest.raises(ValueError, match="9 labels, not as many of each of 5 severities: fetch"):
        CorruptedSet(STORED_SETS["cifar10-c"], tmp_path, data)
    np.save(tmp_path / "labels.npy", np.zeros(10, dtype=np.uint8))
    with pytest.raises(ValueError, match="does not hold 9 labels from 0 to 1"):
        CorruptedSet(STORED_SETS["cifar10-c"], tmp_path, data)


def test_images_of_no_class_are_told_from_the_held_out_ones_by_confidence(tmp_path):
    """Of four held-out images one is less sure than the surest of two foreign ones."""
    values = {"a": 0, "b": 40, "c": 80, "d": 200}  # the brighter, the less sure
    pixels = torch.tensor([*values.values()], dtype=torch.uint8)[:, None, None, None]
    held_out = Split(
        images=pixels.expand(4, 3, 16, 16), labels=torch.tensor([0, 1, 0, 0]), ids=(*values,)
    )
    for name, value in (("sky", 120), ("wall", 240)):
        write_set(tmp_path / name, [])
        Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / name / "one.png")
    data = replace(imagenet(ood=tmp_path), held_out=held_out)
    linear = nn.Linear(1, 1000, bias=False)
    linear.weight.data.zero_()[0] = -9.0
    layers = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Flatten(), linear)
    model = Classifier(layers, (1.0,) * 3, (1.0,) * 3)
    ledger, scores = judged("ood", model, data)
    assert {s: (v.value, v.n) for s, v in scores.items()} == {
        "ood/auroc": (7 / 8, 6),  # of eight pairs the one of d and sky is the wrong way round
        "ood/fpr95": (0.5, 6),  # all four held-out images reach d's confidence, and so does sky
    }
    rows = {row["image_id"]: (row["label"], row["survived"]) for row in ledger.to_pylist()}
    assert rows["sky/one"] == (-1, False)
    assert rows["b"] == (1, False)
    assert evaluator_named("ood", IMAGENET).cost(10, withstanding=0) == 20


def test_detection_is_scikit_learns_and_its_interval_holds_the_truth():
    """Normal confidences a standard deviation apart: the AUROC is Phi(1 / sqrt(2)) = 0.7602."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        known, foreign = rng.normal(1, 1, 200), rng.normal(0, 1, 100).round(1)
        auroc, fpr95 = detection_scores("ood", known, foreign)
        truth = [1] * 200 + [0] * 100
        assert auroc.value == pytest.approx(roc_auc_score(truth, np.append(known, foreign)))
        rates = roc_curve(truth, np.append(known, foreign), drop_intermediate=False)
        assert fpr95.value == pytest.approx(rates[0][rates[1] >= 0.95][0])
        held += auroc.low <= 0.7602 <= auroc.high
    assert held >= 34
