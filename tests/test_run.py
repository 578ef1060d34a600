"""The command line, in process: what is refused, what is printed, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grid.run import main

ROOT = Path(__file__).parents[1]


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "papers"], "unknown study 'papers'; one of ['full', 'paper']"),
        (["--study", "none.toml"], "study file none.toml cannot be read"),
        (["--tables", "T99"], "unknown table 'T99'; study 'paper' has T1, T2"),
        (["--study", "full", "--tables", "T1"], "study 'full' has no tables"),
        (["--only", "colour=red"], "unknown axis 'colour' in --only; one of model, family"),
        (["--only", "activation=tanh"], "activation=tanh; values there: gelu, relu"),
        (["--only", "activation"], "--only wants AXIS=VALUE, not 'activation'"),
        (
            ["--scale", "mnist"],
            "unknown scale 'mnist'; one of ['cifar10', 'digits', 'folder', 'imagenet']",
        ),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--cpus-per-trial", "two"], "'two' is not a whole number"),
        (["--gpus-per-trial", "-1"], "'-1' is not a number of at least 0"),
        (["--hung-after", "0"], "a step takes more than 0 seconds"),
        (["--workers", "0"], "'0' is not a whole number of at least 1"),
        (["--plan", "--nodes", "8"], "--nodes and --gpus-per-node go together"),
        (["--budget-hours", "8"], "--budget-gpu-hours goes with --plan"),
        (
            ["--plan", "--budget-hours", "8", "--results", "none"],
            "hours are unknown: --calibrate first, or give --seconds-per-unit",
        ),
        (
            ["--plan", "--interruptions-per-node-day", "1"],
            "--interruptions-per-node-day goes with --nodes",
        ),
        (["--set", "precision"], "--set wants FIELD=VALUE, not 'precision'"),
        (["--set", "=1"], "unknown field '' in --set; one of optimizer, augmentation"),
        (["--set", "model=resnet18"], "unknown field 'model' in --set; one of optimizer"),
        (["--set", "epochs=5", "--set", "epochs=6"], "--set has two values of epochs"),
        (["--set", "epochs=2.5"], "epochs: Input should be a valid integer, not 2.5"),
        (["--set", "precision=5"], "Input should be 'float32', 'bf16' or 'fp16', not 5"),
        (["--set", "learning_rate=nan"], "learning_rate: Input should be a finite number"),
        (["--set", "micro_batch=1\nseed=2"], "micro_batch: Input should be a valid integer"),
        (["--set", "curriculum=" + "[" * 5000], "unknown curriculum"),
        (["--set", "colour=red", "--data", "d"], "unknown field 'colour'"),
        (
            ["--plan", "--seconds-per-unit", "500", "--nodes", "1", "--gpus-per-node", "1"],
            "beside the evaluators' 0.25 GPUs: give --gpus-per-worker 0.75",
        ),
        (["--sceale", "digits"], "unrecognized arguments"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(capsys, arguments, message):
    assert message in refusal(capsys, *arguments)


def test_a_study_that_asks_for_an_unknown_evaluator_is_refused(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="s"\nbase="resnet50"\nevaluators=["clean", "pgf"]\n')
    assert "unknown evaluator 'pgf'" in refusal(capsys, "--study", str(path))


def test_a_timm_model_that_cannot_take_the_scales_images_is_refused(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="s"\nbase="resnet50"\n[axes]\nfamily=["timm:convnext_tiny"]\n')
    arguments = ["--study", str(path), "--results", str(tmp_path / "r")]
    message = refusal(capsys, *arguments)
    assert "model 'timm:convnext_tiny' cannot take images of 16 px" in message
    assert not (tmp_path / "r").exists()


def test_a_results_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(capsys, "--results", str(tmp_path / "file" / "results"))
    assert "is not writable" in message


def test_an_mlflow_server_that_does_not_answer_is_refused(capsys, tmp_path):
    results = tmp_path / "results"
    arguments = ["--mlflow", "http://127.0.0.1:9", "--results", str(results)]
    assert "no MLflow server answers at http://127.0.0.1:9" in refusal(capsys, *arguments)
    assert not results.exists()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("deit.workers = 3", "cannot be shared by 3 workers; their number must be one of 1, 2, 4"),
        ("deit.worker = 2", "unknown key 'placement.deit.worker'; known keys: workers, min_wor"),
        ("vit.workers = 2", "placement.vit.[key]: Input should be 'resnet', 'deit', 'hybrid' or"),
        ("deit.min_workers = 2", "a trial of 1 workers cannot have 2 at least"),
        ("deit = {workers = 4, min_workers = 3}", "cannot be shared by 3 workers"),
    ],
)
def test_a_placement_in_a_study_that_cannot_be_is_refused(capsys, tmp_path, placement, message):
    path = tmp_path / "s.toml"
    study = 'name="s"\nbase="resnet50"\n[axes]\nfamily=["resnet", "deit"]\n[placement]\n'
    path.write_text(study + placement)
    results = tmp_path / "results"
    assert message in refusal(capsys, "--study", str(path), "--results", str(results))
    assert not results.exists()


def test_a_placement_changes_no_digest(capsys, tmp_path):
    plans = []
    for placement in ("", "[placement.resnet]\nworkers = 2\ngpus = 1.0"):
        path = tmp_path / "s.toml"
        path.write_text(f'name="s"\nbase="resnet50"\n{placement}')
        assert main(["--study", str(path), "--plan"]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("asked", ["--report", "--status"])
def test_what_reads_a_study_is_refused_without_one(capsys, tmp_path, asked):
    message = refusal(capsys, asked, "--results", str(tmp_path / "none"))
    assert "holds no mlflow.db" in message


def test_workers_that_do_not_divide_a_recipes_batch_are_refused(capsys, tmp_path):
    arguments = ["--workers", "3", "--tables", "T1", "--results", str(tmp_path / "r")]
    message = refusal(capsys, *arguments)
    assert (
        "cannot be shared by 3 workers; their number must be one of 1, 2, 4, 8, 16, 32" in message
    )
    assert "resnet50 relu" in message or "deit_small" in message
    assert not (tmp_path / "r").exists()


def test_a_cluster_that_does_not_answer_is_refused(capsys, tmp_path):
    message = refusal(capsys, "--address", "127.0.0.1:9", "--results", str(tmp_path / "r"))
    assert "no Ray cluster answers at 127.0.0.1:9" in message
    assert not (tmp_path / "r").exists()


def test_a_scale_without_data_is_refused(capsys, tmp_path):
    message = refusal(capsys, "--scale", "imagenet", "--results", str(tmp_path / "r"))
    assert "'imagenet' has no embedded data" in message
    assert not (tmp_path / "r").exists()


def test_plan_prints_trials_sharing_and_hyperparameters(capsys):
    assert main(["--plan", "--tables", "T2", "--scale", "imagenet"]) == 0
    printed = capsys.readouterr().out
    assert "rate 1.6, decay 0.0001, batch 4096, warm-up 5, ghost batch 64 of 1024" in printed
    assert "7 rows asked for, 7 trainings (0 shared), 0 combinations refused" in printed


def test_plan_prints_what_is_set_for_all(capsys):
    asked = ["--plan", "--tables", "T5", "T9", "--scale", "imagenet", "--seeds", "2"]
    assert main([*asked, "--set", "precision=bf16", "micro_batch=256", "--set", "epochs=90"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Study paper with precision=bf16 micro_batch=256 epochs=90 at scale")
    assert printed.count(" bf16 90ep seed") == printed.count("micro_batch=256\n") == 10
    assert "14 rows asked for, 10 trainings (4 shared), 0 combinations refused" in printed


SHORTENED = "the warm-up of 5 of 100 epochs is shortened to 0.2 of 4"


def test_plan_prints_what_is_set_and_every_field_in_which_trials_differ(capsys, tmp_path):
    path = tmp_path / "s.toml"
    fixed = "label_smoothing=0.3\nmixup_alpha=0.4\nepochs=4"
    axes = '[axes]\nfamily=["resnet", "deit"]\naugmentation=["none", "mixup"]\nscheduler=["step"]'
    path.write_text(f'name="s"\nbase="resnet50_aligned"\n[set]\n{fixed}\n{axes}')
    assert main(["--plan", "--study", str(path), "--scale", "imagenet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Study s with label_smoothing=0.3 mixup_alpha=0.4 epochs=4 at")
    assert "mixup_alpha has no effect in 2 of 4 trials, the first " in printed
    told = printed.partition("Trials differ in:\n")[2].splitlines()
    found = dict(line.strip().split(": ") for line in told[: told.index(SHORTENED)])
    assert {name: set(values.split(", ")) for name, values in found.items()} == {
        "model": {"resnet50", "deit_small"},
        "augmentations": {"none", "mixup"},
        "batch_size": {"256", "2048"},
        "learning_rate": {"0.0005", "0.002"},
    }


def test_a_studys_file_can_be_set_too(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="s"\nbase="resnet50"\n[set]\nepochs=50\n[axes]\nlearning_rate=[0.1, 0.2]')
    asked = ["--plan", "--study", str(path), "--only", "precision=bf16"]
    assert main([*asked, "--set", "epochs=30", "precision='bf16'", "label_smoothing=0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" bf16 3ep seed0 learning_rate=") == 2
    assert printed.count(" label_smoothing=0.1\n") == 2


def test_a_share_of_a_gpu_costs_the_gpu_that_a_training_is_alone_on(capsys):
    asked = ["--plan", "--scale", "imagenet", "--tables", "T6", "--evaluators", "clean"]
    asked += ["--seconds-per-unit", "500", "--nodes", "1", "--gpus-per-node", "1"]
    assert main([*asked, "--gpus-per-worker", "0.75", "--budget-hours", "171"]) == 0
    printed = capsys.readouterr().out
    # Three trainings of 100 epochs of 4.1 units.
    assert f"Work: 171 GPU-hours, {3 * 100 * 4.1 * 500 / 3600:.0f} to train" in printed
    assert "On 1 nodes of 1 GPUs, 1 trials at once: 7.1 days" in printed
    assert "For 171 GPU-hours: 1 of 1 tables, T6" in printed
    assert main([*asked, "--nodes", "2", "--gpus-per-worker", "0.5"]) == 0
    # Three lanes of half a GPU, each at half the speed.
    assert "3 trials at once: 4.7 days" in capsys.readouterr().out


def test_a_budget_of_a_study_without_tables_says_so(capsys):
    asked = ["--plan", "--study", "full", "--seconds-per-unit", "1", "--budget-hours", "2"]
    assert main(asked) == 0
    assert (
        "For 2 core-hours: a budget chooses among tables, and study full has none; all of it takes "
    ) in capsys.readouterr().out


def test_plan_tells_hours_wall_clock_cost_and_what_a_budget_buys(capsys):
    cluster = ["--nodes", "8", "--gpus-per-node", "8", "--workers", "8"]
    money = ["--dollars-per-gpu-hour", "2", "--budget-gpu-hours", "40"]
    spot = ["--interruptions-per-node-day", "3"]
    arguments = ["--plan", "--scale", "imagenet", "--tables", "T5", "T6", "T11"]
    assert main([*arguments, *cluster, *money, *spot, "--seconds-per-unit", "60"]) == 0
    printed = capsys.readouterr().out
    assert "10 rows asked for, 9 trainings (1 shared)" in printed
    assert "Disk: at most 11.9 GiB" in printed
    assert "194 GPU-hours, 193 to train and 1.1 to judge" in printed
    assert "T5 alone: 3 trainings, 22 GPU-hours" in printed
    assert "On 8 nodes of 8 GPUs, 7 trials at once of 8 workers: " in printed
    assert "Taken away 3 times a node and day, for 10 min: " in printed
    assert "Cost: $" in printed
    assert "For 40 GPU-hours: 2 of 3 tables, T5 T6, for " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here to measure")
def test_hours_of_gpus_are_not_measured_on_a_machine_without_one(capsys, tmp_path):
    arguments = ["--calibrate", "--tables", "T6", "--results", str(tmp_path)]
    message = refusal(capsys, *arguments, "--nodes", "8", "--gpus-per-node", "8")
    assert "measured on one, and this machine has none" in message


def test_any_evaluator_can_be_asked_of_a_grid_and_no_unknown_one(capsys):
    asked = ["--plan", "--study", "full", "--only", "epochs=10", "--evaluators", "autoattack"]
    assert main([*asked, "stylized"]) == 0
    assert "autoattack" in capsys.readouterr().out
    assert "unknown evaluator 'pgf'; one of clean, natural" in refusal(capsys, *asked, "pgf")


def test_plan_asks_for_a_calibration_or_a_unit(capsys, tmp_path):
    assert main(["--plan", "--tables", "T6", "--results", str(tmp_path)]) == 0
    assert "Hours: unknown; --calibrate measures them" in capsys.readouterr().out
    assert main(["--plan", "--tables", "T6", "--seconds-per-unit", "1"]) == 0
    assert "core-hours" in capsys.readouterr().out


def test_plan_prints_what_is_refused_and_why(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('name="s"\nbase="resnet50"\n[axes]\nfamily=["resnet","deit"]\nnorm=["ghost"]\n')
    assert main(["--plan", "--study", str(path)]) == 0
    assert "refused: family=deit norm=ghost: norm 'ghost' needs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--plan", "--study", "full"]])
def test_help_and_plan_import_nothing_heavy(arguments):
    code = (
        "import sys; from grid.run import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
