"""What `python -m evaluators` does: judge a checkpoint, shard after shard, and report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress

from evaluators import PGD_STEPS, base, evaluator_named
from evaluators.base import Evaluator, cell_digest, device_named
from evaluators.health import red_flags
from evaluators.ledger import Score, to_parquet
from evaluators.shards import ShardStore
from evaluators.weights import load_any_weights
from trainables.data.base import Data
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.networks import Classifier, build_classifier, classifier_named
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_named
from trainables.store.checkpoint import recipe_json_of
from trainables.store.provenance import provenance
from trainables.store.storage import DamagedError, write_atomically

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions
    from trainables.store.tracking import Tracker

OF_RADII = ("pgd", "pgd-as-published", "autoattack")


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    scale, classifier = _loaded(options, source)
    weights = hashlib.sha256(options.weights.read_bytes()).hexdigest()[:12]
    folder = options.ledger or Path(
        "results/ledgers", f"{options.weights.stem.strip('.')}-{weights}"
    )
    _make(folder)
    tracker = _tracker(options.mlflow, scale) if options.mlflow else None
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    subject = repr((weights, classifier, normalisation, scale, source.root, folders))
    side = scale.image_size
    cells = [Cell(e, data, folder, subject, side) for e in _evaluators(options, scale)]
    interrupted = False
    for cell in cells:
        print(f"{cell.evaluator.name}: {json.dumps(cell.evaluator.identity(data))}")
        if not (options.report_partial or interrupted):
            interrupted = not cell.judge(classifier, device)
    judged = [cell for cell in cells if cell.store.judged]
    if not judged and not interrupted:
        raise ValueError(f"no image is judged yet in {folder}: leave --report-partial out")
    print(f"{options.weights} at scale {scale.name}: {scale.title}")
    paths = _report(judged, folder)
    if not all(cell.is_whole for cell in cells):
        print("Cut short: the same command judges the other images; --report-partial does not.")
        return not interrupted
    for cell in cells:
        cell.store.clear()
    if tracker:
        _log(tracker, options.weights, cells, paths, device)
    return True


@dataclass(frozen=True)
class Cell:
    """An evaluator's question on a data set, and its shards below a folder."""

    evaluator: Evaluator
    data: Data
    folder: Path
    subject: str
    side: int

    @cached_property
    def store(self) -> ShardStore:
        """The shards of this question and subject."""
        key = f"{self.subject} {cell_digest(self.evaluator, self.data)}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        total, least = self.evaluator.total(self.data), self.evaluator.least_shard
        return ShardStore(self.folder / "shards" / digest, total, side=self.side, least=least)

    @cached_property
    def ledger(self) -> pa.Table:
        """The verdicts that there are."""
        return self.store.merged()[0]

    @property
    def is_whole(self) -> bool:
        """Say whether every image is judged."""
        return self.store.judged == self.store.total

    @property
    def file(self) -> str:
        """Name the ledger's file; that of a part of the images says so."""
        return f"{self.evaluator.name}{'' if self.is_whole else '-' + self._part('-')}.parquet"

    @property
    def scores(self) -> list[Score]:
        """Return the scores; those of a part of the images say so in their names."""
        scores = self.evaluator.summarize(self.ledger)
        part = "" if self.is_whole else f" ({self._part(' ')} images)"
        return [replace(score, name=score.name + part) for score in scores]

    def judge(self, classifier: Classifier, device: torch.device) -> bool:
        """Judge the images that no shard holds yet, showing the time left; False on Ctrl-C."""
        store, console = self.store, Console(stderr=True)
        quiet = store.total <= self.evaluator.least_shard or not console.is_terminal
        with suppress(KeyboardInterrupt), Progress(console=console, disable=quiet) as progress:
            bar = progress.add_task(self.evaluator.name, total=store.total, completed=store.judged)
            while store.waiting:
                shard, began = store.take(), time.monotonic()
                ledger = base.evaluate(
                    self.evaluator, classifier, self.data, device=device, shard=shard
                )
                seconds, judged_by = time.monotonic() - began, provenance(str(device))
                store.add(shard, to_parquet(ledger, seconds=seconds, judged_by=judged_by))
                progress.advance(bar, len(shard))
            return True
        return False

    def _part(self, space: str) -> str:
        return f"{self.store.judged}{space}of{space}{self.store.total}"


def _loaded(options: JudgeOptions, source: DataSource) -> tuple[Scale, Classifier]:
    """Build the model that the options, or the weights file's own header, name; load it."""
    if options.model is None:
        recipe = _recipe_of(options.weights)
        if options.scale not in (None, recipe.scale, recipe.scale.partition("-")[0]):
            raise ValueError(
                f"{options.weights} was trained at {recipe.scale}, not {options.scale}"
            )
        if options.activation:
            recipe = recipe.replace(activation=options.activation)
        scale, classifier = scale_named(recipe.scale), build_classifier(recipe)
    else:
        scale = scale_of(options.scale or "digits", source, image_size=options.image_size)
        classifier = classifier_named(options.model, scale, activation=options.activation)
    for buffer, value in ((classifier.mean, options.mean), (classifier.std, options.std)):
        if value is not None:
            buffer.fill_(value)
    load_any_weights(options.weights, classifier)
    return _with_budgets(scale, options), classifier


def _recipe_of(weights: Path) -> Recipe:
    try:
        return Recipe.model_validate_json(recipe_json_of(weights))
    except OSError as error:
        raise ValueError(f"{weights} cannot be read: {error.strerror or error}") from None
    except DamagedError:
        raise
    except ValueError:
        raise ValueError(f"{weights} names no recipe of this project: give --model") from None


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
        if name in OF_RADII:
            settings["radii"] = tuple(dict.fromkeys(options.epsilon))
        if name == "pgd" and name not in options.evaluators:
            settings["steps"] = steps
        yield evaluator_named(name, scale, **settings)


def _report(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Print the scores and write the ledgers; return their paths."""
    if not cells:
        return []
    scores = [score for cell in cells for score in cell.scores]
    width = max(len(score.name) for score in scores)
    print(f"{'score':{width}}  {'%':>6}  {'95 % interval':>15}  {'n':>6}")
    for score in scores:
        interval = f"[{100 * score.low:.1f}, {100 * score.high:.1f}]"
        print(f"{score.name:{width}}  {100 * score.value:6.2f}  {interval:>15}  {score.n:6d}")
    for flag in red_flags(cell.ledger for cell in cells):
        print(f"red flag: {flag}")
    for cell in cells:
        _write(cell.ledger, folder / cell.file)
    print(f"Ledgers: {folder}")
    return [folder / cell.file for cell in cells]


def _write(ledger: pa.Table, path: Path) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(ledger, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"ledger folder {folder} cannot be made: {error.strerror}") from None


def _tracker(uri: str, scale: Scale) -> Tracker:
    from trainables.store.results import ARTIFACTS, folder_of, settle
    from trainables.store.tracking import Tracker, check_address

    check_address(uri)
    remote = uri.startswith(("http://", "https://"))
    folder = folder_of(uri)
    settle(folder)
    artifacts = None if remote else folder.resolve() / ARTIFACTS
    return Tracker(uri, experiment=f"robustness-{scale.name}", artifacts=artifacts)


def _log(
    tracker: Tracker,
    weights: Path,
    cells: Sequence[Cell],
    paths: list[Path],
    device: torch.device,
) -> None:
    from trainables.store.tracking import scores_as_metrics

    run_id = tracker.log_evaluation(
        str(weights),
        metrics=scores_as_metrics([score for cell in cells for score in cell.scores]),
        ledgers=paths,
        judged_by=provenance(str(device)),
    )
    print(f"MLflow run: {run_id}")
