"""The shipped study is the paper's: plan, tables, figures and claims, pinned before they moved.

tests/golden/bai2021.json was written by the Python that held the study before it was a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from evaluators import column_named
from grid.plan import build_plan
from grid.study import load_study
from trainables.data.registry import folder_data_set
from trainables.scale import CIFAR10, DIGITS, IMAGENET, scale_for

GOLDEN = json.loads((Path(__file__).parent / "golden" / "bai2021.json").read_text())
FOLDER = scale_for(
    folder_data_set(image_size=64, num_classes=10, train_images=4000, content="0" * 8)
)
STUDY = load_study("bai2021")


def sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


@pytest.mark.parametrize("name", ["bai2021", "full"])
@pytest.mark.parametrize("scale", [IMAGENET, DIGITS, CIFAR10, FOLDER], ids=lambda s: s.name[:8])
def test_every_trial_and_what_is_refused_is_as_before(name, scale):
    plan = build_plan(load_study(name), scale, seeds=2 if name == "bai2021" else 1)
    assert {
        "trials": len(plan.trials),
        "asked": plan.requests,
        "refused": len(plan.refused),
        "sha256": sha256([(t.digest, t.name, t.serves, t.evaluators, t.cost) for t in plan]),
        "refused_sha256": sha256(list(plan.refused)),
    } == GOLDEN["plans"][f"{name} {scale.name}"]
    for table in plan.tables:
        for row in table.rows:
            digest = GOLDEN["rows"][f"{table.name}/{row.label}"][scale.name]
            assert row.recipe.digest() == digest, (table.name, row.label)


def test_every_table_has_its_question_rows_and_columns():
    assert {t.name: t.question for t in STUDY.tables} == GOLDEN["questions"]
    rows = [f"{table.name}/{row.label}" for table in STUDY.tables for row in table.rows]
    assert rows == list(GOLDEN["rows"])
    columns = {
        table.name: [
            [c.label, c.evaluator, c.score, c.counterpart, c.counterpart_score, c.own_score]
            for c in map(column_named, table.columns)
        ]
        for table in STUDY.tables
    }
    assert columns == GOLDEN["columns"]


def test_every_published_figure_has_its_value_and_source():
    assert {
        f"{table.name}/{label}/{column}": list(figure)
        for table in STUDY.tables
        for (label, column), figure in table.published.items()
    } == GOLDEN["published"]


def test_every_claim_has_its_statement_test_rows_and_headline():
    claims = []
    for claim in STUDY.claims:
        places = {"row": "/".join(claim.row), "of": "/".join(claim.of).strip("/")}
        claims.append(claim.model_dump() | places | {"also": list(map(list, claim.also))})
    assert claims == GOLDEN["claims"]
