"""Sphinx: `sphinx-build -W docs build/site`. Nothing is fetched, by the build or by its pages."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import registries  # noqa: E402 - beside this file

registries.write(HERE / "reference")

project = "robustness grid"
author = "The contributors of robustness-grid"
version = release = version_of("robustness-grid")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
highlight_language = "text"
smartquotes = False

FROM_ROOT = {
    "index": "README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]+)?\)")


def setup(app: Sphinx) -> None:
    """Read pages through `with_links`."""
    app.connect("source-read", with_links)


def with_links(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a file of the root at its page; links out of docs/ lead to the site's own pages.

    FileNotFoundError where a link leads nowhere.
    """
    home = HERE / page
    if page in FROM_ROOT:
        home = ROOT / FROM_ROOT[page]
        app.env.note_dependency(str(home))
        source[0] = home.read_text() + "\n" + source[0]
    up = "../" * page.count("/")
    pages = {name: f"{page}.md" for page, name in FROM_ROOT.items()}

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        place = (home.parent / target).resolve()
        if not place.exists():
            raise FileNotFoundError(f"{home}: {target} does not exist")
        path = place.relative_to(ROOT).as_posix()
        if path.startswith("grid/studies/"):
            path, anchor = "docs/reference/studies.md", f"#{place.stem}"
        path = f"docs/{pages[path]}" if path in pages else path
        return text if place.is_dir() else f"[{text}]({_to_docs(path, up)}{anchor})"

    source[0] = LINK.sub(turned, source[0])


def _to_docs(path: str, up: str) -> str:
    return up + (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")
