"""What `python -m evaluators` does: judge a checkpoint, shard after shard, and report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators import PGD_STEPS, class_named, evaluator_named
from evaluators.base import Evaluator, device_named
from evaluators.health import red_flags
from evaluators.judging import Cells
from evaluators.loading import load_subject
from trainables.data.load import load_data
from trainables.scale import Scale

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    subject = load_subject(options, source)
    scale, classifier = _with_budgets(subject.scale, options), subject.classifier
    folder = options.ledger or Path("results/ledgers", f"{subject.name}-{subject.digest}")
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    judged = repr((subject.digest, classifier, normalisation, scale, source.root, folders))
    cells = Cells.of(_evaluators(options, scale), data, folder, judged, device)
    print(*subject.said, sep="\n")
    with suppress(KeyboardInterrupt):
        for evaluator in cells.stores:
            print(f"{evaluator.name}: {json.dumps(evaluator.identity(data))}")
            cells.judge(evaluator, classifier, data, device)
    print(f"{subject.name} at scale {scale.name}: {scale.title}")
    _print_scores(cells)
    if not cells.is_whole:
        print("Cut short: the same command judges the other images.")
        return False
    cells.write_ledgers()
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
