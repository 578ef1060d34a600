"""What the names of weights and of timm's models say.

It imports no torch or timm by itself: a plan needs names only.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from trainables.models import MODELS, TIMM_PREFIX
from trainables.recipe import Preprocessing, nearest

HF_PREFIX = "hf://"
URL = ("http://", "https://")
REMOTE = (*URL, HF_PREFIX)


def preprocessing_of(model: str) -> Preprocessing:
    """Return the preprocessing that timm states for a model of its own; empty for all others.

    It is that of the pretrained weights of the whole name, NAME.TAG, at the size they were trained
    at. Raises ValueError.
    """
    config = timm_config(model)
    if config is None:
        return Preprocessing()
    from timm.data import resolve_data_config

    stated = resolve_data_config(pretrained_cfg=config)
    return Preprocessing(
        size=stated["input_size"][-1],
        crop=stated["crop_pct"],
        squash=stated["crop_mode"] == "squash",
        **{name: stated[name] for name in ("interpolation", "mean", "std")},
    )


def num_classes_of(model: str) -> int | None:
    """Return the number of classes of timm's pretrained head; None for other models."""
    config = timm_config(model)
    return None if config is None else int(config["num_classes"])


def timm_config(model: str) -> dict[str, Any] | None:
    """Return timm's configuration of its model's weights, None for a model that is not timm's.

    ValueError names the nearest model.
    """
    if model in MODELS or not model.startswith(TIMM_PREFIX):
        return None
    import timm

    name = model.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name) or ("." in name and not timm.models.is_model_pretrained(name)):
        near = nearest(name, [*timm.list_models(), *timm.list_pretrained()])
        raise ValueError(f"timm has no model {name!r}{near}")
    return dict(timm.models.get_pretrained_cfg(name).to_dict())


def located(where: str, sha256: str, folder: Path) -> tuple[str, str]:
    """Return the place and the sha256 of weights that a file in `folder` names; nothing is fetched.

    Of a local file the sha256 is computed unless stated. ValueError where there can be none.
    """
    if sha256 or where.startswith(URL):
        check_sha256(where, sha256)
    if where.startswith(TIMM_PREFIX):
        timm_config(where)
        from timm.models import is_model_pretrained

        if not is_model_pretrained(where.removeprefix(TIMM_PREFIX)):
            raise ValueError(f"timm has no weights of {where}: name a file of them, and its model")
    elif not where.startswith(REMOTE):
        path = (folder / where).resolve()
        if not path.is_file():
            near = nearest(path.name, sorted(entry.name for entry in path.parent.glob("*")))
            raise ValueError(f"weights {path} are not there; those of timm are timm:NAME.TAG{near}")
        return str(path), sha256 or _sha256(path, path.stat().st_mtime_ns)
    return where, sha256


def check_sha256(where: str, sha256: str) -> None:
    """Raise ValueError where no sha256 is stated of the file at an address."""
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"{where} needs the sha256 of its file, 64 hex digits, not {sha256!r}")


@cache
def _sha256(path: Path, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
