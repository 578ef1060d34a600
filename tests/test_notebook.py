"""Notebooks of examples/ run from their first cell to their last, and show what they say."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def executed(name, folder):
    """Return a notebook of examples/ after it ran in a folder; it is stored without outputs."""
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        client.NotebookClient(notebook, timeout=600, resources=resources).execute()
    return notebook


def test_the_quickstart_runs_and_shows_tables_and_a_figure(tmp_path):
    notebook = executed("quickstart", tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [{k: v for o in cell.outputs for k, v in o.get("data", {}).items()} for cell in code]
    assert "<td>pgd-100</td>" in shown[1]["text/html"]
    assert shown[2]["text/plain"].startswith("Score(name='pgd-100'")
    assert "image/png" in shown[5]
    assert "McNemar p" in shown[6]["text/html"]
    streams = [o.text for cell in code for o in cell.outputs if o.output_type == "stream"]
    lines = "".join(streams).split()
    assert "100/100" in lines
    assert "Warning" not in "".join(streams)
    assert len([*tmp_path.glob("verdicts/Sequential-*/clean.parquet")]) == 1
