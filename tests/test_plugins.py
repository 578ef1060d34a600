"""Plug-ins: other packages' models, data, evaluators, attacks and corruptions, by name alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import EntryPoints, distributions

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import evaluators
from evaluators import columns_of, evaluator_named, headline_of, in_norm
from evaluators.base import Clean, cell_digest, judge_images
from evaluators.intervals import image_scores
from evaluators.ledger import in_order
from evaluators.plugged import class_of
from evaluators.shards import ShardStore
from tests.driver import ROOT
from tests.tiny import Watched
from trainables import plugins
from trainables.data.base import WHOLE, Data, Shard, Split
from trainables.layers import Classifier
from trainables.models import MODELS
from trainables.scale import DIGITS

CPU = torch.device("cpu")
EXAMPLE = ROOT / "examples" / "plugin"


@pytest.fixture
def brought(tmp_path):
    """Return the entry points of a package that is made for the test, without importing any."""

    def bring(kind, version="1.0", **names):
        folder = tmp_path / version
        info = folder / f"theirs-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: theirs\nVersion: {version}\n")
        lines = [f"{name.replace('_', '-')} = {place}" for name, place in names.items()]
        text = "\n".join([f"[robustness_grid.{kind}]", *lines])
        (info / "entry_points.txt").write_text(text)
        (package,) = distributions(path=[str(folder)])
        return package.entry_points

    return bring


@pytest.fixture
def registered(brought, monkeypatch):
    """Put entry points among the evaluators, and return them."""

    def register(kind, **names):
        points = tuple(brought(kind, **names))
        for point in points:
            monkeypatch.setitem(evaluators.EVALUATORS, point.name, point.value)
            monkeypatch.setitem(evaluators.PLUG_INS, point.name, point)
        return points

    return register


@pytest.fixture
def evaluator(brought):
    """Return the evaluator that a function of this file makes."""

    def make(kind, function, version="1.0", scale=DIGITS, **settings):
        (point,) = brought(kind, version, mine=f"tests.test_plugins:{function}")
        return class_of(point)(scale, **settings)

    return make


def linear():
    """A network whose answers depend on every pixel, and that remembers the images it judged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Watched(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)))
    return network, Classifier(network, (0.5,) * 3, (0.25,) * 3)


def ledger_of(question, data, shard=WHOLE, classifier=None):
    return judge_images(question, classifier or linear()[1], data, device=CPU, shard=shard)


# Attacks.


def far_above(model, images, labels, epsilon, generator):
    return images + 7


def anywhere(model, images, labels, epsilon, generator):
    """Draw from the ball; what an image gets depends on the others of its block."""
    return images + epsilon * torch.empty_like(images).uniform_(-1, 1, generator=generator).flip(0)


def greedy(model, images, labels, epsilon, generator):
    """Change the images and labels that came, and return the images."""
    labels.zero_()
    return images.add_(epsilon)


def test_what_an_attack_returns_is_cut_to_the_ball_and_to_the_range(evaluator):
    pixels = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    pixels[1] = 250
    split = Split(images=pixels, labels=torch.tensor([0, 1]), ids=("grey", "bright"))
    data = Data(data_set=DIGITS.data_set, train=split, held_out=split, class_names=("0", "1"))
    network, classifier = linear()
    question = evaluator("attacks", "far_above", radii=[Fraction(16, 255)])
    ledger_of(question, data, classifier=classifier)
    judged = network.judged[-1]
    # 100 + 16, and 250 + 16 cut to white; the network sees (pixel - 0.5) / 0.25.
    expected = torch.tensor([116 / 255, 1.0]).sub(0.5).div(0.25).view(2, 1, 1, 1)
    assert torch.allclose(judged, expected.expand_as(judged), atol=1e-6)


@pytest.mark.parametrize(("kind", "function"), [("attacks", "anywhere"), ("corruptions", "noisy")])
def test_verdicts_do_not_depend_on_how_images_are_cut_into_shards(
    evaluator, kind, function, digits, tmp_path
):
    question = evaluator(kind, function, scale=replace(DIGITS, attack_subset=5000))
    block = question.block
    whole = ledger_of(question, digits)
    ends = [(0, block), (2 * block, len(digits.held_out)), (block, 2 * block)]
    parts = [ledger_of(question, digits, Shard(*bounds)) for bounds in ends]
    assert in_order(pa.concat_tables(parts)).equals(whole)
    with pytest.raises(ValueError, match=f"not made of whole blocks of {block} images"):
        ledger_of(question, digits, Shard(0, block + 1))
    store = ShardStore(tmp_path, 597, side=16, least=question.least_shard)
    while store.waiting:
        shard = store.take()
        assert shard.first % block == 0
        assert shard.end % block == 0 or shard.end == 597


def test_an_attack_may_change_the_images_and_labels_that_it_gets(evaluator, few_digits):
    radii = [Fraction(4, 255), Fraction(64, 255)]
    network, classifier = linear()
    ledger = ledger_of(
        evaluator("attacks", "greedy", radii=radii), few_digits, classifier=classifier
    )
    assert ledger["question"].unique().to_pylist() == ["mine@4/255", "mine@64/255"]
    clean = ledger_of(Clean(DIGITS), few_digits)
    assert ledger["label"].to_pylist() == 2 * clean["label"].to_pylist()
    small, large = network.judged[-4], network.judged[-3]
    # Both start at the image: black is raised to 4/255 and to 64/255 before it is normalised.
    assert small.min() == pytest.approx((4 / 255 - 0.5) / 0.25, abs=1e-5)
    assert large.min() == pytest.approx((64 / 255 - 0.5) / 0.25, abs=1e-5)


def test_an_attack_is_one_column_at_the_scales_radius(registered, digits):
    registered("attacks", mine="tests.test_plugins:far_above")
    assert [column.title for column in columns_of("mine").values()] == ["mine"]
    assert headline_of("mine") == "mine"
    question = evaluator_named("mine", DIGITS)
    assert question.identity(digits)["epsilons"] == {"mine": 27 / 255}
    assert question.total(digits) == 64
    assert in_norm("mine", "Linf") == "mine"
    with pytest.raises(ValueError, match="mine has the norm Linf alone"):
        in_norm("mine", "L2")
    # 64 images by 1 pass to judge and 40 to attack.
    assert question.cost(597, withstanding=1.0) == 64 * 41


def test_the_question_names_the_package_and_its_version(evaluator, digits):
    older = evaluator("attacks", "far_above")
    newer = evaluator("attacks", "far_above", version="1.1")
    assert older.identity(digits)["plug-in"] == "theirs 1.0"
    assert cell_digest(older, digits) != cell_digest(newer, digits)


def nothing(model, images, labels, epsilon, generator):
    return None


def of_another_shape(model, images, labels, epsilon, generator):
    return images[:, :, :8]


def bytes_of(model, images, labels, epsilon, generator):
    return (255 * images).byte()


def not_numbers(model, images, labels, epsilon, generator):
    return images.where(images > 0.5, torch.nan)


@pytest.mark.parametrize(
    ("function", "returned"),
    [
        ("nothing", "NoneType"),
        ("of_another_shape", r"Tensor torch.float32 \(32, 3, 8, 16\)"),
        ("bytes_of", r"Tensor torch.uint8 \(32, 3, 16, 16\)"),
        ("not_numbers", r"Tensor torch.float32 \(32, 3, 16, 16\)"),
    ],
)
def test_what_is_no_images_is_refused_by_the_plug_ins_name(evaluator, function, returned, digits):
    message = rf"plug-in 'mine' \(attacks\) of theirs 1.0 must return .*: it returned {returned}$"
    with pytest.raises(ValueError, match=message):
        ledger_of(evaluator("attacks", function), digits)


# Corruptions.


def noisy(images, severity, generator):
    return images + severity * torch.empty_like(images).normal_(generator=generator).flip(0)


def black_from_three(images, severity, generator):
    return images if severity < 3 else images - 9


def test_a_corruptions_score_is_its_error_over_five_severities(evaluator, few_digits):
    _, classifier = linear()
    question = evaluator("corruptions", "black_from_three")
    clean = ledger_of(Clean(DIGITS), few_digits, classifier=classifier)
    ledger = ledger_of(question, few_digits, classifier=classifier)
    scores = {score.name: score for score in question.summarize(ledger)}
    right = clean["survived"].to_numpy()
    black = classifier(torch.zeros(1, 3, 16, 16)).argmax()
    of_black = few_digits.held_out.labels.eq(black).numpy()
    assert scores["mine/severity-2"].value == pytest.approx(1 - right.mean())
    assert scores["mine/severity-3"].value == pytest.approx(1 - of_black.mean())
    errors = 1 - (2 * right.mean() + 3 * of_black.mean()) / 5
    assert scores["mine"].value == pytest.approx(errors)
    assert scores["mine"].low < errors < scores["mine"].high
    assert scores["mine"].n == 60
    assert np.mean(list(image_scores(ledger, "mine").values())) == pytest.approx(errors)
    assert question.cost(60, withstanding=1.0) == 300


# Evaluators, and what fails.


class Theirs(Clean):
    name = "mine"


def test_an_evaluator_is_its_class_and_the_version_of_its_package(evaluator, few_digits):
    question = evaluator("evaluators", "Theirs")
    clean = ledger_of(Clean(DIGITS), few_digits)
    assert ledger_of(question, few_digits)["predicted"].equals(clean["predicted"])
    assert question.identity(few_digits)["plug-in"] == "theirs 1.0"


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("evaluators", "tests.test_plugins:noisy", "is no Evaluator with name = 'mine'"),
        ("evaluators", "evaluators.base:Clean", "is no Evaluator with name = 'mine'"),
        ("attacks", "tests.test_plugins:ROOT", "is no function"),
        ("attacks", "no_such_module:attack", "cannot be imported: ModuleNotFoundError: No module"),
        ("corruptions", "tests.test_plugins:none", "cannot be imported: AttributeError: module"),
    ],
)
def test_a_plug_in_that_is_none_is_named_with_its_package_and_the_reason(
    registered, kind, place, message
):
    registered(kind, mine=place)
    with pytest.raises(ValueError, match=rf"plug-in 'mine' \({kind}\) of theirs 1.0 {message}"):
        evaluator_named("mine", DIGITS)
    assert evaluator_named("clean", DIGITS).name == "clean"  # the others go on


@pytest.mark.parametrize("name", ["clean", "pgd_10"])
def test_a_name_that_is_taken_is_left_out_with_a_warning(brought, monkeypatch, name):
    monkeypatch.setattr(evaluators, "EVALUATORS", dict(evaluators.EVALUATORS))
    monkeypatch.setattr(evaluators, "PLUG_INS", {})
    points = brought("attacks", **{name: "tests.test_plugins:noisy", "fine": "x:y"})
    monkeypatch.setattr(plugins, "installed", lambda: EntryPoints(points))
    reason = "an evaluator, or a score, of this name is there already"
    with pytest.warns(UserWarning, match=f"plug-in .* 1.0 is left out: ValueError: {reason}"):
        plugins.register_all("attacks", evaluators._add)
    assert list(evaluators.PLUG_INS) == ["fine"]


def test_a_model_that_fails_is_named_and_the_others_are_registered(brought, monkeypatch):
    import_errors = {"broken": "no_such_module:NET", "taken": "tests.test_plugins:TAKEN"}
    points = brought("models", **import_errors, new="tests.test_plugins:NEW")
    monkeypatch.setattr(plugins, "installed", lambda: EntryPoints(points))
    registered = []

    def register(plug_in):
        if (model := plug_in.load()) == TAKEN:
            raise ValueError("'taken' is there already")
        registered.append(model)

    with pytest.warns(UserWarning) as warned:
        plugins.register_all("models", register)
    texts = [str(warning.message) for warning in warned]
    assert [text.partition(" is left out: ")[0] for text in texts] == [
        "plug-in 'broken' (models) of theirs 1.0",
        "plug-in 'taken' (models) of theirs 1.0",
    ]
    assert "ModuleNotFoundError: No module named 'no_such_module'" in texts[0]
    assert "ValueError: 'taken' is there already" in texts[1]
    assert registered == [NEW]


TAKEN, NEW = "taken", "new"


# The example, as its users install it.


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a command that has the example's package."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, folder / "source")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--target")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *offline]
    subprocess.run([*pip, folder / "site", source], check=True)
    paths = (str(ROOT), str(folder / "site"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def command(installed, *arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=installed,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_five_plug_ins_are_known_by_their_names(installed):
    assert not {"tiny-net", "stripes", "mirrored", "fgsm", "occlusion"} & {
        *MODELS,
        *evaluators.EVALUATORS,
    }
    study = ("--study", EXAMPLE / "stripes.toml", "--scale", "stripes")
    said = command(installed, "grid/run.py", *study, "--plan", "--all", "--seconds-per-unit", "1")
    assert "scale stripes: Stripes across and down, 16 px" in said
    assert "| clean, mirrored, fgsm, occlusion" in said
    helped = command(installed, "-m", "evaluators", "--help")
    assert all(name in helped for name in ("tiny-net", "stripes", "mirrored", "fgsm", "occlusion"))


@pytest.mark.slow
def test_the_example_is_trained_judged_and_reported_without_an_edit(installed, tmp_path):
    study = ("--study", EXAMPLE / "stripes.toml", "--scale", "stripes")
    command(installed, "grid/run.py", *study, "--results", tmp_path / "results")
    page = (tmp_path / "results" / "report" / "tables.md").read_text()
    assert (
        "| Model | Clean | published | Mirrored | published | fgsm | published | occlusion er"
        in page
    )
    assert "robustness-grid-example 0.1.0" in page
    (weights,) = tmp_path.glob("results/artifacts/**/weights.safetensors")
    names = ("mirrored", "fgsm", "occlusion")
    judge = ("-m", "evaluators", "--weights", weights, "--evaluators", *names)
    said = command(installed, *judge, "--ledger", tmp_path / "ledgers")
    scores = {line.split()[0]: line for line in said.splitlines() if " [" in line}
    assert {*names, "occlusion/severity-5"} <= set(scores)
    for name in names:
        (theirs,) = tmp_path.glob(f"results/artifacts/*/artifacts/ledgers/{name}.parquet")
        ledger = pq.read_table(tmp_path / "ledgers" / f"{name}.parquet")
        assert ledger.equals(pq.read_table(theirs))
        # Of 100 images, each at five severities or once.
        assert len(ledger) == (500 if name == "occlusion" else 100)
