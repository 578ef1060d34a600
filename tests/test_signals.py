"""Signals that stop a run: it ends as after Ctrl-C, and says how to go on."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import SECONDS, study_of_one, wait_for_checkpoint
from trainables.store.results import is_in_use

ROOT = Path(__file__).parents[1]


def start(tmp_path):
    study = tmp_path / "one.toml"
    study.write_text(study_of_one(epochs=900))
    run = [sys.executable, "grid/run.py", "--study", study, "--results", tmp_path / "results"]
    return subprocess.Popen(
        run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_that_is_told_to_end_says_how_to_continue(tmp_path, number):
    driver = start(tmp_path)
    wait_for_checkpoint(tmp_path / "results", driver)
    driver.send_signal(number)
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 130, said
    assert "Stopped. Continue with: python grid/run.py --study" in said
    assert "Traceback" not in said
    assert not is_in_use(tmp_path / "results")


@pytest.mark.parametrize(("ignored", "code"), [(False, 130), (True, 0)])
def test_a_process_that_ignores_hangups_is_not_stopped_by_one(ignored, code):
    program = (
        "import os, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from grid.signals import stop_on_signals\n"
        "stop_on_signals()\n"
        "try: os.kill(os.getpid(), signal.SIGHUP)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ended.returncode == code


def test_a_terminal_that_is_closed_does_not_fail_the_end():
    program = (
        "import signal\n"
        "from grid.signals import stop_on_signals\n"
        "stop_on_signals()\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt: print('stopped', flush=True)"
    )
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    assert os.read(master, 100).startswith(b"ready")
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(SECONDS) == 0
