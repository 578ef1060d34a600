"""The installed command: `robustness-grid COMMAND [options]`; each reads its own options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from evaluators.__main__ import main as evaluate
from evaluators.options import JudgeOptions
from grid.options import RunOptions, UiOptions
from grid.run import ENVIRONMENT, leave
from grid.run import main as run
from trainables.options import Options, stop_on_signals
from trainables.recipe import unknown
from trainables.store.results import DATABASE, PROJECT, database_uri, settle, version_of

COMMANDS = {
    "evaluate": "judge one model: clean accuracy, attacks, shifts",
    "run": "train and judge the models of a study, and write its report",
    "plan": "print a study's trials, hours, disk and cost; compute nothing",
    "check": "look at data, disk, memory and device, and on a cluster at every node",
    "status": "print how far a study is",
    "report": "write a study's report again",
    "ui": "show the results in MLflow's pages, on this machine alone",
}
LOOPBACK = "127.0.0.1"


def main() -> None:
    """Run the command that the first word names, and end the process with its status."""
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    command, *words = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        stop_on_signals()
        leave(dispatch(command, words))
    parser = _parser()
    if not command.startswith("-"):
        parser.error(unknown("command", command, COMMANDS))
    parser.parse_args([command, *words])


def dispatch(command: str, words: Sequence[str]) -> int:
    """Run a command with its options; return its exit status. SystemExit on wrong options."""
    prog = f"robustness-grid {command}"
    if command == "evaluate":
        return evaluate(words, prog)
    if command == "ui":
        return _show_results(words, prog)
    return run(words if command == "run" else [f"--{command}", *words], prog)


def _show_results(words: Sequence[str], prog: str) -> int:
    """Become MLflow's server on the results' database; return only where there is none to start."""
    options = UiOptions.read(words, prog)
    if options.mlflow and options.mlflow.startswith("http"):
        print(f"MLflow's pages are at {options.mlflow}")
        return 0
    try:
        if not (options.mlflow or (options.results / DATABASE).exists()):
            raise ValueError(f"{options.results} holds no {DATABASE}: run a study first")
        settle(options.results)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print(f"MLflow's pages: http://{LOOPBACK}:{options.port} (Ctrl-C ends them)", flush=True)
    uri = options.mlflow or database_uri(options.results)
    server = f"-m mlflow ui --host {LOOPBACK} --port {options.port} --workers 1".split()
    server += ["--backend-store-uri", uri, "--uvicorn-opts", "--log-level warning"]
    environment = {**ENVIRONMENT, **os.environ}
    return os.execve(sys.executable, [sys.executable, *server], environment)  # noqa: S606


def _complete() -> None:
    """Answer a shell that completes a command line, by argcomplete."""
    parser = argparse.ArgumentParser(prog=PROJECT)
    commands = parser.add_subparsers()
    others: dict[str, type[Options]] = {"evaluate": JudgeOptions, "ui": UiOptions}
    for name in COMMANDS:
        options = others.get(name, RunOptions)
        commands.add_parser(name, parents=[options.parser()], add_help=False)
    import_module("argcomplete").autocomplete(parser)  # of the extra `completion`


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROJECT,
        usage="robustness-grid COMMAND [options]",
        description=f"Measure how robust image classifiers are. Commands:\n{lines}",
        epilog="robustness-grid COMMAND --help lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROJECT} {version_of(PROJECT)}")
    return parser


if __name__ == "__main__":
    main()
