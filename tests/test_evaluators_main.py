"""`python -m evaluators` on checkpoints of any origin, good and bad."""

import argparse
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from evaluators import evaluator_named
from evaluators.__main__ import main
from evaluators.base import judge_images
from trainables.data.load import load_data
from trainables.networks import build_classifier, classifier_named
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.store.checkpoint import save_weights
from trainables.train.loop import train
from trainables.weights import load_weights

RECIPE = Recipe(
    scale="digits",
    model="resnet18",
    activation="gelu",
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=1e-4,
    scheduler="step",
    epochs=1,
    batch_size=64,
)


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    save_weights(path, build_classifier(RECIPE), RECIPE.model_dump_json())
    return path


@pytest.fixture(scope="module")
def timm_resnet50():
    return timm.create_model("resnet50", num_classes=10).eval()


def judge(weights, folder, *options):
    return main(["--weights", str(weights), "--ledger", str(folder), *options])


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def released(model, *, sets=None, ghosts=1):
    """Rename a plain state dict as the study's released checkpoints name theirs."""
    state = model.state_dict()
    renamed = {}
    for name, value in state.items():
        norm, _, leaf = name.rpartition(".")
        if f"{norm}.running_mean" not in state:
            renamed["module." + name] = value
        elif leaf in ("weight", "bias"):
            affine = f"{norm}.aff.bnconv.{leaf}" if sets else name
            shape = (-1, 1, 1, 1) if sets and leaf == "weight" else (1, -1, 1, 1)
            renamed["module." + affine] = value.reshape(shape)
        else:
            for number in range(sets or 1):
                within = f"{norm}.bn{number}" if sets else norm
                other = (
                    value if value.ndim == 0 else torch.cat([value] + [value + 9] * (ghosts - 1))
                )
                renamed[f"module.{within}.proxy_bn.{leaf}"] = other + number
    return renamed


@pytest.mark.parametrize(("sets", "ghosts"), [(None, 4), (8, 2)])
def test_released_ghost_batchnorm_checkpoints_load(timm_resnet50, tmp_path, sets, ghosts):
    for module in timm_resnet50.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    path = tmp_path / "released.pth"
    weights = released(timm_resnet50, sets=sets, ghosts=ghosts)
    torch.save({"model": weights, "epoch": 99, "args": argparse.Namespace(lr=1.6)}, path)
    classifier = classifier_named("timm:resnet50", DIGITS).eval()
    load_weights(path, classifier)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = timm_resnet50((images - classifier.mean) / classifier.std)
        assert torch.equal(expected, classifier.to(memory_format=torch.contiguous_format)(images))


@pytest.fixture(scope="module")
def ghostly(tmp_path_factory):
    """A file, and the model, of a recipe with ghosts, accumulation and pixels in [-1, 1]."""
    changes = {"norm": "ghost", "ghost_batch": 16, "micro_batch": 32, "pixel_range": "half"}
    recipe = RECIPE.replace(**changes)
    classifier = build_classifier(recipe)
    list(train(recipe, classifier, load_data(DIGITS), device=torch.device("cpu")))
    path = tmp_path_factory.mktemp("ghostly") / "ghostly.safetensors"
    save_weights(path, classifier, recipe.model_dump_json())
    return path, classifier.eval()


def test_a_file_of_this_project_is_judged_as_its_study_judges_it(ghostly, tmp_path):
    path, classifier = ghostly
    assert judge(path, tmp_path) == 0
    ledger = pq.read_table(tmp_path / "clean.parquet")
    evaluator = evaluator_named("clean", DIGITS)
    judged = judge_images(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))
    assert ledger.equals(judged)
    assert len(set(ledger["predicted"].to_pylist())) > 1


def test_a_plain_network_takes_the_weights_of_one_with_ghosts(ghostly):
    path, classifier = ghostly
    plain = classifier_named("resnet18", DIGITS, activation="gelu").eval()
    load_weights(path, plain)
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = plain.backbone(images), classifier.backbone(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
def test_torch_files_are_read_by_any_of_their_names(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    classifier = build_classifier(RECIPE)
    torch.save(classifier.state_dict(), path)
    fresh = build_classifier(RECIPE.replace(seed=1))
    load_weights(path, fresh)
    assert torch.equal(fresh.backbone.fc.weight, classifier.backbone.fc.weight)


@pytest.mark.parametrize("model", [[], ["--model", "resnet18"]])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_file_of_this_project_is_refused_by_name(
    own_file, tmp_path, capsys, damage, model
):
    content = bytearray(own_file.read_bytes())
    content[-1] ^= 1
    path = tmp_path / "own.safetensors"
    path.write_bytes({"flipped": content, "truncated": content[:-9], "emptied": b""}[damage])
    said = refused(["--weights", path, *model], capsys)
    reason = "names no recipe" if damage == "emptied" and not model else "is damaged"
    assert f"{path} {reason}" in said


def test_weights_that_do_not_fit_are_named_up_to_three(timm_resnet50, tmp_path, capsys):
    path = tmp_path / "head.pt"
    state = timm_resnet50.state_dict() | {"fc.weight": torch.zeros(1000, 2048)}
    torch.save(state | {"extra.a": torch.zeros(1)}, path)
    error = refused(["--model", "timm:resnet50", "--weights", path], capsys)
    assert "fc.weight is (1000, 2048), not (10, 2048)" in error
    assert "extra.a is unknown" in error
    torch.save({"a": torch.zeros(1)}, path)
    error = refused(["--model", "timm:resnet50", "--weights", path], capsys)
    assert error.count(" is missing") == 3


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "notes.txt"])
def test_a_file_that_is_absent_or_no_weights_is_refused(tmp_path, name, capsys):
    (tmp_path / "notes.txt").write_text("no weights")
    path = tmp_path / name
    assert f"{path} " in refused(["--model", "resnet18", "--weights", path], capsys)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_file_of_strange_bytes_is_refused(tmp_path, suffix, capsys):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"\x07" * 100)
    assert f"{path} " in refused(["--model", "resnet18", "--weights", path], capsys)
    assert "give --model" in refused(["--weights", path], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluators", "pgd-7"], "--evaluators: unknown evaluator 'pgd-7'; one of clean"),
        (["--evaluators", "claen"], "Did you mean 'clean'?"),
        (["--evaluator", "clean"], "Did you mean '--evaluators'?"),
        (["--model", "resnet51"], "unknown model 'resnet51'; one of resnet18"),
        (["--model", "timm:resnet51"], "timm has no model 'resnet51'"),
        (["--scale", "huge"], "unknown scale 'huge'"),
        (["--scale", "imagenet"], "was trained at scale digits: --scale imagenet is another"),
        (["--data", "."], "was trained at scale digits: scale 'digits' is embedded"),
        (["--model", "resnet18", "--scale", "imagenet"], "does not fit the model"),
        (["--std", "0"], "--std: std 0 is of other units: pixels are in [0, 1]"),
        (["--device", "abacus"], "--device abacus"),
        (["--epsilon", "4/255"], "epsilon is a radius of pgd, autoattack and"),
        (["--epsilon", "4", "--evaluators", "pgd"], "4 is no radius in Linf"),
        (["--epsilon=-1/255"], "above 0 and at most 1e+06, like 4/255"),
        (["--patches", "0"], "greater than or equal to 1"),
        (["--attack-images", "1.5"], "should be a valid integer"),
        (["--patch-area", "0"], "above 0 and at most 1, like 0.025"),
        (["--patch-area", "1"], "does not fit 16 px"),
        (["--jpeg", "101"], "less than or equal to 100"),
        (["--jpeg", "85"], "--jpeg 85 is of corruptions and c-bar: name one in"),
        (["--ledger", "/proc/ledgers"], "ledger folder /proc/ledgers cannot be made"),
    ],
)
def test_an_option_that_cannot_be_is_refused(own_file, arguments, message, capsys):
    assert message in refused(["--weights", own_file, *arguments], capsys)


def test_data_of_other_classes_are_refused_by_the_scale_that_a_file_was_trained_at(
    tmp_path, capsys
):
    scale = "folder-16px-3classes-9train-00000000"
    recipe = RECIPE.replace(scale=scale)
    save_weights(tmp_path / "own.safetensors", build_classifier(recipe), recipe.model_dump_json())
    for name in ("val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "picture.png")
    said = refused(["--weights", tmp_path / "own.safetensors", "--data", tmp_path], capsys)
    assert f"own.safetensors was trained at scale {scale}: {tmp_path} has 2 classes" in said


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from evaluators.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{'torch', 'ray', 'mlflow', 'numpy', 'scipy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith("usage: ")
    assert said.endswith("\n\n"), said.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "lengths"), [("pgd-10 pgd-5", [5, 10]), ("pgd-10 pgd", [5, 10, 50, 100])]
)
def test_pgd_has_the_lengths_and_radii_of_the_options(own_file, tmp_path, capsys, names, lengths):
    options = ["--attack-images", "2", "--epsilon", "1/255", "60/255"]
    assert judge(own_file, tmp_path, "--evaluators", "clean", *names.split(), *options) == 0
    printed = capsys.readouterr().out.splitlines()
    first = next(place for place, line in enumerate(printed) if line.startswith("score"))
    (clean, pgd, _), scores = printed[first - 3 : first], printed[first:]
    assert (clean, pgd) == ("clean: 597 images", "pgd: 2 images")
    radii = ("1/255", "60/255")
    names = ["score", "clean", *(f"pgd-{n}@{radius}" for radius in radii for n in lengths)]
    assert sorted(line.split()[0] for line in scores[: len(names)]) == sorted(names)
    assert pq.read_table(tmp_path / "clean.parquet").num_rows == 597
    assert pq.read_table(tmp_path / "pgd.parquet").num_rows == 2 * 2 * len(lengths)


def test_the_patch_attack_takes_its_budget(own_file, tmp_path, capsys):
    budget = ["--patches", "2", "--patch-area", "0.1", "--attack-images", "4"]
    assert judge(own_file, tmp_path, "--evaluators", "tpa", *budget) == 0
    assert "tpa: 4 images" in capsys.readouterr().out.splitlines()
    stages = pq.read_table(tmp_path / "tpa.parquet", columns=["stage"])["stage"].to_pylist()
    assert {*stages} <= {"clean", "patch-1", "patch-2", None}


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


def test_a_run_cut_short_reports_its_images_and_goes_on_behind_them(
    own_file, tmp_path, capsys, monkeypatch
):
    """Of twelve images five are judged when Ctrl-C comes; then the other seven are."""
    monkeypatch.setattr("evaluators.shards.FIRST_PIXELS", 5 * DIGITS.image_size**2)
    options = ["--evaluators", "pgd-5", "--attack-images", "12"]
    judged = []

    def interrupted_at(count):
        def judged_or_interrupted(*arguments, shard, **named):
            if len(judged) == count:
                raise KeyboardInterrupt
            judged.append(shard)
            return judge_images(*arguments, shard=shard, **named)

        return judged_or_interrupted

    monkeypatch.setattr("evaluators.base.judge_images", interrupted_at(1))
    assert judge(own_file, tmp_path, *options) == 130
    *_, score, note, cut_short = capsys.readouterr().out.splitlines()
    assert score.startswith("pgd-5 (5 of 12 images) ")
    assert score.split()[-2] == "5"
    assert note.startswith("note: pgd: max-norm radius ")
    assert cut_short.startswith("Cut short. Judge the other images with: ")
    # Another normalisation is another question: nothing is taken for it.
    monkeypatch.setattr("evaluators.base.judge_images", interrupted_at(1))
    assert judge(own_file, tmp_path, *options, "--mean", "0.9") == 130
    assert "of 12 images" not in capsys.readouterr().out
    monkeypatch.setattr("evaluators.base.judge_images", interrupted_at(None))
    assert judge(own_file, tmp_path, *options) == 0
    assert sum(map(len, judged)) == 12
    assert judge(own_file, tmp_path / "alone", *options) == 0
    whole, alone = (pq.read_table(f / "pgd.parquet") for f in (tmp_path, tmp_path / "alone"))
    assert whole.equals(alone)
    assert not (tmp_path / "shards").exists()


def test_a_signal_that_ends_the_command_has_it_report_as_ctrl_c_does(own_file, tmp_path):
    options = ["--evaluators", "autoattack", "--attack-images", "200", "--ledger", str(tmp_path)]
    command = [sys.executable, "-m", "evaluators", "--weights", str(own_file), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        while not [*tmp_path.glob("shards/*/*.parquet")]:
            assert run.poll() is None
            time.sleep(0.01)
        run.terminate()
        assert "Cut short. Judge the other images with: " in run.stdout.read()
    assert run.returncode == 130


@pytest.mark.slow
def test_a_run_that_is_killed_loses_the_shard_under_way_alone(own_file, tmp_path, monkeypatch):
    options = ["--evaluators", "autoattack", "--attack-images", "200"]
    command = [sys.executable, "-m", "evaluators", "--weights", str(own_file), *options]
    with subprocess.Popen([*command, "--ledger", str(tmp_path)], stdout=subprocess.DEVNULL) as run:
        while not [*tmp_path.glob("shards/*/*.parquet")]:
            assert run.poll() is None
            time.sleep(0.01)
        run.kill()
    judged = []

    def noted(*arguments, shard, **named):
        judged.append(shard)
        return judge_images(*arguments, shard=shard, **named)

    with monkeypatch.context() as patched:
        patched.setattr("evaluators.base.judge_images", noted)
        assert judge(own_file, tmp_path, *options) == 0
    assert sum(map(len, judged)) == 200 - 64
    assert judge(own_file, tmp_path / "alone", *options) == 0
    whole, alone = (pq.read_table(f / "autoattack.parquet") for f in (tmp_path, tmp_path / "alone"))
    assert whole.equals(alone)
