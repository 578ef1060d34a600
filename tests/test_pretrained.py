"""Models and weights of any origin, as the judging command takes them."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from PIL.Image import Resampling
from safetensors.torch import save, save_file
from torch import nn

from evaluators.__main__ import main
from evaluators.checkpoint import load_subject
from evaluators.options import JudgeOptions
from tests.paper import resnet50
from tests.servers import file_server
from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.data.registry import folder_data_set
from trainables.networks import build_classifier, classifier_named, first_classifier
from trainables.pretrained import num_classes_of, preprocessing_of
from trainables.recipe import Preprocessing, check_model
from trainables.scale import DIGITS, scale_for
from trainables.weights import load_weights

BICUBIC = Resampling.BICUBIC
CODE = """
from torch import nn

def net(num_classes=1000, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

class Tupled(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images

def failing():
    return nn.Linear(undefined, 3)

def no_module():
    return "a network"

class Noisy(nn.Module):
    def forward(self, images):
        noisy = images + images.new_empty(images.shape).normal_()
        return noisy.flatten(1)[:, :10]

def half():
    return net(10).half()
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder, which becomes the current one, with a user's net.py and its `net` of 10 classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    scope = {}
    exec(CODE, scope)  # noqa: S102 - the code above
    torch.manual_seed(1)
    return scope["net"](10)


def judge(*words):
    assert main([*words, "--ledger", "ledger"]) == 0
    return pq.read_table("ledger/clean.parquet")["predicted"].to_pylist()


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@torch.inference_mode()
def answers(network):
    """Return what a network answers on the held-out digits, normalised by hand."""
    images = to_unit(load_data(DIGITS).held_out.images[:])
    return network.eval()((images - 0.3) / 0.35).argmax(dim=1).tolist()


def pictures(folder, names):
    """Put a picture of 200 x 180 px of each class below val/, all much alike; return them."""
    noise = torch.Generator().manual_seed(0)
    shown = []
    for place, name in enumerate(names):
        pixels = 120 + 40 * torch.rand(18, 20, 3, generator=noise)
        pixels[:, :, place % 3] += 3 * place
        shown.append(Image.fromarray(pixels.byte().numpy()).resize((200, 180), BICUBIC))
        (folder / "val" / name).mkdir(parents=True)
        shown[-1].save(folder / "val" / name / "picture.png")
    return shown


def nearest_of(network, images):
    """Give a network the head that answers i to the i-th of some images, by its features."""
    with torch.inference_mode():
        features = network.eval().forward_head(network.forward_features(images), pre_logits=True)
    head = network.get_classifier()
    state = {"weight": 1e4 * features, "bias": -5e3 * features.square().sum(dim=1)}
    head.load_state_dict(state)
    return network


@pytest.mark.parametrize(
    ("name", "how"), [("test_resnet", Resampling.BILINEAR), ("test_vit", Resampling.BICUBIC)]
)
def test_a_timm_model_is_shown_images_as_timms_config_of_it_says(
    tmp_path, monkeypatch, capsys, name, how
):
    """Its config: 160 px of 160 / 0.95 = 168, normalised by 0.5 and 0.5."""
    monkeypatch.chdir(tmp_path)
    by_hand = [
        torch.from_numpy(np.array(image.resize((186, 168), how).crop((13, 4, 173, 164))))
        for image in pictures(tmp_path, "abcdefghij")
    ]
    images = (torch.stack(by_hand).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.manual_seed(0)
    network = nearest_of(timm.create_model(name, num_classes=10), images)
    save_file(network.state_dict(), "w.safetensors")
    words = ["--model", f"timm:{name}", "--weights", "w.safetensors", "--data", "."]
    assert judge(*words) == [*range(10)]
    said = f"160 px, crop 0.95, {how.name.lower()}, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert said in capsys.readouterr().out
    for other in ("--mean 0.485 0.456 0.406", "--std 0.3"):
        assert judge(*words, *other.split()) != [*range(10)], other
    options = JudgeOptions.read(words)
    seen = load_data(load_subject(options, options.source())[1], options.source())
    assert torch.equal(seen.held_out.images[:].permute(0, 2, 3, 1), torch.stack(by_hand))


def test_a_name_has_the_preprocessing_of_its_own_tag():
    assert preprocessing_of("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k") == Preprocessing(
        size=224, crop=0.9, squash=False, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    bit = preprocessing_of("timm:resnetv2_50x1_bit.goog_in21k_ft_in1k")
    assert (bit.size, bit.crop, bit.interpolation, bit.mean) == (448, 1, "bilinear", (0.5,) * 3)
    miil, ra = (
        preprocessing_of(f"timm:mobilenetv3_large_100.{tag}") for tag in ("miil_in21k", "ra_in1k")
    )
    assert (miil.mean, miil.std) == ((0, 0, 0), (1, 1, 1))
    assert ra.mean == (0.485, 0.456, 0.406)
    assert num_classes_of("timm:mobilenetv3_large_100.miil_in21k") == 11_221
    assert preprocessing_of("resnet50") == Preprocessing()
    assert num_classes_of("resnet50") is None


def test_a_share_that_is_cut_out_is_not_squashed():
    squashed = Preprocessing(crop=1, squash=True, interpolation="bicubic")
    cut = squashed | JudgeOptions.read(["--crop", "0.9"]).preprocessing()
    assert cut == Preprocessing(crop=0.9, squash=False, interpolation="bicubic")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet49", r"timm has no model 'resnet49'\. Did you mean 'resnet"),
        (
            "timm:resnet18.a1_in1",
            r"'resnet18\.a1_in1'\. Did you mean 'resnet18\.a1_in1k'",
        ),
        ("resnet49", r"unknown model 'resnet49'; one of .* FILE\.pt2\. Did you mean 'resnet50'"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        preprocessing_of(check_model(name))


@pytest.mark.parametrize(
    ("side", "tokens", "patch"), [(32, 64, 4), (64, 64, 8), (160, 100, 16), (224, 196, 16)]
)
def test_a_transformer_of_timm_takes_its_size_and_patches_from_the_data(side, tokens, patch):
    data_set = folder_data_set(image_size=side, num_classes=10, train_images=999, content="0" * 8)
    scale = scale_for(data_set)
    network = classifier_named("timm:test_vit", scale).backbone
    assert network.patch_embed.num_patches == tokens
    assert network.patch_embed.patch_size == (patch, patch)
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 10)


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: state, ""),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "prefix 'module.'"),
        (lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}}, "'model.'"),
        (lambda state: {"net": state, "acc": 0.9}, ""),
        (lambda state: {"epoch": 3, "model": {f"a.b.{k}": v for k, v in state.items()}}, "'a.b.'"),
        (
            lambda state: {f"net.{k}": v for k, v in state.items()} | {"loss.w": torch.ones(1)},
            "not read, as it lies beside that prefix: loss.w (1 in all)",
        ),
    ],
)
def test_weights_load_under_any_prefix_which_is_said(code, capsys, wrap, note):
    torch.save(wrap(code.state_dict()), "w.pth")
    assert judge("--model", "net.py:net", "--weights", "w.pth") == answers(code)
    assert note in capsys.readouterr().out


def test_a_wrong_head_and_missing_keys_are_named(code, capsys):
    state = code.state_dict()
    torch.save({k: v for k, v in state.items() if k[0] != "1"}, "missing.pth")
    said = refused(capsys, "--model", "net.py:net", "--weights", "missing.pth")
    assert "1.weight is missing; 1.bias is missing; 1.running_mean is missing; and 1 more" in said
    torch.save(state, "ten.pth")
    arguments = ["--model-arg", "num_classes=7"]
    assert judge("--model", "net.py:net", *arguments, "--weights", "ten.pth") == answers(code)
    assert "the head has the weights' 10 classes, not 7" in capsys.readouterr().out
    torch.save(state | {"5.weight": torch.ones(7, 8), "5.bias": torch.ones(7)}, "seven.pth")
    said = refused(capsys, "--model", "net.py:net", "--weights", "seven.pth")
    assert "the model answers among 7 classes, and the data have 10" in said


def test_a_new_head_stays_where_that_is_wanted(code):
    torch.save(code.state_dict(), "ten.pth")
    other = nn.Sequential(*list(code)[:-1], nn.Linear(8, 3))
    own = other[5].weight.clone()
    nn.init.zeros_(other[0].weight)
    (note,) = load_weights("ten.pth", other, new_head=True)
    assert note == "the head of 10 classes is left out: a new one of 3 stays"
    assert torch.equal(other[5].weight, own)
    assert other[0].weight.any()
    (note,) = load_weights("ten.pth", other)
    assert note == "the head has the weights' 10 classes, not 3"
    assert torch.equal(other[5].weight, code[5].weight)


def test_a_head_that_fits_is_left_out_where_it_is_reset(code):
    other = copy.deepcopy(code)
    own = nn.init.ones_(other[5].weight).clone()
    nn.init.zeros_(other[0].weight)
    torch.save(code.state_dict(), "ten.pth")
    (note,) = load_weights("ten.pth", other, new_head=True, reset_head=True)
    assert note == "the weights' head is left out: a new one stays"
    assert torch.equal(other[5].weight, own)
    assert torch.equal(other[0].weight, code[0].weight)
    with pytest.raises(ValueError, match="no linear layer at its end"):
        load_weights("ten.pth", nn.Sequential(*code[:-1]), reset_head=True)


@pytest.mark.parametrize("model", ["resnet50", "deit_small", "robust_resnet_dw"])
def test_a_recipe_that_resets_the_head_has_the_seeds_own(model, tmp_path):
    study = resnet50().replace(model=model)
    whole = build_classifier(DIGITS.shrink(study).replace(seed=1))
    torch.save(whole.backbone.state_dict(), tmp_path / "w.pth")
    recipe = DIGITS.shrink(study).replace(init=str(tmp_path / "w.pth"), reset_head=True)
    fresh, (started, _) = build_classifier(recipe), first_classifier(recipe)
    differ = [
        name
        for name, value in started.backbone.state_dict().items()
        if not torch.equal(value, whole.backbone.state_dict()[name])
    ]
    assert differ
    head = {"resnet50": "fc", "deit_small": "head", "robust_resnet_dw": "head.fc"}[model]
    assert all(name.startswith(f"{head}.") for name in differ)
    own = fresh.backbone.state_dict()
    assert all(torch.equal(started.backbone.state_dict()[name], own[name]) for name in differ)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model net.py:nett", "net.py has no function 'nett'. Did you mean 'net'?"),
        ("--model not.py:net", "not.py cannot be imported: FileNotFoundError"),
        ("--model no_such.module:net", "ModuleNotFoundError: No module named 'no_such'"),
        ("--model net.py:failing", "NameError: name 'undefined' is not defined (net.py, line 13)"),
        ("--model net.py:no_module", "net.py:no_module returns a str, not an nn.Module"),
        ("--model net.py:Tupled", "the model returns tuple, not a tensor of logits: give lambda x"),
        ("--model net.py:net --model-arg widht=4", "unexpected keyword argument 'widht'"),
        ("--model net.py:net --model-arg width", "'width' is not NAME=VALUE, like num_classes=10"),
        ("--model net.py:net --model-arg width=x", "net.py:net cannot be built: TypeError"),
        (
            "--model net.py:net --pretrained",
            "--pretrained stands for timm's weights",
        ),
        ("--model resnet18", "resnet18 needs its weights: give --weights"),
        ("--model test_resnet --weights w.pth", "Did you mean 'timm:test_resnet'?"),
        ("--model resnet18 --weights w.pth --model-arg a=1", "'resnet18' cannot be built with a=1"),
        ("--model timm:resnet18", "give --pretrained for timm's own, or --weights"),
        ("--model timm:resnet18 --model-arg a=1 --weights w.pth", "unexpected keyword argument"),
        ("--model timm:resnet18 --pretrained --weights w.pth", "--pretrained stands for timm's"),
        ("--model absent.pt2", "absent.pt2 cannot be built: FileNotFoundError"),
        ("--model net.py:net --weights https://a.org/w.pth", "needs the sha256 of its file"),
        ("--model torchhub:.:net", "torchhub:.:net cannot be built: FileNotFoundError"),
        ("", "a model needs its weights: give --weights"),
    ],
)
def test_a_model_that_cannot_be_is_refused(code, capsys, words, message):
    torch.save(code.state_dict(), "w.pth")
    assert message in refused(capsys, *words.split())


def test_a_function_gets_its_arguments_and_the_number_of_classes(code, capsys):
    for name in ("hubconf.py", "others.py"):
        Path(name).write_text("dependencies = ['torch']\nfrom net import net\n")
    Path("lazy.py").write_text("def __getattr__(name):\n    import net\n    return net.net\n")
    torch.save(code.state_dict(), "w.pth")
    expected = answers(code)
    for words in (
        ["others:net"],
        ["lazy:later"],
        ["torchhub:.:net", "--model-arg", "num_classes=10", "width=8"],
    ):
        assert judge("--model", *words, "--weights", "w.pth") == expected


def test_an_exported_program_is_judged_where_it_takes_any_number_of_images(code, capsys):
    example, batch = (torch.rand(2, 3, 16, 16),), torch.export.Dim("batch")
    torch.export.save(torch.export.export(code.eval(), example), "two.pt2")
    said = refused(capsys, "--model", "two.pt2")
    assert "the exported program cannot take images (" in said
    shapes = re.search(r"dynamic_shapes=(.*)\)$", said.strip())[1].replace(
        "torch.export.Dim", "Dim"
    )
    shapes = eval(shapes, {"Dim": torch.export.Dim})  # noqa: S307 - the advice in the message
    assert batch.__name__ == "batch"
    torch.export.save(torch.export.export(code, example, dynamic_shapes=shapes), "any.pt2")
    assert judge("--model", "any.pt2", "--evaluators", "clean", "pgd-5") == answers(code)


def test_a_random_model_is_judged_and_said_to_be_one(code, capsys):
    judge("--model", "net.py:Noisy")
    assert "verdicts are not repeatable" in capsys.readouterr().out


def test_a_model_of_half_precision_is_judged_in_it(code):
    torch.save(code.half().state_dict(), "half.pth")
    ours = judge("--model", "net.py:half", "--weights", "half.pth")
    images = (to_unit(load_data(DIGITS).held_out.images[:]) - 0.3) / 0.35
    with torch.inference_mode():
        expected = code.eval()(images.half()).argmax(dim=1)
    assert sum(a != b for a, b in zip(ours, expected.tolist(), strict=True)) <= 6  # of 597: ties


def test_other_code_is_another_model_for_a_run_that_continues(code):
    torch.save(code.state_dict(), "w.pth")
    names = set()
    for text in (CODE, f"{CODE}\n# edited", CODE):
        Path("net.py").write_text(text)
        assert main(["--model", "net.py:net", "--weights", "w.pth"]) == 0
        names.add(frozenset(path.name for path in Path("results/ledgers").iterdir()))
    assert sorted(map(len, names)) == [1, 2]


def test_a_file_is_fetched_once_and_only_with_its_sha256(code, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "hub")
    torch.save(code.state_dict(), "w.pth")
    content = Path("w.pth").read_bytes()
    right, wrong = hashlib.sha256(content).hexdigest(), "0" * 64
    with file_server({"/w.pth": content}) as address:
        words = ["--model", "net.py:net", "--weights", f"{address}/w.pth"]
        assert "invalid hash value" in refused(capsys, *words, "--sha256", wrong)
        assert not [*Path("hub").rglob("*.pth")]
        absent = [*words[:-1], f"{address}/absent.pth", "--sha256", right]
        assert "/absent.pth cannot be fetched: HTTP Error 404" in refused(capsys, *absent)
        assert judge(*words, "--sha256", right.upper()) == answers(code)
    (fetched,) = Path("hub").rglob("*.pth")
    assert judge(*words, "--sha256", right) == answers(code)  # nobody serves it any more
    fetched.write_bytes(content[:-1])
    assert f"has the sha256 {hashlib.sha256(content[:-1]).hexdigest()}" in refused(
        capsys, *words, "--sha256", right
    )


def test_weights_of_timms_hub_and_of_hugging_face_are_judged_by_their_thousand_classes(tmp_path):
    """Of two of ImageNet's classes, 0 (n01440764) and 999 (n15075141), by WordNet id."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit")
    nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.zeros(1000).index_fill(0, torch.tensor(999), 1)
    weights = save(network.state_dict())
    pictures(tmp_path, ["n01440764", "n15075141"])
    files = {
        "/timm/test_vit.r160_in1k/resolve/main/model.safetensors": weights,
        "/me/mine/resolve/main/best.safetensors": weights,
    }
    program = """
from contextlib import suppress
from huggingface_hub import constants
from evaluators.__main__ import main
data = ["--data", "."]
main([*data, "--model", "timm:test_vit.r160_in1k", "--pretrained", "--ledger", "timm"])
model = ["--model", "timm:test_vit", "--ledger", "mine", "--weights"]
main([*data, *model, "hf://me/mine/best.safetensors"])
with suppress(SystemExit):
    main([*data, *model, "hf://me/mine"])
constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody answers
main([*data, "--model", "timm:test_vit.r160_in1k", "--pretrained", "--ledger", "cached"])
main([*data, *model, "hf://me/other"])
"""
    with file_server(files) as address:  # huggingface_hub reads the environment as it is imported
        hub = {"HF_ENDPOINT": address, "HF_HOME": "hub"}
        path = {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | hub | path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "hf://me/mine cannot be fetched: " in done.stderr
    silent = "http://127.0.0.1:9 does not answer, and no cache has them"
    assert f"hf://me/other cannot be fetched: {silent}" in done.stderr
    for ledger in ("timm", "mine", "cached"):
        answers = pq.read_table(tmp_path / ledger / "clean.parquet")
        assert set(answers["predicted"].to_pylist()) == {1}
        assert sorted(answers["label"].to_pylist()) == [0, 0, 1, 1]


def test_the_commands_of_the_page_run_as_they_stand(code):
    page = Path(__file__).parents[1].joinpath("docs", "model.md").read_text()
    commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines()
    Path("package").mkdir()
    for name in ("hubconf.py", "package/module.py"):
        Path(name).write_text("dependencies = ['torch']\nfrom net import net\n")
    torch.save(code.state_dict(), "net.pth")
    save_file(code.state_dict(), "net.safetensors")
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "timm.pth")
    shapes = ({0: torch.export.Dim("batch")},)
    images = (torch.rand(2, 3, 16, 16),)
    torch.export.save(torch.export.export(code.eval(), images, dynamic_shapes=shapes), "net.pt2")
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "evaluators"]
        assert main([*words[3:], "--attack-images", "8"]) == 0
