"""The smallest radius that breaks each image, and the curve of accuracy by radius."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from evaluators import compare, evaluate, evaluator_named
from evaluators.base import Batch
from evaluators.intervals import image_scores
from evaluators.ledger import in_order
from grid.report import plots
from grid.study import base_named
from tests.test_norms import Threshold
from trainables.scale import DIGITS


@pytest.mark.parametrize(("norm", "reach"), [("linf", 1.0), ("l2", 48**0.5), ("l1", 48.0)])
def test_each_image_breaks_at_the_first_radius_that_reaches_the_boundary(norm, reach):
    """A grey that is d below 0.5 is broken by d at every value: d in the max-norm."""
    greys = torch.tensor([0.6, 0.49, 0.46, 0.4, 0.2])
    images = greys.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    batch = Batch(images, torch.zeros(5, dtype=torch.long), tuple("abcde"))
    shares = [Fraction(share, 100) for share in (3, 5, 7, 12)]
    radii = [share * Fraction(reach) for share in shares]
    name = "radii" if norm == "linf" else f"radii-{norm}"
    evaluator = evaluator_named(name, DIGITS, radii=radii)
    ledger = evaluator.judge(Threshold(), batch)
    areas = image_scores(ledger, name)
    # Wrong as it is; half-way from 0 to 3, from 3 to 5 and from 7 to 12, of 12; never.
    assert list(areas.values()) == pytest.approx([0, 1.5 / 12, 4 / 12, 9.5 / 12, 1])
    area, *curve = evaluator.summarize(ledger)
    assert (area.name, area.value, area.n) == (name, pytest.approx(0.45), 5)
    assert [s.value for s in curve] == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.2])
    assert {*ledger["stage"].to_pylist()} == {"clean", "pgd", None}
    parts = pa.concat_tables(evaluator.judge(Threshold(), part) for part in batch.parts(2))
    assert in_order(parts).equals(in_order(ledger))


def test_an_image_that_breaks_within_the_smallest_radius_does_not_survive_it():
    """Rounding of 0.5/255 at a pixel near 1 is more than a hundred-thousandth of it."""
    images = torch.full((4, 3, 4, 4), 0.9) + torch.rand(4, 3, 4, 4) / 100
    edge = images.mean(dim=(1, 2, 3)).min() - 0.4 / 255

    class Edge(torch.nn.Module):
        def forward(self, images):
            above = images.mean(dim=(1, 2, 3)) - edge.to(images)
            return torch.stack([above, -above], dim=1)

    data = images, torch.zeros(4, dtype=torch.long)
    scores = evaluate(Edge(), data, "radii", epsilon=["0.5/255", "1/255", "9/255"], progress=False)
    assert scores["radii@0.5/255"].value < 1
    assert scores["radii@9/255"].value == 0


def test_one_radius_is_named_and_two_models_are_compared_by_area():
    data = torch.full((3, 3, 4, 4), 0.4), torch.zeros(3, dtype=torch.long)
    one = evaluate(Threshold(), data, "radii", epsilon=0.2, progress=False)
    assert [s.name for s in one.scores] == ["radii", "radii@0", "radii@51/255"]
    assert one["radii"].value == pytest.approx(0.5)  # half-way from 0 to 0.2
    other = evaluate(Threshold(), data, "radii", epsilon=0.2, progress=False)
    assert compare(one, other)["radii"].difference == 0


def test_an_example_breaks_its_image_at_every_radius_that_holds_it():
    """At 0.3 the answer is wrong between 0.35 and 0.45 alone; PGD at 0.1 stops there."""
    data = torch.full((1, 3, 4, 4), 0.3), torch.tensor([0])

    class Band(torch.nn.Module):
        def forward(self, images):
            mean = images.mean(dim=(1, 2, 3))
            margin = 0.05 - (mean - 0.4).abs()
            return torch.stack([-margin, margin], dim=1)

    scores = evaluate(Band(), data, "radii", epsilon=[0.04, 0.06, 0.08, 0.3], progress=False)
    assert [scores[f"radii@{255 * r:g}/255"].value for r in (0.04, 0.06, 0.08, 0.3)] == [1, 0, 0, 0]


def test_the_report_draws_accuracy_by_radius_in_order(monkeypatch):
    metrics = {"radii": 0.4, "radii/low": 0.3, "radii-l2@0.5": 0.9, "radii-l2@0.5/low": 0.8}
    for name, value in (("radii@27/255", 0.25), ("radii@0", 1.0), ("radii@13.5/255", 0.5)):
        metrics |= {name: value, f"{name}/low": value - 0.1, f"{name}/high": value + 0.1}
    judged = SimpleNamespace(label="judged", recipe=base_named("resnet50"))
    judged.run = SimpleNamespace(metrics=metrics)
    waiting = SimpleNamespace(label="waiting", recipe=judged.recipe, run=None)
    drawn = {}
    monkeypatch.setattr(plots, "_plot", lambda *_, panels, **__: drawn.update(panels))
    table = SimpleNamespace(name="T1", rows=[waiting, judged])
    plots._radii_plot(table, "radii", "caption", "epsilon, 1/255")
    ((line,),) = drawn.values()
    xs, values, lows, _ = line.points
    assert (line.label, xs, [*values]) == ("judged", [0, 13.5, 27], [100, 50, 25])
    assert [*lows] == pytest.approx([90, 40, 15])
