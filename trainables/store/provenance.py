"""What computed a result: the project's version and commit, its libraries, and the hardware."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = "robustness-grid"
LIBRARIES = ("torch", "torchvision", "timm", "ray", "mlflow", "pyautoattack")
ROOT = Path(__file__).parents[2]
THEN = " then "


@cache
def provenance(device: str) -> dict[str, str]:
    """Return the versions and the hardware of this process, by name; `device` as torch names it."""
    versions = {name: version_of(name) for name in (PROJECT, *LIBRARIES)}
    known = {
        PROJECT: versions.pop(PROJECT),
        "commit": _commit(),
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu(),
        "gpu": _gpu(device),
        "device": device.partition(":")[0],
    }
    return {name: value for name, value in known.items() if value}


def joined(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """Return the provenance of what two processes computed in turn: 'torch': '2.14 then 2.15'."""
    both = dict(earlier)
    for name, value in later.items():
        before = earlier[name].split(THEN) if name in earlier else []
        both[name] = THEN.join(dict.fromkeys([*before, *value.split(THEN)]))
    return both


def version_of(package: str) -> str:
    """Return a package's version, '' where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit that is checked out, '' outside a checkout; '+changes' if it was edited."""
    if not (ROOT / ".git").exists():
        return ""
    describe = ["describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        said = subprocess.run(  # noqa: S603 - no part of it is a user's
            ["git", "-C", str(ROOT), *describe],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _gpu(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    import torch

    return str(torch.cuda.get_device_name(device))
