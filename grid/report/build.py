"""Write the report: one self-contained page, its tables as Markdown, CSV and LaTeX, and ledgers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader

from evaluators import BOUNDED, headlines
from evaluators.intervals import Paired
from evaluators.ledger import LEDGER
from grid.plan import Plan
from grid.report.claims import answer, judge_claims
from grid.report.effects import grid_effects, leading
from grid.report.latex import as_latex
from grid.report.plots import draw, transfer_plot
from grid.report.tables import (
    FilledTable,
    describe_provenance,
    describe_work,
    images_text,
    tables_of,
)
from grid.report.transfer import transfers
from grid.report.verdicts import Verdicts, gallery
from grid.study import Study
from grid.table import SCALE
from trainables.scale import Scale
from trainables.store.storage import write_atomically
from trainables.store.tracking import LONGEST_TAG, SUMMARY, Tracker, TrialRun

JUDGED = [name for name in LEDGER.names if name != "image"]
_OWNER = pa.dictionary(pa.int32(), pa.string())
VERDICTS = pa.schema([("trial", _OWNER), ("model", _OWNER), *map(LEDGER.field, JUDGED)])


def write_report(tracker: Tracker, study: Study, plan: Plan, scale: Scale, folder: Path) -> Path:
    """Write the page, its tables and its figures from what MLflow holds; return the page's path."""
    report = _gather(tracker, study, plan, scale)
    environment = Environment(
        loader=PackageLoader("grid.report", "."), autoescape=True, trim_blocks=True
    )
    environment.filters["difference"] = difference_text
    link = "#" + tracker.page(study=study.name).partition("#")[2]
    title = f"**[Compare the trials]({link}) of study {study.name}**"
    said = report["answer"] if report["judgements"] else report["leading"]
    tables, runs = report["tables"], report["runs"]
    files = {
        "index.html": environment.get_template("page.html.j2").render(report),
        "tables.md": environment.get_template("tables.md.j2").render(report),
        SUMMARY: summary_text(plan, runs, said, title),
        "scores.json": _scores(plan, runs).to_json(orient="split", index=False),
        "tables.csv": _cells(tables).to_csv(index=False),
        **{f"latex/{table.name}.tex": as_latex(table, scale.title) for table in tables},
        **{f"plots/{plot.name}.svg": plot.svg for plot in report["plots"]},
    }
    if transfer := report["transfer"]:
        files["transfer.csv"] = transfer["pairs"].to_csv(index=False)
    for name, text in files.items():
        write_atomically(folder / name, text.encode())
    return folder / "index.html"


def _gather(tracker: Tracker, study: Study, plan: Plan, scale: Scale) -> dict[str, Any]:
    """Return what the templates show of a plan, by the names that they use."""
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    verdicts.read_scores(plan)
    planned = [runs[t.digest] for t in plan if t.digest in runs]
    trained = [runs[t.digest] for t in plan if t.digest in runs and t.recipe.epochs]
    tables = tables_of(study, plan, runs)
    seeds = sorted({row.seeds for table in tables for row in table.rows})
    judgements = judge_claims(study.claims, tables, verdicts, least=scale.detect)
    effects = grid_effects(study, plan, runs)
    plots = draw(plan, tables, verdicts, scale=scale, judgements=judgements, effects=effects)
    transfer = transfers(plan, verdicts)
    plots += [transfer_plot(transfer["pairs"])] if transfer else []
    states = Counter(cell.kind for table in tables for row in table.rows for cell in row.cells)
    by_name = {plot.name: plot for plot in plots}
    return {
        "runs": runs,
        "study": study,
        "plan": plan,
        "scale": scale,
        "title": study.title or f"Study {study.name}",
        "images": images_text(trained, scale),
        "seeds": seeds,
        "bounded": bool(plan.evaluators & {*BOUNDED.values()}),
        "states": states.most_common(),
        "tables": tables,
        "comparisons": {table.name: verdicts.comparisons(table) for table in tables},
        "saturations": {table.name: verdicts.saturations(table) for table in tables},
        "judgements": judgements,
        "answer": answer(study, judgements),
        "effects": effects,
        "leading": leading(effects),
        "transfer": transfer,
        "plots": plots,
        "first": by_name.get("headline") or by_name.get("claims") or by_name.get("scatter"),
        "comparable": scale.name == SCALE,
        "health": verdicts.health(plan),
        "gallery": gallery(plan, verdicts, tracker.classes(study.name)),
        "stand_ins": scale.data_set.generated and any(trial.recipe.epochs for trial in plan),
        "origins": [trial for trial in plan if trial.recipe.init],
        "work": describe_work(
            planned, sum(map(tracker.seconds, planned)), tracker.command(study.name)
        ),
        "provenance": describe_provenance(planned),
        "mlflow": tracker.page,
    }


def summary_text(plan: Plan, runs: Mapping[str, TrialRun], answer: str, title: str) -> str:
    """Return Markdown: an answer, and each judged trial's scores, as many as MLflow's note holds.

    title: the one line that MLflow shows of a note before it is opened.
    """
    scores = headlines(plan.evaluators)
    lines = [title, "", answer, "", f"| % | {' | '.join(scores)} |"]
    lines.append("| --- |" + " ---: |" * len(scores))
    room = LONGEST_TAG - len("\n".join(lines))
    for trial in sorted(plan, key=lambda trial: trial.name):
        metrics = runs[trial.digest].metrics if trial.digest in runs else {}
        values = [f"{100 * metrics[s]:.1f}" if s in metrics else "" for s in scores]
        line = f"| {' | '.join([trial.name.replace('|', '/'), *values])} |"
        room -= len(line) + 1
        if any(values) and room > 0:
            lines.append(line)
    return "\n".join(lines)


def difference_text(paired: Paired | None) -> str:
    """Write a difference in points: '+1.2 [-0.3, +2.7] p 0.12'; '' where there is none."""
    if paired is None:
        return ""
    points = [100 * value for value in (paired.difference, paired.low, paired.high)]
    text = f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]"
    return text if paired.p is None else f"{text} p {paired.p:.2g}"


def _scores(plan: Plan, runs: Mapping[str, TrialRun]) -> pd.DataFrame:
    """Return a line per score of every trial, shown in a table or not, with interval and n."""
    ends = {"value": "", "low": "/low", "high": "/high", "n": "/n"}
    return pd.DataFrame(
        {"model": trial.name, "digest": trial.digest, "score": name}
        | {part: metrics[name + end] for part, end in ends.items()}
        for trial in plan
        if trial.digest in runs
        for metrics in [runs[trial.digest].metrics]
        for name in metrics
        if f"{name}/n" in metrics
    )


def _cells(tables: Sequence[FilledTable]) -> pd.DataFrame:
    """Return a line per cell of every table."""
    return pd.DataFrame(
        {
            "table": table.name,
            "scale": row.recipe.scale,
            "model": row.name,
            "digest": digest,
            "run_id": row.run.run_id if row.run else "",
            "score": column,
            **asdict(cell),
            "n": cell.n or None,
            "difference": cell.difference,
            "trained_images": images.get("train") if row.recipe.epochs else 0,
            "held_out_images": images.get("held_out"),
        }
        for table in tables
        for row in table.rows
        for digest, images in [(row.recipe.digest(), row.run.images if row.run else {})]
        for column, cell in zip(table.columns, row.cells, strict=True)
    )


def write_ledgers(tracker: Tracker, plan: Plan, folder: Path) -> None:
    """Write every verdict of a plan but for its images: a Parquet file per evaluator.

    Beside the columns of a ledger it says which `trial` and `model` each is of.
    """
    verdicts = Verdicts(tracker, tracker.trials())
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(plan.evaluators):
        path, aside = folder / f"{name}.parquet", folder / f"{name}.part"
        with pq.ParquetWriter(aside, VERDICTS, compression="zstd") as file:
            for trial in plan:
                if (ledger := verdicts.ledger(trial.digest, name)) is not None:
                    owner = [
                        pa.array([text] * len(ledger)).dictionary_encode()
                        for text in (trial.digest, trial.name)
                    ]
                    judged = map(ledger.column, JUDGED)
                    file.write_table(pa.table([*owner, *judged], schema=VERDICTS))
        aside.replace(path)
