"""The report's figures: matplotlib, SVG, colours that the colour-blind tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pyarrow.compute as pc
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators.corruption_kinds import SEVERITIES
from evaluators.pgd import STEPS
from grid.plan import Plan
from grid.report.claims import Judgement
from grid.report.tables import FilledTable
from grid.report.verdicts import Verdicts
from grid.studies import AUTOATTACK, AUTOATTACK_SMALL, AUTOATTACK_STAGES, Row, Table
from trainables.scale import Scale
from trainables.tracking import Tracker, TrialRun

# Okabe and Ito's colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
VERDICT_COLOURS = {"reproduced": COLOURS[2], "not reproduced": COLOURS[1]}
UNDECIDED = "#777777"
STYLE = {
    "svg.hashsalt": "report",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
}
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Plot:
    """A figure of the page: what it shows, and the picture as SVG."""

    name: str
    caption: str
    svg: str


class _Canvas:
    """A figure with one or more axes, turned into SVG once it is drawn."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""

    @property
    def axes(self) -> Axes:
        return self.figure.axes[0]


@contextmanager
def _canvas(width: float, height: float, *, panels: int = 1) -> Iterator[_Canvas]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(1, panels, squeeze=False)
        canvas = _Canvas(figure)
        yield canvas
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    canvas.svg = _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Return the bare <svg> element, which a page needs neither a doctype nor metadata for."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    return element.replace("xlink:href", "href")


def claims_plot(judgements: Sequence[Judgement]) -> Plot | None:
    """Draw every claim's difference with its interval beside the paper's."""
    shown = [j for j in judgements if j.paired]
    if not shown:
        return None
    with _canvas(7.5, 0.9 + 0.42 * len(shown)) as canvas:
        axes = canvas.axes
        for place, judgement in enumerate(reversed(shown)):
            paired = judgement.paired
            assert paired is not None
            value, low, high = (100 * v for v in (paired.difference, paired.low, paired.high))
            colour = VERDICT_COLOURS.get(judgement.verdict, UNDECIDED)
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(value, place, "o", color=colour)
            if judgement.published is not None:
                axes.plot(judgement.published, place, "D", color="black", fillstyle="none")
        axes.axvline(0, color="#999999", linewidth=0.8)
        labels = [_wrapped(j.claim.statement) for j in reversed(shown)]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.set_xlabel("difference, points")
    return Plot(
        "claims",
        "Each claim's paired difference with its 95 % interval (green: reproduced, orange: not, "
        "grey: too little data to say); hollow diamond: the paper's difference on ImageNet.",
        canvas.svg,
    )


def _wrapped(text: str, width: int = 52) -> str:
    cut = text.rfind(" ", 0, width) if len(text) > width else len(text)
    return text[:cut] + "\n" + text[cut + 1 :] if cut < len(text) else text


def steps_plot(table: FilledTable) -> Plot | None:
    """Draw robust accuracy against the number of PGD steps."""
    columns = {f"PGD-{steps}": float(steps) for steps in STEPS}
    caption = f"Accuracy under PGD against its steps, {table.name}."
    return _lines(table, columns, f"steps-{table.name}", caption, "PGD steps")


def radii_plot(table: FilledTable, scale: Scale) -> Plot | None:
    """Draw accuracy against the radius: clean, and under AutoAttack at two radii."""
    radii = {"AutoAttack 0.001": scale.small_epsilon, "AutoAttack 4/255": scale.epsilon}
    labels = {c.label: c.label_at(scale.name) for c in (AUTOATTACK_SMALL, AUTOATTACK)}
    columns = {"Clean": 0.0} | {labels[name]: 255 * float(e) for name, e in radii.items()}
    caption = f"Accuracy against the attack's radius, AutoAttack, {table.name}."
    return _lines(table, columns, "radii", caption, "epsilon, 1/255")


def stages_plot(table: FilledTable) -> Plot | None:
    """Draw the survivors after each stage of AutoAttack."""
    columns = {column.label: float(i) for i, column in enumerate(AUTOATTACK_STAGES, 1)}
    caption = "Survivors after each of AutoAttack's stages: " + ", ".join(
        f"{place:.0f} {label.removeprefix('after ')}" for label, place in columns.items()
    )
    return _lines(table, {"Clean": 0.0} | columns, "stages", caption + ".", "stages")


def _lines(
    table: FilledTable, columns: Mapping[str, float], name: str, caption: str, x_label: str
) -> Plot | None:
    """Draw a line per row of a table through the columns given, at their places on the x axis."""
    places = [(table.columns.index(c), x) for c, x in columns.items() if c in table.columns]
    rows = [r for r in table.rows if all(r.cells[i].value is not None for i, _ in places)]
    if not rows or len(places) < 2:
        return None
    with _canvas(5.5, 3.4) as canvas:
        axes = canvas.axes
        for row, marker in zip(rows, MARKERS * 9, strict=False):
            cells = [row.cells[i] for i, _ in places]
            xs = [x for _, x in places]
            values = [c.value or 0.0 for c in cells]
            spread = [
                [v - (c.low or 0.0) for v, c in zip(values, cells, strict=True)],
                [(c.high or 0.0) - v for v, c in zip(values, cells, strict=True)],
            ]
            axes.errorbar(xs, values, yerr=np.maximum(spread, 0), marker=marker, label=row.label,
                          capsize=2, linewidth=1.2, markersize=4)  # fmt: skip
        axes.set(xlabel=x_label, ylabel="survived, %", ylim=(-2, 102))
        axes.legend(fontsize=7)
    return Plot(name, caption, canvas.svg)


def corruptions_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the error by kind and severity, a panel per row of a table."""
    grids = {row.label: _errors_by_kind(row, verdicts) for row in table.rows}
    found = {label: grid for label, grid in grids.items() if grid}
    if not found:
        return None
    kinds = list(next(iter(found.values())))
    with _canvas(2.2 + 1.9 * len(found), 4.2, panels=len(found)) as canvas:
        for axes, (label, errors) in zip(canvas.figure.axes, found.items(), strict=True):
            values = [errors[kind] for kind in kinds]
            image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
            axes.set_title(label, fontsize=9)
            axes.set_xticks(range(len(SEVERITIES)), [str(s) for s in SEVERITIES])
            axes.set_yticks(range(len(kinds)), [k.replace("_", " ") for k in kinds], fontsize=7)
            axes.set_xlabel("severity")
            axes.label_outer()
        canvas.figure.colorbar(image, ax=canvas.figure.axes, label="error, %")
    return Plot("corruptions", "Error on corrupted images by kind and severity.", canvas.svg)


def _errors_by_kind(row: Row, verdicts: Verdicts) -> dict[str, list[float]]:
    ledger = verdicts.ledger(row.recipe.digest(), "corruptions")
    if ledger is None:
        return {}
    grouped = ledger.group_by("question").aggregate([("survived", "mean")])
    shares = zip(grouped["question"].to_pylist(), grouped["survived_mean"].to_pylist(), strict=True)
    errors = {question: 100 * (1 - share) for question, share in shares}
    kinds = dict.fromkeys(question.rpartition("-")[0] for question in errors)
    return {kind: [errors[f"{kind}-{severity}"] for severity in SEVERITIES] for kind in kinds}


def patches_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the share of images that survive the texture patch attack against queries spent."""
    ledgers = {row.label: verdicts.ledger(row.recipe.digest(), "tpa") for row in table.rows}
    found = {label: ledger for label, ledger in ledgers.items() if ledger is not None}
    if not found:
        return None
    with _canvas(5.5, 3.4) as canvas:
        for label, ledger in found.items():
            rows = ledger.filter(pc.equal(ledger["question"], "tpa"))
            survived = np.array(rows["survived"].to_pylist())
            queries = np.where(survived, np.inf, np.array(rows["queries"].to_pylist(), dtype=float))
            spent = np.concatenate([[0], np.sort(queries[np.isfinite(queries)])])
            left = [100 * float(np.mean(queries > q)) for q in spent]
            canvas.axes.step(spent, left, where="post", label=label)
        canvas.axes.set(xlabel="queries", ylabel="survived, %", ylim=(-2, 102))
        canvas.axes.legend(fontsize=7)
    return Plot(
        "patches", "Survival of the texture patch attack against the queries spent.", canvas.svg
    )


def training_plot(table: Table, tracker: Tracker, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw training loss and held-out accuracy by epoch; a cross marks a collapse."""
    found = {r.label: runs[d] for r in table.rows if (d := r.recipe.digest()) in runs}
    if not found:
        return None
    with _canvas(8.5, 3.4, panels=2) as canvas:
        loss, accuracy = canvas.figure.axes
        for label, run in found.items():
            losses = tracker.history(run, "train/loss")
            (line,) = loss.plot(*_xy(losses), label=label)
            seen = tracker.history(run, "held_out/accuracy")
            epochs, shares = _xy(seen)
            accuracy.plot(epochs, [100 * s for s in shares], ".-", color=line.get_color())
            if run.outcome == "collapsed" and losses:
                loss.plot(*losses[-1], "x", color=line.get_color(), markersize=9)
        loss.set(xlabel="epoch", ylabel="training loss, nats")
        accuracy.set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(-2, 102))
        loss.legend(fontsize=6)
    caption = f"Training of {table.name}'s models; a cross marks a collapse."
    return Plot("training", caption, canvas.svg)


def _xy(history: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in history], [value for _, value in history]


def scatter_plot(plan: Plan, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw clean against PGD-100 accuracy over every trial, marked by family and training."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for trial in plan:
        metrics = runs[trial.digest].metrics if trial.digest in runs else {}
        if "clean" in metrics and "pgd-100" in metrics:
            training = "adversarial" if trial.recipe.adversary else "clean"
            point = (100 * metrics["clean"], 100 * metrics["pgd-100"])
            groups.setdefault(f"{trial.recipe.family}, {training} training", []).append(point)
    if not groups:
        return None
    with _canvas(5.5, 3.4) as canvas:
        for (label, points), marker in zip(groups.items(), MARKERS * 9, strict=False):
            canvas.axes.plot(*zip(*points, strict=True), marker, label=label, alpha=0.7)
        canvas.axes.set(xlabel="clean accuracy, %", ylabel="PGD-100 accuracy, %")
        canvas.axes.legend(fontsize=7)
    return Plot("scatter", "Clean against robust accuracy, every trial of the study.", canvas.svg)


def size_plot(table: Table, runs: Mapping[str, TrialRun], scale: Scale) -> Plot | None:
    """Draw clean accuracy and corruption error against the number of parameters."""
    from trainables.models import build_classifier, count_parameters

    scores = {"clean": "clean accuracy", "corruptions": "corruption error"}
    with _canvas(8.0, 3.4, panels=2) as canvas:
        drawn = 0
        for axes, (score, label) in zip(canvas.figure.axes, scores.items(), strict=True):
            for row, marker in zip(table.rows, MARKERS * 9, strict=False):
                run = runs.get(row.recipe.digest())
                if run is None or score not in run.metrics:
                    continue
                count = count_parameters(build_classifier(row.recipe))
                axes.plot(count, 100 * run.metrics[score], marker, label=row.label)
                drawn += 1
            axes.set(xlabel="parameters", ylabel=f"{label}, %", xscale="log")
        if drawn:
            canvas.figure.axes[0].legend(fontsize=6)
    if not drawn:
        return None
    return Plot("size", f"Accuracy against model size at scale {scale.name}.", canvas.svg)


def shape_bias_plot(table: Table, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw each row's shape bias: shape's share of the answers that are shape's or texture's."""
    score = "stylized/shape-bias"
    found = {
        row.label: runs[digest].metrics
        for row in table.rows
        if (digest := row.recipe.digest()) in runs and score in runs[digest].metrics
    }
    if not found:
        return None
    with _canvas(5.5, 0.9 + 0.4 * len(found)) as canvas:
        for place, metrics in enumerate(found.values()):
            value, low, high = (100 * metrics[score + end] for end in ("", "/low", "/high"))
            canvas.axes.errorbar(
                value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=2
            )
        canvas.axes.set_yticks(range(len(found)), list(found))
        canvas.axes.set(xlabel="shape bias, %", xlim=(0, 100))
    return Plot("shape-bias", "Shape bias on cue conflicts.", canvas.svg)
