"""Results: the folder with its lock, MLflow database and artifacts; what computed them."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from trainables.plugins import versions as plug_in_versions

SECONDS, WAITING = "train/seconds", "train/waiting"  # metrics that are not the same in every run
WAITS = 0.2  # the share of its time in which a training waits for data, and from which it says so
LOCK = ".lock"
LOOK_SECONDS = 1.0  # `is_in_use` holds the lock for a moment
DATABASE = "mlflow.db"
ARTIFACTS = "artifacts"
DESIGNED = "design.json"  # images by cell, of every design that was run
PROJECT = "robustness-grid"
SCHEMA_TAG = f"{PROJECT}.schema"  # of its experiments
LIBRARIES = ("torch", "torchvision", "timm", "ray", "mlflow", "pyautoattack")
ROOT = Path(__file__).parents[2]
PACKAGES = ("evaluators", "grid", "trainables")
THEN = " then "
# The columns in which MLflow (checked with 3.17) stores absolute addresses of artifacts.
ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
}
ROOT_OF_ARTIFACTS = rf".*/{ARTIFACTS}(?=/|$)"


@contextmanager
def sole_run(results: Path) -> Iterator[None]:
    """Hold the results folder for one run, its database checked and its artifacts re-rooted.

    ValueError when the folder cannot be written, another run holds it or its database is damaged.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock = (results / LOCK).open("w")
    except OSError as error:
        raise ValueError(f"results folder {results} is not writable: {error.strerror}") from None
    with lock:
        if not _locks(lock):
            raise ValueError(
                f"another run is using {results}; wait for it, or give --results another folder"
            )
        check_database(results)
        reroot(results / DATABASE, results, "file:")
        yield


def _locks(file: IO[str]) -> bool:
    """Lock a file for this process; False where another one holds it for longer than a look."""
    deadline = time.monotonic() + LOOK_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def is_in_use(results: Path) -> bool:
    """Tell whether a run holds the folder now."""
    try:
        with (results / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def database_uri(results: Path) -> str:
    """Return the MLflow tracking URI of the folder's database."""
    path = str(results.resolve() / DATABASE)
    if set(path) & set("?%"):
        raise ValueError(f"{path} has a '?' or '%' in it, which its URI cannot have: rename it")
    return f"sqlite:///{path}"


def check_database(results: Path) -> None:
    """Raise ValueError where the folder's MLflow database, if there is one, is not sound."""
    path = results / DATABASE
    if not path.exists():
        return
    try:
        with closing(_connected(path)) as database:
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            database.execute("SELECT artifact_location FROM experiments LIMIT 1")
    except sqlite3.Error as error:
        state = str(error)
    if state != "ok":
        raise ValueError(
            f"{path} is damaged ({state.splitlines()[-1]}): put a copy of it back, or move it away "
            "and run again: trials go on from their own files, and cells are judged anew"
        )


def settle(results: Path) -> None:
    """Re-root the artifacts of a folder that has moved, unless a run holds it, which then has."""
    if not is_in_use(results) and (results / DATABASE).exists():
        with sole_run(results):
            pass


def reroot(database: Path, results: Path, scheme: str = "") -> None:
    """Let a database's addresses of artifacts, where they begin with `scheme`, name `results`'.

    MLflow stores absolute addresses; so a study that was moved, copied or brought from a bucket
    would be read, and written, at its old place. To change them once, here, serves this project,
    `mlflow ui` and `mlflow.pyfunc.load_model` alike.
    """
    if not database.exists():
        return
    new = (results.resolve() / ARTIFACTS).as_uri()
    with closing(_connected(database)) as opened, opened:
        places = opened.execute(
            "SELECT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id) "
            "WHERE key = ?",
            (SCHEMA_TAG,),
        ).fetchall()
        matches = (re.match(scheme + ROOT_OF_ARTIFACTS, place) for (place,) in places)
        for old in {match[0] for match in matches if match} - {new}:
            for table, column in ADDRESSES.items():
                opened.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                    f"WHERE substr({column}, 1, ?) IN (?, ?)",
                    (new, len(old) + 1, len(old) + 1, old, f"{old}/"),
                )


def _connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)


@cache
def provenance(device: str) -> dict[str, str]:
    """Return the versions and the hardware of this process, by name; `device` as torch names it."""
    versions, gpu = {name: version_of(name) for name in (PROJECT, *LIBRARIES)}, ""
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name(device)
    known = {
        PROJECT: versions.pop(PROJECT),
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        **plug_in_versions(),
        "cpu": _cpu(),
        "gpu": gpu,
        "device": device.partition(":")[0],
    }
    return {name: value for name, value in known.items() if value}


def joined(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """Return the provenance of what two processes computed in turn: 'torch': '2.14 then 2.15'."""
    both = dict(earlier)
    for name, value in later.items():
        before = earlier[name].split(THEN) if name in earlier else []
        both[name] = THEN.join(dict.fromkeys([*before, *value.split(THEN)]))
    return both


def version_of(package: str) -> str:
    """Return a package's version, '' where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def code_version() -> str:
    """Return the project's version with a digest of its code: '0.3.0 (code 1f2e3d4c5b6a)'."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{version_of(PROJECT)} (code {digest.hexdigest()[:12]})"


def other_code(driver: str) -> str:
    """Say that the code here has another version than the driver; '' where it has not, or is ''."""
    here = code_version()
    if driver in ("", here):
        return ""
    return f"runs {PROJECT} {here}, where the driver runs {driver}: install the same on both"


def _commit() -> str:
    """Return the commit that is checked out, '' outside a checkout; '+changes' if it was edited."""
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    command = ["git", "--git-dir", str(ROOT / ".git"), "--work-tree", str(ROOT), *describe]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(  # noqa: S603 - no part of it is a user's
            command, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    return ""


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
