"""Models of any origin, timm's and a user's own code, and what the names of weights say.

It imports no torch or timm by itself: a plan needs names only.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainables.models import HUB_PREFIX, MODELS, TIMM_PREFIX
from trainables.recipe import Preprocessing, nearest

if TYPE_CHECKING:
    from torch import nn

    from trainables.scale import Scale

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


def from_user_code(name: str, scale: Scale, **arguments: Any) -> nn.Module:
    """Build a model by a user's code, which it runs, or load an exported program with its weights.

    name: FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, torchhub:OWNER/REPOSITORY[:REF]:NAME (or of a
    local folder), or FILE.pt2, which torch unpickles: that can run code, too. ValueError.
    """
    import torch

    from trainables.layers import Program

    place, _, attribute = name.removeprefix(HUB_PREFIX).rpartition(":")
    build: Callable[[], object]
    if name.startswith(HUB_PREFIX):
        source = "local" if Path(place).is_dir() else "github"
        settings = {"source": source, "trust_repo": True, "verbose": False}
        build = partial(torch.hub.load, place, attribute, **settings, **arguments)
    elif name.endswith(".pt2"):
        build = partial(torch.export.load, name, **arguments)
    else:
        build = _function(place, attribute, scale, arguments)
    try:
        network = build()
    except Exception as error:
        raise ValueError(f"{name} cannot be built: {_in_a_line(error)}") from error
    if isinstance(network, torch.export.ExportedProgram):
        return Program(network.module())
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"{name} returns a {type(network).__name__}, not an nn.Module")
    return network


def _function(
    place: str, attribute: str, scale: Scale, arguments: Mapping[str, Any]
) -> Callable[[], object]:
    """Return a user's function with its arguments, and the scale's where it has such parameters.

    These are `num_classes`, and `image_size` or `img_size`. ValueError.
    """
    module = _imported(place)
    function = getattr(module, attribute, None)  # which a package may bring only now
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(f"{place} has no function {attribute!r}{nearest(attribute, functions)}")
    parameters, side = inspect.signature(function).parameters, scale.image_size
    data = {"num_classes": scale.num_classes, "image_size": side, "img_size": side}
    known = {key: value for key, value in data.items() if key in parameters}
    return partial(function, **{**known, **arguments})


def _imported(place: str) -> ModuleType:
    """Import a user's file, whose folder it may import from, or a module; ValueError."""
    path, is_file = Path(place), place.endswith(".py")
    if (folder := str((path.parent if is_file else Path()).resolve())) not in sys.path:
        sys.path.append(folder)
    try:
        if not is_file:
            return importlib.import_module(place)
        specification = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
        assert specification and specification.loader
        module = importlib.util.module_from_spec(specification)
        sys.modules[module.__name__] = module  # which dataclasses in the file look up
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{place} cannot be imported: {_in_a_line(error)}") from error
    return module


def _in_a_line(error: Exception) -> str:
    """Say an error of a user's code, with its place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno})"
