"""Write the report: one self-contained page, and its tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape

from grid.plan import Plan
from grid.report.claims import VERDICTS
from grid.report.export import difference_text, markdown, write_exports
from grid.report.findings import Findings, find
from grid.report.plots import claims_plot
from grid.studies import Study
from trainables.scale import Scale
from trainables.storage import write_atomically
from trainables.tracking import Tracker

TITLE = "Are Transformers More Robust Than CNNs? Re-run"


def write_report(tracker: Tracker, study: Study, plan: Plan, scale: Scale, folder: Path) -> Path:
    """Write the page and the tables from what MLflow holds; return the page's path."""
    findings = find(tracker, study, plan, scale)
    page = folder / "index.html"
    write_atomically(page, _html(findings).encode())
    write_atomically(folder / "tables.md", markdown(findings, TITLE, _versions()).encode())
    write_exports(findings.tables, folder)
    return page


def _html(findings: Findings) -> str:
    environment = Environment(
        loader=PackageLoader("grid.report", "."), autoescape=select_autoescape(), trim_blocks=True
    )
    plan, scale = findings.plan, findings.scale
    cells = [cell for table in findings.tables for row in table.rows for cell in row.cells]
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        subtitle=f"Study {findings.study.name} on {scale.title}: {len(plan.trials)} trainings.",
        scale_title=scale.title,
        same_data=scale.name == "imagenet",
        interval="Wilson" if plan.seeds == 1 else f"Student's t over {plan.seeds} seeds",
        done=sum(cell.value is not None for cell in cells),
        total=len(cells),
        found=findings,
        answer=_answer(findings),
        claims=claims_plot(findings.judgements),
        difference=difference_text,
        footer=_versions(),
    )


def _answer(findings: Findings) -> str:
    """Say in one sentence how the paper's claims fare here."""
    counts = Counter(judgement.verdict for judgement in findings.judgements)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"Of {len(findings.judgements)} claims of the paper: {told}."


def _versions() -> str:
    packages = ("torch", "torchvision", "timm", "ray", "mlflow")
    named = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"Python {platform.python_version()}, {named}."
