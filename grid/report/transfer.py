"""Whose adversarial images break whom: the matrix of a study's models, and of kinds of them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import pandas as pd

from evaluators.intervals import mean_score
from evaluators.ledger import share
from evaluators.transfer import CLEAN, STEPS, TRANSFER, received
from grid.plan import Plan, transferring
from grid.report.verdicts import Verdicts
from trainables.recipe import Preprocessing, Recipe

TRANSFORMERS = re.compile(
    r"\b(deit|.*vit|swin|twins|xcit|cait|coat|beit|eva|pit|pvt|hiera|volo|nest|tnt|.*former)"
)
CNNS = re.compile(r"net|conv|vgg|inception|^dla|next")


def transfers(plan: Plan, verdicts: Verdicts) -> dict[str, Any]:
    """Return `pairs`, a line per source and target that is judged, and what is said of them.

    Of the images that the target gets right as they are, a line's `value` is the share that it gets
    wrong as the source's adversarial images, with Wilson's interval: its own errors are no
    transfer. Of several trainings of a recipe the first counts. Empty where nothing is judged.
    """
    trials = sorted(transferring(plan), key=lambda trial: (kind_of(trial.recipe), trial.name))
    sources: defaultdict[Preprocessing, list[str]] = defaultdict(list)
    for trial in trials:
        if verdicts.is_judged(trial.digest, TRANSFER):
            sources[trial.geometry].append(trial.digest)
    lines: list[dict[str, Any]] = []
    answers: defaultdict[tuple[str, str], list[pd.Series]] = defaultdict(list)
    for target in trials:
        name = received(sources[target.geometry])
        if (ledger := verdicts.ledger(target.digest, name)) is None:
            continue
        rows = ledger.select(["image_id", "question", "survived"]).to_pandas()
        survived = rows.pivot(index="image_id", columns="question", values="survived")
        right = survived[survived[CLEAN] == True]  # noqa: E712
        for source in (s for s in trials if f"{TRANSFER}/{s.digest}" in right):
            fooled = 1 - right[f"{TRANSFER}/{source.digest}"].dropna().astype(float)
            if fooled.empty:
                continue
            score = asdict(share("", int(fooled.sum()), len(fooled)))
            kinds = kind_of(source.recipe), kind_of(target.recipe)
            names = {"source": source.name, "target": target.name, "kinds": " to ".join(kinds)}
            lines.append({**names, **{n: score[n] for n in ("value", "low", "high", "n")}})
            if source != target:
                answers[kinds].append(fooled)
    if not lines:
        return {}
    judged = {line["source"] for line in lines} & {line["target"] for line in lines}
    return {
        "pairs": pd.DataFrame(lines),
        "readings": [_reading(*kinds, fooled) for kinds, fooled in sorted(answers.items())],
        "lacking": [trial.name for trial in trials if trial.name not in judged],
        "steps": STEPS,
    }


def kind_of(recipe: Recipe) -> str:
    """Return CNN or transformer as a model's name says, or its family."""
    name = recipe.model.rpartition("/")[2].lower().replace("_", " ")
    if TRANSFORMERS.search(name):
        return "transformer"
    return "CNN" if CNNS.search(name) else recipe.family


def _reading(source: str, target: str, fooled: list[pd.Series]) -> str:
    """Say how often images of models of a kind break others of a kind: an image's mean over pairs.

    The interval is Student's over images, which all pairs share; the models are these.
    """
    broken_N = pd.concat(fooled, axis=1).mean(axis=1).to_numpy()
    score, pairs = mean_score("", broken_N, most=1), len(fooled)
    value, low, high = (100 * end for end in (score.value, score.low, score.high))
    said = f"{value:.1f} % [{low:.1f}, {high:.1f}] over {pairs} pair{'s' * (pairs > 1)}"
    return f"{source} to {'another ' * (source == target)}{target}: {said}, {score.n} images"
