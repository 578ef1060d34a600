"""Write the report: one self-contained page and the same tables as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from grid.plan import Plan
from grid.report.tables import FilledTable, fill_tables
from grid.studies import Study
from trainables.scale import Scale
from trainables.storage import write_atomically
from trainables.tracking import Tracker

TITLE = "Are Transformers More Robust Than CNNs? Re-run"


def write_report(tracker: Tracker, study: Study, plan: Plan, scale: Scale, folder: Path) -> Path:
    """Write index.html and tables.md from what MLflow holds; return the page's path."""
    tables = fill_tables(study, plan, tracker.trials())
    page = folder / "index.html"
    write_atomically(page, _html(tables, study, plan, scale).encode())
    write_atomically(folder / "tables.md", _markdown(tables, scale).encode())
    return page


def _html(tables: Sequence[FilledTable], study: Study, plan: Plan, scale: Scale) -> str:
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
        footer=_versions(),
    )


def _markdown(tables: Sequence[FilledTable], scale: Scale) -> str:
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
    return "\n".join([*lines, "", _versions(), ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _versions() -> str:
    packages = ("torch", "torchvision", "timm", "ray", "mlflow")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Python {platform.python_version()}, {named}."
