"""`python -m evaluators` on checkpoints of any origin, good and bad."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from fractions import Fraction

import pyarrow.parquet as pq
import pytest
import timm
import torch

from evaluators import evaluator_named
from evaluators.__main__ import main
from evaluators.base import evaluate
from evaluators.options import JudgeOptions
from evaluators.weights import load_any_weights, plain_names
from trainables.data.load import load_data
from trainables.networks import build_classifier, classifier_named
from trainables.recipe import Recipe
from trainables.scale import DIGITS, SCALES
from trainables.store.checkpoint import save_weights
from trainables.train.loop import train

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
    load_any_weights(path, classifier)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = timm_resnet50((images - classifier.mean) / classifier.std)
        assert torch.equal(expected, classifier.to(memory_format=torch.contiguous_format)(images))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
def test_torch_files_are_read_by_any_of_their_names(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    classifier = build_classifier(RECIPE)
    torch.save(classifier.state_dict(), path)
    fresh = build_classifier(RECIPE.replace(seed=1))
    load_any_weights(path, fresh)
    assert torch.equal(fresh.backbone.fc.weight, classifier.backbone.fc.weight)


def test_a_layer_that_is_called_bn1_is_no_set_of_statistics():
    names = {"layer1.0.bn1.proxy_bn.running_mean": torch.zeros(4)}
    assert list(plain_names(names)) == ["layer1.0.bn1.running_mean"]


def test_a_file_of_this_project_needs_no_model_name(own_file, tmp_path, capsys, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(DIGITS, attack_subset=10))
    arguments = ["--weights", own_file, "--evaluators", "clean", "pgd-10", "--ledger", tmp_path]
    assert main([str(a) for a in arguments]) == 0
    out = capsys.readouterr().out
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines[:2] == ["clean:", "pgd:"]
    assert lines[3:6] == ["score", "clean", "pgd-10"]
    assert "pgd-100" not in out
    assert pq.read_table(tmp_path / "clean.parquet").num_rows == 597
    assert pq.read_table(tmp_path / "pgd.parquet")["question"].to_pylist() == ["pgd-10"] * 10


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
    wanted = "names no recipe" if damage == "emptied" and not model else "is damaged"
    assert f"{path} {wanted}" in said


@pytest.mark.parametrize(
    ("asked", "lengths"), [("pgd-10 pgd-5", [5, 10]), ("pgd-10 pgd", [5, 10, 50, 100])]
)
def test_pgd_is_of_the_lengths_asked_for(own_file, tmp_path, capsys, asked, lengths):
    options = ["--attack-images", "2", "--ledger", str(tmp_path), "--evaluators", *asked.split()]
    assert main(["--weights", str(own_file), *options]) == 0
    identity, _, *scores = capsys.readouterr().out.splitlines()
    assert json.loads(identity.removeprefix("pgd: "))["steps"] == lengths
    assert [line.split()[0] for line in scores[1:-1]] == [f"pgd-{n}" for n in lengths]


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
    assert main(["--weights", str(path), "--ledger", str(tmp_path)]) == 0
    found = pq.read_table(tmp_path / "clean.parquet")
    evaluator = evaluator_named("clean", DIGITS)
    judged = evaluate(evaluator, classifier, load_data(DIGITS), device=torch.device("cpu"))
    assert found.equals(judged)
    assert len(set(found["predicted"].to_pylist())) > 1


def test_a_plain_network_takes_the_weights_of_one_with_ghosts(ghostly):
    path, classifier = ghostly
    plain = classifier_named("resnet18", DIGITS, activation="gelu").eval()
    load_any_weights(path, plain)
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = plain.backbone(images), classifier.backbone(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_models_normalisation_is_not_the_evaluators(own_file, tmp_path, monkeypatch):
    """The networks that make textures and styles normalise by the scale's own."""
    asked = []

    def remembered(name, scale, **settings):
        asked.append(scale)
        return evaluator_named(name, scale, **settings)

    monkeypatch.setattr("evaluators.checkpoint.evaluator_named", remembered)
    options = ["--mean", "0.9", "--std", "0.1", "--ledger", str(tmp_path)]
    assert main(["--weights", str(own_file), *options]) == 0
    assert asked == [DIGITS]


def test_a_run_goes_on_behind_its_own_verdicts_and_no_others(own_file, tmp_path, monkeypatch):
    def judged(folder, *options):
        asked = ["--weights", str(own_file), "--ledger", str(folder), *options]
        return main(asked), folder / "clean.parquet"

    cut_short, folder = ["--mean", "0.9", "--std", "0.1"], tmp_path / "kept"
    with monkeypatch.context() as patched:
        patched.setattr("evaluators.checkpoint._write", raising(KeyboardInterrupt))
        assert judged(folder, *cut_short)[0] == 130
    (kept,) = (folder / "shards").iterdir()
    ours, alone = (pq.read_table(judged(f)[1]) for f in (folder, tmp_path / "alone"))
    assert ours.equals(alone)
    assert list((folder / "shards").iterdir()) == [kept]
    with monkeypatch.context() as patched:
        patched.setattr("evaluators.base.evaluate", raising(AssertionError))
        assert judged(folder, *cut_short)[0] == 0
    assert not pq.read_table(folder / "clean.parquet").equals(ours)
    assert not (folder / "shards").exists()


def test_a_run_cut_short_is_reported_at_the_images_it_has(own_file, tmp_path, capsys, monkeypatch):
    """Of twelve images five are judged when Ctrl-C comes; then the other seven are."""
    asked = ["--weights", str(own_file), "--evaluators", "pgd-5", "--attack-images", "12"]
    assert main([*asked, "--ledger", str(tmp_path / "alone")]) == 0
    monkeypatch.setattr("evaluators.shards.FIRST_PIXELS", 5 * DIGITS.image_size**2)
    asked += ["--ledger", str(tmp_path)]
    assert "no image is judged yet" in refused([*asked, "--report-partial"], capsys)

    with monkeypatch.context() as patched:
        patched.setattr("evaluators.base.evaluate", in_turn(evaluate, raising(KeyboardInterrupt)))
        assert main(asked) == 130
    interrupted = capsys.readouterr().out.splitlines()[-4:]
    assert interrupted[1].startswith("pgd-5 (5 of 12 images) ")
    assert interrupted[1].endswith(" 5")
    assert interrupted[3].startswith("Cut short: the same command judges the other images")
    with monkeypatch.context() as patched:
        patched.setattr("evaluators.base.evaluate", raising(AssertionError))
        assert main([*asked, "--report-partial"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == interrupted
    part = pq.read_table(tmp_path / "pgd-5-of-12.parquet")
    assert part.num_rows == 5
    assert main(asked) == 0
    whole, alone = (pq.read_table(f / "pgd.parquet") for f in (tmp_path, tmp_path / "alone"))
    assert whole.equals(alone)
    assert all(row in whole.to_pylist() for row in part.to_pylist())
    assert not (tmp_path / "shards").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_loses_the_shard_under_way_alone(own_file, tmp_path):
    asked = ["--weights", str(own_file), "--evaluators", "autoattack", "--attack-images", "200"]
    command = [sys.executable, "-m", "evaluators", *asked, "--ledger", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as killed:
        while not (kept := [*tmp_path.glob("shards/*/*.parquet")]):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    before = {path: path.stat().st_mtime_ns for path in kept}
    judged = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "evaluators.base.evaluate",
            lambda *a, **k: judged.append(k["shard"]) or evaluate(*a, **k),
        )
        patched.setattr("evaluators.shards.ShardStore.clear", lambda store: None)
        assert main([*asked, "--ledger", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sum(map(len, judged)) == 200 - 64
    assert main([*asked, "--ledger", str(tmp_path / "alone")]) == 0
    resumed, alone = (
        pq.read_table(f / "autoattack.parquet") for f in (tmp_path, tmp_path / "alone")
    )
    assert resumed.equals(alone)


def in_turn(*functions):
    coming = iter(functions)

    def replies(*a, **k):
        return next(coming)(*a, **k)

    return replies


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


# mlflow itself uses what its database layer deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scores_are_logged_to_mlflow_when_asked(own_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert main(["--weights", str(own_file), "--mlflow", uri]) == 0
    run_id = capsys.readouterr().out.splitlines()[-1].removeprefix("MLflow run: ")
    # Beside the database, wherever the command is started.
    found = list((tmp_path / "artifacts").rglob("clean.parquet"))
    assert len(found) == 1
    assert run_id in str(found[0])


def test_a_pickle_that_is_more_than_weights_is_never_executed(tmp_path, capsys):
    planted = tmp_path / "planted"

    class Plant:
        def __reduce__(self):
            return (open, (str(planted), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"model": Plant()}, path)
    error = refused(["--model", "resnet18", "--weights", path], capsys)
    assert "holds more than weights and is not opened" in error
    assert not planted.exists()


def test_a_head_that_does_not_fit_is_named(timm_resnet50, tmp_path, capsys):
    path = tmp_path / "head.pt"
    state = timm_resnet50.state_dict() | {"fc.weight": torch.zeros(1000, 2048)}
    torch.save(state | {"extra.a": torch.zeros(1)}, path)
    error = refused(["--model", "timm:resnet50", "--weights", path], capsys)
    assert "backbone.fc.weight is (1000, 2048), not (10, 2048)" in error
    assert "backbone.extra.a is unknown" in error


def test_at_most_three_problems_are_named(tmp_path, capsys):
    path = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(1)}, path)
    error = refused(["--model", "resnet18", "--weights", path], capsys)
    assert error.count(" is missing") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluators", "pgd-7"], "unknown evaluator 'pgd-7'; one of clean, natural"),
        (["--evaluators", "claen"], "Did you mean 'clean'?"),
        (["--evaluator", "clean"], "Did you mean '--evaluators'?"),
        (["--evaluators"], "unknown evaluator ''; one of clean"),
        (["--model", "resnet51"], "unknown model 'resnet51'; one of resnet18"),
        (["--model", "timm:resnet51"], "timm has no model 'resnet51'"),
        (["--scale", "huge"], "unknown scale 'huge'"),
        (["--scale", "imagenet"], "was trained at digits, not imagenet"),
        (["--model", "resnet18", "--scale", "imagenet"], "does not fit the model"),
        (["--std", "0"], "--std: Input should be greater than 0"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_what_is_asked_wrongly_is_refused(own_file, arguments, message, capsys):
    assert message in refused(["--weights", own_file, *arguments], capsys)


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth", "notes.txt"])
def test_files_that_are_no_weights_are_refused(tmp_path, name, capsys):
    assert str(tmp_path / name) in refused(
        ["--model", "resnet18", "--weights", tmp_path / name], capsys
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_damaged_files_are_refused(tmp_path, suffix, capsys):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"\x07" * 100)
    refused(["--model", "resnet18", "--weights", path], capsys)
    assert "give --model" in refused(["--weights", path], capsys)


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from evaluators.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{'torch', 'ray', 'mlflow', 'numpy', 'scipy'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert said.startswith("usage: ")
    assert said.endswith("\n\n"), said.splitlines()[-1]


def test_a_radius_can_be_given(own_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(DIGITS, attack_subset=10))
    arguments = ["--weights", own_file, "--evaluators", "pgd", "--epsilon", "60/255"]
    assert main([str(a) for a in (*arguments, "--ledger", tmp_path)]) == 0
    assert f'"epsilon": {float(Fraction(60, 255))}' in capsys.readouterr().out


def test_several_radii_are_asked_in_one_run(own_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(DIGITS, square_queries=5))
    asked = ["pgd-10", "autoattack", "--epsilon", "1/255", "96/255", "--attack-images", "8"]
    arguments = ["--weights", own_file, "--evaluators", *asked, "--ledger", tmp_path]
    assert main([str(a) for a in arguments]) == 0
    found = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if "@" in line)
    assert {"pgd-10@1/255", "pgd-10@96/255", "autoattack@1/255", "autoattack@96/255"} <= set(found)
    assert float(found["autoattack@96/255"]) <= float(found["autoattack@1/255"])
    ledger = pq.read_table(tmp_path / "autoattack.parquet")
    assert ledger.num_rows == 2 * 8


def test_the_patch_attack_takes_its_budget(own_file, tmp_path, capsys):
    asked = ["--patches", "2", "--patch-area", "0.1", "--attack-images", "4"]
    arguments = ["--weights", own_file, "--evaluators", "tpa", *asked]
    assert main([str(a) for a in (*arguments, "--ledger", tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tpa: "))
    identity = json.loads(line.removeprefix("tpa: "))
    assert identity["budget"] == {
        **dataclasses.asdict(DIGITS.patch),
        **{"images": 4, "patches": 2, "area": 0.1},
    }
    stages = set(pq.read_table(tmp_path / "tpa.parquet")["stage"].to_pylist())
    assert stages <= {None, "clean", "patch-1", "patch-2"}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--patches", "0", "greater than or equal to 1"),
        ("--attack-images", "1.5", "should be a valid integer"),
        ("--patch-area", "0", "above 0 and at most 1, like 0.025"),
        ("--patch-area", "1", "does not fit 16 px"),
    ],
)
def test_an_attack_option_out_of_bounds_is_refused(own_file, option, value, said, capsys):
    assert said in refused(["--weights", own_file, option, value], capsys)


@pytest.mark.parametrize(
    ("text", "radius"),
    [("0.25/255", Fraction(1, 1020)), ("0.5/255", Fraction(1, 510)), ("1e-3", Fraction(1, 1000))],
)
def test_a_radius_may_be_a_decimal(text, radius):
    options = JudgeOptions.read(["--weights", "FILE", "--epsilon", text, "4/255"])
    assert options.epsilon == (pytest.approx(radius, rel=1e-15), Fraction(4, 255))


@pytest.mark.parametrize("radius", ["4", "-1/255", "0", "four", "1/0", "1/2/3", "nan", "1/inf"])
def test_a_radius_out_of_bounds_is_refused_with_the_unit(own_file, radius, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--weights", str(own_file), f"--epsilon={radius}"])
    assert "above 0 and at most 1, like 4/255" in capsys.readouterr().err
