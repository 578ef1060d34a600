"""The command line: `python grid/run.py` runs the study; `--help` lists what it can be asked."""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from grid.estimate import print_plan
from grid.options import RunOptions, cluster_address
from grid.plan import Plan, build_plan, format_seconds
from grid.study import Study, load_study
from trainables.data.listing import DataSource, scale_of
from trainables.recipe import problem
from trainables.scale import Scale
from trainables.store.results import check_database, check_results, database_uri, settle

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
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
INTERRUPTED = 130
DECODED_FOLDER = "decoded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 something failed, 2 asked wrongly, 130 interrupted."""
    options = RunOptions.read(arguments)
    try:
        study = load_study(options.study)
        settings = {**study.settings, **options.settings()}
        study = study.model_copy(update={"settings": settings})
        source = options.source(cache=options.results / DECODED_FOLDER)
        scale, plan = _planned(options, study, source)
        if options.plan:
            print_plan(options, study, plan, scale, source)
            return 0
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _check_places(options)
        manifest = ""
        if options.check or source.root is not None:
            manifest = _checked(options, plan, scale, source)
        if options.check:
            _check_cluster(_launch(options, study, plan, scale, source), options.wait)
            return 0
        return _run(options, study, plan, scale, source, manifest)
    except ValueError as error:
        _refuse(problem(error))
    except KeyboardInterrupt:
        _say_stopped(f"Stopped. Continue with: {_command()}")
        return INTERRUPTED


def _check_places(options: RunOptions) -> None:
    """Raise ValueError, before the imports that take seconds, where results or Ray cannot be."""
    if options.report or options.status:
        if not options.mlflow:
            check_database(options.results)
        return
    cluster_address(options.address)
    if not options.check:
        check_results(options.results)


def _planned(options: RunOptions, study: Study, source: DataSource) -> tuple[Scale, Plan]:
    scale = scale_of(options.scale, source, image_size=options.image_size)
    plan = build_plan(
        study,
        scale,
        tables=options.tables,
        only=options.values_by_axis(),
        seeds=options.seeds,
        evaluators=options.evaluators,
    )
    return scale, plan


def _checked(options: RunOptions, plan: Plan, scale: Scale, source: DataSource) -> str:
    """Check the data and the machine, return the data's manifest; ValueError on what is wrong."""
    from grid.check import check, show

    findings, manifest = check(scale, source, plan, results=options.results)
    show(findings, table=options.check, manifest=manifest)
    return manifest


def _run(
    options: RunOptions,
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
    options: RunOptions,
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
        address=cluster_address(options.address),
        storage=storage if not storage or "://" in storage else str(Path(storage).resolve()),
    )


def _check_cluster(launch: Launch, seconds: float) -> None:
    """Look at the running Ray, if any, and print what was found; ValueError on what is wrong."""
    if launch.address is None:
        return
    from grid.check import show
    from grid.launch import check_cluster

    looks = check_cluster(launch, seconds)
    show(
        [(node, "ok" if well else "error", text) for node, (well, text) in looks.items()],
        table=True,
    )


def _report(options: RunOptions, study: Study, plan: Plan, scale: Scale) -> int:
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


def _say_finished(finished: Finished, options: RunOptions, seconds: float) -> None:
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


def _ui_command(options: RunOptions) -> str:
    if options.mlflow:
        return str(options.mlflow)
    return f"mlflow ui --backend-store-uri {shlex.quote(database_uri(options.results))}, then"


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _refuse(message: str) -> NoReturn:
    print(f"{RunOptions.prog}: {message}", file=sys.stderr)
    raise SystemExit(2)


def stop_on_signals() -> None:
    """Stop on SIGTERM and SIGHUP as on Ctrl-C; one that is ignored stays so (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


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
