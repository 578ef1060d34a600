"""The tables in LaTeX: split columns, and whole documents that compile within the text's width."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest

from evaluators.base import Column
from grid.plan import build_plan
from grid.report.latex import as_latex
from grid.report.tables import FilledCell, FilledRow, FilledTable, tables_of
from tests.paper import STUDY, resnet50
from trainables.scale import DIGITS, IMAGENET

DOCUMENT = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{booktabs,graphicx}
%s
\begin{document}
%s
\end{document}
"""
WIDEST = FilledCell("done", 100.0, 100.0, 100.0, 50_000)
needs_latex = pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex: texlive")


def of_rows(columns, **cells):
    rows = [FilledRow(label, resnet50(), 1, tuple(entry)) for label, entry in cells.items()]
    shown = tuple(Column(title, title) for title in columns)
    return FilledTable("T_1", "Who is 5 % better & why?", shown, tuple(rows))


def log_of(folder, *tables, preamble=""):
    """Compile a document of tables; return what LaTeX said."""
    (folder / "paper.tex").write_text(DOCUMENT % (preamble, "\n".join(tables)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return (folder / "paper.log").read_text(errors="replace")


def test_value_interval_and_published_figure_are_columns_of_their_own():
    ours = FilledCell("done", 96.14, 94.25, 97.42, 597, published=76.9)
    attacked = FilledCell("done", 0.0, 0.0, 7.1, 50)
    collapsed = FilledCell("collapsed: PGD-10 accuracy stayed at chance")
    text = as_latex(of_rows(("Clean", "PGD_5"), A=[ours, attacked], B=[ours, collapsed]), "digits")
    lines = text.splitlines()
    assert r"\begin{tabular}{lrlrrl}" in text
    assert r" & value & interval & paper & value & interval \\" in lines
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-6}" in lines
    assert r"A & 96.1 & [94.2, 97.4] & 76.9 & 0.0 & [0.0, 7.1] \\" in lines
    assert r"B & 96.1 & [94.2, 97.4] & 76.9 &  & collapsed \\" in lines
    assert r"images &  & 597 &  &  & 50 \\" in lines
    assert r"\caption{T\_1: Who is 5 \% better \& why?, on digits. " in text
    assert r"\shortstack{PGD\_5}" in text


def test_columns_beyond_a_lines_width_go_into_the_next_panel():
    # Characters beside the label A: three columns of 5 + 14, 2 gaps of 2 each, are the most.
    row = [WIDEST] * 7
    text = as_latex(of_rows(tuple("abcdefg"), A=row), "digits")
    assert text.count(r"\begin{tabular}{lrlrlrl}") == 2
    assert text.count(r"\begin{tabular}{lrl}") == 1


@needs_latex
@pytest.mark.parametrize("scale", [DIGITS, IMAGENET], ids=lambda scale: scale.name)
def test_every_table_of_the_study_compiles_within_the_texts_width(scale, tmp_path):
    tables = tables_of(STUDY, build_plan(STUDY, scale), {})
    texts = []
    for table in tables:
        rows = [
            replace(row, cells=tuple(replace(WIDEST, published=c.published) for c in row.cells))
            for row in table.rows
        ]
        texts.append(as_latex(replace(table, rows=tuple(rows)), scale.title))
    log = log_of(tmp_path, *texts, preamble=r"\renewcommand{\resizebox}[3]{#3}")  # as it is
    assert ("Overfull" in log, "too large" in log, "Float too" in log) == (False, False, False)


@needs_latex
def test_a_label_longer_than_a_line_and_any_character_compile(tmp_path):
    label = r"A_very~long {label} \with $100 & 5% #1^2 " + "and much more of it " * 4
    log = log_of(tmp_path, as_latex(of_rows(("Clean", "natural"), **{label: [WIDEST] * 2}), "x"))
    assert "Overfull" not in log
