"""Runs the code blocks of the documentation; a block that is not run says why in a comment."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent
# Commands of others: what each would need, or change. Those of this project and of Ray are checked.
NOT_RUN = {
    "python3": "makes an environment",
    "pip": "installs packages",
    "pip-audit": "asks the network",
    "git": "asks the network",
    "pytest": "runs these tests",
    "docker": "needs a registry",
    "kubectl": "needs a cluster",
    "sbatch": "needs Slurm: tests/test_slurm.py",
    "export": "changes the environment",
    "cd": "changes the folder",
    ".": "activates an environment",
}
LOOKS = ("--check", "--status", "--report", "--pull", "--pack")  # of results or data
CLASSES = ("n01440764", "n01443537")


@pytest.fixture(scope="session")
def images() -> Any:
    torch = pytest.importorskip("torch")
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def labels(images: Any) -> Any:
    return images.mean((2, 3)).argmax(dim=1)


@pytest.fixture(scope="session")
def model() -> Any:
    """Answer with the brightest channel, which the labels are."""
    return lambda images: 9 * images.mean((2, 3))


@pytest.fixture(scope="session")
def rival() -> Any:
    return lambda images: 9 * images.amax((2, 3))


@pytest.fixture(scope="session")
def other(rival: Any, images: Any, labels: Any) -> Any:
    from evaluators import evaluate

    return evaluate(rival, (images, labels), ["clean", "pgd"], epsilon="8/255", progress=False)


def remember(namespace: dict[str, Any]) -> None:
    """Keep the registries as they are before a page."""
    from trainables.data.registry import DATA_SETS
    from trainables.models import MODELS

    namespace["registries"] = [(registry, dict(registry)) for registry in (DATA_SETS, MODELS)]


def restore(namespace: dict[str, Any]) -> None:
    """Take out what a page has registered."""
    for registry, entries in namespace["registries"]:
        registry.clear()
        registry.update(entries)


def read_toml(example: Example) -> None:
    """Load a block as a study where it is one; others are parts of a pyproject.toml."""
    from grid.study import load_study

    text = str(example.parsed)
    if "name" in tomllib.loads(text):
        with TemporaryDirectory() as folder:
            (Path(folder) / "ours.pth").write_bytes(b"weights")
            (Path(folder) / "page.toml").write_text(text)
            load_study(str(Path(folder) / "page.toml"))


def check_commands(example: Example) -> None:
    """Plan what the project's commands of a block would run; read the options of all others.

    They run in a folder that has what the pages speak of: DIR with images, labels and stimuli.
    """
    from PIL import Image

    with TemporaryDirectory() as folder, mock.patch.dict(os.environ), chdir(folder):
        os.environ |= {"RAY_AUTH_MODE": "disabled"}
        for part, label in product(("train", "val"), CLASSES):
            place = Path("DIR", part, label)
            place.mkdir(parents=True)
            for number in range(100):
                Image.new("RGB", (40, 40), (number, 9, 9)).save(place / f"{number}.png")
        Path("labels.csv").write_text("".join(f"{name},{name}\n" for name in CLASSES))
        Path("texture-vs-shape/stimuli/style-transfer-preprocessed-512").mkdir(parents=True)
        for words in commands_of(str(example.parsed)):
            check_command(words)


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, those behind && and in ray exec's quotes among them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            for word in words[:end]:
                if "grid/run.py" in word.split()[1:]:
                    yield from commands_of(word)
            words = words[end + 1 :]


def check_command(words: list[str]) -> None:
    """Check one command; AssertionError where it is neither checked nor in NOT_RUN."""
    from evaluators.options import JudgeOptions
    from grid.command import COMMANDS
    from grid.options import RunOptions, UiOptions
    from grid.run import main

    program, *rest = words
    if words[:2] == ["python", "grid/run.py"]:
        program, rest = "robustness-grid", ["run", *rest[1:]]
    if words[:3] == ["python", "-m", "evaluators"]:
        program, rest = "robustness-grid", ["evaluate", *rest[2:]]
    if program == "ray":
        check_ray(rest)
    elif program != "robustness-grid":
        is_ours = program == "python" and (rest[0] == "-m" or (ROOT / rest[0]).exists())
        assert is_ours or program in NOT_RUN, f"{shlex.join(words)} is neither checked nor listed"
    elif rest[0] in ("run", "plan") and not {*rest} & {*LOOKS}:
        assert main([*rest[1:], *([] if "--plan" in rest else ["--plan"])]) == 0
    else:
        assert rest[0] in COMMANDS
        others = {"evaluate": JudgeOptions, "ui": UiOptions}
        mode = [] if rest[0] in ("run", *others) else [f"--{rest[0]}"]
        others.get(rest[0], RunOptions).read([*mode, *rest[1:]])


def check_ray(words: list[str]) -> None:
    """Check the names of Ray's commands and options."""
    import click
    from ray.scripts.scripts import cli

    with cli.make_context("ray", [*words]) as context:
        name, found, rest = cli.resolve_command(context, [*words])
        if isinstance(found, click.Group):
            name, found, rest = found.resolve_command(context, rest)
        found.make_context(name, rest)


pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("toml", read_toml),
        CodeBlockParser("bash", check_commands),
    ],
    patterns=["*.md"],
    excludes=["docs/reference/*"],
    setup=remember,
    teardown=restore,
    fixtures=["images", "labels", "model", "rival", "other"],
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Plans of whole studies take seconds each: with the slow tests."""
    for item in items:
        example = getattr(item, "example", None)
        if example and example.region.evaluator is check_commands:
            item.add_marker("slow")
