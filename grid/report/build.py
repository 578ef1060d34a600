"""Write the report: one self-contained page, and its tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader

from grid.plan import Plan
from grid.report.claims import answer
from grid.report.effects import leading
from grid.report.export import attacks_text, difference_text, markdown, write_exports
from grid.report.findings import Findings, find
from grid.report.plots import Plot, claims_plot
from grid.study import Study
from trainables.scale import Scale
from trainables.store.storage import write_atomically
from trainables.store.tracking import Tracker


def write_report(tracker: Tracker, study: Study, plan: Plan, scale: Scale, folder: Path) -> Path:
    """Write the page, its tables and its figures from what MLflow holds; return the page's path."""
    findings = find(tracker, study, plan, scale)
    page = folder / "index.html"
    write_atomically(page, _html(findings, tracker).encode())
    write_atomically(folder / "tables.md", markdown(findings, _title(study)).encode())
    write_exports(findings.tables, scale, folder)
    for plot in findings.plots:
        write_atomically(folder / "plots" / f"{plot.name}.svg", plot.file().encode())
    return page


def _html(findings: Findings, tracker: Tracker) -> str:
    environment = Environment(
        loader=PackageLoader("grid.report", "."), autoescape=True, trim_blocks=True
    )
    plan, scale = findings.plan, findings.scale
    return environment.get_template("page.html.j2").render(
        title=_title(findings.study),
        subtitle=_subtitle(findings),
        scale_title=scale.title,
        same_data=not scale.data_set.generated,
        interval=_interval(plan.seeds),
        attacks=attacks_text(findings),
        states=", ".join(_states(findings)),
        found=findings,
        answer=answer(findings.study, findings.judgements),
        leading=leading(findings.effects),
        first=claims_plot(findings.judgements) or _plot_named("scatter", findings),
        difference=difference_text,
        mlflow=tracker.page,
    )


def _subtitle(findings: Findings) -> str:
    study, count = findings.study, len(findings.plan.trials)
    source = f" ({study.source})" if study.source else ""
    return f"Study {study.name}{source} on {findings.scale.title}: {count} trainings."


def _title(study: Study) -> str:
    return study.title or f"Study {study.name}"


def _interval(seeds: int) -> str:
    over_images = "Wilson; of corruptions Student's t over images"
    if seeds == 1:
        return over_images
    return f"{over_images}; widened by Student's t over {seeds} seeds"


def _plot_named(name: str, findings: Findings) -> Plot | None:
    return next((plot for plot in findings.plots if plot.name == name), None)


def _states(findings: Findings) -> Iterator[str]:
    """Say how many cells there are in each state."""
    cells = [cell for table in findings.tables for row in table.rows for cell in row.cells]
    for state, count in Counter(cell.kind for cell in cells).most_common():
        yield f"{count} {'not yet there' if state == 'not' else state}"
