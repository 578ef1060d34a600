"""Outcomes that are no errors, on the real Ray: a teacher collapses, its student is blocked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from grid.run import ENVIRONMENT
from tests.driver import ROOT, SECONDS, trials

pytestmark = pytest.mark.slow
# A decay that overflows float32 in the first step; the study file's axes do not reach a teacher.
DRIVER = """
from pathlib import Path
import sys

from grid.launch import Launch, run_study
from grid.options import RunOptions
from grid.plan import build_plan
from grid.study import Study
from tests.paper import resnet50
from trainables.recipe import Distillation
from trainables.scale import DIGITS

teacher = resnet50().replace(model="resnet18", weight_decay=1e30)
student = resnet50().replace(model="resnet18", distillation=Distillation(teacher=teacher))
study = Study(name="outcomes", base=student, axes={})
launch = Launch(
    study=study,
    plan=build_plan(study, DIGITS),
    scale=DIGITS,
    options=RunOptions(results=Path(sys.argv[1])),
)
ended = run_study(launch)
print(ended.trained, ended.judged, ended.failures)
"""
COLLAPSED = "the training loss became nan in epoch 1"
BLOCKED = "blocked by resnet18"


def run(results):
    """Run the study; return how many trials and cells it ended, its failures, and its words."""
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(results)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split(), ended.stderr


def test_a_collapse_and_a_block_are_outcomes_and_no_failures(tmp_path):
    results = tmp_path / "results"
    ended, said = run(results)
    assert ended == ["2", "0", "()"]
    assert "collapsed: resnet18 relu sgd step none 10ep seed0" in said
    outcomes = {run.outcome: run for run in trials(results).values()}
    assert outcomes.keys() == {"collapsed", "blocked"}
    collapsed = outcomes["collapsed"]
    assert (collapsed.reason, collapsed.cells) == (COLLAPSED, {})
    assert outcomes["blocked"].reason.startswith(BLOCKED)
    tables = (results / "report" / "tables.md").read_text()
    assert f"collapsed: {COLLAPSED}" in tables
    assert BLOCKED in tables
    # A block is tried again, a collapse is not.
    assert run(results)[0] == ["1", "0", "()"]
    again = trials(results)[collapsed.digest]
    assert (again.run_id, again.end_time) == (collapsed.run_id, collapsed.end_time)
