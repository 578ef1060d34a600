"""Models and weights of any origin: timm's, files, addresses, and a user's own code.

It imports no torch or timm by itself: a plan needs names only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.models import MODELS, TIMM_PREFIX
from trainables.recipe import Preprocessing, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    where: the path of a .safetensors file or one of torch's, or timm:NAME.TAG. sha256: the file's.
    new_head: a head of another number of classes stays as it is (fine-tuning). ValueError says
    what does not fit or is refused; `weights.OtherHeadError` where it is the head alone.
    """
    from trainables.weights import fit_any_weights, read_tensors

    where = str(where)
    if where.startswith(TIMM_PREFIX):
        tensors = _timm_weights(where)
    else:
        tensors = read_tensors(Path(where), sha256)
    return fit_any_weights(tensors, module, where, new_head=new_head)


def _timm_weights(model: str) -> dict[str, Tensor]:
    import timm

    config = timm_config(model)
    assert config is not None
    try:
        pretrained = timm.create_model(
            model.removeprefix(TIMM_PREFIX), pretrained=True, num_classes=config["num_classes"]
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model} cannot be fetched: {error}") from None
    tensors: dict[str, Tensor] = pretrained.state_dict()
    return tensors
