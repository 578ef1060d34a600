"""The command line: `python -m evaluators` asks evaluators' questions of any checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from evaluators import EVALUATORS
from trainables.data.listing import DataSource, scale_of, unused_test_folder
from trainables.models import MODELS, check_model_name
from trainables.options import (
    add_data_options,
    count,
    fraction,
    source_of,
    uri_without_password,
)
from trainables.recipe import ACTIVATIONS
from trainables.scale import Scale, scale_named, scale_names

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from evaluators.base import Evaluator
    from evaluators.ledger import Score
    from evaluators.shards import ShardStore
    from trainables.data.base import Data
    from trainables.networks import Classifier
    from trainables.recipe import Recipe
    from trainables.store.tracking import Tracker

INTERRUPTED = 130
# Single lengths of pgd, which take its shorter trajectory.
LENGTHS = (5, 10, 50, 100)
SINGLE_SCORES = {f"pgd-{steps}": "pgd" for steps in LENGTHS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 asked wrongly, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        _check_names(options)
        return _run(options)
    except ValueError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    from evaluators.base import device_named
    from trainables.data.load import load_data

    device = device_named(options.device)
    source = _readable(source_of(options))
    scale, classifier = _load(options, source)
    weights = hashlib.sha256(options.weights.read_bytes()).hexdigest()[:12]
    named = f"{options.weights.stem.strip('.')}-{weights}"
    folder = options.ledger or Path("results/ledgers") / named
    _make(folder)
    tracker = _tracker(options.mlflow, scale) if options.mlflow else None
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    whose = repr((weights, classifier, normalisation, scale, source.root, folders))
    evaluators = [
        _evaluator(name, scale, options)
        for name in dict.fromkeys(SINGLE_SCORES.get(asked, asked) for asked in options.evaluators)
    ]
    stores = [_store(evaluator, data, folder, whose) for evaluator in evaluators]
    interrupted = False
    for evaluator, store in zip(evaluators, stores, strict=True):
        print(f"{evaluator.name}: {json.dumps(evaluator.identity(data))}")
        if not (options.report_partial or interrupted):
            judge = partial(_judge, evaluator, store, classifier, data, device=device)
            interrupted = not judge(side=scale.image_size)
    pairs = zip(evaluators, stores, strict=True)
    answers = [_Answer.of(evaluator, store) for evaluator, store in pairs if store.judged]
    if not answers and not interrupted:
        raise ValueError(f"no image is judged yet in {folder}: leave --report-partial out")
    print(f"{options.weights} at scale {scale.name}: {scale.title}")
    paths = _report(answers, folder)
    if any(store.judged < store.total for store in stores):
        print("Cut short: the same command judges the other images; --report-partial does not.")
        return INTERRUPTED if interrupted else 0
    for store in stores:
        store.clear()
    if tracker:
        _log(tracker, options.weights, answers, paths, device=device)
    return 0


@dataclass(frozen=True)
class _Answer:
    """An evaluator's ledger and scores, on `judged` of its `total` images."""

    name: str
    judged: int
    total: int
    ledger: pa.Table
    scores: list[Score]

    @classmethod
    def of(cls, evaluator: Evaluator, store: ShardStore) -> _Answer:
        """Read a store that holds a shard at least."""
        ledger, _ = store.merged()
        return cls(evaluator.name, store.judged, store.total, ledger, evaluator.summarize(ledger))

    @property
    def file(self) -> str:
        whole = self.judged == self.total
        return f"{self.name}.parquet" if whole else f"{self.name}-{self._part('-')}.parquet"

    @property
    def named_scores(self) -> list[Score]:
        """Return the scores; those of a part of the images say so in their names."""
        if self.judged == self.total:
            return self.scores
        part = f" ({self._part(' ')} images)"
        return [dataclasses.replace(score, name=score.name + part) for score in self.scores]

    def _part(self, space: str) -> str:
        return f"{self.judged}{space}of{space}{self.total}"


def _report(answers: Sequence[_Answer], folder: Path) -> list[Path]:
    """Print the scores and write the ledgers; return their paths."""
    from evaluators.red_flags import red_flags

    if not answers:
        return []
    _print_table([score for answer in answers for score in answer.named_scores])
    for flag in red_flags(answer.ledger for answer in answers):
        print(f"red flag: {flag}")
    paths = _write({answer.file: answer.ledger for answer in answers}, folder)
    print(f"Ledgers: {folder}")
    return paths


def _log(
    tracker: Tracker,
    weights: Path,
    answers: Sequence[_Answer],
    paths: list[Path],
    *,
    device: torch.device,
) -> None:
    from trainables.store.provenance import provenance
    from trainables.store.tracking import scores_as_metrics

    run_id = tracker.log_evaluation(
        str(weights),
        metrics=scores_as_metrics([score for answer in answers for score in answer.scores]),
        ledgers=paths,
        judged_by=provenance(str(device)),
    )
    print(f"MLflow run: {run_id}")


def _readable(source: DataSource) -> DataSource:
    """Return the source without its damaged images, where that is asked for."""
    if source.root and (unused := unused_test_folder(source.root)):
        print(unused, file=sys.stderr)
    if source.root is None or not source.skip_damaged:
        return source
    from trainables.data.scan import damaged_images

    damaged = damaged_images(source)
    for path in sorted(damaged):
        print(f"skipped: {source.root / path} cannot be read", file=sys.stderr)
    return dataclasses.replace(source, skipped=damaged)


def _load(options: argparse.Namespace, source: DataSource) -> tuple[Scale, Classifier]:
    """Build the model that the options, or the weights file's own header, name; load it."""
    from evaluators.weights import load_any_weights
    from trainables.networks import build_classifier, classifier_named

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
    for held, asked in ((classifier.mean, options.mean), (classifier.std, options.std)):
        if asked is not None:
            held.fill_(asked)
    load_any_weights(options.weights, classifier)
    return _with_budgets(scale, options), classifier


def _with_budgets(scale: Scale, options: argparse.Namespace) -> Scale:
    """Return the scale with the radius, images and patches that the options ask for."""
    asked = {
        "images": options.attack_images,
        "patches": options.patches,
        "area": options.patch_area,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    patch = dataclasses.replace(scale.patch, **given)
    patch.side(scale.image_size)
    subsets = dict.fromkeys(("attack_subset", "autoattack_subset"), options.attack_images)
    return dataclasses.replace(
        scale,
        patch=patch,
        epsilon=options.epsilon[0] if options.epsilon else scale.epsilon,
        **(subsets if options.attack_images else {}),
    )


def _evaluator(name: str, scale: Scale, options: argparse.Namespace) -> Evaluator:
    """Set up an evaluator as the options ask."""
    from evaluators import evaluator_named
    from evaluators.autoattack import AutoAttack
    from evaluators.pgd import PGD, PublishedPGD, at_radius

    several = list(dict.fromkeys(options.epsilon or ()))
    if name == "pgd":
        return PGD(scale, radii=several, steps=_lengths(options.evaluators))
    if name == "pgd-as-published":
        return PublishedPGD(scale, radii=several)
    if name == "autoattack" and len(several) > 1:
        return AutoAttack(scale, radii={name + at_radius(r): float(r) for r in several})
    return evaluator_named(name, scale)


def _lengths(asked: Sequence[str]) -> list[int]:
    """Return the lengths of pgd that are asked for: `pgd` stands for all of them."""
    return [steps for steps in LENGTHS if {"pgd", f"pgd-{steps}"} & set(asked)]


def _recipe_of(weights: Path) -> Recipe:
    from trainables.recipe import Recipe
    from trainables.store.checkpoint import recipe_json_of
    from trainables.store.storage import DamagedError

    try:
        return Recipe.model_validate_json(recipe_json_of(weights))
    except OSError as error:
        raise ValueError(f"{weights} cannot be read: {error.strerror or error}") from None
    except DamagedError:
        raise
    except ValueError:
        raise ValueError(f"{weights} names no recipe of this project: give --model") from None


def _store(evaluator: Evaluator, data: Data, folder: Path, whose: str) -> ShardStore:
    from evaluators.base import cell_digest
    from evaluators.shards import ShardStore

    key = hashlib.sha256(f"{whose} {cell_digest(evaluator, data)}".encode()).hexdigest()[:12]
    return ShardStore(folder / "shards" / key, evaluator.total(data))


def _judge(
    evaluator: Evaluator,
    store: ShardStore,
    classifier: Classifier,
    data: Data,
    *,
    device: torch.device,
    side: int,
) -> bool:
    """Judge the images that no shard holds yet, showing the time left; False on Ctrl-C."""
    from rich.console import Console
    from rich.progress import Progress

    from evaluators.base import evaluate
    from evaluators.ledger import to_parquet
    from evaluators.shards import Pace
    from trainables.store.provenance import provenance

    pace = Pace(side=side, least=evaluator.least_shard)
    console = Console(stderr=True)
    quiet = store.total <= evaluator.least_shard or not console.is_terminal
    with suppress(KeyboardInterrupt), Progress(console=console, disable=quiet) as progress:
        bar = progress.add_task(evaluator.name, total=store.total, completed=store.judged)
        while missing := store.missing():
            shard, _ = pace.cut(missing[0])
            began = time.monotonic()
            ledger = evaluate(evaluator, classifier, data, device=device, shard=shard)
            seconds = time.monotonic() - began
            judged_by = provenance(str(device))
            store.add(shard, to_parquet(ledger, seconds=seconds, judged_by=judged_by))
            pace.add(len(shard), seconds)
            progress.advance(bar, len(shard))
        return True
    return False


def _print_table(scores: Sequence[Score]) -> None:
    width = max(len(score.name) for score in scores)
    print(f"{'score':{width}}  {'%':>6}  {'95 % interval':>15}  {'n':>6}")
    for score in scores:
        interval = f"[{100 * score.low:.1f}, {100 * score.high:.1f}]"
        print(f"{score.name:{width}}  {100 * score.value:6.2f}  {interval:>15}  {score.n:6d}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"ledger folder {folder} cannot be made: {error.strerror}") from None


def _write(ledgers: dict[str, pa.Table], folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainables.store.storage import write_atomically

    for name, ledger in ledgers.items():
        sink = pa.BufferOutputStream()
        pq.write_table(ledger, sink, compression="zstd")
        write_atomically(folder / name, sink.getvalue().to_pybytes())
    return [folder / name for name in ledgers]


def _tracker(uri: str, scale: Scale) -> Tracker:
    from trainables.store.results import ARTIFACTS, folder_of, settle
    from trainables.store.tracking import Tracker, check_address

    check_address(uri)
    remote = uri.startswith(("http://", "https://"))
    folder = folder_of(uri)
    settle(folder)
    artifacts = None if remote else folder.resolve() / ARTIFACTS
    return Tracker(uri, experiment=f"robustness-{scale.name}", artifacts=artifacts)


def _check_names(options: argparse.Namespace) -> None:
    known = [*EVALUATORS, *SINGLE_SCORES]
    for name in options.evaluators:
        if name not in known:
            raise ValueError(f"unknown evaluator {name!r}; one of {', '.join(known)}")
    model = options.model
    if model is not None:
        check_model_name(model)
    if options.scale not in (None, *scale_names()):
        scale_named(options.scale)
    if options.std is not None and not 0 < options.std < math.inf:
        raise ValueError(f"--std {options.std:g} is not above 0")
    if options.mean is not None and not math.isfinite(options.mean):
        raise ValueError(f"--mean {options.mean:g} is no number")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluators",
        description="Ask evaluators' questions of a checkpoint of any origin; print the scores.",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="FILE",
        help=".safetensors, or torch's .pth, .pt, .th or .bin",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(MODELS)} or timm:NAME (default: as the weights file's header says)",
    )
    parser.add_argument(
        "--activation", choices=ACTIVATIONS, help="replaces the network's own activation"
    )
    parser.add_argument(
        "--evaluators",
        nargs="+",
        default=["clean"],
        metavar="E",
        help=f"{', '.join([*EVALUATORS, *SINGLE_SCORES])} (default: clean)",
    )
    parser.add_argument(
        "--scale", help=f"{', '.join(scale_names())} (default: the file's, or digits)"
    )
    add_data_options(parser)
    whose = "default: those of the file's recipe, or the scale's"
    normalisation = f"of the normalisation, all channels, pixels in [0, 1] ({whose})"
    parser.add_argument("--mean", type=float, metavar="M", help=f"mean {normalisation}")
    parser.add_argument("--std", type=float, metavar="S", help=f"deviation {normalisation}")
    _add_attack_options(parser)
    parser.add_argument(
        "--report-partial",
        action="store_true",
        help="judge nothing; report the images that a run of this command, cut short, has judged",
    )
    parser.add_argument("--device", metavar="D", help="default: cuda where there is one, or cpu")
    parser.add_argument(
        "--ledger",
        type=Path,
        metavar="DIR",
        help="where the ledgers go (default: results/ledgers/NAME-OF-THE-FILE-ITS-DIGEST)",
    )
    parser.add_argument(
        "--mlflow",
        type=uri_without_password,
        metavar="URI",
        help="log scores and ledgers there as well",
    )
    return parser


def _add_attack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epsilon",
        type=_radius,
        nargs="+",
        metavar="E",
        help="radii of pgd and autoattack in the max-norm, of pixels in [0, 1], e.g. 4/255 0.5/255 "
        "(default: the scale's)",
    )
    parser.add_argument(
        "--attack-images",
        type=count,
        metavar="N",
        help="images that pgd, autoattack and tpa attack, drawn by a fixed seed "
        "(default: the scale's)",
    )
    parser.add_argument("--patches", type=count, metavar="N", help="of tpa, at most, per image")
    parser.add_argument(
        "--patch-area", type=_area, metavar="A", help="share of the image that one patch covers"
    )


def _radius(text: str) -> Fraction:
    return fraction(text, "radius for pixels in [0, 1]", "4/255")


def _area(text: str) -> float:
    return float(fraction(text, "share of an image", "0.025"))


def _refuse(message: str) -> NoReturn:
    print(f"python -m evaluators: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
