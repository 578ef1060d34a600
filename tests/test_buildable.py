from __future__ import annotations

import re

import pytest
from torch import nn

from grid.run import main
from tests.paper import resnet50
from tests.test_run import refusal
from trainables.buildable import check_buildable
from trainables.models import MODELS, Cost, Model
from trainables.scale import DIGITS

STUDY = 'name = "s"\nbase = "resnet50"\n[axes]\n'
MIXER = 'model = ["timm:mixer_s16_224"]'


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ('model = ["timm:convnext_tinny"]', "timm has no model 'convnext_tinny'. Did you mean"),
        ("model_args = [{widths = 3}]", "cannot be built with widths=3"),
        ("model_args = [{num_classes = 7}]", "has 7 outputs: the data have 10 classes"),
        (
            'model = ["timm:vit_tiny_patch16_224"]\nmodel_args = [{attn_drop_rate = 0.1}]',
            "it draws by scaled_dot_product_attention, which no seed reaches",
        ),
        (
            'model = ["robust_resnet_dw"]\nlayer_decay = [0.75]',
            "layer_decay: 'robust_resnet_dw' does not say which layers follow others",
        ),
        (f"{MIXER}\ntrain_sizes = [[448, 224]]", "mixer_s16_224' cannot take images of 32 px"),
        ('optimizer = ["adahessian"]', "optimizer 'adahessian' cannot make a step"),
        ('optimizer = ["lamb"]\noptimizer_args = [{beta = 1}]', "optimizer 'lamb': .*'beta'"),
        ('scheduler = ["poly"]\nscheduler_args = [{power = 2}]', "scheduler_args of 'poly': "),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_plan(axes, message, capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(STUDY + axes)
    assert re.search(message, refusal(capsys, "--plan", "--study", str(path)))


@pytest.mark.parametrize("command", [(), ("--check",)])
def test_a_run_and_a_check_refuse_a_model_that_cannot_be_built(command, capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(STUDY + 'model = ["timm:convnext_tiny"]')
    results = tmp_path / "results"
    message = refusal(capsys, "--study", str(path), "--results", str(results), *command)
    assert "timm:convnext_tiny' cannot take images of 16 px" in message
    assert not (results / "mlflow.db").exists()


def test_a_combination_that_cannot_be_built_is_refused_alone_with_its_reason(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(f'{STUDY}model = ["resnet18", "timm:convnext_tiny"]\nepochs = [10, 20]\n')
    assert main(["--plan", "--study", str(path), "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 trainings (0 shared), 2 combinations refused" in printed
    (line,) = re.findall("refused: .*", printed)
    assert "2 x 'timm:convnext_tiny' cannot take images of 16 px" in line
    assert line.endswith("(first: model=timm:convnext_tiny epochs=10)")
    teachers = '[bases.t]\nextends = "resnet50"\nmodel = "timm:convnext_tiny"\n'
    path.write_text(f'{STUDY}teacher = ["none", "t"]\n{teachers}')
    assert main(["--plan", "--study", str(path), "--results", str(tmp_path)]) == 0
    assert "1 trainings (0 shared), 1 combinations refused" in capsys.readouterr().out


def test_a_report_of_tables_needs_no_model_to_be_built(capsys, tmp_path):
    path = tmp_path / "s.toml"
    rows = '[{ label = "ConvNeXt", base = "resnet50", model = "timm:convnext_tiny" }]'
    path.write_text(
        f'name = "s"\n[[tables]]\nname = "A"\nquestion = "?"\ncolumns = ["clean"]\nrows = {rows}'
    )
    assert "cannot take" in refusal(capsys, "--study", str(path), "--results", str(tmp_path))
    words = ("--report", "--study", str(path), "--results", str(tmp_path))
    assert "cannot take" not in refusal(capsys, *words)


def test_an_activation_that_a_model_has_nowhere_is_refused(monkeypatch):
    def build(scale, norm_layer):
        pixels = 3 * scale.image_size**2
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, scale.num_classes))

    linear = Model("linear", "base", build, Cost(1, 1, 1), family="linear")
    monkeypatch.setitem(MODELS, "linear", linear)
    recipe = DIGITS.shrink(resnet50()).replace(model="linear", activation="own")
    check_buildable(recipe, {})
    with pytest.raises(ValueError, match="'relu' changes nothing in 'linear': state 'own'"):
        check_buildable(recipe.replace(activation="relu"), {})
