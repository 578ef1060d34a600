"""The tables for other programs and for reading: Markdown, one long CSV, and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from evaluators.intervals import Paired
from evaluators.ledger import LEDGER
from grid.plan import Plan
from grid.report.findings import Findings
from grid.report.tables import FilledCell, FilledTable
from grid.report.verdicts import Comparison, Verdicts
from grid.study import SCALE
from trainables.scale import Scale, scale_named
from trainables.store.storage import write_atomically
from trainables.store.tracking import Tracker

CELLS = b"cells"  # of a file of verdicts: which trials' answers to which questions it holds
JUDGED = tuple(name for name in LEDGER.names if name != "image")
_WHOSE = pa.dictionary(pa.int32(), pa.string())
VERDICTS = pa.schema([("trial", _WHOSE), ("model", _WHOSE), *map(LEDGER.field, JUDGED)])


def write_exports(tables: Sequence[FilledTable], scale: Scale, folder: Path) -> None:
    """Write tables.csv, a line per cell, and tables.tex, a tabular per table."""
    write_atomically(folder / "tables.csv", _long(tables).to_csv(index=False).encode())
    latex = "\n".join(_latex(table, scale) for table in tables)
    write_atomically(folder / "tables.tex", latex.encode())


def write_ledgers(tracker: Tracker, plan: Plan, folder: Path) -> None:
    """Write every verdict of a plan but for its images: a Parquet file per evaluator.

    Beside the columns of a ledger it says which `trial` and `model` each is of. A file that holds
    the same cells already is left alone.
    """
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({name for trial in plan for name in trial.evaluators}):
        judged = [trial for trial in plan if verdicts.is_judged(trial.digest, name)]
        cells = repr([(trial.digest, runs[trial.digest].cells[name]) for trial in judged]).encode()
        path, aside = folder / f"{name}.parquet", folder / f"{name}.part"
        if _cells_of(path) == cells:
            continue
        schema = VERDICTS.with_metadata({CELLS: cells})
        with pq.ParquetWriter(aside, schema, compression="zstd") as file:
            for trial in judged:
                ledger = verdicts.ledger(trial.digest, name)
                assert ledger is not None
                names = [
                    pa.array([text] * len(ledger)).dictionary_encode()
                    for text in (trial.digest, trial.name)
                ]
                file.write_table(pa.table([*names, *map(ledger.column, JUDGED)], schema=schema))
        aside.replace(path)


def _cells_of(path: Path) -> bytes | None:
    try:
        return (pq.read_schema(path).metadata or {}).get(CELLS)
    except (OSError, pa.ArrowException):  # it is not there, or damaged
        return None


def markdown(findings: Findings, title: str) -> str:
    """Return every table, its comparisons and the red flags as Markdown."""
    units = "Percent [95 % interval]; paper: published figure."
    notes = " ".join(filter(None, (units, findings.images, attacks_text(findings))))
    lines = [f"# {title}", "", f"{findings.scale.title}. {notes}"]
    for table in findings.tables:
        lines += ["", f"## {table.name}: {table.question}", "", *_values(table)]
        lines += _differences(table, findings.comparisons[table.name])
    health = findings.health
    lines += ["", f"Attack health: {health.standing}"]
    lines += [
        f"- red flag: {model}: {flag}" for model in health.flags for flag in health.flags[model]
    ]
    lines += [
        f"- not judged yet: {model}: {', '.join(health.waiting[model])}" for model in health.waiting
    ]
    lines += [f"- not asked by the evaluator health: {model}" for model in health.unchecked]
    return "\n".join([*lines, "", findings.provenance, ""])


def attacks_text(findings: Findings) -> str:
    """Say what the attacks may do here and on ImageNet, and how models are trained against them."""
    scale, patch, imagenet = findings.scale, findings.scale.patch, scale_named(SCALE)
    radius, small = (f"{255 * float(e):g}/255" for e in (scale.epsilon, scale.small_epsilon))
    protocols = {t.recipe.protocol for t in findings.plan if t.recipe.adversary}
    trained = f" Adversarial training by the {' and '.join(sorted(protocols))} protocol."
    return (
        f"Attacks in the L-infinity ball of radius {radius} (small radius: {small}; on "
        f"ImageNet: {imagenet.epsilon} and {float(imagenet.small_epsilon):g}), on pixels in "
        "[0, 1], in float32; PGD from a random start, a quarter of the radius a step; texture "
        f"patches: up to {patch.patches}, each of {patch.area:.1%} of "
        f"the image.{trained if protocols else ''}"
    )


def difference_text(paired: Paired | None) -> str:
    """Write a difference in points: '+1.2 [-0.3, +2.7] p 0.12'; '' where there is none."""
    if paired is None:
        return ""
    points = [100 * value for value in (paired.difference, paired.low, paired.high)]
    text = f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]"
    return text if paired.p is None else f"{text} p {paired.p:.2g}"


def _values(table: FilledTable) -> list[str]:
    header = ["Model", "trained on", *[t for column in table.columns for t in (column, "paper")]]
    judged = ["judged on, images", "", *[t for number in table.judged_on for t in (number, "")]]
    rows = [
        [row.label, row.trained_on, *[t for c in row.cells for t in (c.text(), c.published_text())]]
        for row in table.rows
    ]
    return [_line(header), _line(["---"] * len(header)), *map(_line, (*rows, judged))]


def _differences(table: FilledTable, comparisons: Sequence[Comparison]) -> list[str]:
    """Return the rows against the first one; nothing before two rows share a judged column."""
    if not comparisons:
        return []
    return [
        "",
        f"Minus {table.rows[0].label}, in points, on the same images (p: exact McNemar test):",
        "",
        _line(["Model", *table.columns]),
        _line(["---"] * (len(table.columns) + 1)),
        *[_line([row.label, *map(difference_text, row.cells)]) for row in comparisons],
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _long(tables: Sequence[FilledTable]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "table": table.name,
            "scale": row.recipe.scale,
            "model": row.label,
            "digest": digest,
            "run_id": row.run_id,
            "score": column,
            "state": cell.state,
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
            "n": cell.n or None,
            "trained_images": row.images.get("train"),
            "held_out_images": row.images.get("held_out"),
            "published": cell.published,
            "difference": cell.difference,
            "source": cell.source,
        }
        for table in tables
        for row in table.rows
        for digest in [row.recipe.digest()]
        for column, cell in zip(table.columns, row.cells, strict=True)
    )


def _latex(table: FilledTable, scale: Scale) -> str:
    texts = {"trained on": [*(row.trained_on for row in table.rows), ""]}
    for place, (column, number) in enumerate(zip(table.columns, table.judged_on, strict=True)):
        texts[column] = [*(_with_paper(row.cells[place]) for row in table.rows), number]
    labels = [*(row.label for row in table.rows), "judged on, images"]
    frame = pd.DataFrame(texts, index=labels)
    named = table.name.replace("_", r"\_")
    units = "percent, 95\\% interval; figure published for ImageNet"
    caption = f"{named}: {table.question}, on {scale.title} ({units})"
    text: str = frame.to_latex(escape=True, caption=caption, label=f"tab:{table.name}")
    return text


def _with_paper(cell: FilledCell) -> str:
    paper = cell.published_text()
    return f"{cell.text()}; {paper}" if paper else cell.text()
