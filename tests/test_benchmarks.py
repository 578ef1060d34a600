"""Every benchmark, small: both sides must compute the same thing. No time is looked at."""

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, KEPT, figures, main, table
from benchmarks.measure import DisagreementError, Figure, require

SLOWER = Figure(name="a", values=(1.0, 2.0, 3.0, 4.0, 6.0), target=3.5, same="all")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_sides_compute_the_same(name):
    found = list(figures(name, quick=True))
    assert found
    for figure in found:
        assert figure.same
        assert all(math.isfinite(value) for value in figure.values)


def test_a_figure_is_a_median_with_quartiles_beside_its_target():
    assert SLOWER.spread() == "3.00 [1.50, 5.00]"
    assert not SLOWER.reached
    less = Figure(name="b", values=(3.0,), target=3.5, better="less", unit="s", same="all")
    assert less.reached
    assert less.spread() == "3.00"


def test_sides_that_differ_are_an_error():
    with pytest.raises(DisagreementError, match="3 of 4 verdicts"):
        require(False, "3 of 4 verdicts")


def test_the_table_says_what_was_not_reached():
    row = vars(SLOWER) | {"date": "2026-01-31", "commit": "abc"}
    last = table({"pgd": [row]}).splitlines()[-1]
    assert (
        last
        == "| a | 3.00 [1.50, 5.00] x | 5 | at least 3.5, not reached | all | 2026-01-31, abc |"
    )


def test_the_readmes_figures_are_those_that_are_kept():
    kept = table(json.loads(KEPT.read_text()))
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = re.findall(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", readme.partition("## Speed")[2])
    assert len(shown) > 10
    assert [figure for figure in shown if figure not in kept] == []


def test_an_unknown_benchmark_is_refused_with_the_list():
    with pytest.raises(SystemExit, match="unknown benchmark 'fast'; one of adversarial_step"):
        main(["fast"])
