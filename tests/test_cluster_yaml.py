"""Both cluster files: valid by Ray's own schema, and the AWS one brought up on a mock of EC2."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private import commands
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from grid.options import RunOptions

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "cluster-local.yaml")


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_file_is_valid_by_rays_schema_and_listens_on_the_loopback(name):
    config = read(name)
    prepared = prepare_config(config)
    validate_config(prepared)
    with pytest.raises(ValidationError, match="spot_fleet"):
        validate_config(prepared | {"spot_fleet": True})
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "mlflow server $AUTH --host 127.0.0.1" in start
    assert "--allowed-hosts 'localhost:*,127.0.0.1:*'" in start
    assert "0.0.0.0" not in (ROOT / name).read_text()  # noqa: S104
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "RAY_AUTH_MODE=token" in (ROOT / name).read_text()


def test_a_cluster_file_that_names_another_bucket_takes_the_place_of_the_first(tmp_path):
    (setting,) = [c for c in read("cluster.yaml")["setup_commands"] if "GRID_STORAGE" in c]
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'\n")
    home = os.environ | {"HOME": str(tmp_path)}
    for bucket in ("first", "second"):
        subprocess.run(["bash", "-c", setting.replace("BUCKET", bucket)], check=True, env=home)
    lines = (tmp_path / ".bashrc").read_text().splitlines()
    assert lines[0] == "alias ll='ls -l'"
    assert len(lines) == 5
    assert "export GRID_RESULTS=~/results GRID_STORAGE=s3://second/study" in lines


def test_workers_are_spot_instances_else_the_same_on_demand_and_no_trial_runs_on_the_head():
    kinds = read("cluster.yaml")["available_node_types"]
    spot, other = kinds["gpu-spot"], kinds["gpu-on-demand"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == other["node_config"]
    assert kinds["head"]["resources"] == {"CPU": 0}


def test_spot_instances_come_first_then_on_demand_ones_and_none_while_there_is_no_work():
    config = read("cluster.yaml")
    for kind in ("gpu-spot", "gpu-on-demand"):
        config["available_node_types"][kind]["resources"] = {"CPU": 48, "GPU": 4}
    kinds = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    node = ResourceRequestUtil.make({"CPU": 48, "GPU": 4})

    def started(nodes, **availabilities):
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=kinds,
            max_num_nodes=5,
            resource_requests=ResourceRequestUtil.group_by_count([node] * nodes),
            recoverable_resource_availabilities=availabilities,
        )
        launches = ResourceDemandScheduler(None).schedule(request).to_launch
        return {launch.instance_type: launch.count for launch in launches}

    assert started(0) == {}
    assert started(2) == {"gpu-spot": 2}
    assert started(2, **{"gpu-spot": 0.0}) == {"gpu-on-demand": 2}


def test_the_rayjob_runs_a_command_that_the_command_line_takes_on_the_pinned_ray():
    *_, job = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    command, mode, *options = shlex.split(job["spec"]["entrypoint"])
    assert (command, mode) == ("robustness-grid", "run")
    assert RunOptions.read(options).workers == 2
    requirements = (ROOT / "requirements-cluster.txt").read_text()
    pinned = re.search(r"^ray==(\S+)", requirements, re.MULTILINE)
    assert pinned
    assert cluster["rayVersion"] == pinned[1]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        (results,) = (mount for mount in container["volumeMounts"] if mount["name"] == "results")
        assert {"name": "GRID_RESULTS", "value": results["mountPath"]} in container["env"]


@pytest.mark.parametrize(("answer", "ended"), [(200, -signal.SIGTERM), (404, 0)])
def test_a_node_is_drained_by_a_signal_once_aws_takes_it_away(answer, ended):
    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.respond(200, b"token" if self.path == "/api/token" else b"")

        def do_GET(self):
            known = self.headers["X-aws-ec2-metadata-token"] == "token"
            spot = known and self.path == "/meta-data/spot/instance-action"
            self.respond(answer if spot else 404, b"{}")

        def respond(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"METADATA": f"http://127.0.0.1:{server.server_port}"}
        command = ["sh", ROOT / "deploy" / "spot.sh", "sleep", "60" if answer == 200 else "1"]
        done = subprocess.run(command, check=False, env=os.environ | place, timeout=50)
        server.shutdown()
    assert done.returncode == (128 - ended if ended else 0)


class Commands:
    """Stands for ssh and rsync to machines that only the mock has: notes what they would run."""

    def __init__(self):
        self.run = []

    def __getattr__(self, name):
        def note(command, *args, **options):
            self.run.append(" ".join(command) if isinstance(command, list) else command)
            return b"up 1 min" if name == "check_output" else 0

        return note


def bootstrapped_groups(config):
    """Return the security groups of all nodes of a cluster file as Ray fills it in."""
    kinds = config["available_node_types"].values()
    return sorted({group for kind in kinds for group in kind["node_config"]["SecurityGroupIds"]})


@pytest.mark.slow
def test_ray_up_on_a_mock_of_ec2_starts_one_head_and_runs_its_commands(tmp_path, monkeypatch):
    pytest.importorskip("moto", reason="needs moto: pip install 'moto[ec2,iam]'")
    import boto3
    import ray.autoscaler._private.aws.config as aws
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(aws.time, "sleep", lambda seconds: None)
    done = Commands()
    monkeypatch.setattr(
        sys, "argv", ["aws.py", "grid", "--region", "us-west-2", "--ssh-from", "192.0.2.7/32"]
    )
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        for _ in range(2):
            runpy.run_path(str(ROOT / "deploy" / "aws.py"), run_name="__main__")
        ec2 = boto3.client("ec2", "us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        config = read("cluster.yaml")
        for node_type in config["available_node_types"].values():
            assert node_type["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/")
            node_type["node_config"]["ImageId"] = image
        bootstrapped = commands._bootstrap_config(config, no_config_cache=True)
        commands.get_or_create_head_node(
            bootstrapped,
            str(ROOT / "cluster.yaml"),
            no_restart=False,
            restart_only=False,
            yes=True,
            override_cluster_name=None,
            _runner=done,
        )
        (reservation,) = ec2.describe_instances()["Reservations"]
        groups = ec2.describe_security_groups(GroupIds=bootstrapped_groups(bootstrapped))
    (instance,) = reservation["Instances"]
    assert instance["IamInstanceProfile"]["Arn"].endswith("/robustness-grid-head")
    ways = [way for group in groups["SecurityGroups"] for way in group["IpPermissions"]]
    assert [r["CidrIp"] for way in ways for r in way["IpRanges"]] == ["192.0.2.7/32"]
    assert instance["InstanceType"] == "m6i.2xlarge"
    assert {"Key": "ray-node-type", "Value": "head"} in instance["Tags"]
    (key,) = (tmp_path / ".ssh").glob("*.pem")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    said = "\n".join(done.run)
    for piece in (
        "uv pip install",
        "trainables.store.snapshot",
        "mlflow server",
        "ray start --head",
    ):
        assert piece in said


def test_a_slurm_job_whose_time_limit_its_own_warning_fills_is_refused():
    times = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "1300"}
    script = ROOT / "deploy" / "slurm.sh"
    ended = subprocess.run(
        ["bash", script], env=os.environ | times, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "a time limit of 5 minutes: it must be 10 or more" in ended.stderr
