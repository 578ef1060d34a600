"""Show that a change of the code moved nothing: `python -m tests.same`.

Compares with tests/same.json, made by the code before the redesign (`--write`): the digests of
every trial of the shipped studies at three scales, the weights of six recipes after two epochs
and the ledgers of every evaluator on two of them. Weights and ledgers hold for one kind of
processor. To be deleted with the last step of the redesign.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from evaluators import EVALUATORS, column_named, evaluator_named
from evaluators.base import evaluate
from grid.plan import build_plan
from grid.study import base_named, load_study
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import SCALES, scale_named
from trainables.train.loop import train

STORED = Path(__file__).with_name("same.json")
STUDIES = {"paper": "bai2021", "full": "full"}  # by today's name
JUDGED = ("resnet50", "deit-small")


def plans() -> dict[str, Any]:
    """Return the digests, rows and evaluators of the shipped studies at every scale."""
    values: dict[str, Any] = {}
    for name, today in STUDIES.items():
        for scale in SCALES:
            plan = build_plan(load_study(today), scale_named(scale))
            trials = {t.digest: [t.serves, sorted(t.evaluators)] for t in plan}
            if name == "full":
                trials = {"sha256": _sha256(json.dumps(trials, sort_keys=True).encode())}
            tables = {
                table.name: {
                    "question": table.question,
                    "columns": [
                        [c.label, c.evaluator, c.score] for c in map(column_named, table.columns)
                    ],
                    "rows": [[row.label, row.recipe.digest()] for row in table.rows],
                }
                for table in plan.tables
            }
            values[f"{name} {scale}"] = {
                "trials": trials,
                "tables": tables,
                "refused": len(plan.refused),
            }
    return values


def trained(recipes: dict[str, Any], ledgers: list[str]) -> dict[str, Any]:
    """Return what the recipes' weights and, of some, the evaluators' ledgers hash to."""
    values: dict[str, Any] = {}
    for name, fields in recipes.items():
        recipe = Recipe.model_validate(fields)
        scale = scale_named(recipe.scale)
        data, device = load_data(scale), torch.device("cpu")
        classifier = build_classifier(recipe)
        for _ in train(recipe, classifier, data, device=device):
            pass
        weights = {k: v.contiguous() for k, v in classifier.state_dict().items()}
        values[name] = {"digest": recipe.digest(), "weights": _sha256(save(weights))}
        for evaluator in EVALUATORS if name in ledgers else ():
            ledger = evaluate(evaluator_named(evaluator, scale), classifier, data, device=device)
            rows = json.dumps(ledger.drop_columns(["image"]).to_pylist(), sort_keys=True)
            values[name][evaluator] = _sha256(rows.encode())
    return values


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--write"]:
        from tests.golden import RECIPES

        recipes = {
            name: scale_named("digits")
            .shrink(base_named(base))
            .replace(epochs=2, warmup_epochs=0.5)
            .model_dump(mode="json")
            for name, base in RECIPES.items()
        }
        stored = {"recipes": recipes, "plans": plans(), "trained": trained(recipes, [*JUDGED])}
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
        return
    stored = json.loads(STORED.read_text())
    now = json.loads(
        json.dumps({"plans": plans(), "trained": trained(stored["recipes"], [*JUDGED])})
    )
    moved = []
    for part in now:
        for key in stored[part] | now[part]:
            then, here = stored[part].get(key, {}), now[part].get(key, {})
            moved += [f"{part}: {key}: {k}" for k in then | here if then.get(k) != here.get(k)]
    print("\n".join(moved) or "nothing moved")
    sys.exit(bool(moved))


if __name__ == "__main__":
    main()
