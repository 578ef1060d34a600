"""Studies on a real Ray cluster of several nodes: undisturbed, disturbed, grown and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient
from PIL import Image
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.util import placement_group, remove_placement_group

from benchmarks.stub_evaluator import StubCell, StubEvaluator, StubShard
from evaluators.ledger import LEDGER, to_parquet
from evaluators.shards import ShardStore
from grid.cluster import check_nodes, wait_for_nodes
from grid.launch import Launch, _start_pool
from grid.options import RunOptions
from grid.plan import build_plan
from grid.run import main
from grid.study import load_study
from tests import driver
from tests.driver import SECONDS, ended, study_of_one, trials, wait_for_checkpoint, wait_until
from tests.pictures import write_folder
from tests.servers import free_port, s3_bucket
from trainables.data.base import Shard
from trainables.ray_internals import nodes_gone
from trainables.scale import DIGITS
from trainables.store.results import code_version
from trainables.store.retries import MAX_FAILURES
from trainables.store.storage import Folder, below
from trainables.store.tracking import SCHEMA

pytestmark = pytest.mark.cluster
LONG = pytest.mark.long
RAY = Path(sys.executable).parent / "ray"
STUDY = study_of_one(epochs=120)


@pytest.fixture
def bucket():
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "single.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def start():
    """Return a function that starts the command with teams of two; what it starts is ended."""
    started = []

    def start(study, results, *arguments):
        started.append(driver.start(study, results, "--workers", "2", *arguments))
        return started[-1]

    yield start
    for command in started:
        command.kill()
        command.communicate()


def weights(results):
    (path,) = results.glob("trials/*/weights.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, study):
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    ended(driver.start(study, results, "--workers", "2", "--address", "local"))
    return results


@pytest.mark.parametrize(
    "title", [pytest.param("TrainWorker", marks=LONG), "TrainController", "ImplicitFunc"]
)
def test_a_team_of_which_a_process_is_killed_ends_as_if_undisturbed(
    title, start, undisturbed, study, tmp_path
):
    results = tmp_path / "results"
    command = start(study, results, "--address", "local")
    wait_for_checkpoint(results, command)
    below = psutil.Process(command.pid).children(recursive=True)
    [*_, victim] = [p for p in below if title in p.name() + p.cmdline()[0]]
    victim.kill()
    assert "Trained 1 and judged 1 cells" in ended(command)
    assert weights(results) == weights(undisturbed)


@contextmanager
def several_nodes():
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture
def cluster():
    with several_nodes() as nodes:
        yield nodes


@pytest.mark.parametrize("notice", [False, pytest.param(True, marks=LONG)])
def test_a_trial_over_two_nodes_survives_the_death_of_one(
    notice, start, undisturbed, study, tmp_path, cluster
):
    results = tmp_path / "results"
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    command = start(study, results, "--address", cluster.address)
    wait_for_checkpoint(results, command)
    if notice:
        client, preempted = ray._raylet.GcsClient(address=cluster.address), 2
        in_two_minutes = (time.time_ns() // 10**6) + 120_000
        assert client.drain_node(doomed.node_id, preempted, "spot", in_two_minutes)[0]
        # Its worker saves and leaves: idle, it ends long before.
        wait_until(command, lambda: "raylet" not in dict(doomed.live_processes()))
    else:
        cluster.remove_node(doomed, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert "Trained 1 and judged 1 cells" in ended(command)
    assert weights(results) == weights(undisturbed)


PAIR = """
name = "pair"
base = "resnet50"
evaluators = ["clean", "pgd"]
[axes]
family = ["resnet", "deit"]
size = ["small"]
epochs = [20]
learning_rate = [0.01]
[placement.deit]
workers = 1
"""


def test_a_team_keeps_its_files_on_s3(start, tmp_path, bucket):
    path, results = tmp_path / "pair.toml", tmp_path / "results"
    path.write_text(PAIR)
    kept = below(bucket, "study")
    arguments = ("--address", "local", "--storage", kept)
    assert "Trained 2 and judged 4 cells" in ended(start(path, results, *arguments))
    for digest in trials(results):
        names = Folder(below(kept, "trials", digest)).names()
        assert "weights.safetensors" in names
        assert any(name.startswith("epoch-00002") for name in names)
    assert not list(results.glob("trials/*"))
    assert "0 to train" in ended(start(path, results, *arguments))


@pytest.mark.parametrize("workers", [pytest.param("1", marks=LONG), "2"])
def test_an_autoscaler_starts_the_nodes_that_a_study_has_use_for(
    workers, start, tmp_path, autoscaled
):
    path = tmp_path / "two.toml"
    path.write_text(STUDY.replace('["small"]', '["small"]\nseed = [0, 1]').replace("200", "10"))
    results = tmp_path / "results"
    command = start(path, results, "--address", autoscaled, "--workers", workers)
    assert "Trained 2 and judged 2 cells" in ended(command)


FAKE = """
cluster_name: autoscaled
max_workers: 4
provider: {type: fake_multinode, use_node_id_as_ip: true, disable_node_updaters: true,
    disable_launch_config_check: true, gcs_address: "%s"}
auth: {}
upscaling_speed: 100.0
idle_timeout_minutes: 5
head_node_type: ray.head.default
available_node_types:
  ray.head.default: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  pair: {resources: {CPU: 2, object_store_memory: 100000000}, node_config: {}, min_workers: 0,
    max_workers: 2}
file_mounts: {}
cluster_synced_files: []
file_mounts_sync_continuously: false
rsync_exclude: []
rsync_filter: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
"""


@pytest.fixture
def autoscaled(tmp_path, monkeypatch):
    """A head without CPUs, and Ray's autoscaler with a provider whose nodes are processes here."""
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {
        "HOME": str(home),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "0",
    }.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    config = home / "ray_bootstrap_config.yaml"
    config.write_text(FAKE % f"{ray.util.get_node_ip_address()}:{port}")
    with started_head(home / "log", port, f"--autoscaling-config={config}") as address:
        yield address


@contextmanager
def started_head(log, port, *options):
    """Start the head of a cluster, without CPUs, in processes of its own."""
    command = f"{RAY} start --head --block --port={port} --num-cpus=0 --include-dashboard=false"
    usual = "--object-store-memory=100000000 --temp-dir"
    with tempfile.TemporaryDirectory(prefix="ray") as folder, log.open("w") as written:
        head = subprocess.Popen(
            [*command.split(), *options, *usual.split(), folder],
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
        try:
            wait_until(head, lambda: "runtime started" in log.read_text())
            yield f"{ray.util.get_node_ip_address()}:{port}"
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


@contextmanager
def node_with_mounts(cluster, mounts, log):
    """Join a cluster, and a node to it that has mounts of its own."""
    joined = f"{RAY} start --address={cluster.address} --num-cpus=1 --block --disable-usage-stats"
    # Ray gives a node 30 s to start, which a busy machine may exceed.
    lines = f"{mounts} && for _ in 1 2 3; do {joined}; done"
    spaces = "unshare --mount --fork --kill-child"
    allowed = subprocess.run([*spaces.split(), "true"], check=False, capture_output=True)
    if allowed.returncode:
        pytest.skip("needs leave to make mount namespaces")
    with log.open("w") as said:
        node = subprocess.Popen(
            [*spaces.split(), "bash", "-c", lines], stdout=said, stderr=said, start_new_session=True
        )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        wait_until(node, lambda: sum(n["Alive"] for n in ray.nodes()) == 2)
        yield
    finally:
        ray.shutdown()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def test_a_node_that_lacks_the_data_or_leave_to_write_is_named(cluster, tmp_path):
    hidden, kept = tmp_path / "data", tmp_path / "kept"
    for folder in (hidden / "train", kept):
        folder.mkdir(parents=True)
    mounts = f"mount -t tmpfs tmpfs {hidden} && mount --bind -o ro {kept} {kept}"
    with node_with_mounts(cluster, mounts, tmp_path / "node.log"):
        assert list(check_nodes([str(tmp_path)]).values()) == [""]
        (found,) = check_nodes([], [hidden]).values()
        assert found.startswith(f"sees 0 entries at {hidden}, where the driver's node sees 1")
        (found,) = check_nodes([str(kept)]).values()
        assert found.startswith(f"cannot write to {kept}: [Errno 30] Read-only")


def test_the_check_opens_the_images_of_every_node(cluster, tmp_path, capsys):
    root, other = tmp_path / "data", tmp_path / "other"
    write_folder(root, per_class=1, held_out=1)
    shutil.copytree(root, other)
    arguments = ["--data", str(root), "--image-size", "32", "--results", str(tmp_path / "results")]
    arguments += ["--address", cluster.address, "--check", "--tables", "T6"]
    mounts = f"mount --bind {other} {root}"
    with node_with_mounts(cluster, mounts, tmp_path / "node.log"):
        ray.shutdown()
        assert main(arguments) == 0
        assert "every image is sound, and the same" in " ".join(capsys.readouterr().out.split())
        image = other / "train" / "class-05" / "picture 0.JPEG"
        Image.new("RGB", (40, 40)).save(image)
        with pytest.raises(SystemExit):
            main(arguments)
        assert re.search(r"node .*: it has other images: their man", capsys.readouterr().err)
        image.write_bytes(image.read_bytes()[:-100])
        with pytest.raises(SystemExit):
            main(arguments)
        assert re.search(r"node .*: 1 unreadable images .*class-05", capsys.readouterr().err)


def test_a_node_with_another_version_of_the_project_is_named_with_both(cluster, tmp_path):
    edited, here = tmp_path / "status.py", driver.ROOT / "grid" / "status.py"
    edited.write_text(f"{here.read_text()}\n")
    mounts = f"mount --bind {edited} {here}"
    with node_with_mounts(cluster, mounts, tmp_path / "node.log"):
        (found,) = check_nodes([]).values()
    ours, theirs = code_version(), re.findall(r"\d\S+ \(code \w{12}\)", found)
    assert theirs[1:] == [ours] != theirs[:1]
    assert found.endswith(f"where the driver runs {ours}: install the same on both")


def test_a_node_needs_the_storage_and_the_artifacts_but_not_the_results(
    start, study, cluster, tmp_path
):
    results, database = tmp_path / "results", f"sqlite:///{tmp_path}/mlflow.db"
    results.mkdir()
    MlflowClient(database).create_experiment(
        "robustness-digits",
        artifact_location=(tmp_path / "artifacts").as_uri(),
        tags={"robustness-grid.schema": str(SCHEMA)},
    )
    places = ("--storage", str(tmp_path / "kept"), "--mlflow", database)
    with node_with_mounts(cluster, f"mount -t tmpfs tmpfs {results}", tmp_path / "node.log"):
        command = start(study, results, *places, "--address", cluster.address, "--workers", "1")
        assert "Trained 1 and judged 1 cells" in ended(command)


@pytest.fixture(scope="module")
def with_gpu():
    with several_nodes() as nodes:
        nodes.add_node(num_cpus=4, num_gpus=1)
        yield nodes


@pytest.fixture
def joined(with_gpu):
    """A cluster that says it has GPUs: nothing here computes on one."""
    ray.init(address=with_gpu.address, log_to_driver=False)
    yield with_gpu
    ray.shutdown()


def on_gpus(number, results):
    study = load_study("bai2021")
    return Launch(
        study=study,
        plan=build_plan(study, DIGITS),
        scale=DIGITS,
        options=RunOptions(results=results, gpus_per_worker=number),
    )


@pytest.fixture
def evaluators(cluster, tmp_path, monkeypatch):
    """A pool of evaluators that sleep a second for an image, on two nodes with a GPU each."""
    monkeypatch.setattr("grid.assess.EvaluatorActor", StubEvaluator)
    monkeypatch.setattr("grid.assess.LOOK_SECONDS", 0.5)
    monkeypatch.setattr(ShardStore, "_images", lambda _: 1)
    monkeypatch.setattr("evaluators.shards.Shard", StubShard)
    nodes = [cluster.add_node(num_cpus=2, num_gpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    ledger = to_parquet(LEDGER.empty_table(), seconds=1.0).hex()
    seconds = {f"{name} clean": 1.0 for name in "abc"}
    yield _start_pool(on_gpus(1.0, tmp_path), json.dumps([seconds, ledger])), nodes, cluster
    ray.shutdown()


def polled(pool, until):
    """Poll a pool until something has come about; return the cells judged by then."""
    judged = []
    for _ in range(SECONDS * 5):
        judged += pool.poll(0.2)
        if until():
            return judged
    raise AssertionError("it did not come about")


def test_evaluators_borrow_all_gpus_and_give_them_back_to_a_trial_between_shards(evaluators):
    pool, *_ = evaluators
    pool.submit(StubCell("a", "clean", "q"), 400)
    polled(pool, lambda: len(pool._under_way) == 8)
    # A trial as large as the cluster, of which an eighth is less.
    trial = placement_group([{"CPU": 1, "GPU": 1}] * 2)
    polled(pool, lambda: trial.wait(0))
    assert {*pool._homes} == {*pool._starting.values()}  # none holds a GPU
    remove_placement_group(trial)
    polled(pool, lambda: len(pool._under_way) == 8)


def test_a_study_is_trained_by_tune_and_judged_on_gpus_that_evaluators_borrow():
    few = ["--tables", "T6", "--evaluators", "clean", "--shards", "1"]
    command = [sys.executable, "-m", "benchmarks.filling", "--real", "0.1", *few]
    said = subprocess.check_output(command, cwd=driver.ROOT, text=True, timeout=SECONDS)
    assert "3 cells judged, failures: []" in said


def test_what_is_lost_with_a_node_is_no_failure_and_others_judge_it(evaluators):
    pool, (doomed, _), cluster = evaluators
    pool.submit(cell := StubCell("b", "clean", "q"), 40)
    polled(pool, lambda: len(pool._under_way) == 8)
    cluster.remove_node(doomed, allow_graceful=False)
    polled(pool, lambda: doomed.node_id in nodes_gone(False))
    polled(pool, lambda: pool._stores[cell].judged == 40)
    assert all(nodes == [doomed.node_id] for nodes in pool._failures.values())
    # Once more, and the shard would have failed too often, were these failures.
    pool._failures[cell, 0] = [doomed.node_id] * MAX_FAILURES
    assert pool._failed(cell, Shard(0, 1), RayError(), doomed.node_id) is None


def test_storage_is_tried_from_every_node(joined, tmp_path):
    (found,) = check_nodes([str(tmp_path)]).values()
    assert found == ""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_nodes([str(tmp_path / "file")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nodes_that_a_cluster_file_promises_are_missed(joined, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(
        "available_node_types: {head: {}, gpu: {min_workers: 1}, big: {min_workers: 2}}"
    )
    assert wait_for_nodes(0)[1].startswith("2 of 4 nodes are there: `ray status`")
    file.write_text("provider: {worker_ips: [127.0.0.99]}")
    assert wait_for_nodes(0)[1].startswith("no Ray on 127.0.0.99: `ray monitor")


def test_a_check_looks_at_every_node(start, study, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    cluster.add_node(num_cpus=1)
    results = tmp_path / "results"
    arguments = ("--check", "--wait", "60", "--address", cluster.address)
    said = ended(start(study, results, *arguments, "--workers", "1"))
    assert "2 nodes, 1 CPUs, 0 GPUs" in said
    assert f"writes {results}" in said
    assert "a trial needs 2 workers" in ended(start(study, results, *arguments), code=2)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A head that asks for a token, and an environment without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with monkeypatch.context() as of_head:
        of_head.setenv("RAY_AUTH_TOKEN", "5ec2e7" * 8)
        with started_head(tmp_path / "log", free_port()) as address:
            of_head.delenv("RAY_AUTH_TOKEN")
            yield address


def test_a_wrong_token_is_refused_before_any_compute(start, guarded, study, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 48)
    results = tmp_path / "results"
    said = ended(start(study, results, "--address", guarded), code=2)
    assert f"the Ray cluster at {guarded} refuses this run" in said
    assert not (results / "mlflow.db").exists()
