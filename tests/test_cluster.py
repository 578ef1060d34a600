"""Two-worker trials on a real Ray cluster of several nodes, undisturbed, and with deaths in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from grid.cluster import Placement, check_nodes
from grid.launch import _share_out
from tests.driver import SECONDS, wait_for_checkpoint
from trainables.distributed import interface_of
from trainables.scale import DIGITS
from trainables.source import EMBEDDED
from trainables.tracking import Tracker

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[1]
STUDY = """
name = "single"
base = "resnet50"
evaluators = ["clean"]
[axes]
size = ["small"]
epochs = [160]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "single.toml"
    path.write_text(STUDY)
    return path


def start(study, results, *arguments):
    command = [sys.executable, "grid/run.py", "--study", str(study), "--results", str(results)]
    return subprocess.Popen(
        [*command, "--workers", "2", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(driver):
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 0, said
    return said


def only_trial(results):
    uri = f"sqlite:///{results}/mlflow.db"
    tracker = Tracker(uri, experiment="robustness-digits", artifacts=results / "artifacts")
    (trial,) = tracker.trials().values()
    return trial


def weights(results):
    (path,) = results.glob("trials/*/weights.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, study):
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    ended(start(study, results, "--address", "local"))
    return results


def test_a_trial_whose_worker_is_killed_ends_as_if_undisturbed(undisturbed, study, tmp_path):
    results = tmp_path / "results"
    driver = start(study, results, "--address", "local")
    wait_for_checkpoint(results, driver)
    below = psutil.Process(driver.pid).children(recursive=True)
    workers = [
        process for process in below if "TrainWorker" in process.name() + process.cmdline()[0]
    ]
    assert workers, [process.cmdline()[:1] for process in below]
    os.kill(workers[-1].pid, signal.SIGKILL)
    ended(driver)
    assert weights(results) == weights(undisturbed)


@pytest.fixture
def cluster():
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    yield nodes
    nodes.shutdown()


def test_a_trial_over_two_nodes_survives_the_death_of_one(undisturbed, study, tmp_path, cluster):
    results = tmp_path / "results"
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    driver = start(study, results, "--address", cluster.address)
    wait_for_checkpoint(results, driver)
    cluster.remove_node(doomed, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    said = ended(driver)
    assert "Trained 1 and judged 1 cells" in said
    assert weights(results) == weights(undisturbed)
    assert only_trial(results).metrics["epoch"] == 16


def test_a_team_too_big_for_the_cluster_is_refused_before_any_compute(study, tmp_path, cluster):
    cluster.add_node(num_cpus=1)
    results = tmp_path / "results"
    driver = start(study, results, "--address", cluster.address)
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 2, said
    assert "a trial needs 2 workers of 1 CPUs and 0 GPUs each, but Ray has free" in said
    assert not (results / "mlflow.db").exists()


@pytest.fixture
def joined(cluster):
    """A cluster that says it has GPUs: nothing here computes on one."""
    cluster.add_node(num_cpus=4, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


def test_evaluators_hold_their_share_of_gpus_before_trials_are_counted(joined, tmp_path):
    whole = Placement(gpus=1.0)
    with pytest.raises(ValueError, match=r"0\.75 GPUs; .* \(evaluators hold 0\.25 GPUs\)"):
        _share_out(whole, tmp_path, "sqlite:///none", DIGITS, EMBEDDED)
    ray.shutdown()
    ray.init(address=joined.address, log_to_driver=False)
    _, lanes = _share_out(Placement(gpus=0.75), tmp_path, "sqlite:///none", DIGITS, EMBEDDED)
    assert lanes == 1


def test_storage_is_tried_from_every_node(joined, tmp_path):
    assert check_nodes(str(tmp_path)) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_nodes(str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_token_is_refused_before_any_compute(cluster, study, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    driver = start(study, tmp_path / "results", "--address", cluster.address)
    said = driver.communicate(timeout=SECONDS)[0]
    assert driver.returncode == 2, said
    assert "refuses this run: Token authentication is enabled but no" in said


def test_gloo_gets_the_interface_of_a_nodes_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.99") == ""
