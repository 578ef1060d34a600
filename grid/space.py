"""The combinations of axes that a grid spans: all, along the axes, in step, or a sample. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal

from pydantic import Field, ValidationInfo

from trainables.recipe import Frozen, check_known

Mode = Literal["product", "zip", "one-at-a-time"]
Labels = dict[str, str]  # by axis the label of one of its values
Choices = Mapping[str, Mapping[str, Any]]  # by axis its values by label
BASE = "base"  # the axis of several bases
MOST_DRAWS = 64  # of a sample's size each


class Sample(Frozen):
    """How many of the combinations that can be are trained, and how they are drawn.

    sobol: scrambled points of a Sobol sequence, which spread evenly over the axes.
    """

    size: int = Field(gt=0)
    method: Literal["sobol", "random"] = "sobol"
    seed: int = Field(0, ge=0)


def size(choices: Choices, mode: Mode) -> int:
    """Return how many combinations a grid spans, those that are left out among them."""
    bases, *lengths = map(len, choices.values())
    of_axes = {
        "product": math.prod(lengths),
        "zip": max(lengths, default=1),
        "one-at-a-time": 1 + sum(lengths),
    }
    return bases * of_axes[mode]


def spanned(choices: Choices, mode: Mode) -> Iterator[Labels]:
    """Yield every combination of bases, which come first, and axes."""
    axes = {axis: values for axis, values in choices.items() if axis != BASE}
    for base in choices[BASE]:
        if mode == "one-at-a-time":
            yield {BASE: base}
            yield from ({BASE: base, axis: label} for axis in axes for label in axes[axis])
            continue
        in_step = mode == "zip" and axes
        values = axes.values()
        for chosen in zip(*values, strict=True) if in_step else product(*values):
            yield {BASE: base, **dict(zip(axes, chosen, strict=True))}


def drawn(choices: Choices, sample: Sample) -> Iterator[Labels]:
    """Yield combinations of the product by chance, some of them again."""
    from numpy.random import default_rng
    from scipy.stats.qmc import Sobol

    labels = {axis: list(values) for axis, values in choices.items()}
    rng = default_rng(sample.seed)
    sobol = Sobol(len(choices), rng=rng) if sample.method == "sobol" else None
    batch = 2 ** math.ceil(math.log2(sample.size))  # Sobol's points balance in powers of 2
    for _ in range(MOST_DRAWS):
        for point in sobol.random(batch) if sobol else rng.random((batch, len(choices))):
            yield {
                axis: values[int(share * len(values))]
                for (axis, values), share in zip(labels.items(), point, strict=True)
            }


def conditions(stated: Any, info: ValidationInfo) -> Any:
    """Return the labels that are meant by axis = value or values; ValueError on unknown ones."""
    choices = {BASE: dict.fromkeys(info.data.get("base", ())), **info.data.get("axes", {})}
    if not isinstance(stated, dict):
        return stated
    return {axis: tuple(_labels(axis, value, choices)) for axis, value in stated.items()}


def _labels(axis: str, stated: Any, choices: Choices) -> Iterator[str]:
    known = choices[check_known("axis of this grid", axis, choices)]
    whole = stated in known.values() or str(stated) in known
    for value in stated if isinstance(stated, tuple) and not whole else (stated,):
        matching = (label for label, v in known.items() if v == value or label == str(value))
        yield next(matching, None) or check_known(f"value of {axis}", str(value), known)
