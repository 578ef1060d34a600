"""The documentation is built without a warning and without a network, and lists what there is."""

from __future__ import annotations

import html
import re
import subprocess
import sys

import pytest

from evaluators import EVALUATORS
from grid.options import RunOptions
from grid.study import STUDIES, load_study
from tests.driver import ROOT
from trainables.recipe import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-qW", "--keep-going", "docs", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def text(path):
    return html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert {"index.html", "quickstart.html", "concepts.html", "resume.html"} <= {
        page.name for page in pages
    }
    fetched = r'<(?:script|img|source|iframe)[^>]+src="(\w+:[^"]+)"|<link[^>]+href="(\w+:[^"]+)"'
    assert not [found for page in pages for found in re.findall(fetched, page.read_text())]
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles
    assert not [style for style in styles if re.search(r"url\([\"']?(https?:)?//", style)]


def test_the_reference_lists_every_entry_of_the_registries(site):
    recipe = text(site / "reference" / "recipe.html")
    assert not {name for name in Recipe.model_fields if name not in recipe}
    evaluators = (site / "reference" / "evaluators.html").read_text()
    ids = {name: name.replace(".", "-") for name in EVALUATORS}
    assert not {name for name, id_ in ids.items() if f'<section id="{id_}">' not in evaluators}
    assert "Images: 5,000. Passes for each: 204." in text(site / "reference" / "evaluators.html")
    studies = text(site / "reference" / "studies.html")
    for study in map(load_study, STUDIES):
        assert not [claim.says for claim in study.claims if claim.says not in studies]
        assert all(table.question in studies for table in study.tables)
    options = {f"--{field.alias}" for field in RunOptions.model_fields.values()}
    assert not {name for name in options if name not in text(site / "reference" / "commands.html")}
