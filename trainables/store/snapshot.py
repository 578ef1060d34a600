"""Results that outlive their machine: a database copied to an object store, a study brought home.

`python -m trainables.store.snapshot DATABASE PLACE COMMAND ...` runs a server of the database.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pyarrow.fs import FileType, LocalFileSystem, copy_files

from trainables.store.results import ARTIFACTS, DATABASE, DESIGNED, reroot, sole_run
from trainables.store.storage import ASIDE, below, reached, read_file, write_atomically, write_file

SNAPSHOT_SECONDS = 300.0
POLL_SECONDS = 1.0


def snapshot(database: Path, place: str) -> None:
    """Copy an SQLite database, which may be in use, below a path or URI."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, DATABASE)
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        write_file(below(place, DATABASE), copy.read_bytes())


def serve(database: Path, place: str, command: Sequence[str]) -> None:
    """Run a server of a database until SIGTERM, start it again when it ends, and copy the database.

    A database that is not there is fetched first.
    """
    if not database.exists() and (content := read_file(below(place, DATABASE))):
        write_atomically(database, content)
    stop, copied = threading.Event(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = subprocess.Popen(command)  # noqa: S603 - its caller's own
    while not stop.wait(POLL_SECONDS):
        if server.poll() is not None:
            print(f"the server ended with status {server.returncode}: started again", flush=True)
            server = subprocess.Popen(command)  # noqa: S603
        if time.monotonic() > copied + SNAPSHOT_SECONDS:
            copied = time.monotonic()
            _try_snapshot(database, place)
    server.terminate()
    server.wait()
    _try_snapshot(database, place)


def _try_snapshot(database: Path, place: str) -> None:
    try:
        if database.exists():  # else the server's own is elsewhere
            snapshot(database, place)
    except (OSError, ValueError, sqlite3.Error) as error:
        print(f"no copy of {database} in {place}: {error}", flush=True)


def pull(place: str, results: Path) -> None:
    """Bring a study from a path or URI into a results folder, which can then be continued.

    ValueError where the folder has results, or the place has no database.
    """
    with sole_run(results):
        if (results / DATABASE).exists():
            raise ValueError(f"{results} holds results already: give --results another folder")
        content = read_file(below(place, DATABASE))
        if content is None:
            raise ValueError(
                f"{place} holds no {DATABASE}: name the place of a cluster's --storage"
            )
        for name in ("trials", ARTIFACTS):
            files, path = reached(below(place, name))
            if files.get_file_info(path).type != FileType.NotFound:
                (results / name).mkdir(exist_ok=True)
                copy_files(path, str(results / name), files, LocalFileSystem())
        if (design := read_file(below(place, DESIGNED))) is not None:
            write_atomically(results / DESIGNED, design)
        aside = results / f"{ASIDE}{DATABASE}.pulled"
        try:
            write_atomically(aside, content)
            reroot(aside, results)
            aside.replace(results / DATABASE)
        except sqlite3.Error as error:
            raise ValueError(f"{below(place, DATABASE)} is damaged: {error}") from None
        finally:
            aside.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
