"""What `python -m evaluators` does: judge a checkpoint, shard after shard, and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluators import PGD_STEPS, class_named, evaluator_named
from evaluators.base import Evaluator, device_named
from evaluators.health import red_flags
from evaluators.judging import Cells
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.networks import build_classifier, classifier_named
from trainables.pretrained import load_weights
from trainables.scale import Scale, scale_named
from trainables.store.checkpoint import recipe_of
from trainables.weights import read_content

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    content = read_content(options.weights)
    digest = hashlib.sha256(content).hexdigest()[:12]
    scale, classifier = _loaded(options, content, source)
    folder = options.ledger or Path("results/ledgers", f"{options.weights.stem}-{digest}")
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    subject = repr((digest, classifier, normalisation, scale, source.root, folders))
    cells = Cells.of(_evaluators(options, scale), data, folder, subject, device)
    with suppress(KeyboardInterrupt):
        for evaluator in cells.stores:
            print(f"{evaluator.name}: {json.dumps(evaluator.identity(data))}")
            cells.judge(evaluator, classifier, data, device)
    print(f"{options.weights} at scale {scale.name}: {scale.title}")
    _print_scores(cells)
    if not cells.is_whole:
        print("Cut short: the same command judges the other images.")
        return False
    cells.write_ledgers()
    print(f"Ledgers: {folder}")
    return True


def _loaded(options: JudgeOptions, content: bytes, source: DataSource) -> tuple[Scale, Classifier]:
    """Build the model that the options, or the weights file's own header, name; load it."""
    if options.model is None:
        recipe = recipe_of(content, options.weights)
        if options.scale not in (None, recipe.scale, recipe.scale.partition("-")[0]):
            raise ValueError(
                f"{options.weights} was trained at {recipe.scale}, not {options.scale}"
            )
        if options.activation:
            recipe = recipe.replace(activation=options.activation)
        scale, classifier = scale_named(recipe.scale), build_classifier(recipe)
    else:
        scale = scale_of(options.scale, source, image_size=options.image_size)
        scale = scale.preprocessed(options.preprocessing())
        classifier = classifier_named(options.model, scale, activation=options.activation)
    for buffer, value in ((classifier.mean, options.mean), (classifier.std, options.std)):
        if value:
            buffer.copy_(torch.tensor(value).view_as(buffer))
    load_weights(options.weights, classifier)
    return _with_budgets(scale, options), classifier


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


def _evaluators(options: JudgeOptions, scale: Scale) -> Iterator[Evaluator]:
    """Set up the evaluators; `pgd-10` and its like are pgd of these lengths alone."""
    lengths = {f"pgd-{steps}": steps for steps in PGD_STEPS}
    steps = sorted(lengths[name] for name in {*options.evaluators} & lengths.keys())
    for name in dict.fromkeys("pgd" if n in lengths else n for n in options.evaluators):
        settings: dict[str, Any] = {}
        if class_named(name).takes_radii:
            settings["radii"] = tuple(dict.fromkeys(options.epsilon))
        if name == "pgd" and name not in options.evaluators:
            settings["steps"] = steps
        yield evaluator_named(name, scale, **settings)


def _print_scores(cells: Cells) -> None:
    scores, ledgers = cells.scores()
    if not ledgers:
        return
    width = max(len(score.name) for score in scores)
    print(f"{'score':{width}}  {'%':>6}  {'95 % interval':>15}  {'n':>6}")
    for score in scores:
        interval = f"[{100 * score.low:.1f}, {100 * score.high:.1f}]"
        print(f"{score.name:{width}}  {100 * score.value:6.2f}  {interval:>15}  {score.n:6d}")
    for flag in red_flags(ledgers):
        print(f"red flag: {flag}")
