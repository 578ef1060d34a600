"""The command line: `python grid/run.py` runs the study; `--help` lists what it can be asked."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from grid.axes import at_key
from grid.estimate import held_out_images, print_plan
from grid.options import RunOptions, cluster_address
from grid.plan import Plan, build_plan, format_seconds, with_sizes
from grid.study import Study, load_study
from trainables.buildable import check_buildable
from trainables.data.listing import DataSource, scale_of
from trainables.options import again, installed, stop_on_signals
from trainables.recipe import Preprocessing, check_team, problem
from trainables.scale import Scale
from trainables.store.results import check_database, settle, sole_run

if TYPE_CHECKING:
    from grid.design import Designed
    from grid.launch import Finished

# Before ray and mlflow are imported: no calls home, no files outside the results, quiet logs; what
# is to be tried again `patiently` knows.
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
DECODED_FOLDER = "decoded"


def main(arguments: Sequence[str] | None = None, prog: str = RunOptions.prog) -> int:
    """Run the command; 0 done, 1 something failed, 2 wrong input, 130 interrupted."""
    options = RunOptions.read(arguments, prog)
    try:
        return _run(options)
    except ValueError as error:
        print(f"{prog}: {problem(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ConnectionError as error:
        print(f"{prog}: {error}. Continue with: {again()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            print(f"\nStopped. Continue with: {again()}", file=sys.stderr)
        return 130


def _run(options: RunOptions) -> int:
    if options.pull:
        from trainables.store.snapshot import pull  # pyarrow, which --help spares

        pull(options.pull, options.results)
        print(f"{options.results} has the study of {options.pull}: --report, or continue it")
        return 0
    if options.pack and options.data:
        from trainables.data.packing import pack  # pyarrow

        print(f"{options.pack} has {pack(options.data.absolute(), options.pack)}: --data reads it")
        return 0
    if not _only_looks(options):
        options.source().stage()
    study, plan, scale, source = _planned_for(options)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.report or options.status:
        return _read_results(options, study, plan, scale)
    designed = partial(_designed, options, study, plan, scale, held_out_images(scale, source))
    if options.plan:
        plan, design = designed()
        print_plan(options, study, plan, scale, source, design)
    print(options.images_line(scale))
    if options.plan:
        return 0
    # Before the imports that take seconds.
    address = cluster_address(options.address)
    if not options.check:
        with sole_run(options.results):
            plan, _ = designed()
    from grid.check import check, show
    from grid.launch import Launch, check_cluster, run_study

    launch = Launch(study, plan, scale, options, source, address=address)
    if options.check or source.root is not None:
        findings, manifest = check(scale, source, plan, results=options.results)
        show(findings, table=options.check, manifest=manifest)
        launch = replace(launch, manifest=manifest)
    if not options.check:
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        began = time.monotonic()
        return _say_end(run_study(launch), options, time.monotonic() - began)
    if address is not None:
        show(check_cluster(launch), table=True)
    return 0


def _only_looks(options: RunOptions) -> bool:
    """Tell whether nothing is to be trained or judged, so that no data need be brought here."""
    return options.plan or options.report or options.status


def _planned_for(options: RunOptions) -> tuple[Study, Plan, Scale, DataSource]:
    """Return the study that options name, and its plan, scale and data as they ask for them."""
    study = load_study(options.study)
    source = options.source(cache=options.results / DECODED_FOLDER)
    if _only_looks(options):
        source = replace(source, origin="")
    scale = scale_of(options.scale, source, image_size=options.image_size)
    scale = scale.preprocessed(options.preprocessing())
    scale = replace(scale, attacks_in=options.attacks_in)
    scale = replace(scale, autoattack="exact") if options.exact else scale
    settings = {**study.settings, **options.settings()}
    if chosen := scale.data_set.departure.chosen():
        settings["preprocessing"] = Preprocessing(**settings.get("preprocessing", {}) | chosen)
    study = study.model_copy(update={"settings": settings})
    planned = partial(_planned, options, study)
    sized = partial(with_sizes, scale, reduced=study.reduced, reduced_epochs=study.reduced_epochs)
    sizes = replace(options.sizes, why=options.sizes.described(scale))
    if options.minutes:
        from grid.quick import fit

        sizes = fit(options, source, sized, planned)
    source, scale = replace(source, eval_images=sizes.eval_images), sized(sizes)
    scale = replace(scale, detect=options.detect or study.detect_at(scale))
    plan = planned(scale)
    plan = replace(plan, notes=(*filter(None, [sizes.why]), *plan.notes))
    return study, plan, scale, source


def _planned(options: RunOptions, study: Study, scale: Scale) -> Plan:
    """Return the plan that options ask for; what is to be trained can be built."""
    can_be_built = partial(check_buildable, checked={})
    plan = build_plan(
        study,
        scale,
        tables=options.tables,
        only=options.values_by_axis(),
        seeds=options.seeds,
        evaluators=options.evaluators,
        check=can_be_built,
        source=options.source(),
    )
    teams = {
        t.recipe.family for t in plan if study.workers_of(t.recipe.family, options.workers) > 1
    }
    if study.early_stop and teams:
        raise ValueError(
            f"early_stop ends trials of one worker, and {', '.join(sorted(teams))} has several: "
            "leave out early_stop, or take --workers 1 and no [placement] of several"
        )
    placed = {study.placement.get(trial.recipe.family) for trial in plan}
    if not options.gpus_per_worker and not any(theirs and theirs.gpus for theirs in placed):
        stated = {"--evaluator-share": "evaluator_share" in options.model_fields_set}
        stated["--numerics fast"] = options.numerics == "fast"
        for name in (name for name, is_stated in stated.items() if is_stated):
            raise ValueError(f"{name} is of GPUs: give --gpus-per-worker, or leave it out")
    if not (options.report or options.status):
        for trial in plan:
            with at_key(trial.name):
                can_be_built(trial.recipe)
            if trial.recipe.epochs:
                check_team(trial.recipe, study.workers_of(trial.recipe.family, options.workers))
    return plan


def _designed(
    options: RunOptions, study: Study, plan: Plan, scale: Scale, held_out: int
) -> tuple[Plan, Designed | None]:
    """Return a plan with the images that its claims need, and their design where it is made now."""
    if not (options.detect or (scale.detect and study.claims)):
        return plan, None
    from grid.design import with_design

    return with_design(options, study, plan, scale, held_out)


def _read_results(options: RunOptions, study: Study, plan: Plan, scale: Scale) -> int:
    from grid.status import open_existing, print_status

    if not options.mlflow:
        check_database(options.results)
        if options.report:
            settle(options.results)
    if options.status:
        print_status(options.results, options.mlflow, scale, plan, watch=options.watch)
        return 0
    from grid.report.build import write_report

    tracker = open_existing(options.results, options.mlflow, scale)

    if not tracker.trials().keys() & {trial.digest for trial in plan}:
        raise ValueError(
            f"{options.results} holds no trial of study {study.name!r} at scale {scale.name}: give "
            "the options of the run, like --study, --scale and --data"
        )
    print(write_report(tracker, study, plan, scale, options.results / "report"))
    return 0


def _say_end(finished: Finished, options: RunOptions, seconds: float) -> int:
    ui = options.mlflow or installed("ui", "--results", str(options.results))
    print(
        f"Trained {finished.trained} and judged {finished.judged} cells "
        f"in {format_seconds(seconds)}.\n"
        f"Report:    {finished.report}\n"
        f"MLflow UI: {ui}\n"
        f"           {finished.comparison}"
    )
    for failure in finished.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if finished.failures:
        print(f"Try what failed again with: {again()}", file=sys.stderr)
    return 1 if finished.failures else 0


def leave(code: int) -> NoReturn:
    """End the process without taking apart all that it has loaded, which takes seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    stop_on_signals()
    leave(main())
