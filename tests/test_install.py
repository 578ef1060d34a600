"""What the wheel holds, and what an installation takes from a package index.

The index is a folder of stub wheels, which `python -m http.server` shows on the loopback.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.driver import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CUDA = "nvidia-stub"
BUILT = ("torch", "torchvision")  # separately for CPUs


def offer(index, name, version, *needs):
    """Put a wheel that holds nothing but its metadata into an index."""
    start = f"{re.sub('[-_.]+', '_', name)}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata = "\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)])
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder = index / re.sub("[-_.]+", "-", name).lower()
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{start}-py3-none-any.whl", "w") as file:
        file.writestr(f"{start}.dist-info/METADATA", f"{metadata}\n")
        file.writestr(f"{start}.dist-info/WHEEL", wheel)
        file.writestr(f"{start}.dist-info/RECORD", "")


def offer_all(index, *, suffixes):
    """Offer the least version of all that the project needs; torch's builds by their suffixes."""
    extras = PROJECT["project"]["optional-dependencies"]
    listed = [
        *PROJECT["project"]["dependencies"],
        *(need for extra in extras.values() for need in extra),
    ]
    for need in map(Requirement, listed):
        least = [s.version for s in need.specifier if s.operator in (">=", "==")]
        if need.name not in (*BUILT, PROJECT["project"]["name"]):
            offer(index, need.name, *(least or ["1"]))
        for suffix in suffixes if need.name in BUILT else ():
            others = ["torch"] if need.name == "torchvision" else []
            offer(index, need.name, f"{least[0]}{suffix}", *others, *([] if suffix else [CUDA]))
    offer(index, CUDA, "1")


@contextmanager
def served(folder, log):
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(server, lambda: "(http" in log.read_text())
        yield re.search(r"\((http\S+)\)", log.read_text())[1]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("suffixes", [["+cpu"], ["", "+cpu"], [""]], ids=str)
def test_cpu_builds_are_taken_where_they_are_offered_and_bring_no_cuda(tmp_path, suffixes):
    index, copy = tmp_path / "index", tmp_path / "project"
    offer_all(index, suffixes=suffixes)
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = copy.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    options = "--isolated --dry-run --ignore-installed --no-build-isolation --no-cache-dir --quiet"
    with served(index, tmp_path / "log") as address:
        pip = [sys.executable, "-m", "pip", "install", *options.split(), "--index-url", address]
        report = ["--report", str(tmp_path / "report.json")]
        subprocess.run([*pip, *report, f"{copy}[test]"], check=True, env=os.environ)
    installed = json.loads((tmp_path / "report.json").read_text())["install"]
    taken = {part["metadata"]["name"]: part["metadata"]["version"] for part in installed}
    are_for_cpus = "+cpu" in suffixes
    assert [taken[name].endswith("+cpu") for name in BUILT] == [are_for_cpus] * 2
    assert (CUDA in taken) != are_for_cpus


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist and the wheel of the files that git tracks; the wheel is built from the sdist."""
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return sorted(out.iterdir(), key=lambda path: path.suffix)  # .gz, .whl


def tracked(*folders):
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == set(tracked("grid", "trainables", "evaluators"))
    assert {"grid/studies/bai2021.toml", "grid/report/page.html.j2", "grid/py.typed"} <= names
    for checker in (["twine", "check", "--strict", sdist], ["check_wheel_contents"]):
        words = [sys.executable, "-m", *checker, wheel]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_wheel_plans_a_study_outside_the_checkout(distributions, tmp_path):
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(distributions[1])], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}  # comes before an editable installation
    version = PROJECT["project"]["version"]
    for words, shown in (
        (["-c", "import grid; print(grid.__file__)"], str(target / "grid" / "__init__.py")),
        (["-m", "grid.command", "--version"], f"robustness-grid {version}"),
        (["-m", "grid.command", "plan", "--study", "plain-vit"], "Study plain-vit at scale digits"),
    ):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown in done.stdout
