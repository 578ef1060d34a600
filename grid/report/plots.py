"""The report's figures: matplotlib, SVG, colours that the colour-blind tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cycler import cycler
from matplotlib.figure import Figure

from evaluators import column_named, columns_of, headline_of
from grid.plan import Plan
from grid.report.claims import Judgement
from grid.report.effects import Effects
from grid.report.tables import FilledTable
from grid.report.verdicts import Verdicts
from grid.table import Row, Table
from trainables.scale import Scale
from trainables.store.tracking import ALONG, TrialRun

# Okabe and Ito's colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DECISION_COLOURS = {"reproduced": COLOURS[2], "not reproduced": COLOURS[1]}
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
MARKERS = "osD^vPX*" * 9
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


def _figure(width: float, height: float, *, panels: int = 1, rows: int = 1) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(rows, panels, squeeze=False)
    return figure


def _plot(name: str, caption: str, figure: Figure, table: str = "") -> Plot:
    """Return a figure as the <svg> element alone: a page needs neither a doctype nor metadata."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    return Plot(name, caption, svg[svg.index("<svg") :], table)


def draw(
    plan: Plan,
    tables: Sequence[tuple[Table, FilledTable]],
    verdicts: Verdicts,
    *,
    scale: Scale,
    judgements: Sequence[Judgement],
    effects: Sequence[Effects],
) -> list[Plot]:
    """Draw every figure of a report for which there is something to draw."""
    runs = verdicts.runs
    with mpl.rc_context(STYLE):
        plots = [
            claims_plot(judgements),
            scatter_plot(plan, runs),
            shape_bias_plot([table for table, _ in tables], runs),
            *map(effects_plot, effects),
        ]
        for table, filled in tables:
            plots += _curves(filled, scale)
            along = dict.fromkeys(name for trial in plan for name in trial.along)
            plots.append(checkpoints_plot(table, along, verdicts))
            evaluators = {column.evaluator for column in table.shown}
            if "tpa" in evaluators:
                plots.append(patches_plot(table, verdicts))
            if "corruptions" in evaluators:
                plots.append(corruptions_plot(table, verdicts))
            if len(tables) == 1 or _is_about_training(table, runs):
                plots.append(training_plot(table, verdicts))
    return [plot for plot in plots if plot]


def _is_about_training(table: Table, runs: Mapping[str, TrialRun]) -> bool:
    """Say whether a table trains adversarially or lost a training."""
    digests = [row.recipe.digest() for row in table.rows]
    fell = any(runs[digest].outcome == "collapsed" for digest in digests if digest in runs)
    return fell or any(row.recipe.adversary for row in table.rows)


def claims_plot(judgements: Sequence[Judgement]) -> Plot | None:
    """Draw every claim's difference with its interval beside the published one."""
    shown = [j for j in judgements[::-1] if j.paired or j.outcome]
    if not shown:
        return None
    figure = _figure(7.5, 0.9 + 0.42 * len(shown))
    (axes,) = figure.axes
    for place, judgement in enumerate(shown):
        colour = DECISION_COLOURS.get(judgement.decision, UNDECIDED)
        if paired := judgement.paired:
            value, low, high = (100 * v for v in (paired.difference, paired.low, paired.high))
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(value, place, "o", color=colour)
        else:
            text = fill(judgement.outcome, 32, initial_indent=" ", subsequent_indent=" ")
            axes.text(0, place, text, color=colour, va="center", fontsize=7)
        if judgement.published is not None:
            axes.plot(judgement.published, place, "D", color="black", fillstyle="none")
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [fill(j.claim.says, 52) for j in shown], fontsize=8)
    axes.set_xlabel("difference, points")
    caption = (
        "Each claim's difference, the side that the claim favours minus the other, with its 95 % "
        "interval, or how its trainings ended. Right supports the claim; green: reproduced, "
        "orange: not, grey: undecided; hollow diamond: the published difference."
    )
    return _plot("claims", caption, figure)


def _curves(table: FilledTable, scale: Scale) -> Iterator[Plot | None]:
    """Draw robust accuracy against the number of PGD steps, and against AutoAttack's radius."""
    steps = {c.label: float(c.label.removeprefix("PGD-")) for c in columns_of("pgd").values()}
    caption = f"Accuracy under PGD against its steps, {table.name}."
    yield _lines(table, steps, "steps", caption, "PGD steps, number")
    radii = {"autoattack-small": scale.small_epsilon, "autoattack": scale.epsilon}
    columns = {column_named(name).at(scale.name): 255 * float(e) for name, e in radii.items()}
    epsilons = {column_named("autoattack/clean").label: 0.0}
    epsilons |= {column.title: radius for column, radius in columns.items() if column}
    caption = (
        f"Accuracy under AutoAttack against epsilon, {table.name}; more radii for a model: "
        "python -m evaluators --weights FILE --evaluators autoattack --epsilon E."
    )
    yield _lines(table, epsilons, "epsilon", caption, "epsilon, 1/255")


def _lines(
    table: FilledTable, columns: Mapping[str, float], name: str, caption: str, x_label: str
) -> Plot | None:
    """Draw a line per row of a table through some columns, at their places on the x axis.

    Nothing where a column lacks, or where the lines are more than can be told apart.
    """
    if not set(columns) <= set(table.columns):
        return None
    places = [table.columns.index(column) for column in columns]
    rows = [row for row in table.rows if all(row.cells[i].value is not None for i in places)]
    if not 0 < len(rows) <= MOST_LINES:
        return None
    xs = list(columns.values())
    figure = _figure(6.5, 3.6)
    (axes,) = figure.axes
    for row, marker in zip(rows, MARKERS, strict=False):
        cells = [row.cells[i] for i in places]
        values, lows, highs = (
            np.array([getattr(cell, end) for cell in cells]) for end in ("value", "low", "high")
        )
        spread = np.maximum([values - lows, highs - values], 0)
        axes.errorbar(xs, values, spread, marker=marker, markersize=4, capsize=2, label=row.label)
    axes.set(xlabel=x_label, ylabel="survived, %", ylim=(-2, 102))
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    return _plot(f"{name}-{table.name}", caption, figure, table.name)


def _ledgers(rows: Iterable[Row], verdicts: Verdicts, evaluator: str) -> dict[str, pa.Table]:
    """Return the ledgers of the rows that are judged, by label."""
    ledgers = {row.label: verdicts.ledger(row.recipe.digest(), evaluator) for row in rows}
    return {label: ledger for label, ledger in ledgers.items() if ledger is not None}


def corruptions_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the error by kind and severity, a panel per row of a table."""
    judged = _ledgers(table.rows[:MOST_LINES], verdicts, "corruptions")
    if not judged:
        return None
    across = min(len(judged), PANELS_IN_A_ROW)
    down = -(-len(judged) // across)
    figure = _figure(2.2 + 1.6 * across, 0.6 + 3.2 * down, panels=across, rows=down)
    for unused in figure.axes[len(judged) :]:
        unused.remove()
    for axes, (label, ledger) in zip(figure.axes, judged.items(), strict=True):
        frame = ledger.select(["question", "survived"]).to_pandas()
        frame[["kind", "severity"]] = frame["question"].str.rsplit("-", n=1, expand=True)
        survived = frame.pivot_table("survived", index="kind", columns="severity", sort=False)
        image = axes.imshow(100 * (1 - survived), cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_title(fill(label, 22), fontsize=8)
        axes.set_xticks(range(len(survived.columns)), survived.columns)
        axes.set_yticks(range(len(survived)), survived.index.str.replace("_", " "), fontsize=7)
        axes.set_xlabel("severity, level")
        axes.label_outer()
    figure.colorbar(image, ax=figure.axes, label="error, %")
    caption = f"Error on corrupted images by kind and severity, {table.name}."
    return _plot(f"corruptions-{table.name}", caption, figure, table.name)


def patches_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the share of images that survive texture patches against the queries spent."""
    judged = _ledgers(table.rows, verdicts, "tpa")
    if not judged:
        return None
    figure = _figure(6.5, 3.6)
    (axes,) = figure.axes
    for label, ledger in judged.items():
        rows = ledger.filter(pc.equal(ledger["question"], "tpa")).to_pylist()
        spent = sorted(row["queries"] or 0 for row in rows if not row["survived"])
        left = 100 * (1 - np.arange(len(spent) + 1) / len(rows))
        axes.step([0, *spent], left, where="post", label=label)
    axes.set(xlabel="queries, forward passes", ylabel="survived, %", ylim=(-2, 102))
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    caption = f"Survival of the texture patch attack against its queries, {table.name}."
    return _plot(f"patches-{table.name}", caption, figure, table.name)


def training_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw training loss and held-out accuracy by epoch; a cross marks the end of a collapse."""
    runs, history = verdicts.runs, verdicts.tracker.history
    runs_by_label = {r.label: runs[d] for r in table.rows if (d := r.recipe.digest()) in runs}
    if not 0 < len(runs_by_label) <= MOST_LINES:
        return None
    figure = _figure(8.5, 3.6, panels=2)
    loss, accuracy = figure.axes
    for label, run in runs_by_label.items():
        losses = [(e, v) for e, v in history(run, "train/loss") if v < MOST_LOSS]
        (line,) = loss.plot(*np.reshape(losses, (-1, 2)).T, label=label)
        epochs, shares = np.reshape(history(run, "held_out/accuracy"), (-1, 2)).T
        accuracy.plot(epochs, 100 * shares, ".-", color=line.get_color())
        if run.outcome == "collapsed" and losses:
            loss.plot(*losses[-1], "x", color=line.get_color(), markersize=9)
    loss.set(xlabel="time, epochs", ylabel="training loss, nats")
    accuracy.set(xlabel="time, epochs", ylabel="held-out accuracy, %", ylim=(-2, 102))
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    caption = f"Training of {table.name}'s models; a cross marks a collapse."
    return _plot(f"training-{table.name}", caption, figure, table.name)


def checkpoints_plot(table: Table, evaluators: Iterable[str], verdicts: Verdicts) -> Plot | None:
    """Draw the scores of a table's models along their training, by the evaluators of each trial."""
    runs, history = verdicts.runs, verdicts.tracker.history
    runs_by_label = {r.label: runs[d] for r in table.rows if (d := r.recipe.digest()) in runs}
    judged = [run for run in runs_by_label.values() if run.checkpoints]
    scores = [
        s for s in map(headline_of, evaluators) if any(ALONG + s in r.metrics for r in judged)
    ]
    if not scores or len(runs_by_label) > MOST_LINES:
        return None
    figure = _figure(1 + 3.6 * len(scores), 3.6, panels=len(scores))
    for axes, score in zip(figure.axes, scores, strict=True):
        for (label, run), marker in zip(runs_by_label.items(), MARKERS, strict=False):
            points = history(run, ALONG + score)
            if score in run.metrics:
                points.append((run.logged_epochs, run.metrics[score]))
            epochs, shares = np.reshape(points, (-1, 2)).T
            axes.plot(epochs, 100 * shares, f"{marker}-", markersize=4, label=label)
        axes.set(xlabel="time, epochs", ylabel=f"{column_named(score).label}, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    caption = f"Scores of {table.name}'s models along their training."
    return _plot(f"checkpoints-{table.name}", caption, figure, table.name)


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
    figure = _figure(5.5, 3.4)
    (axes,) = figure.axes
    for (label, points), marker in zip(groups.items(), MARKERS, strict=False):
        axes.plot(*zip(*points, strict=True), marker, label=label, alpha=0.7)
    axes.set(xlabel="clean accuracy, %", ylabel="PGD-100 accuracy, %")
    axes.legend(fontsize=7)
    return _plot("scatter", "Clean against robust accuracy, every trial of the study.", figure)


def shape_bias_plot(tables: Sequence[Table], runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw each model's shape bias: shape's share of the answers that are shape's or texture's."""
    score = "stylized/shape-bias"
    labels: dict[str, str] = {}
    for table in tables:
        for row in table.rows:
            labels.setdefault(row.recipe.digest(), f"{table.name}: {row.label}")
    judged = [(runs[d].metrics, label) for d, label in labels.items() if d in runs]
    shown = sorted((m[score], label, m) for m, label in judged if score in m)[-3 * MOST_LINES :]
    if not shown:
        return None
    figure = _figure(6.5, 0.9 + 0.25 * len(shown))
    (axes,) = figure.axes
    for place, (share, _, metrics) in enumerate(shown):
        low, high = (100 * metrics[score + end] for end in ("/low", "/high"))
        axes.plot([low, high], [place, place], "|-", color=COLOURS[0])
        axes.plot(100 * share, place, "o", color=COLOURS[0])
    axes.set_yticks(range(len(shown)), [label for _, label, _ in shown], fontsize=7)
    axes.set(xlabel="shape bias, %", xlim=(0, 100))
    caption = "Shape bias on cue conflicts with its 95 % interval, every model judged."
    return _plot("shape-bias", caption, figure)


def effects_plot(effects: Effects) -> Plot:
    """Draw the difference that each value of each axis makes."""
    contrasts = list(effects.contrasts[::-1].itertuples())
    figure = _figure(4.5, max(2.8, 1.2 + 0.26 * len(contrasts)))
    (axes,) = figure.axes
    for place, c in enumerate(contrasts):
        colour = COLOURS[0] if c.low > 0 or c.high < 0 else UNDECIDED
        axes.plot([100 * c.low, 100 * c.high], [place, place], color=colour)
        axes.plot(100 * c.difference, place, "o", color=colour, markersize=4)
    axes.axvline(0, color="#999999", linewidth=0.8)
    names = [f"{c.axis}: {c.value} - {c.reference}" for c in contrasts]
    axes.set_yticks(range(len(contrasts)), names, fontsize=7)
    axes.set_xlabel(f"{effects.score}: difference, points")
    caption = (
        f"Main effects on {effects.score} with 95 % intervals; grey: the interval holds 0, or the "
        "pairs are too alike for one."
    )
    return _plot(f"effects-{effects.score}", caption, figure, "effects")
