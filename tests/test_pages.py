"""The report and the MLflow UI in a real browser, as a person opens them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from grid.plan import build_plan
from grid.report.build import write_report
from grid.study import load_study
from tests import browser as chromium
from tests.made_up import record
from tests.servers import MlflowServer
from trainables.scale import DIGITS
from trainables.store.tracking import Tracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not chromium.installed(), reason="no Chromium: apt-get install chromium"),
]
TABLES = tuple(table.name for table in load_study("bai2021").tables)
FIGURES = {
    *("claims", "headline"),
    "scatter",
    "shape-bias",
    *("steps-T1", "epsilon-T1", "steps-T2", "training-T2", "patches-T3", "patches-T4"),
    *(f"corruptions-{table}" for table in TABLES[4:]),
    "training-T8",  # where the recorded collapse is
}
GRID = """
name = "a-grid"
base = "resnet50"
evaluators = ["clean", "pgd", "autoattack", "tpa", "corruptions"]
[axes]
activation = ["relu", "gelu"]
optimizer = ["sgd", "adamw"]
weight_decay = [1e-4, 1e-3, 1e-2]
"""
PHONE, TABLET, DESK = (
    {"width": width, "height": height} for width, height in ((390, 844), (900, 900), (1400, 900))
)
WIDE = {"width": 1600, "height": 1000}
# Elements that show over each other: text in one box that reaches into its next sibling's.
OVERLAPS = """() =>
  [...document.querySelectorAll('main > section, section > *, tr > *')].filter(e => {
    const next = e.nextElementSibling;
    if (!next) return false;
    const a = e.getBoundingClientRect(), b = next.getBoundingClientRect();
    return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
}).map(e => e.outerHTML.slice(0, 80))"""
# Text that is smaller on the screen than ten pixels: in a figure the picture's scale counts.
SMALL = """() => [...document.querySelectorAll('body *')].filter(e => {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || ['SCRIPT', 'STYLE'].includes(e.tagName)) return false;
    const scale = e.ownerSVGElement ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale < 10;
}).map(e => e.outerHTML.slice(0, 120))"""
# Labels of one figure that lie over each other, or out of it.
CLASHES = """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].filter(t => t.checkVisibility()).map(t => {
        const {left, right, top, bottom, height} = t.getBoundingClientRect();
        return {t, left, right, top: top + height / 5, bottom: bottom - height / 5};
    });
    const out = boxes.filter(b => b.left < frame.left - 2 || b.right > frame.right + 2
        || b.top < frame.top - 2 || b.bottom > frame.bottom + 2);
    const over = boxes.filter((a, i) => boxes.slice(i + 1).some(b =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1));
    return [...out, ...over].map(b => svg.parentElement.id + ': ' + b.t.textContent);
})"""
CUT_OFF = """() => [...document.querySelectorAll('h1, h2, h3, p, figure, figcaption, li')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""


FAULTS = (OVERLAPS, CUT_OFF, SMALL, CLASHES)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A recorded study under a running MLflow server, and its report's page."""
    results = tmp_path_factory.mktemp("pages")
    paper = load_study("bai2021")
    plan = build_plan(paper, DIGITS, tables=TABLES)
    record(results, paper, plan, collapsed=1)
    server = MlflowServer(results)
    server.start()
    tracker = Tracker(server.uri, experiment="robustness-digits", artifacts=None)
    page = write_report(tracker, paper, plan, DIGITS, results / "report")
    yield page, tracker
    server.kill()
    shutil.rmtree(results)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The report's page on a recorded grid of twelve trials."""
    results = tmp_path_factory.mktemp("grid")
    (results / "grid.toml").write_text(GRID)
    study = load_study(str(results / "grid.toml"))
    plan = build_plan(study, DIGITS)
    tracker = record(results, study, plan)
    yield write_report(tracker, study, plan, DIGITS, results / "report")
    shutil.rmtree(results)


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as opened:
        yield opened


def opened(browser, address, said, **options):
    page = browser.new_page(**{"viewport": DESK} | options)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else 0)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    return page


EVERY_WIDTH = pytest.mark.parametrize(
    "viewport", [DESK, TABLET, PHONE], ids=["desk", "tablet", "phone"]
)


@EVERY_WIDTH
def test_the_report_is_whole_and_nothing_overlaps(study, browser, viewport):
    said = []
    page = opened(browser, study[0].as_uri(), said, viewport=viewport)
    assert said == []
    assert {*TABLES} <= set(page.eval_on_selector_all("section", "s => s.map(e => e.id)"))
    figures = page.eval_on_selector_all("figure[id]", "f => f.map(e => e.id)")
    assert (set(figures), len(figures)) == (FIGURES, len(FIGURES))
    heights = "f => f.map(e => e.getBoundingClientRect().height).filter(height => height)"
    drawn = page.eval_on_selector_all("figure[id] > svg", heights)
    assert (len(drawn), min(drawn) > 50) == (len(FIGURES), True)  # one of two pictures each
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [page.evaluate(fault) for fault in FAULTS] == [[]] * len(FAULTS)
    pictures = page.eval_on_selector_all("#gallery img", "i => i.map(e => e.naturalWidth)")
    assert set(pictures) == {16}
    assert "Of 24 claims of the study, decided together: " in page.inner_text("#answer .answer")
    page.close()


@EVERY_WIDTH
def test_a_grids_report_says_which_choice_matters(grid, browser, viewport):
    said = []
    page = opened(browser, grid.as_uri(), said, viewport=viewport)
    assert said == []
    assert page.inner_text("#answer .answer").startswith("Of the axes of this grid ")
    assert page.query_selector("#answer figure#scatter svg")
    figures = page.eval_on_selector_all("figure[id]", "f => f.map(e => e.id)")
    scores = ("clean", "pgd-100", "autoattack-bounded", "tpa", "corruptions")
    drawn = {f"{name}-a-grid" for name in ("steps", "patches", "corruptions", "training")}
    assert set(figures) == {"scatter", *(f"effects-{score}" for score in scores)} | drawn
    assert page.query_selector("#effects").inner_text().count("explains") >= 5 * 3
    labels = "#a-grid .scroll tbody th [data-tip]"
    models = page.eval_on_selector_all(labels, "t => t.map(e => e.innerText)")
    assert len(set(models)) == 12
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.inner_text("#health .flag").startswith("Not judged by the evaluator “health”")
    assert [page.evaluate(fault) for fault in FAULTS] == [[]] * len(FAULTS)
    page.close()


def test_the_first_screen_has_the_question_the_answer_its_figure_and_where_to_go(study, browser):
    page = opened(browser, study[0].as_uri(), [])
    bottoms = "e => e.map(e => e.getBoundingClientRect().bottom)"
    first = page.eval_on_selector_all("h1, nav, .answer, #headline > .wide, .next", bottoms)
    assert len(first) == 5
    assert max(first) <= DESK["height"]
    page.evaluate("scrollTo(0, 4000)")
    assert page.eval_on_selector_all("nav", "e => e.map(e => e.getBoundingClientRect().y)") == [0]
    page.close()


def test_a_table_is_sorted_filtered_copied_and_explained(study, browser):
    page = opened(browser, study[0].as_uri(), [], has_touch=True)
    page.context.grant_permissions(["clipboard-read"])
    table = page.locator("#T2 .scroll table").first
    heads, firsts = table.locator("thead th"), table.locator("tbody th span[data-tip]")
    heads.nth(1).locator("button").click()
    values = table.locator("tbody td:nth-child(2)").all_inner_texts()
    numbers = [float(text.split()[0]) for text in values]
    assert numbers == sorted(numbers, reverse=True)
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    page.locator("#T2 .tools input").first.fill("with adamw")
    assert firsts.locator("visible=true").count() == 1
    copies = {}
    for kind in ("Markdown", "CSV", "LaTeX"):
        page.locator("#T2 .tools").first.get_by_text(f"Copy {kind}").click()
        copies[kind] = page.evaluate("navigator.clipboard.readText()").splitlines()
    value, interval = table.locator("tbody tr:visible td").first.inner_text().split(maxsplit=1)
    label = firsts.locator("visible=true").inner_text()
    assert re.fullmatch("ResNet-50 with AdamW [0-9a-f]{6}", label)
    name = f"{label} 1 training, run"
    assert copies["Markdown"][2].startswith(f"| {name} | {value} | {interval} |")
    assert copies["CSV"][1].startswith(f'"{name}",{value},"{interval}",')
    assert copies["LaTeX"][4].startswith(f"{name} & {value} & {interval} &")
    assert (copies["LaTeX"][1], copies["LaTeX"][-2]) == (r"\toprule", r"\bottomrule")
    firsts.locator("visible=true").first.tap()
    said = page.evaluate("getComputedStyle(document.activeElement, '::after').content")
    assert said.startswith('"resnet50 relu adamw')
    page.close()


def test_without_its_script_the_page_says_the_same(study, browser):
    texts = []
    for script in (True, False):
        page = opened(browser, study[0].as_uri(), [], java_script_enabled=script)
        texts.append(page.inner_text("#T2 .scroll").split())
        page.close()
    assert texts[0] == texts[1]


def test_dark_is_dark_and_print_is_not_cut(study, browser):
    page = opened(browser, study[0].as_uri(), [], color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(18, 21, 25)"
    page.emulate_media(media="print", color_scheme="light")
    page.set_viewport_size({"width": 794, "height": 1123})  # A4 at 96 dots an inch
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.pdf(format="A4").startswith(b"%PDF")
    bottom = "e => e.at(-1).getBoundingClientRect().bottom"
    assert page.eval_on_selector_all("#claims-tested tr", bottom) < 1123
    hidden = "e => e.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    assert page.eval_on_selector_all(".scroll", hidden) == []
    page.close()


def test_every_link_of_the_report_leads_somewhere_from_another_folder_too(study, browser, tmp_path):
    path, tracker = study
    page = opened(browser, Path(shutil.copy(path, tmp_path / "moved.html")).as_uri(), [])
    links = set(page.eval_on_selector_all("a", "a => a.map(e => e.getAttribute('href'))"))
    inside = {link for link in links if link.startswith("#")}
    assert all(page.query_selector(f"[id='{link[1:]}']") for link in inside)
    plan = build_plan(load_study("bai2021"), DIGITS, tables=TABLES)
    firsts = {row.recipe.digest() for table in plan.tables for row in table.rows}
    runs = {tracker.page(run_id=tracker.trials()[digest].run_id) for digest in firsts}
    assert links - inside == runs | {tracker.page(study="bai2021")}
    page.close()


def test_the_mlflow_ui_compares_runs_and_opens_one_with_ledgers_and_model(study, browser):
    _, tracker = study
    runs, said = tracker.trials().values(), []
    page = opened(browser, tracker.page(study="bai2021"), said, viewport=WIDE)
    names = {trial.name for trial in build_plan(load_study("bai2021"), DIGITS, tables=TABLES)}
    page.get_by_text(re.compile("^(" + "|".join(map(re.escape, names)) + ")$")).first.wait_for()
    headers = page.eval_on_selector_all("[role=columnheader]", "h => h.map(e => e.innerText)")
    assert {"clean", "pgd-100", "autoattack-bounded", "natural"} <= set(headers)
    # MLflow itself asks for a user that a server without accounts does not know.
    assert [text for text in said if "404" not in text] == []
    run = next(run for run in runs if run.outcome == "finished")
    page.goto(tracker.page(run_id=run.run_id))
    page.get_by_text(run.run_id).first.wait_for()
    page.goto(tracker.page(run_id=run.run_id) + "/artifacts")
    page.get_by_text("ledgers").first.wait_for()
    assert "MLmodel" in page.inner_text("body")
    page.close()
