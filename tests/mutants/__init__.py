"""Deliberate bugs that the fast tests must notice, one row each in `mutants.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug: `old` becomes `new` in a file, and one of the tests must fail.

    equivalent: why nothing can fail, of a mutant that changes no behaviour.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def applied(self, root: Path = ROOT) -> str | None:
        """Return the file's text with the bug in it, None unless `old` occurs once."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def mutants() -> dict[str, Mutant]:
    """Return every mutant by name."""
    rows = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text())["mutants"]
    listed = [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    named = {mutant.name: mutant for mutant in listed}
    assert len(named) == len(listed), "two mutants have one name"
    return named
