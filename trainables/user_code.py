"""Models that a user's own code builds."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trainables.layers import Program
from trainables.models import HUB_PREFIX
from trainables.recipe import nearest
from trainables.scale import Scale


def from_user_code(name: str, scale: Scale, **arguments: Any) -> nn.Module:
    """Build a model by a user's code, which it runs, or load an exported program with its weights.

    name: FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, torchhub:OWNER/REPOSITORY[:REF]:NAME (or of a
    local folder), or FILE.pt2, which torch unpickles: that can run code, too. ValueError.
    """
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
    if not isinstance(network, nn.Module):
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
