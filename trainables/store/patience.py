"""Waiting for an MLflow server that is away, instead of losing what it was to be told."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import requests
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from trainables.store.storage import FULL, NoRoomError

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0
AWAY = re.compile(
    r"failed with exception|error code 5\d\d|too many 5\d\d|5\d\d Server Error|database is locked"
)
COLLIDED = re.compile(r"UNIQUE constraint|duplicate key|Duplicate entry", re.IGNORECASE)
MOST_COLLISIONS = 5  # of one call with those of other writers
CUT_OFF = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
NO_ROOM = re.compile(r"disk is full|No space left|quota exceeded", re.IGNORECASE)
DELETED = "Current state is deleted"
SILENT = "MLflow does not answer"
Answer = TypeVar("Answer")


def patiently(
    ask: Callable[[], Answer],
    *,
    say: Callable[[str], None],
    given_up: threading.Event | None = None,
) -> Answer:
    """Ask until the server answers and its disk has room, or until `given_up` is set.

    `say` is told once what is waited for, and once that it is over. Where another writer made
    the same row at the same time, it is asked again and finds that row. ValueError where a run
    was deleted meanwhile; any other answer that is an error is raised as it is.
    """
    stop, wait, announced = given_up or threading.Event(), FIRST_WAIT_SECONDS, ""
    collisions = 0
    while True:
        try:
            answer = ask()
        except (MlflowException, OSError) as error:
            if DELETED in str(error):
                raise ValueError(
                    "a run of this study was deleted in MLflow meanwhile: give the same command "
                    "again, and it is written anew from what its trial has kept"
                ) from error
            if COLLIDED.search(str(error)) and collisions < MOST_COLLISIONS:
                collisions += 1
                continue
            awaited = _awaited(error)
            if not awaited or stop.is_set():
                raise
            if not announced:
                say(f"{awaited}: training goes on, what is to be written waits")
            announced = announced or awaited
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        else:
            if announced:
                say("MLflow answers again" if announced == SILENT else "there is room again")
            return answer


def _awaited(error: MlflowException | OSError) -> str:
    """Say what has to change before it is worth to ask again, '' where nothing will."""
    if isinstance(error, NoRoomError):
        return str(error)
    if getattr(error, "errno", None) in FULL or NO_ROOM.search(str(error)):
        return f"no room ({error})"
    return SILENT if isinstance(error, CUT_OFF) or AWAY.search(str(error)) else ""


class PatientClient:
    """MlflowClient whose every method is asked patiently.

    What it is used for may be asked twice without harm: metrics, tags and artifacts are written
    at their own key and step. Only `create_run` is not so, and has `made` look first.
    """

    def __init__(self, client: MlflowClient, say: Callable[[str], None]) -> None:
        self._client, self._say = client, say
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Have calls that wait raise what they wait for."""
        self._given_up.set()

    def create_run(
        self, *arguments: Any, made: Callable[[], Any | None], shared: bool, **named: Any
    ) -> Any:
        """Return the run that `made` finds, or create it.

        A try of our own whose answer was lost may have made it or, where runs are `shared`,
        another command.
        """
        may_be_there = shared

        def ask() -> Any:
            nonlocal may_be_there
            run = made() if may_be_there else None
            may_be_there = True
            return run or self._client.create_run(*arguments, **named)

        return self._patiently(ask)

    def log_folder(self, artifact_uri: str, folder: str, place: str = "") -> None:
        """Store a local folder's files at a place below an artifact URI.

        The client's own `log_artifacts` goes by a run's id, which a copied results folder shares.
        """
        store = get_artifact_repository(artifact_uri, tracking_uri=self._client.tracking_uri)
        self._patiently(lambda: store.log_artifacts(folder, place or None))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **named: self._patiently(lambda: method(*arguments, **named))

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        return patiently(ask, say=self._say, given_up=self._given_up)
