"""The command line: `python grid/run.py` runs the study; `--help` lists what it can be asked."""

from __future__ import annotations

import argparse
import atexit
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from grid.address import found_address
from grid.axes import AXES, SETTABLE, problem
from grid.plan import Plan, build_plan
from grid.progress import format_seconds
from grid.signals import stop_on_signals
from grid.study import DEFAULT, STUDIES, Study, load_study
from grid.summary import add_plan_options, check_plan_options, print_plan
from trainables.data.listing import DataSource, scale_of
from trainables.options import DataOptions, amount, count, uri_without_password
from trainables.recipe import unknown
from trainables.scale import Scale, scale_names
from trainables.store.results import check_database, check_results, database_uri, settle
from trainables.watchdog import HUNG_SECONDS

if TYPE_CHECKING:
    from grid.launch import Finished, Launch

# Before ray and mlflow are imported: no calls home, no files outside the results, quiet logs; what
# is to be tried again `PatientClient` knows.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "RAY_AUTH_MODE": "token",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
INTERRUPTED = 130
DECODED_FOLDER = "decoded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 something failed, 2 asked wrongly, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        study = load_study(options.study)
        settings = {**study.settings, **_parse_settings(options.settings)}
        study = replace(study, settings=settings)
        options.image_size = (data := DataOptions.of(options)).image_size
        source = data.source(cache=options.results / DECODED_FOLDER)
        scale, plan = _planned(options, study, source)
        check_plan_options(options)
        if options.plan:
            print_plan(options, study, plan, scale, source)
            return 0
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _check_places(options)
        manifest = ""
        if options.check or source.root is not None:
            source, manifest = _examined(options, plan, scale, source)
        if options.check:
            _check_cluster(_launch(options, study, plan, scale, source), options.check)
            return 0
        if source.skipped:
            scale, plan = _planned(options, study, source)
        return _run(options, study, plan, scale, source, manifest)
    except ValueError as error:
        _refuse(problem(error))
    except KeyboardInterrupt:
        _say_stopped(f"Stopped. Continue with: {_command()}")
        return INTERRUPTED


def _check_places(options: argparse.Namespace) -> None:
    """Raise ValueError, before the imports that take seconds, where results or Ray cannot be."""
    if options.report or options.status:
        if not options.mlflow:
            check_database(options.results)
        return
    found_address(options.address)
    if not options.check:
        check_results(options.results)


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

    from grid.check import check, without_damaged

    findings = check(scale, source, plan, results=options.results)
    if options.check:
        findings.print(Console())
    else:
        for warning in findings.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if findings.problem:
        raise ValueError(findings.problem)
    return without_damaged(source, findings), findings.manifest


def _run(
    options: argparse.Namespace,
    study: Study,
    plan: Plan,
    scale: Scale,
    source: DataSource,
    manifest: str,
) -> int:
    began = time.monotonic()
    if options.report:
        return _report(options, study, plan, scale)
    if options.status:
        from grid.status import print_status

        print_status(options.results, options.mlflow, scale, plan)
        return 0
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    from grid.launch import run_study

    finished = run_study(_launch(options, study, plan, scale, source, manifest))
    _say_finished(finished, options, time.monotonic() - began)
    return 1 if finished.failures else 0


def _launch(
    options: argparse.Namespace,
    study: Study,
    plan: Plan,
    scale: Scale,
    source: DataSource,
    manifest: str = "",
) -> Launch:
    from grid.cluster import Placement
    from grid.launch import Launch

    storage = options.storage
    return Launch(
        study=study,
        plan=plan,
        scale=scale,
        results=options.results,
        mlflow=options.mlflow,
        placement=Placement(
            workers=options.workers,
            cpus=options.cpus_per_worker,
            gpus=options.gpus_per_worker,
            compile=options.compile,
            hung_after=options.hung_after,
        ),
        source=source,
        manifest=manifest,
        address=found_address(options.address),
        storage=storage if not storage or "://" in storage else str(Path(storage).resolve()),
    )


def _check_cluster(launch: Launch, seconds: float) -> None:
    """Look at the running Ray, if any, and print what was found; ValueError on what is wrong."""
    from rich.console import Console

    if launch.address is None:
        return
    from grid.check import Finding, Findings
    from grid.launch import check_cluster

    looks = check_cluster(launch, seconds)
    findings = Findings(
        [Finding(k, "ok" if well else "error", text) for k, (well, text) in looks.items()]
    )
    findings.print(Console())
    if findings.problem:
        raise ValueError(findings.problem)


def _report(options: argparse.Namespace, study: Study, plan: Plan, scale: Scale) -> int:
    from grid.report.build import write_report
    from grid.status import open_existing

    if not options.mlflow:
        settle(options.results)
    tracker = open_existing(options.results, options.mlflow, scale)
    print(write_report(tracker, study, plan, scale, options.results / "report"))
    return 0


def _say_stopped(message: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"\n{message}", file=sys.stderr)


def _say_finished(finished: Finished, options: argparse.Namespace, seconds: float) -> None:
    print(
        f"Trained {finished.trained} and judged {finished.judged} cells "
        f"in {format_seconds(seconds)}.\n"
        f"Report:    {finished.report}\n"
        f"MLflow UI: {_ui_command(options)}\n"
        f"           {finished.comparison}"
    )
    for failure in finished.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if finished.failures:
        print(f"Try what failed again with: {_command()}", file=sys.stderr)


def _ui_command(options: argparse.Namespace) -> str:
    if options.mlflow:
        return str(options.mlflow)
    return f"mlflow ui --backend-store-uri {shlex.quote(database_uri(options.results))}, then"


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
        default=DEFAULT,
        metavar="NAME|FILE",
        help=f"{', '.join(STUDIES)}, or a .toml file (default: {DEFAULT})",
    )
    parser.add_argument("--tables", nargs="+", metavar="T", help="only these tables, e.g. T5 T7")
    parser.add_argument(
        "--only",
        metavar="'AXIS=VALUE ...'",
        help="only trials with these values, e.g. 'family=resnet activation=relu,gelu'",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="settings",
        metavar="FIELD=VALUE",
        help="train every trial so, e.g. precision=bf16 micro_batch=256 (other trials than without;"
        " plain batch normalisation takes its statistics over a micro-batch)",
    )
    parser.add_argument(
        "--evaluators", nargs="+", metavar="E", help="ask only these, e.g. clean pgd"
    )
    parser.add_argument(
        "--seeds", type=count, default=1, metavar="N", help="train each recipe N times"
    )
    parser.add_argument(
        "--scale",
        default="digits",
        help=f"{', '.join(scale_names())} (default: digits, no download)",
    )
    DataOptions.add_to(parser)
    _add_other_answers(parser)
    _add_places(parser)
    _add_placement(parser)
    return parser


def _add_other_answers(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument(
        "--check",
        nargs="?",
        type=count,
        const=600,
        metavar="SECONDS",
        help="look at data, disk, memory and device, print what was found, and stop; on a cluster "
        "look at every node, and wait for those that its file promises (default: 600 s)",
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
        type=uri_without_password,
        metavar="DIR|URI",
        help="where trials keep checkpoints and weights: a folder, s3://, gs:// (default: results)",
    )
    parser.add_argument(
        "--mlflow",
        type=uri_without_password,
        metavar="URI",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="an MLflow server (default: MLFLOW_TRACKING_URI, or a database in the results)",
    )


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a Ray cluster, or `local` (default: RAY_ADDRESS, the one `ray start` joined here, "
        "or this machine alone)",
    )
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="of each trial (default: 1)"
    )
    parser.add_argument(
        "--cpus-per-worker",
        "--cpus-per-trial",
        type=count,
        default=1,
        metavar="C",
        help="default: 1",
    )
    parser.add_argument(
        "--gpus-per-worker",
        "--gpus-per-trial",
        type=amount,
        default=0.0,
        metavar="G",
        help="default: 0; 0.75 on a single GPU, of which evaluators hold the rest",
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


def _seconds(text: str) -> float:
    seconds = amount(text)
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
            raise ValueError(f"--only: {unknown('axis', axis, AXES)}")
        only[axis] = tuple(values.split(","))
    return only


def _parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals or not value:
            raise ValueError(f"--set wants FIELD=VALUE, not {text!r}")
        if field not in SETTABLE:
            raise ValueError(f"--set: {unknown('field', field, SETTABLE)}")
        if field in settings:
            raise ValueError(f"--set has two values of {field}; leave one out")
        settings[field] = _parse_value(value)
    return settings


def _parse_value(text: str) -> Any:
    """Read a value as a study file would have it, or as text where that is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _refuse(message: str) -> NoReturn:
    print(f"grid/run.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def _leave(code: int) -> NoReturn:
    """End the process without taking apart all that it has loaded, which takes seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    stop_on_signals()
    _leave(main())
