"""The scores of one model and the paired comparison of two, as tables, frames and figures."""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from evaluators import evaluator_of, intervals
from evaluators.calibration import calibration_scores
from evaluators.intervals import Paired, error_consistency
from evaluators.ledger import Score
from trainables.recipe import unknown
from trainables.train.norms import NORMS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[str]]
PLACE = re.compile(r"^\d+-([0-9a-f]{12}\.\d+)$")  # and content, in the id of an image in memory


class _Table(ABC):
    """A title, rows under a header, and remarks: as lines, or as HTML for a notebook."""

    @abstractmethod
    def _shown(self) -> tuple[str, Rows, Sequence[str]]: ...

    def __str__(self) -> str:
        title, rows, remarks = self._shown()
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = ("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows)
        return "\n".join([title, *lines, *remarks])

    def _repr_html_(self) -> str:
        title, rows, remarks = self._shown()
        lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        table = "".join(f"<tr>{line}</tr>" for line in lines)
        before, *after = (f"<p>{html.escape(text)}</p>" for text in (title, *remarks))
        return "".join([before, f"<table>{table}</table>", *after])


@dataclass(frozen=True, eq=False)
class Scores(_Table):
    """One model's scores, each with its evaluator's seconds, and every verdict behind them.

    `ledger`: a row per image and question (evaluators/ledger.py). `identities`: of each evaluator,
    all that its verdicts depend on beside the model. `seconds`: of all processes together. `flags`:
    why the attacks are not to be believed. `notes`: on the model and the settings.
    """

    scores: tuple[Score, ...]
    seconds: Mapping[str, float]
    ledger: pa.Table
    identities: Mapping[str, Mapping[str, Any]]
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    data: str = ""

    def __getitem__(self, score: str) -> Score:
        """Return a score by its name; ValueError lists the names."""
        by_name = {s.name: s for s in self.scores}
        if score not in by_name:
            raise ValueError(unknown("score", score, by_name))
        return by_name[score]

    @property
    def frame(self) -> pd.DataFrame:
        """The scores as a pandas frame, a row each: value, low, high (shares), n, seconds."""
        rows = [asdict(score) | {"seconds": self.seconds[score.name]} for score in self.scores]
        frame: pd.DataFrame = pa.Table.from_pylist(rows).to_pandas()
        return frame.set_index("name").rename_axis("score")

    @cached_property
    def calibration(self) -> Mapping[str, Score]:
        """Scores of the answers' confidences by name, clean/ece: see `calibration_scores`."""
        return {score.name: score for score in calibration_scores(self.ledger)}

    def plot(self) -> Figure:
        """Draw the scores with their intervals; `.savefig(FILE)` writes the figure."""
        from matplotlib import pyplot as plt

        shares = [s for s in self.scores if _is_share(s)]
        names = [s.name for s in shares]
        figure, axes = plt.subplots(figsize=(6, 1 + 0.3 * len(names)), layout="constrained")
        plt.close(figure)  # a notebook shows what the cell returns, and nothing a second time
        for place, s in enumerate(shares):
            axes.plot([100 * s.low, 100 * s.high], [place, place], color="tab:blue")
            axes.plot(100 * s.value, place, "o", color="tab:blue")
        axes.set(xlabel="% with 95 % interval", title=self.name, xlim=(-2, 102))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        return cast("Figure", figure)

    def _shown(self) -> tuple[str, Rows, Sequence[str]]:
        rows = [("score", "%", "95 % interval", "n", "seconds")]
        for s in self.scores:
            value, interval = f"{100 * s.value:.2f}", f"[{100 * s.low:.1f}, {100 * s.high:.1f}]"
            if not _is_share(s):
                value, interval = f"{s.value:,.3g}", f"[{s.low:,.3g}, {s.high:,.3g}]"
                if "/queries" in s.name:
                    value, interval = f"{s.value:,.0f} queries", f"[{s.low:,.0f}, {s.high:,.0f}]"
            rows.append((s.name, value, interval, str(s.n), f"{self.seconds[s.name]:.1f}"))
        flags = [f"red flag: {flag}" for flag in self.flags]
        return f"{self.name}: {self.data}", rows, [*flags, *(f"note: {n}" for n in self.notes)]


@dataclass(frozen=True, eq=False)
class Comparison(_Table):
    """Paired differences of two models' scores, first minus second, on the images both judged.

    `kappa`: by score, whether both err on the same images more than chance has it
    (`error_consistency`).
    """

    first: Scores
    second: Scores
    paired: Mapping[str, Paired]
    kappa: Mapping[str, Score]
    notes: tuple[str, ...] = ()

    def __getitem__(self, score: str) -> Paired:
        """Return the difference of a score by its name; ValueError lists the names."""
        if score not in self.paired:
            raise ValueError(unknown("compared score", score, self.paired))
        return self.paired[score]

    def _shown(self) -> tuple[str, Rows, Sequence[str]]:
        ends = ("95 % interval", "n", "McNemar p", "error consistency")
        header = ("score", "first", "second", "difference", *ends)
        rows: list[tuple[str, ...]] = [header]
        for name, paired in self.paired.items():
            both = (f"{100 * scores[name].value:.2f}" for scores in (self.first, self.second))
            difference = f"{100 * paired.difference:+.2f}"
            interval = f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
            p = "" if paired.p is None else f"{paired.p:.2g}"
            kappa = f"{self.kappa[name].value:.2f}" if name in self.kappa else ""
            rows.append((name, *both, difference, interval, str(paired.n), p, kappa))
        title = f"{self.first.name} minus {self.second.name}"
        return title, rows, [f"note: {note}" for note in self.notes]


def compare(scores: Scores, other: Scores) -> Comparison:
    """Compare two models on the images both judged: paired difference, interval, exact McNemar p.

    ValueError where they share no question, or no image. What only one was asked, or was asked with
    other settings, is left out and named.
    """
    changes = {
        name: _change(identity, other.identities[name])
        for name, identity in scores.identities.items()
        if name in other.identities
    }
    notes = [f"{name} is not compared: {change}" for name, change in changes.items() if change]
    paired, kappa = {}, {}
    for name in (s.name for s in scores.scores if s.name in other.seconds):
        ours, theirs = (_by_content(side.ledger, name) for side in (scores, other))
        if changes[evaluator_of(name)] or not (ours and theirs):
            continue
        if difference := intervals.compare([ours], [theirs]):
            paired[name] = difference
            consistency = error_consistency(name, ours, theirs)
            if consistency and not (ours.rest.spared or theirs.rest.spared):
                kappa[name] = consistency
    if not paired:
        reasons = "; ".join(notes) or "they share no score of the same images"
        raise ValueError(f"nothing can be compared: {reasons}")
    return Comparison(scores, other, paired, kappa, tuple(notes))


def _by_content(ledger: pa.Table, score: str) -> intervals.ImageScores:
    """Return what each image adds to a score, by its id without its place."""
    values = intervals.image_scores(ledger, score) or intervals.ImageScores()
    renamed = ((PLACE.sub(r"\1", image_id), value) for image_id, value in values.items())
    return intervals.ImageScores(renamed, rest=values.rest)


def _is_share(score: Score) -> bool:
    """Return whether a score is a share: no mean number of queries, no loss, no temperature."""
    return not re.search("/(queries|nll|temperature)", score.name)


def _change(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Say in which setting two evaluators' identities differ, the images apart; '' in none."""
    for key in [k for k in {**ours, **theirs} if k not in ("images", "data")]:
        both = [side.get(key) for side in (ours, theirs)]
        if both[0] != both[1]:
            ball = NORMS[ours.get("norm", "linf")]
            shown = [ball.name_of(v) if isinstance(v, float) else v for v in both]
            return f"{key} is {shown[0]} of the first and {shown[1]} of the second"
    return ""
