"""What attacks within balls share: the norm, and the radii by the name of their question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

from evaluators.base import Evaluator
from trainables.data.base import Data
from trainables.scale import Scale
from trainables.train.norms import NORMS, Norm


class BallAttack(Evaluator):
    """Does the answer withstand an attack within a ball around the image?

    `radii`: by default the scale's own, in the max-norm its field `radius`; each of several is its
    own question, pgd-100@8/255, pgd-l2-100@0.5. `drawn`: the scale's field of how many images.
    ValueError where a radius is of another norm's order.
    """

    takes_radii = True
    always_named = False  # one radius alone is named, too
    may_be_bf16 = False  # it seeks in the scale's precision of attacks
    least_shard = 1
    norm: ClassVar[str] = "linf"
    radius, drawn = "epsilon", "attack_subset"

    def __init__(self, scale: Scale, *, radii: Sequence[Fraction] = ()) -> None:
        super().__init__(scale)
        self.subset_size = getattr(scale, self.drawn)
        standard = self.ball.standard_radius(getattr(scale, self.radius), scale.image_size)
        several = sorted(radii or self.standard_radii(standard))
        for radius in radii:
            self.ball.check(float(radius), scale.image_size)
        ends = [f"@{self.ball.name_of(float(radius))}" for radius in several]
        is_named = len(ends) > 1 or self.always_named
        names = [self.name + end for end in ends] if is_named else [self.name]
        self.radii = dict(zip(names, map(float, several), strict=True))

    def standard_radii(self, standard: Fraction) -> list[Fraction]:
        """Return the radii by default, of the scale's own."""
        return [standard]

    @property
    def ball(self) -> Norm:
        """Return the norm by its properties."""
        return NORMS[self.norm]

    def radii_line(self) -> str:
        """Say by which radii it attacks."""
        radii = ", ".join(map(self.ball.name_of, self.radii.values()))
        title = "max-norm" if self.norm == "linf" else self.ball.title
        return f"{title} radius {radii}{', sought in bf16' if self.is_bf16 else ''}"

    @property
    def is_bf16(self) -> bool:
        """Whether it seeks in bfloat16; what it finds counts where float32 errs, too."""
        return self.may_be_bf16 and self.scale.attacks_in == "bf16"

    def identity(self, source: Data) -> dict[str, Any]:
        """Name what is not the max-norm in float32: that was the only one."""
        norm = {} if self.norm == "linf" else {"norm": self.norm}
        return super().identity(source) | norm | ({"attacks_in": "bf16"} if self.is_bf16 else {})

    @classmethod
    def within(cls, norm: str, name: str) -> type[BallAttack]:
        """Return the attack in another norm, by the name of its entry: pgd-l2."""
        columns = [
            replace(
                column,
                name=column.name.replace(cls.name, name, 1),
                label=f"{column.counterpart or column.label}, {NORMS[norm].title}",
                counterpart="",
            )
            for column in cls.columns
        ]
        return type(name, (cls,), {"name": name, "columns": tuple(columns), "norm": norm})
