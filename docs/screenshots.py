"""Take the pictures of the report and of the MLflow UI: README, results.md.

    python -m docs.screenshots RESULTS [SCALE]

RESULTS is the folder of a finished run. Needs Chromium and the test requirements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from grid.status import open_existing
from tests.browser import browser
from tests.servers import MlflowServer
from trainables.scale import scale_named
from trainables.store.tracking import Tracker

HERE = Path(__file__).parent
STUDY = "bai2021"


def main(results: Path, scale: str = "digits") -> None:
    """Write docs/report.png and docs/mlflow.png."""
    open_existing(results, None, scale_named(scale))
    server = MlflowServer(results)
    server.start()
    try:
        tracker = Tracker(server.uri, experiment=f"robustness-{scale}", artifacts=None)
        with browser() as chromium:
            page = chromium.new_page(viewport={"width": 1400, "height": 900})
            page.goto((results / "report" / "index.html").resolve().as_uri())
            _take(page, "report.png")
            page = chromium.new_page(viewport={"width": 1900, "height": 760})
            page.set_default_timeout(120_000)
            page.goto(tracker.page(study=STUDY))
            page.locator("[role=columnheader]", has_text="clean").first.wait_for()
            for label in ("Close", "Close assistant"):
                if (button := page.get_by_label(label, exact=True)).count():
                    button.first.click()
            page.get_by_text("matching runs").first.wait_for()
            _take(page, "mlflow.png")
    finally:
        server.kill()


def _take(page: Any, name: str) -> None:
    path = HERE / name
    page.screenshot(path=path)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
