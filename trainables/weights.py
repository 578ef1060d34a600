"""Weights of any origin: fetched, and fitted to a model under whatever names they have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import constants, get_session, hf_hub_download
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from trainables.layers import Classifier
from trainables.models import TIMM_PREFIX
from trainables.pretrained import HF_PREFIX, URL, check_sha256, num_classes_of
from trainables.store.tensors import read_content, read_tensors

HUB_SECONDS = 3.0
HF_FILE = "model.safetensors"  # what a repository's weights are called
SEVERAL_SETS = re.compile(r"(?P<norm>.+)\.bn(?P<set>\d+)\.proxy_bn\.")


def load_weights(
    where: str | Path, module: nn.Module, *, sha256: str = "", **heads: bool
) -> tuple[str, ...]:
    """Load weights of any origin into a module; return notes on what was mapped.

    where: timm:NAME.TAG, or what `local_file` takes. sha256: the file's. heads: as `fit_weights`.
    """
    where = str(where)
    if where.startswith(TIMM_PREFIX):
        built_with = getattr(getattr(module, "backbone", module), "built_with", {})
        options = {**built_with, "num_classes": num_classes_of(where)}  # timm fits them to these
        with _fetching(where):
            name = where.removeprefix(TIMM_PREFIX)
            tensors = timm.create_model(name, pretrained=True, **options).state_dict()
    else:
        path = local_file(where, sha256)
        tensors = read_tensors(read_content(path, sha256), path)
    return fit_weights(tensors, module, where, **heads)


def local_file(where: str, sha256: str = "") -> Path:
    """Return the file at a path, an http(s) URL, or hf://ORG/REPO[/FILE], fetched if need be.

    A URL's file lies in torch.hub's folder under its sha256, which must be stated; a repository's
    in huggingface_hub's. ValueError says why it cannot be had.
    """
    if where.startswith(URL):
        check_sha256(where, sha256)
    elif not where.startswith(HF_PREFIX):
        return Path(where)
    with _fetching(where):
        if where.startswith(HF_PREFIX):
            parts = where.removeprefix(HF_PREFIX).split("/", 2)
            file = parts[2] if parts[2:] else HF_FILE
            return Path(hf_hub_download("/".join(parts[:2]), file))
        name = f"{sha256.lower()[:16]}-{Path(urlsplit(where).path).name}"
        path = Path(get_dir(), "checkpoints", name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(where, str(path), hash_prefix=sha256.lower())
    return path


@contextmanager
def _fetching(where: str) -> Iterator[None]:
    """Fetch weights; ValueError says why they cannot be had.

    Where the hub does not answer, huggingface_hub, which would ask it for a minute, reads its cache
    alone.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not (where.startswith(URL) or _hub_answers())
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
        lost = constants.HF_HUB_OFFLINE and not offline
        silent = f"{constants.ENDPOINT} does not answer, and no cache has them: " if lost else ""
        raise ValueError(f"{where} cannot be fetched: {silent}{error}") from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    """Tell whether the hub answers within seconds, whatever it answers."""
    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS))

    asking = Thread(target=ask, daemon=True)  # a resolver of names has no timeout
    asking.start()
    asking.join(HUB_SECONDS)
    return bool(answers)


def fit_weights(
    tensors: dict[str, Tensor],
    module: nn.Module,
    origin: str,
    *,
    new_head: bool = False,
    reset_head: bool = False,
) -> tuple[str, ...]:
    """Load weights of whatever names into a module or a classifier's backbone; say what was mapped.

    A head of another number of classes becomes as wide as the weights', or with `new_head` stays as
    it is; with `reset_head` any does. ValueError names what else does not fit.
    """
    backbone = module.backbone if isinstance(module, Classifier) else module
    model = backbone.state_dict()
    named, notes = _without_prefix(_plain_names(tensors), model)
    # How many batches a norm has seen is no part of its answer, and ours do not count them.
    fitted = {name: value for name, value in model.items() if name.endswith("num_batches_tracked")}
    for name, value in named.items():
        fitted[name] = _plain_shape(name, value, model[name]) if name in model else value
    if reset_head:
        fitted |= {name: model[name] for name in _head(backbone)}
        notes.append("the weights' head is left out: a new one stays")
    if head := _other_head(fitted, model):
        outputs, built = len(fitted[head[0]]), len(model[head[0]])
        if new_head:
            fitted |= {name: model[name] for name in head}
            notes.append(f"the head of {outputs} classes is left out: a new one of {built} stays")
        else:
            for layer, _, parameter in (name.rpartition(".") for name in head):
                empty = nn.Parameter(torch.empty_like(fitted[f"{layer}.{parameter}"]))
                setattr(backbone.get_submodule(layer), parameter, empty)
            notes.append(f"the head has the weights' {outputs} classes, not {built}")
    _load(fitted, backbone, origin)
    return tuple(notes)


def _head(network: nn.Module) -> list[str]:
    """Return the names of the layer that timm calls a network's classifier, or its last linear one.

    ValueError where there is none.
    """
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    timms = getattr(network, "get_classifier", lambda: None)()
    head = timms if isinstance(timms, nn.Module) else next(reversed(linear), None)
    place = next((name for name, layer in network.named_modules() if layer is head), "")
    if not place:
        raise ValueError("reset_head: the model has no linear layer at its end")
    return [name for name in network.state_dict() if name.startswith(f"{place}.")]


def _load(tensors: dict[str, Tensor], module: nn.Module, origin: str) -> None:
    """Give a model the weights of its names; ValueError names the first three that do not fit."""
    model = module.state_dict()
    problems = [f"{name} is missing" for name in model if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in model]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in model.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise ValueError(f"{origin} does not fit the model: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(tensors)


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under timm's names, as the study's released checkpoints do not have it.

    A GhostBN `X.proxy_bn.*` is X's. Where X holds several sets of statistics, `X.bn0.proxy_bn.*` is
    X's and the other sets, which evaluation never reads, are left out; their shared affine is X's:
    `X.aff.bnconv.weight` or `X.aff.weight`. Source: STUDY section 3: evaluation uses set 0.
    """
    plain = {}
    for name, value in tensors.items():
        several = SEVERAL_SETS.match(name)
        first = several and f"{several['norm']}.bn0.proxy_bn.running_mean"
        if several is None or several["set"] == "0" or first not in tensors:
            without_ghost = re.sub(r"(\.bn0)?\.proxy_bn\.", ".", name)
            plain[re.sub(r"\.aff(\.bnconv)?\.(weight|bias)$", r".\2", without_ghost)] = value
    return plain


def _plain_shape(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """Return a norm's (C, 1, 1, 1) or (1, C, 1, 1) affine as (C,).

    Of statistics (G * C,) or (S, G * C): ghost 0 of set 0.
    """
    if wanted.ndim != 1:
        return value
    if value.numel() == wanted.numel():
        return value.reshape(wanted.shape)
    ghosts = name.endswith(("running_mean", "running_var")) and not value.numel() % wanted.numel()
    return value.flatten()[: len(wanted)] if ghosts else value


def _without_prefix(
    tensors: dict[str, Tensor], model: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors below the prefix that most of the model's names have, and notes on it."""
    prefixes = Counter(
        name[: part.end()]
        for name in tensors
        for part in re.finditer(r"^|\.", name)
        if name[part.end() :] in model
    )
    prefix = min(prefixes, key=lambda word: (-prefixes[word], len(word)), default="")
    others = [name for name in tensors if not name.startswith(prefix)]
    notes = [f"the names' prefix {prefix!r} is left out"] if prefix else []
    if others:
        named = f"{', '.join(others[:3])}{', ...' if others[3:] else ''}"
        notes.append(f"not read, as it lies beside that prefix: {named} ({len(others)} in all)")
    below = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    return below, notes


def _other_head(tensors: dict[str, Tensor], model: dict[str, Tensor]) -> list[str]:
    """Return the names of a head of another number of classes, where nothing else differs."""
    if tensors.keys() != model.keys():
        return []
    names = [name for name, value in model.items() if tensors[name].shape != value.shape]
    sizes = {(tensors[name].shape[:1], model[name].shape[:1]) for name in names}
    first_axis = all(tensors[name].shape[1:] == model[name].shape[1:] for name in names)
    return names if len(sizes) == 1 and first_axis else []
