"""Outcomes that are no errors, on the real Ray: a teacher collapses, its student is blocked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grid.run import ENVIRONMENT
from tests.driver import trials

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
# A decay that overflows float32 in the first step; the study file's axes do not reach a teacher.
DRIVER = """
from pathlib import Path
import sys

from grid.cluster import Placement
from grid.launch import Launch, run_study
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
    results=Path(sys.argv[1]),
    mlflow=None,
    placement=Placement(),
)
ended = run_study(launch)
print(ended.trained, ended.judged, ended.failures)
"""
COLLAPSED = "the training loss became nan in epoch 1"
BLOCKED = "blocked by resnet18"


def run(results):
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(results)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    results = tmp_path_factory.mktemp("outcomes") / "results"
    return results, run(results)


def outcomes(results):
    return {run.outcome: run for run in trials(results).values()}


def test_a_collapse_and_a_block_are_outcomes_and_no_failures(ended):
    results, driver = ended
    assert driver.returncode == 0, driver.stderr
    assert driver.stdout.split() == ["2", "0", "()"]
    assert "collapsed: resnet18 relu sgd step none 10ep seed0" in driver.stderr
    found = outcomes(results)
    assert found.keys() == {"collapsed", "blocked"}
    assert found["collapsed"].reason == COLLAPSED
    assert found["collapsed"].cells == {}
    assert found["blocked"].reason.startswith(BLOCKED)


def test_the_tables_say_so(ended):
    results, _ = ended
    tables = (results / "report" / "tables.md").read_text()
    assert f"collapsed: {COLLAPSED}" in tables
    assert BLOCKED in tables


def test_a_collapse_is_not_tried_again(ended):
    results, _ = ended
    collapsed = outcomes(results)["collapsed"]
    again = run(results)
    assert again.returncode == 0, again.stderr
    found = outcomes(results)["collapsed"]
    assert (found.run_id, found.end_time) == (collapsed.run_id, collapsed.end_time)
    assert again.stdout.split() == ["1", "0", "()"]
