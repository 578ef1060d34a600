"""A results folder: one run at a time, its MLflow database, and where its artifacts lie."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"
DATABASE = "mlflow.db"
ARTIFACTS = "artifacts"
LOCK_SECONDS = 1.0  # another process may hold the lock for a moment, to see whether it is free
# The columns in which MLflow (checked with 3.17) keeps absolute addresses of artifacts.
ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
}
MOVED_ROOTS = (
    "SELECT DISTINCT artifact_location FROM experiments "
    "WHERE artifact_location LIKE ? AND artifact_location != ?"
)


@contextmanager
def sole_run(results: Path) -> Iterator[None]:
    """Hold the results folder for one run, its database checked and its artifacts re-rooted.

    ValueError when the folder cannot be written, another run holds it or its database is damaged.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock = (results / LOCK).open("w")
    except OSError as error:
        raise _unwritable(results, error.strerror) from None
    with lock:
        if not os.access(results, os.W_OK):
            raise _unwritable(results, "Permission denied")
        if not _takes(fcntl.LOCK_EX, lock, seconds=LOCK_SECONDS):
            raise ValueError(
                f"another run is using {results}; wait for it, or give --results another folder"
            )
        check_database(results)
        _reroot(results)
        yield


def check_results(results: Path) -> None:
    """Raise ValueError where `sole_run` would; a folder that is not there is not left behind."""
    if results.exists():
        with sole_run(results):
            return
    missing = [folder for folder in (results, *results.parents) if not folder.exists()]
    try:
        results.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(results, error.strerror) from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def is_in_use(results: Path) -> bool:
    """Tell whether a run holds the folder now."""
    try:
        lock = (results / LOCK).open()
    except OSError:
        return False
    with lock:
        return not _takes(fcntl.LOCK_SH, lock, seconds=0.0)


def database_uri(results: Path) -> str:
    """Return the MLflow tracking URI of the folder's database, whatever its path contains."""
    path = str(results.resolve() / DATABASE)
    if not set(path) & set("?%"):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL, make_url

    # With the driver named, MLflow does not take the escaped path for a folder to make.
    uri = URL.create("sqlite+pysqlite", database=path).render_as_string()
    if make_url(uri).database != path:
        raise ValueError(f"{results} has a '?' or '%' in its path, which needs SQLAlchemy 2.1")
    return uri


def folder_of(uri: str) -> Path:
    """Return the folder of an SQLite database, beside which its artifacts lie; else `results`."""
    from sqlalchemy.engine import make_url

    if not uri.startswith("sqlite"):
        return Path("results")
    return Path(make_url(uri).database or f"results/{DATABASE}").parent


def check_database(results: Path) -> None:
    """Raise ValueError where the folder's MLflow database, if there is one, is not sound."""
    path = results / DATABASE
    if not path.exists():
        return
    problem = "is empty" if path.stat().st_size == 0 else ""
    if not problem:
        try:
            with closing(_connected(path)) as database:
                (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
                database.execute("SELECT artifact_location FROM experiments LIMIT 1")
            problem = "" if state == "ok" else f"is damaged ({state.splitlines()[-1]})"
        except sqlite3.Error as error:
            problem = f"is damaged ({error})"
    if problem:
        raise ValueError(
            f"{path} {problem}: put a copy of it back, or move it away and run again: trials go "
            "on from their own files, and cells are judged anew"
        )


def settle(results: Path) -> None:
    """Re-root the artifacts of a folder that has moved, unless a run holds it, which then has."""
    if _moved_roots(results) and not is_in_use(results):
        with sole_run(results):
            pass


def _reroot(results: Path) -> None:
    """Have MLflow's database address artifacts where the folder lies now.

    It stores absolute addresses; so a folder that was moved or copied would be read, and written,
    at its old place. To change them once, here, serves this project, `mlflow ui` and
    `mlflow.pyfunc.load_model` alike.
    """
    new = artifacts_uri(results)
    if moved := _moved_roots(results):
        with closing(_connected(results / DATABASE)) as database, database:
            for old in moved:
                for table, column in ADDRESSES.items():
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                        f"WHERE substr({column}, 1, ?) IN (?, ?)",
                        (new, len(old) + 1, len(old) + 1, old, f"{old}/"),
                    )


def artifacts_uri(results: Path) -> str:
    """Return the address below which MLflow keeps the folder's artifacts."""
    return (results.resolve() / ARTIFACTS).as_uri()


def _moved_roots(results: Path) -> list[str]:
    """Return the addresses of artifacts, as the database has them, that are not the folder's."""
    path = results / DATABASE
    if not path.exists():
        return []
    with closing(_connected(path)) as database:
        theirs = (f"file:%/{ARTIFACTS}", artifacts_uri(results))
        rows = database.execute(MOVED_ROOTS, theirs).fetchall()
    return [old for (old,) in rows]


def _connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)


def _takes(kind: int, file: IO[str], *, seconds: float) -> bool:
    """Lock a file, waiting so long; False where another process holds it."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        else:
            return True


def _unwritable(results: Path, reason: str | None) -> ValueError:
    return ValueError(f"results folder {results} is not writable: {reason}")
