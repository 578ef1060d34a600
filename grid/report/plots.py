"""The report's figures: matplotlib, SVG, colours that the colour-blind tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
import pyarrow.compute as pc
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators import column_named, columns_of
from grid.plan import Plan
from grid.report.claims import Judgement
from grid.report.effects import Effects, Interaction
from grid.report.tables import FilledTable
from grid.report.verdicts import Verdicts
from grid.study import Row, Table
from trainables.data.registry import SEVERITIES
from trainables.scale import Scale
from trainables.store.tracking import Tracker, TrialRun

# Okabe and Ito's colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
VERDICT_COLOURS = {"reproduced": COLOURS[2], "not reproduced": COLOURS[1]}
UNDECIDED = "#777777"
STYLE = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
}
MARKERS = "osD^vPX*"
MOST_LINES = 12  # more models than these no eye tells apart
PANELS_IN_A_ROW = 5
MOST_LOSS = 1e6  # nats; what is above, infinite or no number is not drawn


@dataclass(frozen=True)
class Plot:
    """A figure of the page: what it shows, the picture as SVG, and the table it goes with."""

    name: str
    caption: str
    svg: str
    table: str = ""

    def element(self) -> str:
        """Return the picture as part of a page, named by its caption."""
        return self.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.caption)}" ', 1)

    def file(self) -> str:
        """Return the picture as a file of its own."""
        space = 'xmlns="http://www.w3.org/2000/svg"'
        return self.svg.replace("<svg ", f"<svg {space} ", 1)


class _Canvas:
    """A figure with one or more axes, turned into SVG once it is drawn."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""

    @property
    def axes(self) -> Axes:
        return self.figure.axes[0]


@contextmanager
def _canvas(width: float, height: float, *, panels: int = 1, rows: int = 1) -> Iterator[_Canvas]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(rows, panels, squeeze=False)
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
    """Draw every claim's difference with its interval beside the published one."""
    shown = [j for j in judgements if j.paired or j.outcome]
    if not shown:
        return None
    with _canvas(7.5, 0.9 + 0.42 * len(shown)) as canvas:
        axes = canvas.axes
        for place, judgement in enumerate(reversed(shown)):
            colour = VERDICT_COLOURS.get(judgement.verdict, UNDECIDED)
            if paired := judgement.paired:
                value, low, high = (100 * v for v in (paired.difference, paired.low, paired.high))
                axes.plot([low, high], [place, place], color=colour, linewidth=2)
                axes.plot(value, place, "o", color=colour)
            else:
                text = _wrapped(f" {judgement.outcome}", 32).replace("\n", "\n ")
                axes.text(0, place, text, color=colour, va="center", fontsize=7)
            if judgement.published is not None:
                axes.plot(judgement.published, place, "D", color="black", fillstyle="none")
        axes.axvline(0, color="#999999", linewidth=0.8)
        labels = [_wrapped(j.claim.says) for j in reversed(shown)]
        axes.set_yticks(range(len(shown)), labels, fontsize=8)
        axes.set_xlabel("difference, points")
    return Plot(
        "claims",
        "Each claim's paired difference with its 95 % interval (of one model: its own score), or "
        "how its trainings ended; green: reproduced, orange: not, grey: undecided; hollow "
        "diamond: the published difference, on ImageNet.",
        canvas.svg,
    )


def _wrapped(text: str, width: int = 52) -> str:
    cut = text.rfind(" ", 0, width) if len(text) > width else len(text)
    return text[:cut] + "\n" + text[cut + 1 :] if cut < len(text) else text


def steps_plot(table: FilledTable) -> Plot | None:
    """Draw robust accuracy against the number of PGD steps."""
    columns = {c.label: float(c.label.removeprefix("PGD-")) for c in columns_of("pgd").values()}
    caption = f"Accuracy under PGD against its steps, {table.name}."
    return _lines(table, columns, "steps", caption, "PGD steps, number")


def radii_plot(table: FilledTable, scale: Scale) -> Plot | None:
    """Draw accuracy against the radius: clean, and under AutoAttack at the radii asked."""
    radii = {"autoattack-small": scale.small_epsilon, "autoattack": scale.epsilon}
    shown = {column_named(name).at(scale.name): 255 * float(e) for name, e in radii.items()}
    clean = column_named("autoattack/clean").label
    columns = {clean: 0.0} | {column.title: radius for column, radius in shown.items() if column}
    caption = (
        f"Accuracy under AutoAttack against epsilon, {table.name}; more radii for a model: "
        "python -m evaluators --weights FILE --evaluators autoattack --epsilon E."
    )
    return _lines(table, columns, "epsilon", caption, "epsilon, 1/255")


def stages_plot(table: FilledTable, scale: Scale) -> Plot | None:
    """Draw the survivors after each stage of AutoAttack."""
    shown = filter(None, (column.at(scale.name) for column in columns_of("autoattack").values()))
    columns = {column.title: float(place) for place, column in enumerate(shown)}
    caption = f"Survivors after each of AutoAttack's stages, {table.name}."
    ticks = ("clean", "APGD-CE", "APGD-T", "FAB-T", "Square")
    return _lines(table, columns, "stages", caption, "after stage, in their order", ticks)


def _lines(
    table: FilledTable,
    columns: Mapping[str, float],
    name: str,
    caption: str,
    x_label: str,
    ticks: Sequence[str] = (),
) -> Plot | None:
    """Draw a line per row of a table through the columns given, at their places on the x axis.

    Nothing where a column lacks, or where the lines are more than can be told apart.
    """
    if not set(columns) <= set(table.columns):
        return None
    places = [table.columns.index(column) for column in columns]
    rows = [row for row in table.rows if all(row.cells[i].value is not None for i in places)]
    if not 0 < len(rows) <= MOST_LINES:
        return None
    xs = list(columns.values())
    with _canvas(6.5, 3.6) as canvas:
        axes = canvas.axes
        for row, marker in zip(rows, MARKERS * 2, strict=False):
            cells = [row.cells[i] for i in places]
            values = [c.value or 0.0 for c in cells]
            spread = [
                [v - (c.low or 0.0) for v, c in zip(values, cells, strict=True)],
                [(c.high or 0.0) - v for v, c in zip(values, cells, strict=True)],
            ]
            axes.errorbar(xs, values, yerr=np.maximum(spread, 0), marker=marker, label=row.label,
                          capsize=2, linewidth=1.2, markersize=4)  # fmt: skip
        axes.set(xlabel=x_label, ylabel="survived, %", ylim=(-2, 102))
        axes.set_xticks(xs, ticks or [f"{x:g}" for x in xs])
        canvas.figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return Plot(f"{name}-{table.name}", caption, canvas.svg, table.name)


def corruptions_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the error by kind and severity, a panel per row of a table."""
    grids = {row.label: _errors_by_kind(row, verdicts) for row in table.rows[:MOST_LINES]}
    judged = {label: grid for label, grid in grids.items() if grid}
    if not judged:
        return None
    kinds = list(next(iter(judged.values())))
    across = min(len(judged), PANELS_IN_A_ROW)
    down = -(-len(judged) // across)
    with _canvas(2.2 + 1.6 * across, 0.6 + 3.2 * down, panels=across, rows=down) as canvas:
        panels = canvas.figure.axes
        for axes, (label, errors) in zip(panels, judged.items(), strict=False):
            values = [errors[kind] for kind in kinds]
            image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
            axes.set_title(label, fontsize=8)
            axes.set_xticks(range(len(SEVERITIES)), [str(s) for s in SEVERITIES])
            axes.set_yticks(range(len(kinds)), [k.replace("_", " ") for k in kinds], fontsize=7)
            axes.set_xlabel("severity, level")
            axes.label_outer()
        for unused in panels[len(judged) :]:
            unused.remove()
        canvas.figure.colorbar(image, ax=canvas.figure.axes, label="error, %")
    caption = f"Error on corrupted images by kind and severity, {table.name}."
    return Plot(f"corruptions-{table.name}", caption, canvas.svg, table.name)


def _errors_by_kind(row: Row, verdicts: Verdicts) -> dict[str, list[float]]:
    ledger = verdicts.ledger(row.recipe.digest(), "corruptions")
    if ledger is None:
        return {}
    grouped = ledger.group_by("question").aggregate([("survived", "mean")])
    shares = zip(grouped["question"].to_pylist(), grouped["survived_mean"].to_pylist(), strict=True)
    errors = {question: 100 * (1 - share) for question, share in shares}
    kinds = dict.fromkeys(question.rpartition("-")[0] for question in errors)
    return {kind: [errors[f"{kind}-{severity}"] for severity in SEVERITIES] for kind in kinds}


def patches_plot(table: Table, verdicts: Verdicts, scale: Scale) -> Plot | None:
    """Draw the share of images that survive texture patches against queries and patches spent."""
    ledgers = {row.label: verdicts.ledger(row.recipe.digest(), "tpa") for row in table.rows}
    judged = {label: ledger for label, ledger in ledgers.items() if ledger is not None}
    if not judged:
        return None
    patches = range(scale.patch.patches + 1)
    with _canvas(8.5, 3.4, panels=2) as canvas:
        by_queries, by_patches = canvas.figure.axes
        for (label, ledger), marker in zip(judged.items(), MARKERS * 2, strict=False):
            rows = ledger.filter(pc.equal(ledger["question"], "tpa"))
            survived = np.array(rows["survived"].to_pylist())
            queries = np.where(survived, np.inf, np.array(rows["queries"].to_pylist(), dtype=float))
            spent = np.concatenate([[0], np.sort(queries[np.isfinite(queries)])])
            left = [100 * float(np.mean(queries > q)) for q in spent]
            by_queries.step(spent, left, where="post", label=label)
            stages = rows["stage"].to_pylist()
            broken = np.cumsum([stages.count(f"patch-{n}" if n else "clean") for n in patches])
            by_patches.plot(patches, 100 * (1 - broken / len(stages)), marker=marker, markersize=4)
        by_queries.set(xlabel="queries, forward passes", ylabel="survived, %", ylim=(-2, 102))
        by_patches.set(xlabel="patches, number", ylabel="survived, %", ylim=(-2, 102))
        by_patches.set_xticks(patches)
        canvas.figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    caption = f"Survival of the texture patch attack against queries and patches, {table.name}."
    return Plot(f"patches-{table.name}", caption, canvas.svg, table.name)


def training_plot(table: Table, tracker: Tracker, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw training loss and held-out accuracy by epoch; a cross marks the end of a collapse."""
    runs_by_label = {r.label: runs[d] for r in table.rows if (d := r.recipe.digest()) in runs}
    if not 0 < len(runs_by_label) <= MOST_LINES:
        return None
    with _canvas(8.5, 3.6, panels=2) as canvas:
        loss, accuracy = canvas.figure.axes
        for label, run in runs_by_label.items():
            history = tracker.history(run, "train/loss")
            losses = [entry for entry in history if entry[1] < MOST_LOSS]
            (line,) = loss.plot(*_xy(losses), label=label)
            epochs, shares = _xy(tracker.history(run, "held_out/accuracy"))
            accuracy.plot(epochs, [100 * s for s in shares], ".-", color=line.get_color())
            if run.outcome == "collapsed" and losses:
                loss.plot(*losses[-1], "x", color=line.get_color(), markersize=9)
        loss.set(xlabel="time, epochs", ylabel="training loss, nats")
        accuracy.set(xlabel="time, epochs", ylabel="held-out accuracy, %", ylim=(-2, 102))
        canvas.figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    caption = f"Training of {table.name}'s models; a cross marks a collapse."
    return Plot(f"training-{table.name}", caption, canvas.svg, table.name)


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


def size_plot(table: Table, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw clean accuracy and corruption error against the number of parameters."""
    from trainables.networks import build_classifier, count_parameters

    scores = {"clean": "clean accuracy", "corruptions": "corruption error"}
    judged = [row for row in table.rows if (d := row.recipe.digest()) in runs and runs[d].metrics]
    if not judged:
        return None
    with _canvas(8.5, 3.6, panels=2) as canvas:
        for row, marker in zip(judged, MARKERS * 9, strict=False):
            count = count_parameters(build_classifier(row.recipe))
            metrics = runs[row.recipe.digest()].metrics
            for axes, score in zip(canvas.figure.axes, scores, strict=True):
                if score in metrics:
                    axes.plot(count, 100 * metrics[score], marker, label=row.label)
        for axes, label in zip(canvas.figure.axes, scores.values(), strict=True):
            axes.set(xlabel="parameters, number", ylabel=f"{label}, %", xscale="log")
        handles, labels = canvas.axes.get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    return Plot("size", "Accuracy and error against model size.", canvas.svg, table.name)


def shape_bias_plot(tables: Sequence[Table], runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw each model's shape bias: shape's share of the answers that are shape's or texture's."""
    score = "stylized/shape-bias"
    rows: dict[str, str] = {}
    for table in tables:
        for row in table.rows:
            rows.setdefault(row.recipe.digest(), f"{table.name}: {row.label}")
    judged = {
        label: runs[digest].metrics
        for digest, label in rows.items()
        if digest in runs and score in runs[digest].metrics
    }
    if not judged:
        return None
    judged = dict(sorted(judged.items(), key=lambda item: item[1][score])[-3 * MOST_LINES :])
    with _canvas(6.5, 0.9 + 0.25 * len(judged)) as canvas:
        for place, metrics in enumerate(judged.values()):
            value, low, high = (100 * metrics[score + end] for end in ("", "/low", "/high"))
            canvas.axes.errorbar(
                value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=2,
                color=COLOURS[0],
            )  # fmt: skip
        canvas.axes.set_yticks(range(len(judged)), list(judged), fontsize=7)
        canvas.axes.set(xlabel="shape bias, %", xlim=(0, 100))
    caption = "Shape bias on cue conflicts with its 95 % interval, every model asked."
    return Plot("shape-bias", caption, canvas.svg)


def effects_plot(effects: Effects) -> Plot:
    """Draw each choice's main effect, and beside it the interaction that explains the most."""
    contrasts, interaction = effects.contrasts[::-1], effects.interaction
    panels = 2 if interaction else 1
    width, height = 4.5 + 3.5 * (panels - 1), 1.2 + 0.26 * len(contrasts)
    with _canvas(width, max(height, 2.8), panels=panels) as canvas:
        axes = canvas.axes
        for place, c in enumerate(contrasts):
            colour = COLOURS[0] if c.is_told_apart else UNDECIDED
            if c.low is not None and c.high is not None:
                axes.plot([100 * c.low, 100 * c.high], [place, place], color=colour)
            axes.plot(100 * c.difference, place, "o", color=colour, markersize=4)
        axes.axvline(0, color="#999999", linewidth=0.8)
        names = [f"{c.axis}: {c.value} - {c.reference}" for c in contrasts]
        axes.set_yticks(range(len(contrasts)), names, fontsize=7)
        axes.set_xlabel(f"{effects.score}: difference, points")
        if interaction:
            _draw_interaction(canvas.figure.axes[1], effects.score, interaction)
    caption = (
        f"Main effects on {effects.score} with 95 % intervals"
        + (f", and the strongest interaction, {interaction.axis}" if interaction else "")
        + "; grey: the interval holds 0, or the pairs are too alike for one."
    )
    return Plot(f"effects-{effects.score}", caption, canvas.svg, "effects")


def _draw_interaction(axes: Axes, score: str, interaction: Interaction) -> None:
    means = interaction.means
    places = {value: place for place, value in enumerate(dict.fromkeys(a for a, _ in means))}
    for value, marker in zip(dict.fromkeys(b for _, b in means), MARKERS * 9, strict=False):
        points = [(places[a], 100 * mean) for (a, b), mean in means.items() if b == value]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=4, label=value)
    axes.set_xticks(list(places.values()), list(places), fontsize=7)
    first, second = interaction.axis.split(" x ")
    axes.set(xlabel=f"{first}, value", ylabel=f"mean {score}, %")
    axes.legend(fontsize=6, title=second, title_fontsize=7)
