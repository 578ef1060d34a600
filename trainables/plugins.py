"""Plug-ins: what other installed packages add to the registries, by the entry points they name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any

KINDS = ("models", "data_sets", "evaluators", "attacks", "corruptions")
installed = cache(entry_points)  # reads the metadata of every package: once a process


def plug_ins(kind: str) -> EntryPoints:
    """Return the entry points of a kind, of which none is imported yet."""
    return installed().select(group=f"robustness_grid.{kind}")


def versions() -> dict[str, str]:
    """Return the version of every package that brings plug-ins, by its name."""
    packages = (plug_in.dist for kind in KINDS for plug_in in plug_ins(kind))
    return {package.name: package.version for package in packages if package}


def origin(plug_in: EntryPoint) -> str:
    """Return the package and the version that a plug-in comes from."""
    return f"{plug_in.dist.name} {plug_in.dist.version}" if plug_in.dist else "no package"


def described(plug_in: EntryPoint) -> str:
    """Name a plug-in for a message: "plug-in 'stripes' (data_sets) of example 0.1"."""
    return f"plug-in {plug_in.name!r} ({plug_in.group.rpartition('.')[2]}) of {origin(plug_in)}"


def load(plug_in: EntryPoint) -> Any:
    """Import what an entry point names; ValueError says why it cannot be."""
    try:
        return plug_in.load()
    except Exception as error:  # a stranger's code raises anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{described(plug_in)} cannot be imported: {reason}") from error


def register_all(kind: str, register: Callable[[EntryPoint], object]) -> None:
    """Register every plug-in of a kind; a warning names one that fails, and the others go on."""
    for plug_in in plug_ins(kind):
        try:
            register(plug_in)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{described(plug_in)} is left out: {reason}", stacklevel=2)
