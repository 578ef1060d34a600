"""The installed command: what it refuses, and that what it prints can be run as it stands."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.driver import ROOT, SECONDS, ended, study_of_one, wait_for_checkpoint
from trainables.options import as_typed

COMMAND = [sys.executable, "-m", "grid.command"]
# Of a shell in which nothing is activated; PYTHONPATH stands for an installation.
BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}


def answer(*words, code):
    done = subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "unknown command 'rum'; one of evaluate, run, plan"),
        (["rum"], "Did you mean 'run'?"),
        (["--data", "x"], "robustness-grid: error: unrecognized arguments: --data x"),
        (["run", "--dat", "x"], "robustness-grid run: error: unknown option '--dat'. Did you mean"),
        (["status", "--results", "/nowhere"], "robustness-grid status: /nowhere holds no mlflow"),
        (["evaluate", "--mdel", "x"], "robustness-grid evaluate: error: unknown option '--mdel'"),
        (["ui", "--results", "/nowhere"], "robustness-grid ui: /nowhere holds no mlflow.db: run"),
        (["ui", "--port", "0"], "robustness-grid ui: error: --port: Input should be greater"),
    ],
)
def test_wrong_words_are_refused_under_the_name_that_the_user_called(words, message):
    assert message in answer(*words, code=2)


def test_a_shell_completes_commands_and_their_options(tmp_path):
    for line, completed in (("robustness-grid sta", ["status "]), ("x run --tab", ["--tables "])):
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        place = {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"), "_ARGCOMPLETE_IFS": "|"}
        subprocess.run(COMMAND, cwd=ROOT, env=os.environ | asked | place, check=True)
        assert (tmp_path / "words").read_text().split("|") == completed


def test_the_help_lists_the_seven_commands_and_each_has_its_own():
    listed = re.findall(r"^  ([a-z]+) ", answer("--help", code=0), re.MULTILINE)
    assert listed == ["evaluate", "run", "plan", "check", "status", "report", "ui"]
    for name in listed:
        assert f"usage: robustness-grid {name} [options]" in answer(name, "--help", code=0)


def test_plan_computes_nothing_and_prints_what_run_py_prints(tmp_path):
    words = ["--tables", "T6", "--results", str(tmp_path / "r")]
    plan = subprocess.run(
        [sys.executable, "grid/run.py", "--plan", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "  T6     3 trials" in plan.stdout
    assert answer("plan", *words, code=0) == plan.stdout
    assert not (tmp_path / "r").exists()


def printed(said, name):
    """Return the command that a line of the output ends in."""
    return re.search(rf"^{name}: +(\S.*)$", said, re.MULTILINE)[1]


def in_a_bare_shell(command, folder):
    return subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command}"],
        cwd=folder,
        env=BARE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def page(port, server):
    deadline = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None, server.stdout.read()
        assert time.monotonic() < deadline
        try:
            with urlopen(f"http://127.0.0.1:{port}/") as response:
                return response.read().decode()
        except URLError:
            time.sleep(0.2)


@pytest.mark.slow
def test_printed_commands_work_as_they_stand_from_where_the_user_is(tmp_path):
    (tmp_path / "one.toml").write_text(study_of_one(epochs=200))
    words = ["run", "--study", "one.toml", "--results", "my results", "--address", "local"]
    driver = subprocess.Popen(
        [*COMMAND, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_checkpoint(tmp_path / "my results", driver)
    driver.send_signal(signal.SIGINT)
    said = ended(driver, code=130)
    status = printed(said, "Status")
    assert "1 trials: 1 stopped" in ended(in_a_bare_shell(status, tmp_path))

    said = ended(in_a_bare_shell(printed(said, "Stopped. Continue with"), tmp_path))
    assert "Trained 1 and judged 1 cells" in said
    assert "1 trials: 1 finished" in ended(in_a_bare_shell(status, tmp_path))

    port = free_port()
    server = in_a_bare_shell(f"{printed(said, 'MLflow UI')} --port {port}", tmp_path)
    try:
        assert "<title>MLflow</title>" in page(port, server)
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=SECONDS)
    assert {path.name for path in tmp_path.iterdir()} == {"one.toml", "my results"}


def test_a_command_is_shown_as_it_was_typed_without_its_password(monkeypatch):
    server = ["--mlflow", "http://me:secret@host:5000"]
    monkeypatch.setattr(sys, "argv", ["grid/run.py", *server])
    assert as_typed() == "python grid/run.py --mlflow http://host:5000"
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/robustness-grid", "run", *server])
    assert as_typed() == "robustness-grid run --mlflow http://host:5000"
