"""The report's figures: matplotlib, SVG, each drawn for a wide place and for a narrow one.

A model's colour is its family's, its marker its recipe's; colours are such as the colour-blind tell
apart. Where lines end stands which model they are of.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators import answering, column_named, columns_of, headline_of
from grid.plan import Plan
from grid.report.claims import Judgement
from grid.report.effects import Effects
from grid.report.tables import FilledRow, FilledTable
from grid.report.verdicts import Verdicts
from grid.table import Row, Table
from trainables.models import MODELS
from trainables.recipe import Recipe
from trainables.scale import Scale
from trainables.store.tracking import ALONG, TrialRun

WIDE, NARROW = 6.2, 3.1  # inches of 96 px, less than which a figure's place must not be
TEXT = 8  # points: 10.7 px
LINE = 0.15  # inches, of text
INK, DIM, SHADE = "#010101", "#777777", "#d9efe7"
# Okabe and Ito's colours, each with its like on a dark page.
COLOURS = {
    "#0072b2": "#56b4f9",
    "#d55e00": "#ff8a3d",
    "#009e73": "#2fcf9f",
    "#cc79a7": "#e79cc6",
    "#b07d00": "#f0b93a",
    "#3a8fb7": "#8fd3f4",
    "#555555": "#bbbbbb",
}
BLUE, ORANGE, GREEN, *_ = COLOURS
ON_DARK = COLOURS | {DIM: "#9aa3ae", SHADE: "#1c4034"}
DECISION_COLOURS = {"reproduced": GREEN, "not reproduced": ORANGE}
STYLE = {
    "svg.fonttype": "none",
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
MARKERS = "osD^vPX*<>" * 9
LEADER = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 2}
MOST_LINES = 12  # more models than these no eye tells apart
MOST_DOTS = 36
MOST_LOSS = 1e6  # nats; what is above, infinite or no number is not drawn
Paint = Callable[[bool], Figure]  # draws a figure: for a narrow place?


@dataclass(frozen=True)
class Plot:
    """A figure of the page: what it shows, as SVG for both places, and the table it goes with."""

    name: str
    caption: str
    svg: str
    narrow: str
    table: str = ""

    def element(self) -> str:
        """Return both pictures as part of a page, in its colours, named by the caption."""
        text = ""
        for kind, svg in (("wide", self.svg), ("narrow", self.narrow)):
            label = f'<svg class="{kind}" role="img" aria-label="{escape(self.caption)}" '
            text += svg.replace("<svg ", label, 1)
        for light, dark in ON_DARK.items():
            text = text.replace(light, f"light-dark({light}, {dark})")
        return text.replace(INK, "currentColor")


def _plot(name: str, caption: str, paint: Paint, table: str = "") -> Plot:
    return Plot(name, caption, _svg(paint(False), name), _svg(paint(True), f"{name}-n"), table)


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as the <svg> element alone: a page needs neither a doctype nor metadata.

    Ids within it, which would be the same in both figures of a page, begin with the name.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


@dataclass(frozen=True)
class Series:
    """What a figure shows of one model: a line with the intervals of its points, if they have any.

    lost: its training collapsed at the line's end.
    """

    label: str
    colour: str
    marker: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    lost: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its interval on a row of its own, and a note at its end.

    zone: the values that support what the label says. published: a value to compare with.
    """

    label: str
    colour: str
    value: float
    low: float
    high: float
    zone: tuple[float, float] | None = None
    published: float | None = None
    note: str = ""


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
            claims_plot("claims", judgements),
            claims_plot("headline", [j for j in judgements if j.claim.headline]),
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


def _colour(recipe: Recipe) -> str:
    families = [*dict.fromkeys(model.family for model in MODELS.values())]
    place = families.index(recipe.family) if recipe.family in families else -1  # timm's, a user's
    return list(COLOURS)[place % len(COLOURS)]


def _looks(rows: Iterable[Row | FilledRow]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of rows by label."""
    return {r.label: (_colour(r.recipe), m) for r, m in zip(rows, MARKERS, strict=False)}


def _lines(panels: Mapping[str, Sequence[Series]], x_label: str, **settings: Any) -> Paint:
    """Return what draws a panel per y label, one below the other, with a label at each line's end.

    settings: of the axes. A series without a marker changes by steps.
    """

    def paint(narrow: bool) -> Figure:
        wrap, least = (20, 2.0) if narrow else (30, 2.2)
        texts = {s.label: fill(s.label, wrap) for lines in panels.values() for s in lines}
        height = max(least, LINE * 1.1 * sum(text.count("\n") + 1 for text in texts.values()))
        size = (NARROW if narrow else WIDE, height * len(panels) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat
        for axes, (y_label, lines) in zip(every, panels.items(), strict=True):
            for line in lines:
                _draw_line(axes, line)
            if "%" in y_label:
                bottom, top = axes.get_ylim()
                axes.set_ylim(max(bottom, -3), min(top, 103))
            axes.set_title(y_label, loc="left")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(**settings)
            axes.minorticks_off()
            _label_ends(axes, lines, texts, height)
        axes.set_xlabel(x_label)
        return figure

    return paint


def _draw_line(axes: Axes, line: Series) -> None:
    style: dict[str, Any] = {"color": line.colour, "markersize": 5, "linewidth": 1.2}
    if not line.marker:
        axes.step(line.xs, line.ys, where="post", **style)
    elif line.lows:
        spread = np.maximum([np.subtract(line.ys, line.lows), np.subtract(line.highs, line.ys)], 0)
        axes.errorbar(line.xs, line.ys, spread, marker=line.marker, capsize=2, **style)
    else:
        axes.plot(line.xs, line.ys, marker=line.marker, **style)
    if line.lost:
        axes.plot(line.xs[-1], line.ys[-1], "x", color=line.colour, markersize=9)


def _label_ends(
    axes: Axes, lines: Sequence[Series], texts: Mapping[str, str], height: float
) -> None:
    """Write each line's label beside its end, apart from the others; height: inches of the axes."""
    bottom, top = axes.get_ylim()
    ends = sorted((line for line in lines if len(line.ys)), key=lambda line: line.ys[-1])
    rooms = np.array([LINE * (texts[line.label].count("\n") + 1) / height for line in ends])
    wanted = np.array([(line.ys[-1] - bottom) / (top - bottom) for line in ends])
    touching = np.cumsum(rooms) - rooms / 2  # the places of labels that stand on one another
    above = np.maximum.accumulate(wanted - touching).clip(0, max(0, 1 - rooms.sum()))
    for line, place in zip(ends, touching + above, strict=True):
        axes.annotate(
            texts[line.label],
            (line.xs[-1], line.ys[-1]),
            (1.06, place),
            textcoords="axes fraction",
            va="center",
            color=line.colour,
            annotation_clip=False,
            arrowprops=LEADER | {"color": line.colour},
        )


def _dots(dots: Sequence[Dot], x_label: str, *, zero: bool = True, legend: bool = False) -> Paint:
    """Return what draws a row per dot, the first on top, with the axis above them.

    zero: differences from 0, rather than values, are shown. legend: it stands above the axis.
    """

    def paint(narrow: bool) -> Figure:
        texts = [fill(dot.label, 21 if narrow else 40) for dot in dots]
        notes = ["" if narrow else dot.note for dot in dots]
        rooms = [
            LINE * (max(text.count("\n") for text in both) + 1) + 0.1
            for both in zip(texts, notes, strict=True)
        ]
        edges = np.cumsum([0, *rooms])
        size = (NARROW if narrow else WIDE, edges[-1] + (0.8 if legend else 0.5))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        if zero:
            axes.axvline(0, color=DIM, linewidth=0.8)
        places = (edges[1:] + edges[:-1]) / 2
        for dot, note, place in zip(dots, notes, places, strict=True):
            _draw_dot(axes, dot, note, place)
        limits = axes.get_xlim()
        if legend:
            axes.plot([], [], "o-", color=INK, label="ours, 95 % interval")
            axes.plot([], [], "D", color=INK, fillstyle="none", label="published")
            axes.fill_between([], [], color=SHADE, label="supports the claim")
            figure.legend(loc="outside upper left", ncols=1 if narrow else 3)
        for dot, low, high in zip(dots, edges, edges[1:], strict=False):
            if dot.zone:
                ends = np.clip(dot.zone, *limits)
                axes.fill_betweenx([low + 0.02, high - 0.02], *ends, color=SHADE, linewidth=0)
        axes.set(xlim=limits, ylim=(edges[-1], 0))
        axes.set_yticks(places, texts)
        axes.tick_params("y", length=0)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(x_label, loc="left")
        axes.spines[["left", "bottom"]].set_visible(False)
        return figure

    return paint


def _draw_dot(axes: Axes, dot: Dot, note: str, place: float) -> None:
    axes.plot([dot.low, dot.high], [place, place], color=dot.colour, linewidth=2)
    axes.plot(dot.value, place, "o", color=dot.colour, markersize=5)
    if dot.published is not None:
        axes.plot(dot.published, place, "D", color=INK, fillstyle="none", markersize=5)
    transform = axes.get_yaxis_transform()
    axes.text(1.02, place, note, transform=transform, color=dot.colour, va="center")


def claims_plot(name: str, judgements: Sequence[Judgement]) -> Plot | None:
    """Draw claims' differences with their intervals beside the published ones."""
    shown = [j for j in judgements if j.paired or j.outcome]
    if not shown:
        return None
    dots = []
    for judgement in shown:
        colour = DECISION_COLOURS.get(judgement.decision, DIM)
        ends, zone = (np.nan, np.nan, np.nan), None
        notes = [str(judgement.decision)]
        if judgement.outcome:
            notes.insert(0, fill(judgement.outcome, 22))
        if p := judgement.paired:
            ends = (100 * p.difference, 100 * p.low, 100 * p.high)
            notes.insert(0, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends))
        if judgement.claim.test != "collapses":
            zone = (100 * judgement.supports[0], 100 * judgement.supports[1])
        published = judgement.published
        note = "\n".join(notes)
        dots.append(Dot(judgement.claim.says, colour, *ends, zone, published, note))
    caption = (
        "Each claim's difference with its 95 % interval: the side that the claim favours minus the "
        "other, so that right supports the claim."
    )
    paint = _dots(dots, "difference, points", legend=True)
    return _plot(name, caption, paint)


def _curves(table: FilledTable, scale: Scale) -> Iterator[Plot | None]:
    """Draw robust accuracy against the number of PGD steps, and against AutoAttack's radius."""
    steps = {c.label: float(c.label.removeprefix("PGD-")) for c in columns_of("pgd").values()}
    caption = f"Accuracy under PGD against its steps, {table.name}."
    x_label = "PGD steps, number (logarithmic)"
    yield _columns_plot(table, steps, f"steps-{table.name}", caption, x_label)
    radii = {"autoattack-small": scale.small_epsilon, "autoattack": scale.epsilon}
    columns = {
        column_named(answering(name, scale)).at(scale.name): 255 * float(e)
        for name, e in radii.items()
    }
    epsilons = {column_named("autoattack/clean").label: 0.0}
    epsilons |= {column.title: radius for column, radius in columns.items() if column}
    caption = (
        f"Accuracy under AutoAttack against epsilon, {table.name}; more radii for a model: "
        "python -m evaluators --weights FILE --evaluators autoattack --epsilon E."
    )
    name = f"epsilon-{table.name}"
    yield _columns_plot(table, epsilons, name, caption, "epsilon, 1/255")


def _columns_plot(
    table: FilledTable,
    columns: Mapping[str, float],
    name: str,
    caption: str,
    x_label: str,
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
    xs, looks, lines = list(columns.values()), _looks(table.rows), []
    for row in rows:
        cells = [row.cells[i] for i in places]
        ends = [[getattr(c, end) for c in cells] for end in ("value", "low", "high")]
        lines.append(Series(row.label, *looks[row.label], xs, ends[0], ends[1], ends[2]))
    ticks = {"xticks": xs, "xticklabels": [f"{x:g}" for x in xs]}
    scale = "linear" if 0 in xs else "log"
    paint = _lines({"survived, %": lines}, x_label, xscale=scale, **ticks)
    return _plot(name, caption, paint, table.name)


def _ledgers(rows: Iterable[Row], verdicts: Verdicts, evaluator: str) -> dict[str, pa.Table]:
    """Return the ledgers of the rows that are judged, by label."""
    ledgers = {row.label: verdicts.ledger(row.recipe.digest(), evaluator) for row in rows}
    return {label: ledger for label, ledger in ledgers.items() if ledger is not None}


def corruptions_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the error by kind and severity, a panel per row of a table."""
    shares = {}
    for label, ledger in _ledgers(table.rows[:MOST_LINES], verdicts, "corruptions").items():
        frame = ledger.select(["question", "survived"]).to_pandas()
        frame[["kind", "severity"]] = frame["question"].str.rsplit("-", n=1, expand=True)
        shares[label] = frame.pivot_table("survived", index="kind", columns="severity", sort=False)
    if not shares:
        return None

    def paint(narrow: bool) -> Figure:
        across = min(len(shares), 2 if narrow else 4)
        down = -(-len(shares) // across)
        figure = Figure(
            figsize=(NARROW if narrow else WIDE, 0.7 + 3.1 * down), layout="constrained"
        )
        panels = figure.subplots(down, across, squeeze=False).flat
        for axes, (label, survived) in zip(panels, shares.items(), strict=False):
            image = axes.imshow(
                100 * (1 - survived), cmap="cividis", vmin=0, vmax=100, aspect="auto"
            )
            axes.set_title(fill(label, 14 if narrow else 18))
            axes.set_xticks(range(len(survived.columns)), survived.columns)
            axes.set_yticks(range(len(survived)), survived.index.str.replace("_", " "))
            axes.label_outer()
        for unused in figure.axes[len(shares) :]:
            unused.remove()
        figure.supxlabel("severity, level", fontsize=TEXT)
        bar = figure.colorbar(image, ax=figure.axes, location="top", aspect=40)
        bar.set_label("error, %", loc="left")
        return figure

    caption = f"Error on corrupted images by kind and severity, {table.name}."
    return _plot(f"corruptions-{table.name}", caption, paint, table.name)


def patches_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw the share of images that survive texture patches against the queries spent."""
    looks, lines = _looks(table.rows), []
    judged = _ledgers(table.rows[:MOST_LINES], verdicts, "tpa")
    for label, ledger in judged.items():
        rows = ledger.filter(pc.equal(ledger["question"], "tpa")).to_pylist()
        spent = sorted(row["queries"] or 0 for row in rows if not row["survived"])
        most = max((row["queries"] or 0 for row in rows), default=0)
        left = 100 * (1 - np.arange(len(spent) + 1) / len(rows))
        xs, ys = [0, *spent, most], [*left, left[-1]]
        lines.append(Series(label, looks[label][0], "", xs, ys))
    if not lines:
        return None
    caption = f"Survival of the texture patch attack against its queries, {table.name}."
    paint = _lines({"survived, %": lines}, "queries, forward passes")
    return _plot(f"patches-{table.name}", caption, paint, table.name)


def _runs(table: Table, verdicts: Verdicts) -> dict[str, TrialRun]:
    """Return the runs of a table's rows by label; none where they are too many to tell apart."""
    runs = {r.label: verdicts.runs.get(r.recipe.digest()) for r in table.rows}
    known = {label: run for label, run in runs.items() if run}
    return known if len(known) <= MOST_LINES else {}


def training_plot(table: Table, verdicts: Verdicts) -> Plot | None:
    """Draw training loss and held-out accuracy by epoch; a cross marks the end of a collapse."""
    history, looks = verdicts.tracker.history, _looks(table.rows)
    panels: dict[str, list[Series]] = {"training loss, nats": [], "held-out accuracy, %": []}
    for label, run in _runs(table, verdicts).items():
        lost = run.outcome == "collapsed"
        losses = [(e, v) for e, v in history(run, "train/loss") if v < MOST_LOSS]
        shares = [(e, 100 * v) for e, v in history(run, "held_out/accuracy")]
        for lines, points in zip(panels.values(), (losses, shares), strict=True):
            if points:
                xs, ys = zip(*points, strict=True)
                lines.append(Series(label, *looks[label], xs, ys, lost=lost))
    if not any(panels.values()):
        return None
    caption = f"Training of {table.name}'s models; a cross marks a collapse."
    return _plot(f"training-{table.name}", caption, _lines(panels, "time, epochs"), table.name)


def checkpoints_plot(table: Table, evaluators: Iterable[str], verdicts: Verdicts) -> Plot | None:
    """Draw the scores of a table's models along their training, by the evaluators of each trial."""
    history, looks, panels = verdicts.tracker.history, _looks(table.rows), {}
    runs = {label: run for label, run in _runs(table, verdicts).items() if run.checkpoints}
    for score in map(headline_of, evaluators):
        lines = []
        for label, run in runs.items():
            points = history(run, ALONG + score) if ALONG + score in run.metrics else []
            if points and score in run.metrics:
                points.append((run.logged_epochs, run.metrics[score]))
            if points:
                epochs, shares = zip(*points, strict=True)
                lines.append(Series(label, *looks[label], epochs, [100 * s for s in shares]))
        if lines:
            panels[f"{column_named(score).label}, %"] = lines
    if not panels:
        return None
    caption = f"Scores of {table.name}'s models along their training."
    return _plot(f"checkpoints-{table.name}", caption, _lines(panels, "time, epochs"), table.name)


def scatter_plot(plan: Plan, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw clean against PGD-100 accuracy over every trial, marked by family and training."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for trial in plan:
        metrics = runs[trial.digest].metrics if trial.digest in runs else {}
        if "clean" in metrics and "pgd-100" in metrics:
            training = "adversarial" if trial.recipe.adversary else "clean"
            point = (100 * metrics["clean"], 100 * metrics["pgd-100"])
            groups.setdefault((trial.recipe.family, training, _colour(trial.recipe)), []).append(
                point
            )
    if not groups:
        return None

    def paint(narrow: bool) -> Figure:
        size = (NARROW, 3.4) if narrow else (WIDE, 3.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for (family, training, colour), points in groups.items():
            label, marker = f"{family}, {training} training", "os"[training == "adversarial"]
            style: dict[str, Any] = {"color": colour, "markersize": 5, "alpha": 0.7}
            axes.plot(*zip(*points, strict=True), marker, label=label, **style)
        axes.set_title("PGD-100 accuracy, %", loc="left")
        axes.set_xlabel("clean accuracy, %")
        figure.legend(loc="outside upper left", ncols=1 if narrow else 3)
        return figure

    caption = "Clean against robust accuracy, every trial of the study."
    return _plot("scatter", caption, paint)


def shape_bias_plot(tables: Sequence[Table], runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw each model's shape bias: shape's share of the answers that are shape's or texture's."""
    score = "stylized/shape-bias"
    rows: dict[str, tuple[str, Row]] = {}
    for table in tables:
        for row in table.rows:
            rows.setdefault(row.recipe.digest(), (f"{table.name}: {row.label}", row))
    dots = []
    for digest, (label, row) in rows.items():
        metrics = runs[digest].metrics if digest in runs else {}
        if score in metrics:
            value, low, high = (100 * metrics[score + end] for end in ("", "/low", "/high"))
            dots.append(Dot(label, _colour(row.recipe), value, low, high))
    if not dots:
        return None
    shown = sorted(dots, key=lambda dot: dot.value)[-MOST_DOTS:]
    caption = "Shape bias on cue conflicts with its 95 % interval, every model judged."
    return _plot("shape-bias", caption, _dots(shown[::-1], "shape bias, %", zero=False))


def effects_plot(effects: Effects) -> Plot:
    """Draw the difference that each value of each axis makes."""
    dots = []
    for c in effects.contrasts.itertuples():
        colour = BLUE if c.low > 0 or c.high < 0 else DIM
        ends = (100 * c.difference, 100 * c.low, 100 * c.high)
        dots.append(Dot(f"{c.axis}: {c.value} - {c.reference}", colour, *ends))
    caption = f"Main effects on {effects.score} with 95 % intervals; grey: the interval holds 0."
    paint = _dots(dots, "difference, points")
    return _plot(f"effects-{effects.score}", caption, paint, "effects")
