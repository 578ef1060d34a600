"""Weights that are damaged, swapped or lost, restored from their other copy before they are needed.

A finished trial's weights lie twice: in the storage, for its students, and in MLflow, to be judged.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainables.checkpoint import read_weights
from trainables.scale import Scale
from trainables.storage import WEIGHTS, folder_at, parted
from trainables.tracking import Tracker, TrialRun


def mend_weights(
    tracker: Tracker,
    run: TrialRun,
    path: str,
    scale: Scale,
    *,
    judged: bool,
    teaches: bool,
    say: Callable[[str], None],
) -> bool:
    """Restore a trial's weights where it is to be judged or to teach; False if no copy is sound.

    `path`: the path or URI of its weights in the storage.
    """
    copies = {"MLflow": lambda: tracker.artifact(run, WEIGHTS), path: lambda: _stored(path)}
    needed = ["MLflow"] * judged + [path] * teaches
    damaged = [place for place in needed if not _is_sound(copies[place](), run)]
    if not damaged:
        return True
    contents = (copies[place]() for place in copies if place not in damaged)
    sound = next((c for c in contents if c is not None and _is_sound(c, run)), None)
    if sound is None:
        say(f"the weights of trial {run.digest} are damaged or missing: it is trained again")
        return False
    for place in damaged:
        if place == path:
            folder, name = parted(path)
            folder_at(folder).write(name, sound)
        else:
            _store(tracker, run, sound, scale)
        say(f"the weights of trial {run.digest} in {place} were damaged: they are restored")
    return True


def _stored(path: str) -> bytes | None:
    parent, name = parted(path)
    folder = folder_at(parent)
    return folder.read(name) if name in folder.names() else None


def _is_sound(content: bytes | None, run: TrialRun) -> bool:
    """Tell whether a copy is there, whole, the trial's own, and the one that MLflow notes."""
    if content is None:
        return False
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != (run.weights_sha256 or sha256):
        return False
    try:
        read_weights(content, WEIGHTS, run.digest)
    except ValueError:
        return False
    return True


def _store(tracker: Tracker, run: TrialRun, content: bytes, scale: Scale) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, WEIGHTS)
        weights.write_bytes(content)
        tracker.store_weights(
            run, weights, sha256, image_size=scale.image_size, classes=scale.num_classes
        )
