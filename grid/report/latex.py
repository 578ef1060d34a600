"""A table as LaTeX for a paper: booktabs, columns of value, interval and paper, never too wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from grid.report.tables import FilledTable

SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
LINE = 84  # characters of \footnotesize in the 345 points of article's text
GAP = 2  # characters between two columns
PAGE = 48  # lines of a float
LABEL = 26  # characters in a line of a label that has words to break between
FLOAT = r"""\begin{table}[tp]
\centering\footnotesize\setlength{\tabcolsep}{3pt}
\caption{%s}%s\par\medskip
%s
\end{table}
"""
# A word longer than a line shrinks its panel to the text's width.
PANEL = r"""\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{\begin{tabular}{%s}
\toprule
%s \\
%s
%s \\
\midrule
%s \\
\midrule
%s \\
\bottomrule
\end{tabular}}"""
Column = list[list[str]]  # its parts in the head, in each row and in the number of images


def as_latex(table: FilledTable, scale: str) -> str:
    """Return a table as floats of panels that each hold as many columns as fit a line.

    It needs the packages booktabs and graphicx. scale: the title of the models' scale.
    """
    labels = [row.label for row in table.rows]
    words = [word for label in labels for word in label.split()]
    width = min(max(map(len, labels), default=0), max([LABEL, *map(len, words)]))
    panels = [_panel(labels, columns, width) for columns in _fitting(table, LINE - width)]
    lines = sum(-(-len(label) // width) for label in labels)
    count = max(1, PAGE // (lines + 6))
    title = f"{table.name}: {table.question}, on {scale}".translate(SPECIAL)
    first = rf"{title}. Percent with its 95\% interval; paper: the published figure."
    floats = [r"% \usepackage{booktabs,graphicx}" + "\n"]
    for place in range(0, len(panels), count):
        caption = (f"{title}, continued.", "") if place else (first, rf"\label{{tab:{table.name}}}")
        floats.append(FLOAT % (*caption, "\n\n\\medskip\n".join(panels[place : place + count])))
    return "\n".join(floats)


def _fitting(table: FilledTable, room: float) -> Iterator[dict[str, Column]]:
    """Yield the columns by title, as many at once as have room for their characters."""
    columns: dict[str, Column] = {}
    for place, title in enumerate(table.columns):
        column = _column(table, place)
        if columns and sum(map(_width, [*columns.values(), column])) > room:
            yield columns
            columns = {}
        columns[title] = column
    yield columns


def _column(table: FilledTable, place: int) -> Column:
    cells = [row.cells[place] for row in table.rows]
    lines = [["value", "interval", "paper"]]
    for cell in cells:
        state = "--" if cell.kind == "not" else cell.kind
        ours = cell.text().split(" ", 1) if cell.n else ("", state)
        lines.append([*ours, cell.published_text()])
    lines.append(["", table.judged_on[place], ""])
    has_paper = any(cell.published is not None for cell in cells)
    return lines if has_paper else [line[:2] for line in lines]


def _width(column: Column) -> int:
    return sum(max(map(len, part)) + GAP for part in zip(*column, strict=True))


def _panel(labels: list[str], columns: Mapping[str, Column], width: int) -> str:
    titles, rules, first = [""], "", 2
    for title, column in columns.items():
        wrapped = textwrap.wrap(title, max(12, _width(column)))
        stack, parts = r"\\".join(line.translate(SPECIAL) for line in wrapped), len(column[0])
        titles.append(rf"\multicolumn{{{parts}}}{{c}}{{\shortstack{{{stack}}}}}")
        rules += rf"\cmidrule(lr){{{first}-{first + parts - 1}}}"
        first += parts
    breaks = max(map(len, labels), default=0) > width
    spec = f"p{{{width / 2:g}em}}" if breaks else "l"
    spec += "".join("rlr"[: len(column[0])] for column in columns.values())
    firsts = ["", *(r"\raggedright " * breaks + label.translate(SPECIAL) for label in labels)]
    head, *rows, images = (
        " & ".join([label, *(text for part in parts for text in part)])
        for label, *parts in zip([*firsts, "images"], *columns.values(), strict=True)
    )
    return PANEL % (spec, " & ".join(titles), rules, head, " \\\\\n".join(rows), images)
