"""A table as LaTeX for a paper: booktabs, columns of value, interval and paper, never too wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from grid.report.tables import FilledCell, FilledTable

SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
LINE = 84  # characters of \footnotesize in the 345 points of article's text
GAP = 1.5  # characters between two columns
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
%s
\end{tabular}}"""


def as_latex(table: FilledTable, scale: str) -> str:
    """Return a table as floats of panels that each hold as many columns as fit a line.

    It needs the packages booktabs and graphicx. scale: the title of the models' scale.
    """
    panels = [_panel(table, places) for places in _fitting(table)]
    lines = sum(-(-len(row.label) // _label_width(table)) for row in table.rows)
    count = max(1, PAGE // (lines + 6))
    title = f"{table.name}: {table.question}, on {scale}".translate(SPECIAL)
    first = rf"{title}. Percent with its 95\% interval; paper: the published figure."
    label = rf"\label{{tab:{table.name}}}"
    floats = [r"% \usepackage{booktabs,graphicx}" + "\n"]
    for place in range(0, len(panels), count):
        caption = (f"{title}, continued.", "") if place else (first, label)
        body = "\n\n\\medskip\n".join(panels[place : place + count])
        floats.append(FLOAT % (*caption, body))
    return "\n".join(floats)


def _cells(table: FilledTable, place: int) -> list[FilledCell]:
    return [row.cells[place] for row in table.rows]


def _heads(table: FilledTable, place: int) -> list[str]:
    """Return the heads of a column's parts; "paper" is there where it has a figure."""
    has_paper = any(cell.published is not None for cell in _cells(table, place))
    return ["value", "interval", *(["paper"] if has_paper else [])]


def _width(table: FilledTable, place: int) -> int:
    """Return the characters that a column takes."""
    heads = _heads(table, place)
    widest = max((len(cell.text()) for cell in _cells(table, place) if cell.n), default=8)
    return round(widest + (len(heads) > 2) * len("paper") + GAP * len(heads))


def _label_width(table: FilledTable) -> int:
    """Return the characters of the widest line of the rows' labels."""
    labels = [row.label for row in table.rows] or [""]
    words = [word for label in labels for word in label.split()]
    return min(max(map(len, labels)), max([LABEL, *map(len, words)]))


def _fitting(table: FilledTable) -> Iterator[list[int]]:
    """Yield the places of columns that fit a line beside the rows' labels."""
    room = LINE - _label_width(table)
    places: list[int] = []
    for place in range(len(table.columns)):
        if places and sum(_width(table, p) for p in [*places, place]) > room:
            yield places
            places = []
        places.append(place)
    yield places


def _panel(table: FilledTable, places: Sequence[int]) -> str:
    parts = [_heads(table, place) for place in places]
    titles, rules, first = [], [], 2
    for place, heads in zip(places, parts, strict=True):
        lines = textwrap.wrap(table.columns[place], max(12, _width(table, place)))
        title = r"\\".join(line.translate(SPECIAL) for line in lines)
        titles.append(rf"\multicolumn{{{len(heads)}}}{{c}}{{\shortstack{{{title}}}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(heads) - 1}}}")
        first += len(heads)
    rows = [
        _row(row.label, (_parts(row.cells[p], len(h)) for p, h in zip(places, parts, strict=True)))
        for row in table.rows
    ]
    numbers = (
        [table.judged_on[p], *[""] * (len(h) - 1)] for p, h in zip(places, parts, strict=True)
    )
    lines = [
        _row("", ([title] for title in titles)),
        "".join(rules),
        _row("", parts),
        r"\midrule",
        *rows,
        r"\midrule",
        _row("images", numbers),
        r"\bottomrule",
    ]
    breaks = max((len(row.label) for row in table.rows), default=0) > _label_width(table)
    label = f"p{{{_label_width(table) / 2:g}em}}" if breaks else "l"
    return PANEL % (label + "".join("rlr"[: len(heads)] for heads in parts), "\n".join(lines))


def _parts(cell: FilledCell, count: int) -> list[str]:
    """Return a cell's value, interval and, of three parts, its published figure."""
    paper = [cell.published_text()] * (count - 2)
    if not cell.n:
        state = "--" if cell.kind == "not" else cell.kind.translate(SPECIAL)
        return [rf"\multicolumn{{2}}{{l}}{{{state}}}", *paper]
    value, interval = cell.text().split(" ", 1)
    return [value, interval, *paper]


def _row(label: str, parts: Iterable[Sequence[str]]) -> str:
    ragged = r"\raggedright " if len(label) > LABEL else ""
    return (
        " & ".join([ragged + label.translate(SPECIAL), *(p for part in parts for p in part)])
        + r" \\"
    )
