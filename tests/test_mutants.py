"""The list of mutants fits the code that it mutates."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import ROOT, mutants

MUTANTS = mutants()


@pytest.mark.parametrize("name", MUTANTS)
def test_no_mutant_is_stale(name):
    mutant = MUTANTS[name]
    mutated = mutant.applied()
    assert mutated is not None, f"{mutant.file} does not have this once:\n{mutant.old}"
    if mutant.file.endswith(".py"):
        ast.parse(mutated)
    assert mutant.new != mutant.old
    assert all(Path(ROOT, test).is_file() for test in mutant.tests)
    assert mutant.tests or mutant.equivalent
