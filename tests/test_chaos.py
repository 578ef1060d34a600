"""The short form of `python -m tests.chaos`: some faults in one study, and nothing is lost."""

from __future__ import annotations

import pytest

from tests.chaos import FAULTS, FAULTS_EACH, Chaos

FAULTS_IN_CI = ("trial actor killed", "MLflow server killed", "checkpoint truncated")


@pytest.mark.slow
def test_a_study_disturbed_at_random_ends_as_if_undisturbed(tmp_path):
    injected, lost = Chaos(tmp_path, seed=0).round(FAULTS_IN_CI)
    assert injected
    assert not lost


def test_every_fault_is_drawn_as_often_and_by_its_seed(tmp_path):
    drawn = Chaos(tmp_path, seed=3).rounds(list(FAULTS), 2 * len(FAULTS))
    assert drawn == Chaos(tmp_path, seed=3).rounds(list(FAULTS), 2 * len(FAULTS))
    assert drawn != Chaos(tmp_path, seed=4).rounds(list(FAULTS), 2 * len(FAULTS))
    assert all(len(faults) <= FAULTS_EACH for faults in drawn)
    assert sorted(name for faults in drawn for name in faults) == sorted([*FAULTS, *FAULTS])
