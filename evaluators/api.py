"""The Python API: judge any model on any images, and compare two models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from evaluators import LARGEST_RADIUS, in_norm
from evaluators.base import device_named
from evaluators.judging import Cells, evaluators_named
from evaluators.own_data import digest, for_head, read
from evaluators.own_model import PROBED, classifier_of, device_of, fingerprint, probe, undisturbed
from evaluators.scores import Scores, compare
from trainables.options import fraction

__all__ = ["compare", "evaluate"]

Radius = str | float | Fraction
PRECISION: dict[bool, Literal["float32", "bf16"]] = {False: "float32", True: "bf16"}
RADIUS = ("radius for pixels in [0, 1]", "8/255")


def evaluate(
    model: Any,
    data: Any,
    evaluators: str | Sequence[str] = ("clean",),
    *,
    epsilon: Radius | Sequence[Radius] | None = None,
    norm: str = "Linf",
    mean: Any = None,
    std: Any = None,
    device: str | torch.device | None = None,
    batch_size: int = 200,
    store: str | Path | None = None,
    progress: bool = True,
    eot: int = 1,
    autocast: bool = False,
    image_size: int | None = None,
    name: str = "",
) -> Scores:
    """Judge a model on all images of the data by evaluators; return scores and every verdict.

    model: an nn.Module or a function from images (B, C, H, W), float32 in [0, 1], to logits (B, K).
    It is judged in eval mode and comes back as it was. mean, std: of a normalisation in front of
    it, a number or one for each channel. data: (images, labels) as tensors or arrays, a
    Dataset, a DataLoader, a folder, a Hugging Face Dataset, or this project's Data.
    image_size: to which images of files are brought. epsilon: radii, "8/255" or a number; default:
    the scale's; of a user's images in memory 8/255 up to 64 px, else 4/255, and in L2 and L1 of
    the same size. norm: of pgd and autoattack: Linf, L2 or L1; "pgd-l2" states its own. device:
    default the model's own, or the first GPU for one without weights. store: a folder in which
    verdicts stay; the same call goes on with what it holds. eot: passes that are averaged of a
    model that draws at random. autocast: pgd and autoattack seek in bfloat16. Raises ValueError
    where the model or the data cannot be judged.
    """
    if batch_size < 1 or eot < 1:
        raise ValueError(f"batch_size {batch_size} and eot {eot} must be at least 1")
    names = [in_norm(name, norm) for name in _several(evaluators)]
    if not names:
        raise ValueError("there is no evaluator to judge by: clean, pgd, autoattack, ...")
    radii = _radii(epsilon)
    own_scale, own_data = read(data, image_size)
    probed = own_data.held_out.images[:PROBED]
    classifier = classifier_of(model, probed.shape[1], mean, std, draws=eot)
    label = name or getattr(model, "__qualname__", type(model).__name__)
    home = device or device_of(classifier)
    where = device_named(str(home) if home else None)
    in_training = any(module.training for module in classifier.backbone.modules())
    notes = ["the model was in training mode: it was judged in eval mode"] if in_training else []
    with undisturbed(classifier, where), TemporaryDirectory() as temporary:
        outputs, remarks = probe(classifier.to(where).eval(), probed)
        scale, judged_data = for_head(own_scale, own_data, outputs)
        chosen = evaluators_named(names, replace(scale, attacks_in=PRECISION[autocast]), radii)
        folder = Path(temporary)
        if store:
            subject = f"{fingerprint(classifier, probed)}-{digest(judged_data)}"
            folder = Path(store, f"{re.sub('[^A-Za-z0-9_.-]+', '-', label)}-{subject}")
        in_parts = progress or bool(store)
        cells = Cells(chosen, judged_data, folder, folder.name, where, in_parts=in_parts)
        cells.judge(classifier, progress=progress, batch_size=batch_size)
        if store:
            cells.write_ledgers()
        return cells.scores(label, notes + remarks)


def _radii(epsilon: Radius | Sequence[Radius] | None) -> list[Fraction]:
    stated = (str(radius) for radius in _several(epsilon) if radius is not None)
    return [fraction(radius, *RADIUS, most=LARGEST_RADIUS) for radius in stated]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
