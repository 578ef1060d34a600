"""Write the report: one self-contained page and the same tables as Markdown."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from evaluators.paired import Paired
from grid.plan import Plan
from grid.report.claims import VERDICTS, Judgement, judge_claims
from grid.report.plots import (
    Plot,
    claims_plot,
    corruptions_plot,
    patches_plot,
    radii_plot,
    scatter_plot,
    shape_bias_plot,
    size_plot,
    stages_plot,
    steps_plot,
    training_plot,
)
from grid.report.tables import FilledTable, fill_tables, tables_of
from grid.report.verdicts import Comparison, Verdicts
from grid.studies import Study
from trainables.checkpoint import write_atomically
from trainables.scale import Scale
from trainables.tracking import Tracker, TrialRun

Comparisons = Mapping[str, Sequence[Comparison]]
Flags = Mapping[str, Sequence[str]]
TITLE = "Are Transformers More Robust Than CNNs? Re-run"


def write_report(tracker: Tracker, study: Study, plan: Plan, scale: Scale, folder: Path) -> Path:
    """Write index.html and tables.md from what MLflow holds; return the page's path."""
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    tables = fill_tables(study, plan, runs)
    comparisons = {
        table.name: verdicts.comparisons(table, plan.seeds) for table in tables_of(study, plan)
    }
    flags = verdicts.red_flags(trial.digest for trial in plan)
    judgements = judge_claims(plan, verdicts, runs)
    plots = _plots(tables, study, plan, scale, tracker, runs, verdicts)
    page = folder / "index.html"
    html = _html(
        tables,
        study,
        plan,
        scale,
        comparisons=comparisons,
        flags=flags,
        judgements=judgements,
        plots=plots,
    )
    write_atomically(page, html.encode())
    markdown = _markdown(tables, scale, plan, comparisons=comparisons, flags=flags)
    write_atomically(folder / "tables.md", markdown.encode())
    return page


def _html(
    tables: Sequence[FilledTable],
    study: Study,
    plan: Plan,
    scale: Scale,
    *,
    comparisons: Comparisons,
    flags: Flags,
    judgements: Sequence[Judgement],
    plots: Sequence[Plot],
) -> str:
    environment = Environment(
        loader=PackageLoader("grid.report", "."), autoescape=select_autoescape(), trim_blocks=True
    )
    cells = [cell for table in tables for row in table.rows for cell in row.cells]
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        subtitle=f"Study {study.name} on {scale.title}: {len(plan.trials)} trainings.",
        scale_title=scale.title,
        same_data=scale.name == "imagenet",
        interval="Wilson" if plan.seeds == 1 else f"Student's t over {plan.seeds} seeds",
        done=sum(cell.value is not None for cell in cells),
        total=len(cells),
        tables=tables,
        comparisons=comparisons,
        difference=difference_text,
        flags=_named(flags, plan),
        answer=_answer(judgements),
        judgements=judgements,
        claims=claims_plot(judgements),
        plots=plots,
        healthy=len(flags),
        footer=_versions(),
    )


def _plots(
    tables: Sequence[FilledTable],
    study: Study,
    plan: Plan,
    scale: Scale,
    tracker: Tracker,
    runs: Mapping[str, TrialRun],
    verdicts: Verdicts,
) -> list[Plot]:
    """Draw every figure for which there is something to draw."""
    filled = {table.name: table for table in tables}
    asked = {table.name: table for table in tables_of(study, plan)}
    drawn: list[Plot | None] = [scatter_plot(plan, runs)]
    if "T1" in filled:
        drawn += [radii_plot(filled["T1"], scale), steps_plot(filled["T1"])]
    if "T2" in filled:
        drawn += [steps_plot(filled["T2"]), stages_plot(filled["T2"])]
        drawn.append(training_plot(asked["T2"], tracker, runs))
    if "T3" in filled:
        drawn.append(patches_plot(asked["T3"], verdicts))
    if "T5" in filled:
        drawn += [corruptions_plot(asked["T5"], verdicts), shape_bias_plot(asked["T5"], runs)]
    if "T8" in filled:
        drawn.append(size_plot(asked["T8"], runs, scale))
    return [plot for plot in drawn if plot]


def _answer(judgements: Sequence[Judgement]) -> str:
    """Say in one sentence how the paper's claims fare here."""
    counts = Counter(judgement.verdict for judgement in judgements)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"Of {len(judgements)} claims of the paper: {told}." if judgements else ""


def difference_text(paired: Paired | None) -> str:
    """Write a difference in points: '+1.2 [-0.3, +2.7] p 0.12'; '' where there is none."""
    if paired is None:
        return ""
    points = [100 * value for value in (paired.difference, paired.low, paired.high)]
    text = f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]"
    return text if paired.p is None else f"{text} p {paired.p:.2g}"


def _named(flags: Flags, plan: Plan) -> list[tuple[str, str]]:
    """Return each red flag with the model that it is about."""
    described = {trial.digest: trial.recipe.describe() for trial in plan}
    return [(described[digest], flag) for digest, found in flags.items() for flag in found]


def _markdown(
    tables: Sequence[FilledTable],
    scale: Scale,
    plan: Plan,
    *,
    comparisons: Comparisons,
    flags: Flags,
) -> str:
    lines = [f"# {TITLE}", "", f"{scale.title}. Percent [95 % interval]; paper: published figure."]
    for table in tables:
        lines += ["", f"## {table.name}: {table.question}", ""]
        header = ["Model"]
        for column in table.columns:
            header += [column, "paper"]
        lines += [_markdown_row(header), _markdown_row(["---"] * len(header))]
        for row in table.rows:
            texts = [text for c in row.cells for text in (c.text(), c.published_text())]
            lines.append(_markdown_row([row.label, *texts]))
        lines += _markdown_comparisons(table, comparisons[table.name])
    lines += ["", f"Attack health: {len(flags)} models looked at."]
    lines += [f"- red flag: {model}: {flag}" for model, flag in _named(flags, plan)]
    return "\n".join([*lines, "", _versions(), ""])


def _markdown_comparisons(table: FilledTable, found: Sequence[Comparison]) -> list[str]:
    if not found:
        return []
    return [
        "",
        f"Minus {table.rows[0].label}, in points, on the same images (p: exact McNemar test):",
        "",
        _markdown_row(["Model", *table.columns]),
        _markdown_row(["---"] * (len(table.columns) + 1)),
        *[_markdown_row([row.label, *map(difference_text, row.cells)]) for row in found],
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _versions() -> str:
    packages = ("torch", "torchvision", "timm", "ray", "mlflow")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Python {platform.python_version()}, {named}."
