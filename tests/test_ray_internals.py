"""Each private name of Ray that the project uses is there, in the Ray that is installed."""

from __future__ import annotations

import ast
from importlib import import_module
from operator import attrgetter

import pytest

from tests.driver import ROOT

TABLE = "ray.core.generated.gcs_pb2"
FIELDS = {"creator_actor_id", "creator_actor_dead", "creator_job_id", "placement_group_id", "state"}
NAMES = [
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    ("ray._private.state", "state._connect_and_get_accessor"),
    ("ray._private.state", "state.get_draining_nodes"),
    ("ray._private.state", "GlobalStateAccessor.get_placement_group_table"),
    (TABLE, "PlacementGroupTableData.REMOVED"),
    ("ray.tune.execution.class_cache", "ENV_VARS_TO_PROPAGATE"),
    ("ray.train.v2._internal.exceptions", "WorkerGroupStartupTimeoutError"),
    ("ray.train.v2.api.exceptions", "ControllerError"),
]
BASE = ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer")  # for developers


@pytest.mark.parametrize(("module", "name"), [*NAMES, BASE])
def test_ray_has_a_private_name_that_the_project_uses(module, name):
    assert attrgetter(name)(import_module(module)) is not None


def test_every_private_module_that_is_imported_is_named_above():
    tree = ast.parse((ROOT / "trainables" / "ray_internals.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    private = {name for name in imported if "._" in name or ".execution" in name or TABLE in name}
    named = {f"{module}.{name}" for module, name in NAMES} | {module for module, _ in NAMES}
    assert all(any(n == p or n.startswith(f"{p}.") for n in named) for p in private), private


def test_what_the_private_names_hold_is_what_the_project_takes_them_for():
    assert "AWS_SECRET_ACCESS_KEY" in import_module(NAMES[-3][0]).ENV_VARS_TO_PROPAGATE
    failure = import_module(NAMES[-1][0]).ControllerError(ValueError("no room"))
    assert str(failure.controller_failure) == "no room"
    table = import_module(TABLE).PlacementGroupTableData
    assert {*table.DESCRIPTOR.fields_by_name} >= FIELDS
    assert isinstance(import_module(NAMES[0][0]).ENABLE_RAY_CLUSTER, bool)
