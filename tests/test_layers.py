"""The direction of imports, read with ast."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("grid", "evaluators", "trainables")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "ray": {
        "grid/cluster.py",
        "grid/launch.py",
        "grid/assess.py",
        "trainables/distributed.py",
        "trainables/trial.py",
        "trainables/ray_internals.py",
    },
    "mlflow": {"trainables/store/tracking.py"},
}
LIGHT = (
    "grid/command.py",
    "grid/run.py",
    "grid/options.py",
    "trainables/models.py",
    "trainables/store/results.py",
    "grid/study.py",
    "grid/space.py",
    "grid/table.py",
    "grid/axes.py",
    "grid/plan.py",
    "grid/estimate.py",
)
HEAVY = {"torch", "torchvision", "timm", "ray", "mlflow", "sklearn", "scipy", "pyarrow", "numpy"}


def imported(path: Path, *, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def tops(path: Path, **options: bool) -> set[str]:
    return {name.split(".")[0] for name in imported(path, **options)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way_and_frameworks_stay_at_the_rim(path):
    name = str(path.relative_to(ROOT))
    package = name.split("/", maxsplit=1)[0]
    above = PACKAGES[: PACKAGES.index(package)]
    assert not tops(path) & set(above), f"{package} must not import {above}"
    for framework, allowed in MAY_IMPORT.items():
        assert framework not in tops(path) or name in allowed


@pytest.mark.parametrize("name", LIGHT)
def test_what_help_and_plan_need_imports_nothing_heavy(name):
    seen, todo = set(), [ROOT / name]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        assert not tops(path, top_only=True) & HEAVY, path
        for module in imported(path, top_only=True):
            candidate = ROOT / (module.replace(".", "/") + ".py")
            if candidate.exists():
                todo.append(candidate)


def imported_modules(path: Path) -> set[str]:
    """Return every name that a file imports or imports from, submodules of packages included."""
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.ImportFrom]
    assert not any(node.level for node in froms), f"{path} imports relatively"
    submodules = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return imported(path) | submodules


def test_no_module_imports_itself_by_way_of_others():
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: imported_modules(path) & modules.keys() for name, path in modules.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("trainables.recipe") < order.index("evaluators.base")
    assert {*order} == {*modules}


PRIVATE = re.compile(r"\bray(?:\.\w+)*\._\w+|ray\.tune\.execution|import _[A-Z]\w+")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_ray_are_in_one_file(path):
    if path.name != "ray_internals.py":
        assert not PRIVATE.search(path.read_text())


def test_no_file_of_grid_hides_a_module():
    names = {path.stem for path in (ROOT / "grid").iterdir() if path.suffix == ".py"}
    assert not names & set(sys.stdlib_module_names)


LIGHT_CALL = """
import subprocess
import sys
blocked = ("ray", "mlflow", "matplotlib", "timm", "torchvision", "sklearn")
sys.modules |= dict.fromkeys(blocked)  # importing one raises ImportError
import torch
from evaluators import evaluate
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
scores = evaluate(model, (torch.rand(9, 3, 2, 2), torch.arange(9) % 3), ["clean", "pgd-5"])
print(scores["clean"].n, sorted(s.name for s in scores.scores))
"""


def test_the_api_judges_without_what_only_the_grid_or_other_models_need():
    command = [sys.executable, "-c", LIGHT_CALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "9 ['clean', 'pgd-5']"
