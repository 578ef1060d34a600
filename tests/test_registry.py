"""The registry of data sets: docs/data.md adds one by its entry alone, and all else follows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from evaluators.base import judge_images
from evaluators.natural import Natural
from grid.check import check
from grid.plan import build_plan
from grid.study import Study
from tests.paper import resnet50
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.data.registry import DATA_SETS, STORED_SETS, data_set_named, register
from trainables.networks import build_classifier
from trainables.scale import CIFAR10, scale_names
from trainables.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def shapes():
    """The data set that docs/data.md adds by one entry."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})  # noqa: S102 - the project's own page
    yield data_set_named("shapes")
    del DATA_SETS["shapes"]


@pytest.fixture
def root(tmp_path):
    """Twelve train and four held-out images of each class, and three natural ones of squares."""
    counts = {"train": 12, "val": 4}
    places = [(f"{s}/{k}", n) for s, n in counts.items() for k in ("disc", "square")]
    for folder, count in [*places, ("imagenet-a/square", 3)]:
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (40, 32 + number))
            draw = ImageDraw.Draw(image).ellipse if "disc" in folder else None
            (draw or ImageDraw.Draw(image).rectangle)((9, 9, 20, 20), fill=(250, 250, 9 * number))
            image.save(tmp_path / "data" / folder / f"{number}.png")
    return tmp_path / "data"


def test_the_documented_data_set_is_trained_judged_and_checked(shapes, root, tmp_path):
    source = DataSource(root=root)
    scale = scale_of("shapes", source)
    data = load_data(scale, source)
    assert (len(data.train), len(data.held_out), data.class_names) == (24, 8, ("disc", "square"))
    recipe = scale.shrink(resnet50()).replace(model="timm:test_resnet", epochs=1, warmup_epochs=0.0)
    classifier = build_classifier(recipe)
    assert classifier.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    (report,) = train(recipe, classifier, data, device=CPU)
    assert report.outcome == "finished"
    ledger = judge_images(Natural(scale), classifier, data, device=CPU)
    # Of two classes only squares have natural images: among these no answer is wrong.
    scores = {score.name: (score.value, score.n) for score in Natural(scale).summarize(ledger)}
    assert scores["natural"] == (1.0, 3)
    findings, _ = check(
        scale, source, build_plan(Study(name="one", base=resnet50()), scale), results=tmp_path
    )
    assert "error" not in {level for _, level, _ in findings}
    texts = {subject: text for subject, _, text in reversed(findings)}
    assert texts["images"] == "2 classes, 24 to train, 8 held out"
    assert texts["imagenet-a"].startswith("3 images of 1 classes")
    assert "shapes" in scale_names()


def test_other_folders_are_not_the_documented_data_set(shapes, root):
    for split in ("train", "val"):
        (root / split / "disc").rename(root / split / "triangle")
    with pytest.raises(ValueError, match="is not Discs and squares: it lacks 1 of 2 classes"):
        load_data(scale_of("shapes", DataSource(root=root)), DataSource(root=root))


def test_a_name_that_is_taken_and_a_stored_set_that_is_not_known_are_refused(shapes):
    with pytest.raises(ValueError, match="'shapes' is there already"):
        register(shapes)
    with pytest.raises(ValueError, match="unknown stored set 'imagenet-z'; one of imagenet-a"):
        register(replace(shapes, name="other", counterparts=("imagenet-z",)))


def test_a_stored_set_that_a_folder_does_not_read_is_refused(root):
    source = DataSource(root=root, stored=(("cifar10-c", root),))
    with pytest.raises(ValueError, match=r"--stored cifar10-c=DIR is not .* imagenet-a"):
        scale_of("folder", source, image_size=32)


def test_a_stored_set_that_a_scale_does_not_read_is_refused(tmp_path):
    source = DataSource(root=tmp_path, stored=(("imagenet-c", tmp_path),))
    with pytest.raises(ValueError, match=r"--stored imagenet-c=DIR is not read at scale 'cifar10'"):
        scale_of("cifar10", source)


@pytest.mark.parametrize("data_set", DATA_SETS.values(), ids=lambda data_set: data_set.name)
def test_an_entry_has_one_stored_set_at_most_for_each_evaluator(data_set):
    evaluators = [STORED_SETS[name].evaluator for name in data_set.counterparts]
    assert len(set(evaluators)) == len(evaluators)
    assert all(data_set.counterpart(STORED_SETS[n].evaluator) == n for n in data_set.counterparts)


def test_another_archive_of_torchvisions_is_one_entry(monkeypatch, tmp_path):
    """CIFAR-100 differs from CIFAR-10 by its class in torchvision alone."""
    names = tuple(f"class {label}" for label in range(100))
    entry = replace(CIFAR10.data_set, name="cifar100", title="CIFAR-100", archive="CIFAR100")
    entry = replace(entry, num_classes=100, classes=names)
    monkeypatch.setitem(DATA_SETS, entry.name, entry)
    (tmp_path / "cifar-100-python").mkdir()
    source = DataSource(root=tmp_path)
    with pytest.raises(ValueError, match="cifar-100-python is not CIFAR-100 as published"):
        load_data(scale_of("cifar100", source), source)
