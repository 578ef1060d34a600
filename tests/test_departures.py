"""The table of departures from the study's code: every switch it names exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from evaluators import EVALUATORS
from evaluators.options import JudgeOptions
from grid.options import RunOptions
from tests.paper import BASES, with_settings
from trainables.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "departures.md"
COLUMNS = {
    ("What", "The study", "Ours", "Why", "Switch"),
    ("What", "The study", "Ours", "Paper or practice", "Switch"),
}
CODE = re.compile(r"`([^`]+)`")
OUR_FILE = re.compile(r"(?:grid|trainables|evaluators)/\S+\.(?:py|toml)")
THEIR_FILE = re.compile(r"[\w./-]+(?:\.(?:py|sh|txt|md|ipynb)|/)(?::\d+(?:-\d+)?)?")
JUDGE = "python -m evaluators "


def _tables() -> list[list[tuple[str, ...]]]:
    """Return the document's tables, each with its header and without the rule below it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *lines = block.splitlines()
        rows = [tuple(map(str.strip, line.strip("|").split("|"))) for line in (header, *lines)]
        tables.append(rows)
    return tables


ROWS = [row for table in _tables() for row in table[1:]]
SWITCHES = {row[0]: row[-1] for row in ROWS if not row[-1].startswith("none:")}


def test_there_are_two_tables_and_no_row_lacks_a_cell():
    tables = _tables()
    assert {table[0] for table in tables} == COLUMNS
    assert all(len(row) == 5 and all(row) for row in ROWS)
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_a_file_on_both_sides_and_ours_is_there(row):
    what, theirs, ours, _, switch = row
    assert any(THEIR_FILE.fullmatch(code) for code in CODE.findall(theirs)), what
    files = [code for code in CODE.findall(ours) if OUR_FILE.fullmatch(code)]
    assert files, what
    assert [file for file in files if not (ROOT / file).is_file()] == []
    if switch.startswith("none:"):
        assert len(switch.removeprefix("none:").split()) >= 4, what


@pytest.mark.parametrize("what", SWITCHES)
def test_a_switch_is_taken_and_a_setting_makes_another_trial(what, tmp_path):
    (switch,) = CODE.findall(SWITCHES[what])
    assert SWITCHES[what] == f"`{switch}`"
    words = shlex.split(switch.removeprefix(JUDGE).replace("=DIR", f"={tmp_path}"))
    if switch.startswith(JUDGE):
        JudgeOptions.read(["--weights", "FILE", *words])
        return
    options = RunOptions.read(words)
    assert set(options.evaluators) <= set(EVALUATORS)
    if settings := options.settings():
        digests = {_digest(base, settings) for base in BASES.values()}
        assert digests - {None} - {base.digest() for base in BASES.values()}


def _digest(recipe: Recipe, settings: dict[str, Any]) -> str | None:
    """Return the digest of a recipe with some fields set; None where they do not go with it."""
    try:
        return with_settings(recipe, settings).digest()
    except ValueError:
        return None


def test_every_value_as_published_is_named_by_a_row():
    named = " ".join(SWITCHES.values())
    published = {name for name in EVALUATORS if name.endswith("as-published")}
    assert published
    assert {name for name in published if name not in named} == set()
    assert "protocol=as-published" in named


def test_readers_are_led_to_the_table():
    assert "(docs/departures.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(departures.md)" in (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
