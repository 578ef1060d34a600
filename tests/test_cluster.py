"""Two-worker trials on a real Ray cluster of several nodes, undisturbed, and with deaths in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from trainables.tracking import Tracker

ROOT = Path(__file__).parents[1]
SECONDS = 400
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


def wait_for_checkpoint(results, driver):
    deadline = time.monotonic() + SECONDS
    while not list(results.glob("trials/*/epoch-*.pt")):
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)


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
