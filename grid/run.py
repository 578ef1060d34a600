"""The command line: `python grid/run.py` runs the study; `--help` lists what it can be asked."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, NoReturn

from grid.plan import Plan, build_plan
from grid.progress import format_seconds
from grid.schedule import lanes_of, simulate
from grid.studies import AXES, STUDIES, Study, load_study, problem
from trainables.recipe import Recipe
from trainables.scale import SCALE_NAMES, Scale
from trainables.source import DataSource, add_data_options, scale_of, source_of
from trainables.watchdog import HUNG_SECONDS

if TYPE_CHECKING:
    from grid.launch import Finished

# Before ray and mlflow are imported: no calls home, no files outside the results, quiet logs.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "RAY_AUTH_MODE": "token",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
INTERRUPTED = 130
DECODED_FOLDER = "decoded"
INDENT = " " * 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 something failed, 2 asked wrongly, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    options.sent = _without_on(given)
    try:
        source = source_of(options, cache=options.results / DECODED_FOLDER)
        study = load_study(options.study)
        scale, plan = _planned(options, study, source)
        _check_schedule(options)
        if options.plan:
            print_plan(study, plan, scale)
            if options.nodes:
                print_schedule(options, plan)
            return 0
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        manifest = ""
        if options.check or source.root is not None:
            source, manifest = _examined(options, plan, scale, source)
        if options.check:
            return 0
        if source.skipped:
            scale, plan = _planned(options, study, source)
        return _run(options, study, plan, scale, source, manifest)
    except ValueError as error:
        _refuse(problem(error))


def _planned(options: argparse.Namespace, study: Study, source: DataSource) -> tuple[Scale, Plan]:
    scale = scale_of(options.scale, source, image_size=options.image_size)
    plan = build_plan(
        study,
        scale,
        tables=options.tables,
        only=_parse_only(options.only),
        seeds=options.seeds,
        evaluators=options.evaluators,
    )
    return scale, plan


def _examined(
    options: argparse.Namespace, plan: Plan, scale: Scale, source: DataSource
) -> tuple[DataSource, str]:
    """Return the source without damaged images, and its manifest; ValueError on what is wrong."""
    from rich.console import Console

    from grid.doctor import examine, without_damaged

    examination = examine(scale, source, plan, results=options.results)
    if options.check:
        examination.print(Console())
    else:
        for warning in examination.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if examination.problem:
        raise ValueError(examination.problem)
    return without_damaged(source, examination), examination.manifest


def _run(
    options: argparse.Namespace,
    study: Study,
    plan: Plan,
    scale: Scale,
    source: DataSource,
    manifest: str,
) -> int:
    began = time.monotonic()
    if options.on:
        return _run_on(options)
    if options.report:
        return _report(options, study, plan, scale)
    if options.status:
        from grid.status import print_status

        print_status(options.results, options.mlflow, scale, plan)
        return 0
    from grid.cluster import Placement, found_address
    from grid.launch import run_study

    placement = Placement(
        workers=options.workers,
        cpus=options.cpus_per_worker,
        gpus=options.gpus_per_worker,
        compile=options.compile,
        hung_after=options.hung_after,
    )
    try:
        finished = run_study(
            study,
            plan,
            scale,
            results=options.results,
            mlflow=options.mlflow,
            placement=placement,
            source=source,
            manifest=manifest,
            address=found_address(options.address),
            storage=_absolute(options.storage),
        )
    except KeyboardInterrupt:
        print(f"\nStopped. Continue with: {_command()}", file=sys.stderr)
        return INTERRUPTED
    _say_finished(finished, options, time.monotonic() - began)
    return 1 if finished.failures else 0


def _report(options: argparse.Namespace, study: Study, plan: Plan, scale: Scale) -> int:
    from grid.report.build import write_report
    from grid.status import open_existing

    tracker = open_existing(options.results, options.mlflow, scale)
    print(write_report(tracker, study, plan, scale, options.results / "report"))
    return 0


def _absolute(storage: str | None) -> str | None:
    return storage if storage is None or "://" in storage else str(Path(storage).resolve())


def _run_on(options: argparse.Namespace) -> int:
    from grid.remote import ROOT, run_on

    if Path(options.study).suffix and not (ROOT / options.study).resolve().is_relative_to(ROOT):
        raise ValueError(f"--on sends this project, and {options.study} is not in it")
    try:
        return run_on(options.on, options.sent)
    except KeyboardInterrupt:
        print(f"\nIt goes on without you. Return with: {_command()}", file=sys.stderr)
        return INTERRUPTED


def _say_finished(finished: Finished, options: argparse.Namespace, seconds: float) -> None:
    print(
        f"Trained {finished.trained} and judged {finished.judged} cells "
        f"in {format_seconds(seconds)}.\n"
        f"Report:    {finished.report}\n"
        f"MLflow UI: {_ui_command(options)}"
    )
    for failure in finished.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if finished.failures:
        print(f"Try what failed again with: {_command()}", file=sys.stderr)


def _ui_command(options: argparse.Namespace) -> str:
    if options.mlflow:
        return str(options.mlflow)
    database = f"sqlite:///{options.results.resolve()}/mlflow.db"
    return f"mlflow ui --backend-store-uri {shlex.quote(database)}  (http://127.0.0.1:5000)"


def _without_on(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as the head of a cluster gets them: without --on and its value."""
    taker = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    taker.add_argument("--on")
    return taker.parse_known_args(arguments)[1]


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python grid/run.py",
        allow_abbrev=False,
        description="Re-run and extend the study 'Are Transformers More Robust Than CNNs?'. "
        "The same command again continues: what is done is left alone.",
    )
    parser.add_argument(
        "--study",
        default="paper",
        metavar="NAME|FILE",
        help=f"{', '.join(STUDIES)}, or a .toml file (default: paper)",
    )
    parser.add_argument("--tables", nargs="+", metavar="T", help="only these tables, e.g. T5 T7")
    parser.add_argument(
        "--only",
        metavar="'AXIS=VALUE ...'",
        help="only trials with these values, e.g. 'family=resnet activation=relu,gelu'",
    )
    parser.add_argument(
        "--evaluators", nargs="+", metavar="E", help="ask only these, e.g. clean pgd"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="train each recipe N times"
    )
    parser.add_argument(
        "--scale",
        default="digits",
        help=f"{', '.join(SCALE_NAMES)} (default: digits, no download)",
    )
    add_data_options(parser)
    _add_other_answers(parser)
    _add_places(parser)
    _add_placement(parser)
    return parser


def _add_other_answers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="print the trials and stop")
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at data, disk, memory and device, print what was found, and stop",
    )
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="with --plan: simulate the training on N nodes"
    )
    parser.add_argument("--gpus-per-node", type=_positive, metavar="G", help="of these nodes")
    parser.add_argument(
        "--seconds-per-unit",
        type=_share,
        metavar="X",
        help="seconds of one worker for a unit of cost: at digits a second of one core, at "
        "imagenet an epoch of 10^9 multiply-accumulates an image",
    )
    parser.add_argument("--report", action="store_true", help="rebuild the report and stop")
    parser.add_argument(
        "--status", action="store_true", help="say where the study stands, from MLflow, and stop"
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(os.environ.get("GRID_RESULTS", "results")),
        metavar="DIR",
        help="where everything a run makes lies; on a cluster a folder that all nodes share "
        "(default: GRID_RESULTS, or results)",
    )
    parser.add_argument(
        "--storage",
        metavar="DIR|URI",
        help="where trials keep checkpoints and weights: a folder, s3://, gs:// (default: results)",
    )
    parser.add_argument(
        "--mlflow",
        metavar="URI",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="an MLflow server (default: MLFLOW_TRACKING_URI, or a database in the results)",
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on",
        type=Path,
        metavar="CLUSTER.yaml",
        help="run on a cluster that `ray up` started: send this project, follow the log",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a Ray cluster, or `local` (default: RAY_ADDRESS, the one `ray start` joined here, "
        "or this machine alone)",
    )
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="of each trial (default: 1)"
    )
    parser.add_argument(
        "--cpus-per-worker",
        "--cpus-per-trial",
        type=_positive,
        default=1,
        metavar="C",
        help="default: 1",
    )
    parser.add_argument(
        "--gpus-per-worker",
        "--gpus-per-trial",
        type=_share,
        default=0.0,
        metavar="G",
        help="default: 0",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="train through torch.compile: faster on a GPU, other bits than without",
    )
    parser.add_argument(
        "--hung-after",
        type=_seconds,
        default=HUNG_SECONDS,
        metavar="SECONDS",
        help="kill and restart a worker or evaluator that does no step for so long "
        f"(default: {HUNG_SECONDS:.0f})",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _seconds(text: str) -> float:
    seconds = _share(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError("a step takes more than 0 seconds")
    return seconds


def _parse_only(text: str | None) -> dict[str, tuple[str, ...]]:
    only = {}
    for part in (text or "").split():
        axis, equals, values = part.partition("=")
        if not equals or not values:
            raise ValueError(f"--only wants AXIS=VALUE, not {part!r}")
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r} in --only; one of {', '.join(AXES)}")
        only[axis] = tuple(values.split(","))
    return only


def print_plan(study: Study, plan: Plan, scale: Scale) -> None:
    """Print the trials, what they share, and what was refused."""
    print(f"Study {study.name} at scale {scale.name}: {scale.title}")
    for trial in plan:
        print(f"  {trial.digest}  {trial.recipe.describe()}")
        print(f"{INDENT}{_hyperparameters(trial.recipe)}")
        print(f"{INDENT}{'; '.join(trial.serves)} | {', '.join(trial.evaluators)}")
    for refused in plan.refused:
        print(f"  refused: {refused.combination}: {refused.reason}")
    for name, images in _subsets(plan, scale).items():
        print(f"  {name}: {images} images, an interval of at most ±{_reach(images):.0f} points")
    shared = plan.asked - len(plan.trials)
    print(
        f"{plan.asked} rows asked for, {len(plan.trials)} trainings ({shared} shared), "
        f"{len(plan.refused)} combinations refused"
    )


def _subsets(plan: Plan, scale: Scale) -> dict[str, int]:
    """Return how many images the costly evaluators ask about."""
    sizes = {
        "pgd": scale.attack_subset,
        "autoattack-small": scale.autoattack_subset,
        "autoattack": scale.autoattack_subset,
        "tpa": scale.patch.images,
    }
    asked = {name for trial in plan for name in trial.evaluators}
    return {name: images for name, images in sizes.items() if name in asked}


def _reach(images: int) -> float:
    """Return half the width, in points, of the widest 95 % Wilson interval of n images."""
    z = NormalDist().inv_cdf(0.975)
    return 50 * z / math.sqrt(images + z**2)


def _check_schedule(options: argparse.Namespace) -> None:
    asked = [options.nodes, options.gpus_per_node, options.seconds_per_unit]
    if any(asked) and not (all(asked) and options.plan):
        raise ValueError("--nodes, --gpus-per-node and --seconds-per-unit go together, with --plan")


def print_schedule(options: argparse.Namespace, plan: Plan) -> None:
    """Print how long the trials would train on some nodes, by simulation."""
    gpus = options.gpus_per_worker or 1.0
    lanes = lanes_of(
        options.nodes, options.gpus_per_node, workers=options.workers, gpus_per_worker=gpus
    )
    found = simulate(
        plan.trials,
        lanes=lanes,
        workers=options.workers,
        seconds_per_unit=options.seconds_per_unit,
    )
    over = found.makespan / found.lower_bound - 1
    print(
        f"Training on {options.nodes} nodes of {options.gpus_per_node} GPUs, {lanes} trials at "
        f"once, of {options.workers} workers of {gpus:g} GPUs: {format_seconds(found.makespan)}, "
        f"{over:.0%} over the least possible; {found.utilisation:.0%} of the workers in use"
    )


def _hyperparameters(recipe: Recipe) -> str:
    parts = [
        f"rate {recipe.learning_rate:g}",
        f"decay {recipe.weight_decay:g}",
        f"batch {recipe.batch_size}",
        f"warm-up {recipe.warmup_epochs:g}",
    ]
    if recipe.norm == "ghost":
        parts.append(f"ghost batch {recipe.ghost_batch} of {recipe.forward_batch}")
    if recipe.adversary:
        parts.append(f"epsilon {recipe.adversary.epsilon * 255:g}/255")
    return ", ".join(parts)


def _refuse(message: str) -> NoReturn:
    print(f"grid/run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
