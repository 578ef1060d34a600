"""Run the fast tests on a copy of the project with one deliberate bug at a time.

    python -m tests.mutants [NAME ...]

NAME begins the names of the mutants to run; without one all are run, in about an hour. A mutant is
killed where one of its tests fails; it survives where they pass, end in an error, or take more than
five minutes; it is stale where its text is not in the file once: exit code 1 for both of these.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.mutants import ROOT, Mutant, mutants

SECONDS = 300
FAST = ("-x", "-q", "-m", "not slow and not cluster", "-p", "no:cacheprovider")
FAILED = 1  # pytest's exit code where a test failed; others say that it could not run


def chosen(names: list[str]) -> list[Mutant]:
    """Return the mutants whose names begin with one of these, or all."""
    known = mutants()
    for name in names:
        if not any(mutant.startswith(name) for mutant in known):
            close = difflib.get_close_matches(name, known, n=3, cutoff=0)
            print(f"no mutant begins with {name!r}; close: {', '.join(close)}", file=sys.stderr)
            raise SystemExit(2)
    return [m for m in known.values() if not names or m.name.startswith(tuple(names))]


def copy_of_the_project(folder: Path) -> Path:
    """Copy what git tracks or would track to a folder."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    return folder


def exit_code(root: Path, tests: Iterable[str]) -> int | None:
    """Return how pytest ends on some of a copy's tests, None where it does not end in time."""
    command = [sys.executable, "-m", "pytest", *FAST, *tests]
    environment = os.environ | {"PYTHONPATH": str(root)}
    try:
        ended = subprocess.run(
            command, cwd=root, env=environment, timeout=SECONDS, check=False, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return None
    return ended.returncode


def fate(mutant: Mutant, root: Path) -> str:
    """Run a mutant's tests on a copy that has it, and put the copy back."""
    if mutant.equivalent:
        return "equivalent"
    mutated = mutant.applied(root)
    if mutated is None:
        return "stale"
    path = root / mutant.file
    sound = path.read_text()
    path.write_text(mutated)
    try:
        return "killed" if exit_code(root, mutant.tests) == FAILED else "survived"
    finally:
        path.write_text(sound)


def main(names: list[str]) -> int:
    """Print what became of each mutant and of how many; return the exit code."""
    listed = chosen(names)
    with tempfile.TemporaryDirectory() as folder:
        root = copy_of_the_project(Path(folder))
        for test in sorted({test for mutant in listed for test in mutant.tests}):
            if (code := exit_code(root, [test])) != 0:
                raise SystemExit(f"{test} ends with {code} where there is no mutant")
        fates: Counter[str] = Counter()
        for mutant in listed:
            fates[end := fate(mutant, root)] += 1
            print(f"{end:10}  {mutant.name}  {mutant.equivalent}".rstrip(), flush=True)
    counted = fates["killed"] + fates["survived"]
    print(", ".join(f"{count} {end}" for end, count in fates.items()), end="; ")
    print(f"{fates['killed'] / max(counted, 1):.0%} of {counted} killed")
    return int(fates["survived"] + fates["stale"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
