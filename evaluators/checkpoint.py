"""What `python -m evaluators` does: judge a checkpoint, shard after shard, and report."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.base import device_named
from evaluators.judging import Cells, evaluators_named
from evaluators.loading import load_subject
from evaluators.own_model import PROBED, probe
from trainables.data.load import load_data
from trainables.models import MODELS
from trainables.options import again
from trainables.scale import Scale

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    subject = load_subject(options, source, device)
    scale, classifier = _with_budgets(subject.scale, options), subject.classifier
    folder = options.ledger or Path("results/ledgers", f"{subject.name}-{subject.digest}")
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    judged = repr((subject.digest, classifier, normalisation, scale, source.root, folders))
    evaluators = [*evaluators_named(options.evaluators, scale, options.epsilon)]
    print(*subject.said, sep="\n")
    notes: list[str] = []
    if subject.model not in MODELS:
        needing = next((e.name for e in evaluators if e.by_gradient), "")
        images = data.held_out.images[:PROBED]
        _, notes = probe(classifier.to(device).eval(), images, by_gradient=needing)
    cells = Cells.of(evaluators, data, folder, judged, device)
    with suppress(KeyboardInterrupt):
        for evaluator in cells.stores:
            print(f"{evaluator.name}: {json.dumps(evaluator.identity(data))}")
            cells.judge(evaluator, classifier, data, device)
    print(cells.scores(f"{subject.name} at scale {scale.name}", data, notes))
    if not cells.is_whole:
        print(f"Cut short. Judge the other images with: {again()}")
        return False
    cells.write_ledgers()
    cells.clear()
    print(f"Ledgers: {folder}")
    return True


def _with_budgets(scale: Scale, options: JudgeOptions) -> Scale:
    """Return the scale with the images and patches that the options state."""
    images = options.attack_images
    budget: dict[str, Any] = {
        "images": images,
        "patches": options.patches,
        "area": options.patch_area,
    }
    patch = replace(scale.patch, **{k: value for k, value in budget.items() if value is not None})
    patch.side(scale.image_size)
    if images is None:
        return replace(scale, patch=patch)
    return replace(scale, patch=patch, attack_subset=images, autoattack_subset=images)
