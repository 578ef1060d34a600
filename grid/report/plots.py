"""The report's figures: matplotlib, SVG, each drawn for a wide place and for a narrow one.

A model's colour is its family's, its marker its recipe's; colours are such as the colour-blind tell
apart. Where lines end stands which model they are of.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators import PGD_STEPS, column_named, headlines
from grid.plan import Plan
from grid.report.claims import Judgement
from grid.report.effects import Effects
from grid.report.tables import FilledTable
from grid.report.verdicts import Verdicts
from trainables.models import MODELS
from trainables.recipe import Recipe
from trainables.scale import Scale
from trainables.store.tracking import ALONG, Tracker, TrialRun

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
Floats = npt.NDArray[np.float64]


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


def _plot(
    name: str, caption: str, paint: Callable[..., Figure], table: str = "", **contents: Any
) -> Plot:
    """Paint a figure for both places; contents: what the painter shows."""
    wide, narrow = (paint(is_narrow, **contents) for is_narrow in (False, True))
    return Plot(name, caption, _svg(wide, name), _svg(narrow, f"{name}-n"), table)


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
class Line:
    """A model's line: points are its xs and ys and, where they have intervals, lows and highs.

    Without a marker it changes by steps. lost: its training collapsed at the line's end.
    """

    label: str
    colour: str
    marker: str
    points: Sequence[Sequence[float]]
    lost: bool = False

    @property
    def end(self) -> tuple[float, float]:
        return self.points[0][-1], self.points[1][-1]


def draw(
    plan: Plan,
    tables: Sequence[FilledTable],
    verdicts: Verdicts,
    *,
    scale: Scale,
    judgements: Sequence[Judgement],
    effects: Sequence[Effects],
) -> list[Plot]:
    """Draw every figure of a report for which there is something to draw."""
    along = headlines({name for trial in plan for name in trial.along})
    with mpl.rc_context(STYLE):
        plots = [
            claims_plot("claims", judgements),
            claims_plot("headline", [j for j in judgements if j.claim.headline]),
            scatter_plot(plan, verdicts.runs),
            shape_bias_plot(tables),
            *map(effects_plot, effects),
        ]
        for table in tables:
            plots += _plots_of(table, scale, verdicts, along, alone=len(tables) == 1)
    return [plot for plot in plots if plot]


def _plots_of(
    whole: FilledTable, scale: Scale, verdicts: Verdicts, along: Sequence[str], *, alone: bool
) -> Iterator[Plot]:
    """Draw a table's figures, of its first models where there are very many.

    along: the scores of weights along the way. alone: it is the report's only table.
    """
    table = replace(whole, rows=whole.rows[:MOST_LINES])
    more = f" The first {MOST_LINES} of {len(whole.rows)} models." * (len(whole.rows) > MOST_LINES)
    plots = [
        *columns_plots(table, scale),
        checkpoints_plot(table, along, verdicts.tracker),
        patches_plot(table, verdicts),
        corruptions_plot(table, verdicts),
    ]
    is_lost = any(row.run.outcome == "collapsed" for row in table.rows if row.run)
    if alone or is_lost or any(row.recipe.adversary for row in table.rows):
        plots.append(training_plot(table, verdicts.tracker))
    yield from (replace(plot, caption=plot.caption + more) for plot in plots if plot)


def _colour(recipe: Recipe) -> str:
    families = [*dict.fromkeys(model.family for model in MODELS.values())]
    place = families.index(recipe.family) if recipe.family in families else -1  # timm's, a user's
    return list(COLOURS)[place % len(COLOURS)]


def _looks(table: FilledTable) -> dict[str, tuple[str, str]]:
    """Return colour and marker of rows by label."""
    return {r.label: (_colour(r.recipe), m) for r, m in zip(table.rows, MARKERS, strict=False)}


def _figure(
    narrow: bool, height: float, down: int = 1, across: int = 1, **settings: Any
) -> tuple[Figure, Any]:
    """Return a figure, as high as so many inches, and its axes."""
    figure = Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False, **settings).flatten()


def _lines(
    narrow: bool, panels: Mapping[str, Sequence[Line]], x_label: str, **settings: Any
) -> Figure:
    """Draw a panel per y label, one below the other, with a label at each line's end.

    settings: of the axes.
    """
    wrap, least = (20, 2.0) if narrow else (30, 2.2)
    texts = {line.label: fill(line.label, wrap) for lines in panels.values() for line in lines}
    height = max(least, LINE * 1.1 * sum(text.count("\n") + 1 for text in texts.values()))
    figure, every = _figure(narrow, height * len(panels) + 0.6, len(panels), sharex=True)
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


def _draw_line(axes: Axes, line: Line) -> None:
    xs, ys, *ends = line.points
    style: Any = {"color": line.colour, "linewidth": 1.2}
    drawn = "default" if line.marker else "steps-post"
    axes.plot(xs, ys, marker=line.marker, markersize=5, drawstyle=drawn, **style)
    if ends:
        axes.vlines(xs, *ends, **style)
    if line.lost:
        axes.plot(*line.end, "x", markersize=9, **style)


def _label_ends(axes: Axes, lines: Sequence[Line], texts: Mapping[str, str], height: float) -> None:
    """Write each line's label beside its end, apart from the others; height: inches of the axes."""
    bottom, top = axes.get_ylim()
    ends = sorted(lines, key=lambda line: line.end[1])
    rooms = np.array([LINE * (texts[line.label].count("\n") + 1) / height for line in ends])
    wanted = np.array([(line.end[1] - bottom) / (top - bottom) for line in ends])
    touching = np.cumsum(rooms) - rooms / 2  # the places of labels that stand on one another
    above = np.maximum.accumulate(wanted - touching).clip(0, max(0, 1 - rooms.sum()))
    for line, place in zip(ends, touching + above, strict=True):
        axes.annotate(
            texts[line.label],
            line.end,
            (1.06, place),
            textcoords="axes fraction",
            va="center",
            color=line.colour,
            annotation_clip=False,
            arrowprops=LEADER | {"color": line.colour},
        )


def _dots(narrow: bool, dots: pd.DataFrame, x_label: str, *, zero: bool = True) -> Figure:
    """Draw a row per dot, the first on top, with the axis above them.

    Columns of dots: label, colour, value, low and high; of claims besides: note, published, and
    zone_low and zone_high, between which values support the claim. zero: they are differences.
    """
    of_claims = "note" in dots
    texts = [fill(label, 21 if narrow else 40) for label in dots["label"]]
    notes = dots["note"] if of_claims and not narrow else [""] * len(dots)
    most = [max(map(len, map(str.splitlines, both))) for both in zip(texts, notes, strict=True)]
    rooms = LINE * np.array(most) + 0.1
    edges = np.cumsum([0, *rooms])
    places = edges[1:] - rooms / 2
    figure, (axes,) = _figure(narrow, edges[-1] + (0.8 if of_claims else 0.5))
    if zero:
        axes.axvline(0, color=DIM, linewidth=0.8)
    axes.hlines(places, dots["low"], dots["high"], dots["colour"], linewidth=2)
    axes.scatter(dots["value"], places, 25, dots["colour"])
    for place, note, colour in zip(places, notes, dots["colour"], strict=True):
        transform = axes.get_yaxis_transform()
        axes.text(1.02, place, note, transform=transform, color=colour, va="center")
    if of_claims:
        _draw_zones(axes, dots, places, rooms)
        figure.legend(loc="outside upper left", ncols=1 if narrow else 3)
    axes.set_ylim(edges[-1], 0)
    axes.set_yticks(places, texts)
    axes.tick_params("y", length=0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(x_label, loc="left")
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def _draw_zones(axes: Axes, dots: pd.DataFrame, places: Floats, rooms: Floats) -> None:
    """Draw what claims' differences are compared with, and name it for the legend."""
    axes.plot([], [], "o-", color=INK, label="ours, 95 % interval")
    hollow: Any = {"marker": "D", "facecolors": "none", "edgecolors": INK}
    axes.scatter(dots["published"], places, 25, label="published", **hollow)
    limits = axes.get_xlim()
    lows, highs = (dots[end].clip(*limits) for end in ("zone_low", "zone_high"))
    behind: Any = {"color": SHADE, "zorder": 0, "label": "supports the claim"}
    axes.barh(places, highs - lows, rooms - 0.04, lows, **behind)
    axes.set_xlim(limits)


def claims_plot(name: str, judgements: Iterable[Judgement]) -> Plot | None:
    """Draw claims' differences with their intervals beside the published ones."""
    shown = [j for j in judgements if j.paired or j.outcome]
    if not shown:
        return None
    caption = (
        "Each claim's difference with its 95 % interval: the side that the claim favours minus the "
        "other, so that right supports the claim. The words judge all claims together, which asks "
        "more of each than its own interval."
    )
    dots = pd.DataFrame(map(_dot_of, shown)).astype({"published": float})
    return _plot(name, caption, _dots, dots=dots, x_label="difference, points")


def _dot_of(judgement: Judgement) -> dict[str, Any]:
    ends, zone, notes = [np.nan] * 3, (np.nan, np.nan), [str(judgement.decision)]
    if judgement.outcome:
        notes.insert(0, fill(judgement.outcome, 22))
    if p := judgement.paired:
        ends = [100 * p.difference, 100 * p.low, 100 * p.high]
        notes.insert(0, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends))
    if judgement.claim.test != "collapses":
        zone = judgement.supports
    return {
        "label": judgement.claim.says,
        "colour": DECISION_COLOURS.get(judgement.decision, DIM),
        **dict(zip(("value", "low", "high"), ends, strict=True)),
        **{f"zone_{end}": 100 * at for end, at in zip(("low", "high"), zone, strict=True)},
        "published": judgement.published,
        "note": "\n".join(notes),
    }


def columns_plots(table: FilledTable, scale: Scale) -> Iterator[Plot | None]:
    """Draw robust accuracy against the number of PGD steps, and against AutoAttack's radius."""
    steps = {f"pgd-{steps}": float(steps) for steps in PGD_STEPS}
    caption = f"Accuracy under PGD against its steps, {table.name}."
    x_label = "PGD steps, number (logarithmic)"
    yield _columns_plot(table, steps, f"steps-{table.name}", caption, x_label)
    small, full = (255 * float(e) for e in (scale.small_epsilon, scale.epsilon))
    radii = {"autoattack/clean": 0.0, "autoattack-small": small, "autoattack": full}
    caption = (
        f"Accuracy under AutoAttack against epsilon, {table.name}; more radii for a model: "
        "python -m evaluators --weights FILE --evaluators autoattack --epsilon E."
    )
    yield _columns_plot(table, radii, f"epsilon-{table.name}", caption, "epsilon, 1/255")
    under_pgd = f"Accuracy under PGD against epsilon, {table.name}, with 95 % intervals."
    yield _radii_plot(table, "radii", under_pgd, "epsilon, 1/255")
    certified = f"Certified accuracy against the L2 radius, {table.name}, with 95 % intervals."
    yield _radii_plot(table, "certified", certified, "radius in L2")


def _radii_plot(table: FilledTable, evaluator: str, caption: str, x_label: str) -> Plot | None:
    """Draw accuracy by radius of the models that an evaluator of several radii judged."""
    looks, lines, start = _looks(table), [], f"{evaluator}@"
    for row in table.rows:
        scores = row.run.metrics if row.run else {}
        names = [n for n in scores if n.startswith(start) and f"{n}/low" in scores]
        by_radius = {float(n.removeprefix(start).partition("/")[0]): n for n in names}
        if xs := sorted(by_radius):
            ends = ("", "/low", "/high")
            ys = ([100 * scores[by_radius[x] + end] for x in xs] for end in ends)
            lines.append(Line(row.label, *looks[row.label], [xs, *ys]))
    if not lines:
        return None
    shown: dict[str, Any] = {"panels": {"survived, %": lines}, "x_label": x_label}
    return _plot(f"{evaluator}-{table.name}", caption, _lines, table.name, **shown)


def _columns_plot(
    table: FilledTable, xs: Mapping[str, float], name: str, caption: str, x_label: str
) -> Plot | None:
    """Draw a line per row through the columns of some scores, if all are there; xs: by score."""
    scores = [column.name.replace("-bounded", "") for column in table.shown]
    if not {*xs} <= {*scores}:
        return None
    looks, lines, ticks = _looks(table), [], list(xs.values())
    for row in table.rows:
        cells = [row.cells[scores.index(score)] for score in xs]
        points = [ticks, *([getattr(c, end) for c in cells] for end in ("value", "low", "high"))]
        if None not in points[1]:
            lines.append(Line(row.label, *looks[row.label], points))
    if not lines:
        return None
    at: Any = {"xscale": "linear" if 0 in ticks else "log", "xticks": ticks}
    at["xticklabels"] = [f"{x:g}" for x in ticks]
    panels = {"survived, %": lines}
    return _plot(name, caption, _lines, table.name, panels=panels, x_label=x_label, **at)


def _ledgers(table: FilledTable, verdicts: Verdicts, evaluator: str) -> dict[str, pa.Table]:
    """Return the ledgers of the rows that are judged, by label, if the table has such a column."""
    shown = any(column.evaluator == evaluator for column in table.shown)
    rows = table.rows if shown else ()
    ledgers = {row.label: verdicts.ledger(row.recipe.digest(), evaluator) for row in rows}
    return {label: ledger for label, ledger in ledgers.items() if ledger is not None}


def corruptions_plot(table: FilledTable, verdicts: Verdicts) -> Plot | None:
    """Draw the error by kind and severity, a panel per row of a table."""
    errors = {}
    for label, ledger in _ledgers(table, verdicts, "corruptions").items():
        frame = ledger.select(["question", "survived"]).to_pandas()
        frame[["kind", "severity"]] = frame["question"].str.rsplit("-", n=1, expand=True)
        shares = frame.pivot_table("survived", index="kind", columns="severity", sort=False)
        errors[label] = 100 * (1 - shares)
    if not errors:
        return None
    caption = f"Error on corrupted images by kind and severity, {table.name}."
    return _plot(f"corruptions-{table.name}", caption, _heat_maps, table.name, errors=errors)


def _heat_maps(
    narrow: bool,
    errors: Mapping[str, pd.DataFrame],
    x_label: str = "severity, level",
    label: str = "error, %",
    *,
    values: bool = False,
) -> Figure:
    across = min(len(errors), 2 if narrow else 4)
    down = -(-len(errors) // across)
    lines = max(sum(1 + name.count("\n") for name in error.index) for error in errors.values())
    figure, panels = _figure(narrow, 0.7 + max(3.1, LINE * lines) * down, down, across)
    for axes, (title, error) in zip(panels, errors.items(), strict=False):
        image = axes.imshow(error, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_title(fill(title, 14 if narrow else 18))
        axes.set_xticks(range(len(error.columns)), error.columns)
        axes.set_yticks(range(len(error)), error.index.str.replace("_", " "))
        axes.label_outer()
        for place, value in np.ndenumerate(error) if values else ():
            colour = "white" if value < 50 else "black"
            text = "" if np.isnan(value) else f"{value:.0f}"
            axes.text(*place[::-1], text, ha="center", va="center", color=colour)
    for unused in panels[len(errors) :]:
        unused.remove()
    figure.supxlabel(x_label, fontsize=TEXT)
    bar = figure.colorbar(image, ax=figure.axes, location="top", aspect=40)
    bar.set_label(label, loc="left")
    return figure


def patches_plot(table: FilledTable, verdicts: Verdicts) -> Plot | None:
    """Draw the share of images that survive texture patches against the queries spent."""
    looks, lines = _looks(table), []
    for label, ledger in _ledgers(table, verdicts, "tpa").items():
        frame = ledger.filter(pc.equal(ledger["question"], "tpa")).to_pandas()
        spent = frame["queries"].fillna(0).sort_values()
        lost = spent[~frame["survived"]]
        left = 100 * (1 - np.arange(len(lost) + 1) / len(frame))
        points = [[0, *lost, spent.max()], [*left, left[-1]]]
        lines.append(Line(label, looks[label][0], "", points))
    if not lines:
        return None
    caption = f"Survival of the texture patch attack against its queries, {table.name}."
    panels, x_label = {"survived, %": lines}, "queries, forward passes"
    name = f"patches-{table.name}"
    return _plot(name, caption, _lines, table.name, panels=panels, x_label=x_label)


def training_plot(table: FilledTable, tracker: Tracker) -> Plot | None:
    """Draw training loss and held-out accuracy by epoch; a cross marks the end of a collapse."""
    metrics = {"training loss, nats": "train/loss", "held-out accuracy, %": "held_out/accuracy"}
    caption = f"Training of {table.name}'s models; a cross marks a collapse."
    return _epochs_plot(f"training-{table.name}", caption, table, metrics, tracker)


def checkpoints_plot(table: FilledTable, scores: Iterable[str], tracker: Tracker) -> Plot | None:
    """Draw the scores of a table's models along their training."""
    metrics = {f"{column_named(score).label}, %": ALONG + score for score in scores}
    caption = f"Scores of {table.name}'s models along their training."
    return _epochs_plot(f"checkpoints-{table.name}", caption, table, metrics, tracker)


def _epochs_plot(
    name: str, caption: str, table: FilledTable, metrics: Mapping[str, str], tracker: Tracker
) -> Plot | None:
    """Draw metrics, by their panels' titles, of a table's models against the epoch."""
    looks, panels = _looks(table), {}
    for title, metric in metrics.items():
        lines, factor = [], 100 if "%" in title else 1
        for row, run in ((r, r.run) for r in table.rows if r.run and metric in r.run.metrics):
            points = tracker.history(run, metric)
            last = metric.removeprefix(ALONG)
            if last != metric and last in run.metrics:
                points.append((run.logged_epochs, run.metrics[last]))
            points = [(epoch, factor * value) for epoch, value in points if value < MOST_LOSS]
            if points:
                lost, xys = run.outcome == "collapsed", [*zip(*points, strict=True)]
                lines.append(Line(row.label, *looks[row.label], xys, lost))
        if lines:
            panels[title] = lines
    if not panels:
        return None
    return _plot(name, caption, _lines, table.name, panels=panels, x_label="time, epochs")


def scatter_plot(plan: Plan, runs: Mapping[str, TrialRun]) -> Plot | None:
    """Draw clean against PGD-100 accuracy over every trial, marked by family and training."""
    scores = ("clean", "pgd-100")
    rows = [
        (t.recipe.family, bool(t.recipe.adversary), _colour(t.recipe), *(m[s] for s in scores))
        for t in plan
        if t.digest in runs and {*scores} <= (m := runs[t.digest].metrics).keys()
    ]
    frame = pd.DataFrame(rows, columns=["family", "adversarial", "colour", *scores])
    caption = "Clean against robust accuracy, every trial of the study."
    return _plot("scatter", caption, _scatter, dots=frame) if rows else None


def _scatter(narrow: bool, dots: pd.DataFrame) -> Figure:
    figure, (axes,) = _figure(narrow, 3.4 if narrow else 3.6)
    kinds = dots.groupby(["family", "adversarial", "colour"], sort=False)
    for (family, adversarial, colour), group in kinds:
        marker, training = "s" if adversarial else "o", "adversarial" if adversarial else "clean"
        xys = 100 * group["clean"], 100 * group["pgd-100"]
        label = f"{family}, {training} training"
        axes.plot(*xys, marker, color=colour, markersize=5, alpha=0.7, label=label)
    axes.set_title("PGD-100 accuracy, %", loc="left")
    axes.set_xlabel("clean accuracy, %")
    figure.legend(loc="outside upper left", ncols=1 if narrow else 3)
    return figure


def shape_bias_plot(tables: Iterable[FilledTable]) -> Plot | None:
    """Draw each model's shape bias: shape's share of the answers that are shape's or texture's."""
    score, ends = "stylized/shape-bias", {"value": "", "low": "/low", "high": "/high"}
    frame = pd.DataFrame(
        {"digest": row.recipe.digest(), "label": f"{table.name}: {row.label}"}
        | {"colour": _colour(row.recipe)}
        | {end: 100 * row.run.metrics[score + name] for end, name in ends.items()}
        for table in tables
        for row in table.rows
        if row.run and score + ends["low"] in row.run.metrics  # unless its ledger is damaged
    )
    if frame.empty:
        return None
    caption = "Shape bias on cue conflicts with its 95 % interval, every model judged."
    shown = frame.drop_duplicates("digest").nlargest(MOST_DOTS, "value")
    return _plot("shape-bias", caption, _dots, dots=shown, x_label="shape bias, %", zero=False)


def effects_plot(effects: Effects) -> Plot:
    """Draw the difference that each value of each axis makes."""
    c = effects.contrasts
    ends = {"value": 100 * c["difference"], "low": 100 * c["low"], "high": 100 * c["high"]}
    colours = np.where((c["low"] > 0) | (c["high"] < 0), BLUE, DIM)
    labels = c["axis"] + ": " + c["value"] + " - " + c["reference"]
    dots = pd.DataFrame({"label": labels, "colour": colours, **ends})
    caption = f"Main effects on {effects.score} with 95 % intervals; grey: the interval holds 0."
    name = f"effects-{effects.score}"
    return _plot(name, caption, _dots, "effects", dots=dots, x_label="difference, points")


def transfer_plot(pairs: pd.DataFrame) -> Plot:
    """Draw how often each model's adversarial images (rows) break each other one (columns)."""
    names = [*dict.fromkeys(pairs["source"])]
    shown = names[:MOST_LINES]
    more = f" The first {len(shown)} of {len(names)} models." * (len(names) > len(shown))
    rates = 100 * pairs.pivot(index="source", columns="target", values="value")
    rates = rates.reindex(index=shown, columns=shown)
    rates.index = pd.Index([fill(f"{name} {i}", 22) for i, name in enumerate(shown, 1)])
    rates.columns = pd.Index(range(1, len(shown) + 1))
    caption = (
        "Of the images that the column's model gets right, the share that the adversarial images "
        f"of the row's break, in percent; first trainings.{more}"
    )
    labels: Any = {"x_label": "judging model", "label": "broken, %", "values": True}
    with mpl.rc_context(STYLE):
        return _plot(
            "transfer-matrix", caption, _heat_maps, "transfer", errors={"": rates}, **labels
        )
