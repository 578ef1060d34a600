"""A quick look: parts of data sets, reduced models, and sizes that fit into a user's minutes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from evaluators import evaluator_named
from evaluators.base import cell_digest
from grid.plan import Sizes, with_sizes
from grid.quick import largest
from grid.run import main
from grid.study import base_named, load_study
from tests.pictures import CLASSES, write_folder
from trainables.data.listing import EMBEDDED, DataSource, choose, scale_of
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.scale import DIGITS, IMAGENET, scale_named


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"), per_class=30, held_out=10, side=32)


def test_a_part_has_each_class_as_often_as_the_whole_and_any_order_chooses_it():
    labels = [0] * 6 + [1] * 3 + [2] * 3
    ids = [f"image {place}" for place in range(12)]
    places = choose(ids, labels, 4)
    assert [labels[place] for place in places] == [0, 0, 1, 2]
    assert Counter(labels[place] for place in choose(ids, labels, 8)) == {0: 4, 1: 2, 2: 2}
    turned = choose(ids[::-1], labels[::-1], 4)
    assert sorted(11 - place for place in turned) == places
    assert choose(ids, labels, 0) == list(range(12))
    with pytest.raises(ValueError, match="13 images are more than the 12 that there are"):
        choose(ids, labels, 13)


def test_train_images_are_part_of_the_name_and_so_of_the_digest():
    part = with_sizes(DIGITS, Sizes(train_images=300), reduced=False)
    assert (part.name, part.data_set.train_images) == ("digits-300train", 300)
    assert part.learning_rate == DIGITS.learning_rate
    assert scale_named(part.name) == part
    recipes = [scale.shrink(base_named("resnet50")) for scale in (DIGITS, part)]
    assert len({recipe.digest() for recipe in recipes}) == 2
    data = load_data(part)
    assert len(data.train) == 300
    assert set(Counter(data.train.labels.tolist()).values()) <= {29, 30, 31}
    assert data.held_out.ids == load_data(DIGITS).held_out.ids
    whole = with_sizes(DIGITS, Sizes(train_images=1200), reduced=False)
    assert whole == DIGITS
    with pytest.raises(ValueError, match="--train-images 1201: there are 1,200"):
        with_sizes(DIGITS, Sizes(train_images=1201), reduced=False)


def test_eval_images_are_part_of_the_question_and_not_of_the_digest():
    data = load_data(DIGITS, replace(EMBEDDED, eval_images=40))
    assert len(data.held_out) == 40
    assert set(Counter(data.held_out.labels.tolist()).values()) <= {3, 4, 5}
    clean = evaluator_named("clean", DIGITS)
    assert cell_digest(clean, data) != cell_digest(clean, load_data(DIGITS))
    with pytest.raises(ValueError, match="598 images are more than the 597"):
        load_data(DIGITS, replace(EMBEDDED, eval_images=598))


def test_class_folders_are_cut_before_they_are_decoded(folder):
    source = DataSource(root=folder, eval_images=2 * CLASSES)
    whole = scale_of("folder", source)
    assert whole.name == scale_of("folder", DataSource(root=folder)).name
    scale = with_sizes(whole, Sizes(train_images=5 * CLASSES), reduced=False)
    data = load_data(scale, source)
    assert Counter(data.train.labels.tolist()) == dict.fromkeys(range(CLASSES), 5)
    assert Counter(data.held_out.labels.tolist()) == dict.fromkeys(range(CLASSES), 2)


def test_reduced_models_are_those_of_digits_and_the_images_radii_stay(folder):
    whole = scale_of("folder", DataSource(root=folder))
    scale = with_sizes(whole, Sizes(epochs=7), reduced=True)
    assert scale.name == f"{whole.name}-reduced"
    assert (scale.epsilon, scale.patch_size) == (Fraction(4, 255), whole.patch_size)
    assert (scale.training_epsilon, scale.natural_tilt) == (None, 0)
    for base in load_study("quick").bases.values():
        if base.model in ("resnet50", "deit_small"):
            recipe = scale.shrink(base)
            assert recipe.epochs == 7 * base.epochs // 100
            parameters = sum(p.numel() for p in build_classifier(recipe).parameters())
            assert parameters < 200_000
            images = torch.rand(2, 3, scale.image_size, scale.image_size)
            assert build_classifier(recipe)(images).shape == (2, CLASSES)
    assert with_sizes(DIGITS, Sizes(), reduced=True) == DIGITS


def test_a_study_may_state_its_epochs_where_models_are_cut_down(capsys, tmp_path):
    def epochs_for_300(scale, **sizes):
        sized = with_sizes(scale, Sizes(**sizes), reduced=False, reduced_epochs=6)
        return sized.shrink(base_named("deit_small").replace(epochs=300)).epochs

    assert epochs_for_300(DIGITS) == 18
    assert epochs_for_300(DIGITS, epochs=5) == 15
    assert epochs_for_300(IMAGENET) == 300
    path = tmp_path / "s.toml"
    path.write_text('name = "s"\nbase = "resnet50"\nreduced_epochs = 2\n')
    command = ["--plan", "--all", "--study", str(path), "--results", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "resnet50 relu sgd step none 2ep" in printed
    assert "the study's file has 2 epochs here for 100 at full size" in printed
    assert main([*command, "--scale", "imagenet"]) == 0
    assert "epochs here" not in capsys.readouterr().out


def seconds(sizes):
    """A hundredth of a second an image and epoch of each of two trials, a second to judge one."""
    return 0.01 * sizes.train_images * sizes.epochs, sizes.eval_images


@pytest.mark.parametrize(
    ("room", "stated", "chosen"),
    [
        # 300 of 400 s to judge; all 2,000 images take 20 s an epoch, of which 35 are left room.
        (1000, Sizes(), Sizes(2000, 300, 35)),
        # 30 s to judge; 300 images are the most that leave at least 15 epochs: 23 of 3 s.
        (100, Sizes(), Sizes(300, 30, 23)),
        (1000, Sizes(epochs=10), Sizes(2000, 300, 10)),
        (1000, Sizes(train_images=500, eval_images=900), Sizes(500, 900, 20)),
        (10**6, Sizes(), Sizes(2000, 1200, 100)),
        (10, Sizes(), Sizes(30, 30, 1)),
    ],
)
def test_the_largest_sizes_that_have_room_are_chosen(room, stated, chosen):
    whole = Sizes(2000, 1200, 100)
    assert largest(stated, whole, room, seconds) == chosen


def refusal(capsys, *words):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    return capsys.readouterr().err


def test_stated_sizes_are_planned_said_and_refused(capsys, tmp_path):
    words = ["--plan", "--all", "--results", str(tmp_path / "r")]
    assert main([*words, "--epochs", "70", "--train-images", "600", "--eval-images", "50"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Study quick at scale digits-600train: ")
    assert "Quick look: 600 of 1,200 train images, 70 epochs in place of 10, 50 held-out" in said
    assert said.count("none 70ep seed0") == 2
    assert not (tmp_path / "r").exists()
    assert main([*words, "--study", "bai2021", "--tables", "T11", "--epochs", "20"]) == 0
    assert "60ep seed0" in capsys.readouterr().out  # of 300
    assert "--train-images 9999: there are 1,200" in refusal(capsys, "--train-images", "9999")
    assert "--minutes: Input should be greater than" in refusal(capsys, "--minutes", "0.5")
    few = refusal(capsys, "--minutes", "1", "--eval-images", "597", "--results", str(tmp_path))
    assert re.search(r"597 held-out images takes about .*: give --minutes \d+, or fewer", few)
    lacking = refusal(capsys, "--minutes", "5", "--status", "--results", str(tmp_path / "r"))
    assert "json is not there: run the study with these options first" in lacking


def test_the_same_command_goes_on_with_the_same_sizes(capsys, tmp_path):
    words = ["--plan", "--minutes", "60", "--only", "family=resnet", "--evaluators", "clean"]
    said = []
    for _ in range(2):
        assert main([*words, "--results", str(tmp_path)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert re.search(
        r"chosen for 60 min by the pace and load of this machine at the start: about .*", said[0]
    )
    assert "1,200 of 1,200 train images, 10 epochs in place of 10, 597 held-out" in said[0]


@pytest.mark.slow
def test_a_quick_look_at_a_folder_ends_with_a_report_that_says_so(capsys, tmp_path, folder):
    words = ["--data", str(folder), "--minutes", "60", "--results", str(tmp_path / "results")]
    words += ["--epochs", "2", "--eval-images", "12"]  # leaves the train images to be chosen
    assert main(words) == 0
    said = capsys.readouterr()
    assert "Trained 2 and judged 12 cells" in said.out
    (note,) = re.findall(
        r"^note: (Quick look: .* train images, .* chosen for 60 min.*)$", said.err, re.M
    )
    for name in ("index.html", "tables.md"):
        assert note in (tmp_path / "results" / "report" / name).read_text()
    assert main(words) == 0
    assert "Trained 0 and judged 0 cells" in capsys.readouterr().out
