"""The command line, in process: what is refused, what is printed, and how fast it answers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from grid.options import RunOptions
from grid.run import main
from grid.status import open_tracker
from tests.driver import SECONDS, ended, start, study_of_one, wait_for_checkpoint
from trainables.scale import DIGITS
from trainables.store.results import is_in_use

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
        (
            ["--study", "bai"],
            "unknown study 'bai'; one of bai2021, ",
        ),
        (["--tables", "T99"], "study 'bai2021': unknown table 'T99'; one of T1, T2"),
        (["--study", "full", "--tables", "T1"], "study 'full' has no tables"),
        (["--only", "colour=red"], "--only: unknown axis 'colour'; one of model, family"),
        (["--only", "activation"], "--only wants AXIS=VALUE, not 'activation'"),
        (["--scale", "mnist"], "unknown scale 'mnist'; one of digits, imagenet, cifar10, folder"),
        (["--evaluators", "pgf"], "unknown evaluator 'pgf'; one of clean, calibration, natural"),
        (["--seeds", "0"], "--seeds: Input should be greater than or equal to 1, not '0'"),
        (["--cpus-per-worker", "two"], "--cpus-per-worker: Input should be a valid integer"),
        (["--gpus-per-worker", "nan"], "--gpus-per-worker: Input should be a finite number"),
        (["--wait", "8"], "--wait goes with --check"),
        (["--hung-after", "0"], "--hung-after: Input should be greater than 0"),
        (["--watch"], "--watch goes with --status"),
        (["--only", "family=resnt"], "values there: deit, hybrid, resnet. Did you mean 'resnet'?"),
        (["--plan", "--workers", "3"], "cannot be shared by 3 workers; their number must be one"),
        (["--numerics", "fast"], "--numerics fast is of GPUs: give --gpus-per-worker"),
        (["--evaluator-share", "0.5"], "--evaluator-share is of GPUs: give --gpus-per-worker"),
        (["--plan", "--status", "--report"], "--plan and --status and --report exclude each other"),
        (["--set", "=1"], "--set: unknown field ''; one of optimizer, augmentation"),
        (["--set", "model=resnet18"], "--set: unknown field 'model'; one of optimizer"),
        (["--set", "epochs=5", "--set", "epochs=6"], "--set has two values of epochs"),
        (["--set", "epochs=2.5"], "epochs: Input should be a valid integer, not 2.5"),
        (["--set", "learning_rate=nan"], "learning_rate: Input should be a finite number"),
        (["--set", "micro_batch=1\nseed=2"], "micro_batch: Input should be a valid integer"),
        (["--set", "curriculum=" + "[" * 5000], "unknown curriculum"),
        (["--sceale", "digits"], "unknown option '--sceale'. Did you mean '--scale'?"),
        (["--scale", "imagenet"], "'imagenet' has no embedded data"),
        (["--workers", "3"], "3 workers; their number must be one of 1, 2, 4, 8, 16, 32"),
        (["--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["--mlflow", "http://127.0.0.1:9"], "MLflow at http://127.0.0.1:9 cannot be used"),
        (["--mlflow", "postgresql+none://h/db"], "[cluster]' brings that of postgresql+psycopg://"),
        (["--report"], "holds no mlflow.db"),
        (["--status"], "holds no mlflow.db"),
    ],
)
def test_wrong_options_are_refused_with_the_allowed_ones(capsys, tmp_path, arguments, message):
    assert message in refusal(capsys, "--results", str(tmp_path / "r"), *arguments)
    assert not (tmp_path / "r" / "mlflow.db").exists()


def test_a_results_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(capsys, "--results", str(tmp_path / "file" / "results"))
    assert "is not writable" in message


GRID = 'name="s"\nbase="resnet50"\n[axes]\nfamily='


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ('["timm:convnext_tiny"]', "'timm:convnext_tiny' cannot take images of 16 px"),
        (
            '["resnet", "deit"]\n[placement]\ndeit.workers = 3',
            "cannot be shared by 3 workers; their number must be one of 1, 2, 4",
        ),
        (
            '["resnet"]\n[placement]\ndeit.worker = 2',
            "placement.deit: unknown key 'worker'; one of workers, cpus, gpus. Did you mean",
        ),
        (
            '["resnet"]\n[placement]\ndiet.workers = 2',
            "placement.diet: unknown family 'diet'; one of resnet, deit, hy",
        ),
    ],
)
def test_studies_that_cannot_be_trained_are_refused(capsys, tmp_path, rest, message):
    path = tmp_path / "s.toml"
    path.write_text(GRID + rest)
    results = tmp_path / "results"
    assert message in refusal(capsys, "--study", str(path), "--results", str(results))
    assert not (results / "mlflow.db").exists()


@pytest.mark.parametrize("option", [("--numerics", "fast"), ("--evaluator-share", "0.5")])
def test_gpus_of_a_studys_placement_do_for_what_is_of_gpus(capsys, tmp_path, option):
    path = tmp_path / "s.toml"
    path.write_text(GRID + '["resnet", "deit"]\n[placement]\ndeit.gpus = 1')
    command = ["--study", str(path), "--results", str(tmp_path / "results"), *option]
    assert main([*command, "--plan"]) == 0
    assert "is of GPUs" in refusal(capsys, *command, "--only", "family=resnet")
    assert not (tmp_path / "results").exists()  # nor a design


def test_plan_prints_trials_sharing_and_hyperparameters(capsys):
    assert main(["--plan", "--all", "--tables", "T2", "--scale", "imagenet"]) == 0
    printed = capsys.readouterr().out
    assert "rate 1.6, decay 0.0001, batch 4096, warm-up 5\n" in printed
    assert "7 rows, 7 trainings (0 shared), 0 combinations refused; 28 cells to judge" in printed


def test_plan_prints_what_is_set_for_all(capsys):
    asked = ["--plan", "--all", "--tables", "T5", "T9", "--scale", "imagenet", "--seeds", "2"]
    assert main([*asked, "--set", "precision=bf16", "micro_batch=256", "--set", "epochs=90"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Study bai2021 with precision=bf16 micro_batch=256 epochs=90 at scale"
    )
    assert printed.count(" bf16 90ep seed") == 10
    assert "14 rows, 10 trainings (4 shared), 0 combinations refused" in printed


def test_plan_prints_settings_and_every_field_in_which_trials_differ(capsys, tmp_path):
    path = tmp_path / "s.toml"
    axes = '["resnet", "deit"]\naugmentation=["none", "mixup"]\nscheduler=["cosine"]'
    path.write_text(
        f'{GRID}{axes}\noptimizer=["adamw"]\n[set]\nlabel_smoothing=0.3\nmixup_alpha=0.4'
    )
    asked = ["--plan", "--all", "--study", str(path), "--scale", "imagenet"]
    assert main([*asked, "--set", "precision=bf16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Study s with label_smoothing=0.3 mixup_alpha=0.4 precision=bf16 at")
    assert "mixup_alpha has no effect in 2 of 4 trials, the first " in printed
    lines = printed.partition("Trials differ in:\n")[2].splitlines()
    values = dict(line.strip().split(": ") for line in lines if line.startswith("  "))
    assert {name: set(text.split(", ")) for name, text in values.items()} == {
        "model": {"resnet50", "deit_small"},
        "augmentations": {"none", "mixup"},
        "batch_size": {"256", "2048"},
        "learning_rate": {"0.0005", "0.002"},
    }


def test_the_plan_of_the_paper_and_of_the_whole_grid_fit_one_screen(capsys, tmp_path):
    for study in ("bai2021", "full"):
        assert main(["--plan", "--study", study, "--results", str(tmp_path / "none")]) == 0
        assert len(capsys.readouterr().out.splitlines()) <= 24
    assert main(["--plan", "--all", "--study", "full", "--results", str(tmp_path / "none")]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3 * 1536


def test_a_share_of_a_gpu_costs_the_gpu_that_a_training_is_alone_on(capsys):
    asked = ["--plan", "--scale", "imagenet", "--tables", "T6", "--evaluators", "clean"]
    assert main([*asked, "--seconds-per-unit", "500", "--gpus-per-worker", "0.75"]) == 0
    printed = capsys.readouterr().out
    # Three trainings of 100 epochs of 4.1 units.
    assert f"Work: 171 GPU-hours, {3 * 100 * 4.1 * 500 / 3600:.0f} to train" in printed
    assert "Wall clock: 7.1 days with 1 trials at once" in printed


def test_plan_tells_hours_wall_clock_and_cost(capsys):
    lanes = ["--gpus-per-worker", "1", "--workers", "8", "--trials-at-once", "7"]
    arguments = ["--plan", "--scale", "imagenet", "--tables", "T5", "T6", "T11"]
    money = ["--dollars-per-gpu-hour", "2", "--seconds-per-unit", "60"]
    assert main([*arguments, *lanes, *money]) == 0
    printed = capsys.readouterr().out
    assert "10 rows, 9 trainings (1 shared)" in printed
    assert "Disk: about 7 GiB" in printed
    assert "Work: 194 GPU-hours, 193 to train and 1.1 to judge (60 s a unit: --sec" in printed
    assert "  T5     3 trials      22 h" in printed
    # The longest training takes 300 epochs of 15.1 units on 8 GPUs: more than a seventh of all.
    longest = 300 * 15.1 * 60 / 8 / 3600
    assert f"Wall clock: {longest:.1f} h with 7 trials at once of 8 workers" in printed
    assert "Cost: $388." in printed


def test_plan_says_what_is_refused_and_why_and_that_hours_are_unknown(capsys, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(GRID + '["resnet","deit"]\nnorm=["ghost"]\n')
    assert main(["--plan", "--study", str(path), "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "refused: 1 x norm 'ghost' needs" in printed
    assert "Hours: unknown; give --seconds-per-unit, or finish" in printed


def test_help_shows_25_options_and_help_all_every_one(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([option])
        shown[option] = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(shown["--help"]) <= 25
    assert shown["--help-all"] - shown["--help"] >= {"--hung-after", "--storage", "--stored"}


def test_words_of_set_may_hold_commas_and_quotes():
    words = ["--set", "augmentation=randaug+mixup", 'activation="gelu"', "--set", "a=[1, {b = 2}]"]
    options = RunOptions.read([*words, "--only", "family=resnet,deit epochs=10"])
    assert options.set == ("augmentation=randaug+mixup", 'activation="gelu"', "a=[1, {b = 2}]")
    assert options.values_by_axis() == {"family": ("resnet", "deit"), "epochs": ("10",)}


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], set()),
        (["--plan", "--study", "full"], set()),
        (["--plan", "--results", "none"], {"numpy", "scipy", "pyarrow"}),  # with its claims' design
        (["--tables", "none", "--results", "none"], set()),
    ],
)
def test_help_and_plan_and_wrong_words_import_nothing_heavy(arguments, light):
    heavy = {"torch", "ray", "mlflow", "numpy", "scipy", "scipy.stats", "pandas", "pyarrow"} - light
    code = (
        "import sys; from grid.run import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"heavy = {heavy!r} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_that_is_told_to_end_says_how_to_continue(tmp_path, number):
    study = tmp_path / "one.toml"
    study.write_text(study_of_one(epochs=900))
    words = [sys.executable, "grid/run.py", "--study", study, "--results", tmp_path / "results"]
    driver = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_checkpoint(tmp_path / "results", driver)
    driver.send_signal(number)
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 130, said
    assert f"Stopped. Continue with: {sys.executable} grid/run.py --study" in said
    assert "Traceback" not in said
    assert not is_in_use(tmp_path / "results")


def test_a_report_of_what_the_results_do_not_hold_is_refused_and_writes_nothing(tmp_path, capsys):
    open_tracker(tmp_path, None, DIGITS)  # as another study's run has left it
    said = refusal(capsys, "--report", "--results", str(tmp_path))
    assert f"{tmp_path} holds no trial of study 'bai2021' at scale digits: give the options" in said
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_a_run_whose_ray_has_died_ends_and_says_how_to_continue(tmp_path):
    study = tmp_path / "one.toml"
    study.write_text(study_of_one(epochs=900))
    driver = start(study, tmp_path / "results", "--address", "local")
    assert driver.stdout.readline().startswith("Images of digits")
    assert "1 to train" in driver.stdout.readline()
    family = psutil.Process(driver.pid).children(recursive=True)
    next(process for process in family if process.name() == "raylet").kill()
    said = ended(driver, code=1)
    assert f"Ray's last node has died. Continue with: {sys.executable} grid/run.py --study" in said


@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)])
def test_a_process_that_ignores_hangups_is_not_stopped_by_one(ignored, code):
    program = (
        "import os, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from trainables.options import stop_on_signals\n"
        "stop_on_signals()\n"
        "try: os.kill(os.getpid(), signal.SIGHUP)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ended.returncode == code


IN_FINALISER = """
import signal, sys, time
from trainables.options import stop_on_signals

class Dropped:
    def __del__(self):
        if sys.argv[1] == "interrupted":
            signal.raise_signal(signal.SIGINT)
        raise ValueError("in a finaliser")

stop_on_signals()
try:
    Dropped()
    print("went on")
    time.sleep(60 if sys.argv[1] == "interrupted" else 0)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("how", "code", "ignored"), [("interrupted", 130, False), ("fails", 0, True)]
)
def test_an_interrupt_that_comes_inside_a_finaliser_is_not_lost(how, code, ignored):
    command = [sys.executable, "-c", IN_FINALISER, how]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "went on\n"
    assert ("Exception ignored in: <function Dropped.__del__" in ended.stderr) == ignored
    assert ended.returncode == code
