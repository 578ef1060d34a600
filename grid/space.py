"""The combinations of axes that a grid spans: all, along the axes, in step, or a sample. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from pydantic import Field

from grid.axes import Library, at_key, axis_value
from trainables.recipe import Frozen, Recipe, check_known

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


@dataclass(frozen=True)
class Space:
    """The bases and axes of a grid, and what is left out of it.

    exclude: a combination that has a value of each axis of an entry is left out. only_with: an axis
    keeps the base's value unless every axis named beside it has one of the values there.
    """

    bases: Mapping[str, Recipe]
    axes: Choices
    library: Library
    mode: Mode = "product"
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    only_with: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    sample: Sample | None = None

    @property
    def size(self) -> int:
        """How many combinations it spans, those that are left out among them."""
        lengths = [len(values) for values in self.axes.values()]
        of_axes = {
            "product": math.prod(lengths),
            "zip": max(lengths, default=1),
            "one-at-a-time": 1 + sum(lengths),
        }
        return len(self.bases) * of_axes[self.mode]

    def combinations(self) -> Iterator[Labels]:
        """Yield each combination once, the base's name in it; of a sample those drawn, in order."""
        yielded = set()
        sample = self.sample if self.sample and self.size > self.sample.size else None
        for labels in self._drawn(sample) if sample else self._spanned():
            meant = self._with_their_conditions(labels)
            excluded = any(self._meets(meant, entry) for entry in self.exclude)
            if (key := tuple(meant.items())) not in yielded and not excluded:
                yield meant
            yielded.add(key)

    def own(self, labels: Labels, axis: str) -> str:
        """Return the label of a combination on an axis; the base's value where it states none."""
        if axis in labels:
            return labels[axis]
        value = axis_value(self.bases[labels[BASE]], axis, self.library)
        return next((label for label, v in self.axes[axis].items() if str(v) == value), value)

    def _spanned(self) -> Iterator[Labels]:
        for base in self.bases:
            if self.mode == "one-at-a-time":
                yield {BASE: base}
                yield from ({BASE: base, a: label} for a in self.axes for label in self.axes[a])
                continue
            in_step = self.mode == "zip" and self.axes
            values = self.axes.values()
            for chosen in zip(*values, strict=True) if in_step else product(*values):
                yield {BASE: base, **dict(zip(self.axes, chosen, strict=True))}

    def _drawn(self, sample: Sample) -> Iterator[Labels]:
        """Yield combinations of the product by chance, some of them again."""
        from numpy.random import default_rng
        from scipy.stats.qmc import Sobol

        choices = {BASE: list(self.bases), **{a: list(values) for a, values in self.axes.items()}}
        rng = default_rng(sample.seed)
        sobol = Sobol(len(choices), rng=rng) if sample.method == "sobol" else None
        batch = 2 ** math.ceil(math.log2(sample.size))  # Sobol's points balance in powers of 2
        for _ in range(MOST_DRAWS):
            for point in sobol.random(batch) if sobol else rng.random((batch, len(choices))):
                yield {
                    axis: values[int(share * len(values))]
                    for (axis, values), share in zip(choices.items(), point, strict=True)
                }

    def _with_their_conditions(self, labels: Labels) -> Labels:
        """Return the labels without axes whose conditions do not hold."""
        for axis, conditions in self.only_with.items():
            if axis in labels and not self._meets(labels, conditions):
                return self._with_their_conditions({a: v for a, v in labels.items() if a != axis})
        return labels

    def _meets(self, labels: Labels, conditions: Mapping[str, tuple[str, ...]]) -> bool:
        return all(self.own(labels, axis) in values for axis, values in conditions.items())


def conditions_of(
    key: str, stated: Mapping[str, Any], choices: Choices
) -> dict[str, tuple[str, ...]]:
    """Return the labels that are meant by axis = value or values; ValueError on unknown ones.

    key: under which they are stated.
    """
    with at_key(key):
        return {axis: tuple(_labels(axis, value, choices)) for axis, value in stated.items()}


def _labels(axis: str, stated: Any, choices: Choices) -> Iterator[str]:
    known = choices[check_known("axis of this grid", axis, choices)]
    whole = stated in known.values() or str(stated) in known
    for value in stated if isinstance(stated, tuple) and not whole else (stated,):
        matching = (label for label, v in known.items() if v == value or label == str(value))
        yield next(matching, None) or check_known(f"value of {axis}", str(value), known)
