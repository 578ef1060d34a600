"""Weights that are damaged, swapped or lost, restored from their other copy before they are needed.

A finished trial's weights lie twice: in the storage, for its students, and in MLflow, to be judged.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainables.scale import Scale
from trainables.store.storage import WEIGHTS, read_file, write_file
from trainables.store.tracking import Tracker, TrialRun


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
    copies = {
        "MLflow": lambda: tracker.artifact(run.artifact_uri, WEIGHTS),
        path: lambda: read_file(path),
    }
    needed = ["MLflow"] * judged + [path] * teaches
    damaged = [place for place in needed if not _is_sound(copies[place](), run)]
    if not damaged:
        return True
    contents = (copies[place]() for place in copies if place not in damaged)
    sound = next((content for content in contents if _is_sound(content, run)), None)
    if sound is None:
        say(f"the weights of trial {run.digest} are damaged or missing: it is trained again")
        return False
    for place in damaged:
        if place == path:
            write_file(path, sound)
        else:
            _store(tracker, run, sound, scale)
        say(f"the weights of trial {run.digest} in {place} were damaged: they are restored")
    return True


def _is_sound(content: bytes | None, run: TrialRun) -> bool:
    """Tell whether a copy is there, and is the one that was judged: its sha256 is in MLflow."""
    return content is not None and hashlib.sha256(content).hexdigest() == run.weights_sha256


def _store(tracker: Tracker, run: TrialRun, content: bytes, scale: Scale) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, WEIGHTS)
        weights.write_bytes(content)
        sizes = {"image_size": scale.image_size, "classes": scale.num_classes}
        tracker.store_weights(run, weights, run.weights_sha256, **sizes)
