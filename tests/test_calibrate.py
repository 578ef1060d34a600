"""The calibration, on this machine."""

from __future__ import annotations

import pytest

from grid.forecast import Calibration
from grid.run import main

pytestmark = pytest.mark.slow


def test_what_was_measured_is_kept_and_planned_by(capsys, tmp_path):
    arguments = ["--tables", "T6", "--evaluators", "clean", "--results", str(tmp_path)]
    assert main(["--calibrate", *arguments]) == 0
    first = capsys.readouterr().out
    calibration = Calibration.load(tmp_path / "calibration-digits-cpu.json")
    assert calibration.throughput.epochs.keys() == {"resnet50"}
    forward, gradient = calibration.throughput.passes["resnet50"]
    assert 0 < forward < gradient < calibration.throughput.epochs["resnet50"]
    assert calibration.throughput.start_up > 0
    assert main(["--plan", *arguments]) == 0
    again = capsys.readouterr().out
    assert f"measured {calibration.measured}" in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert again.splitlines()[-1].startswith("Here, ")
