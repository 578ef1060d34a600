"""MLflow's migrations take seconds: they run once, and the tests' other databases are copies."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

SQLITE = "sqlite:///"


@functools.cache
def migrated() -> bytes:
    """Return the content of an empty database, as MLflow makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"{SQLITE}{path}").search_experiments(max_results=1)
        return path.read_bytes()


def migrate(path: Path) -> None:
    """Put an empty database where none is."""
    if path.parent.is_dir() and not path.exists():
        path.write_bytes(migrated())


def migrate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow's clients in this process find their new databases migrated."""
    migrated()
    make = MlflowClient.__init__

    def find(self: MlflowClient, uri: str | None = None, *rest: Any, **named: Any) -> None:
        if uri and uri.startswith(SQLITE) and "%" not in uri and "?" not in uri:
            migrate(Path(uri.removeprefix(SQLITE)))
        make(self, uri, *rest, **named)

    monkeypatch.setattr(MlflowClient, "__init__", find)
