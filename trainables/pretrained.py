"""Models and weights of any origin: timm's, files, addresses, and a user's own code.

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
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from trainables.models import HUB_PREFIX, MODELS, TIMM_PREFIX
from trainables.recipe import Preprocessing, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainables.scale import Scale

HF_PREFIX = "hf://"
URL = ("http://", "https://")
REMOTE = (*URL, HF_PREFIX)
HF_FILE = "model.safetensors"  # what a repository's weights are called


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
    _, height, width = stated["input_size"]
    if height != width:
        raise ValueError(f"{model} takes images of {height} x {width} px: here they are square")
    return Preprocessing(
        size=height,
        crop=stated["crop_pct"],
        squash=stated["crop_mode"] == "squash",
        interpolation=stated["interpolation"],
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
    )


def num_classes_of(model: str) -> int | None:
    """Return the number of classes of timm's pretrained head; None for other models."""
    config = timm_config(model)
    return None if config is None else int(config["num_classes"])


def timm_config(model: str) -> dict[str, Any] | None:
    """Return timm's configuration of its model's weights, None for a model that is not timm's.

    ValueError names the nearest model, or the tags of its weights.
    """
    if model in MODELS or not model.startswith(TIMM_PREFIX):
        return None
    import timm
    from timm.models import get_pretrained_cfg

    name = model.removeprefix(TIMM_PREFIX)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models())
        raise ValueError(f"timm has no model {architecture!r}{near}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = f"one of {', '.join(tags)}{nearest(tag, tags)}" if tags else "it has none"
        raise ValueError(f"timm's {architecture} has no weights {tag!r}; {known}")
    config: dict[str, Any] = get_pretrained_cfg(name).to_dict()
    return config


def load_weights(
    where: str | Path, module: nn.Module, *, sha256: str = "", new_head: bool = False
) -> tuple[str, ...]:
    """Load weights of any origin into a module; return notes on what was mapped.

    where: timm:NAME.TAG, or what `local_file` takes. sha256: the file's. A head of another number
    of classes becomes as wide as the weights', or with `new_head` stays as it is (fine-tuning).
    ValueError says what does not fit or is refused.
    """
    from trainables.weights import fit_any_weights, read_tensors

    where = str(where)
    if where.startswith(TIMM_PREFIX):
        tensors = _timm_weights(where, module)
    else:
        tensors = read_tensors(local_file(where, sha256), sha256)
    return fit_any_weights(tensors, module, where, new_head=new_head)


def _timm_weights(model: str, module: nn.Module) -> dict[str, Tensor]:
    """Return timm's pretrained weights, brought by timm to the image size of a module."""
    import timm

    config = timm_config(model)
    assert config is not None
    built_with = getattr(getattr(module, "backbone", module), "built_with", {})
    options = {**built_with, "num_classes": config["num_classes"]}
    try:
        pretrained = timm.create_model(model.removeprefix(TIMM_PREFIX), pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"weights {model} cannot be had: {error}") from None
    tensors: dict[str, Tensor] = pretrained.state_dict()
    return tensors


def located(where: str, sha256: str, folder: Path) -> tuple[str, str]:
    """Return the place and the sha256 of weights that a file in `folder` names; nothing is fetched.

    Of a local file the sha256 is computed unless stated. ValueError where there can be none.
    """
    if sha256 or where.startswith(URL):
        _check_sha256(where, sha256)
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


def _check_sha256(where: str, sha256: str) -> None:
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"{where} needs the sha256 of its file, 64 hex digits, not {sha256!r}")


@cache
def _sha256(path: Path, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_file(where: str, sha256: str = "") -> Path:
    """Return the file at a path, an http(s) URL, or hf://ORG/REPO[/FILE], fetched if need be.

    A URL's file lies in torch.hub's folder under its sha256, which must be stated; a repository's
    in huggingface_hub's. ValueError says why it cannot be had.
    """
    if where.startswith(URL):
        return _downloaded(where, sha256)
    if where.startswith(HF_PREFIX):
        return _from_hugging_face(where)
    return Path(where)


def _downloaded(url: str, sha256: str) -> Path:
    from torch.hub import download_url_to_file, get_dir

    _check_sha256(url, sha256)
    name = Path(urlsplit(url).path).name
    path = Path(get_dir(), "checkpoints", f"{sha256.lower()[:16]}-{name}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(path), hash_prefix=sha256.lower())
        except (OSError, RuntimeError) as error:
            if isinstance(error, HTTPError):
                error.close()
            raise ValueError(f"{url} cannot be fetched: {error}") from None
    return path


def _from_hugging_face(where: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = where.removeprefix(HF_PREFIX).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"{where} is not {HF_PREFIX}ORG/REPO or {HF_PREFIX}ORG/REPO/FILE")
    repository, file = "/".join(parts[:2]), (*parts, HF_FILE)[2]
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:  # also where it is offline
        raise ValueError(f"{file} of {where} cannot be fetched: {error}") from None


def from_function(name: str, scale: Scale, norm_layer: object, **arguments: Any) -> nn.Module:
    """Build a model by a user's function, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.

    This runs the user's code. Parameters `num_classes` and `image_size` or `img_size`, where the
    function has them and no argument is stated, get the scale's. ValueError.
    """
    place, _, attribute = name.rpartition(":")
    module = _imported(place)
    functions = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {attribute!r}{nearest(attribute, functions)}")
    parameters = inspect.signature(function).parameters
    side = scale.image_size
    data = {"num_classes": scale.num_classes, "image_size": side, "img_size": side}
    known = {key: value for key, value in data.items() if key in parameters} | arguments
    return _network_of(partial(function, **known), name)


def code_of(model: str) -> bytes:
    """Return the file of the user's code, or the exported program, that a model's name names."""
    if model in MODELS or model.startswith((TIMM_PREFIX, HUB_PREFIX)):
        return b""
    place = model if model.endswith(".pt2") else model.rpartition(":")[0]
    if place.endswith((".py", ".pt2")):
        return Path(place).read_bytes()
    file = _imported(place).__file__
    return Path(file).read_bytes() if file else b""


def _imported(place: str) -> ModuleType:
    """Import a user's file, whose folder it may import from, or a module; ValueError."""
    path, is_file = Path(place), place.endswith(".py")
    if is_file and not path.is_file():
        raise ValueError(f"{path} is not there")
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
        raise ValueError(f"{place} cannot be imported: {_where(error)}") from error
    return module


def from_hub(name: str, scale: Scale, norm_layer: object, **arguments: Any) -> nn.Module:
    """Build a model by torch.hub: torchhub:OWNER/REPOSITORY[:REF]:NAME, or of a local folder.

    This runs the repository's code. ValueError.
    """
    import torch

    repository, _, entry = name.removeprefix(HUB_PREFIX).rpartition(":")
    source = "local" if Path(repository).is_dir() else "github"
    settings = {"source": source, "trust_repo": True, "verbose": False}
    return _network_of(partial(torch.hub.load, repository, entry, **settings, **arguments), name)


def from_program(name: str, scale: Scale, norm_layer: object, **arguments: Any) -> nn.Module:
    """Load an exported program, FILE.pt2, with the weights in it.

    torch unpickles such a file, which can run code. ValueError.
    """
    import torch

    from trainables.layers import Program

    if arguments:
        raise ValueError(f"{name} is an exported program: it takes no --model-arg")
    return _network_of(lambda: Program(torch.export.load(name).module()), name)


def _network_of(build: Callable[[], object], name: str) -> nn.Module:
    """Call what builds a network; ValueError says where it failed, or what it made instead."""
    from torch import nn

    try:
        network = build()
    except Exception as error:
        raise ValueError(f"{name} cannot be built: {_where(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returns a {type(network).__name__}, not an nn.Module")
    return network


def _where(error: Exception) -> str:
    """Say an error of a user's code in a line, with its place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno})"
