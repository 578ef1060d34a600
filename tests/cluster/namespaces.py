"""cluster-local.yaml for real: three machines as network namespaces, a real sshd in each.

    sudo -E python tests/cluster/namespaces.py

`ray up`, `--check`, a trial of two workers by `ray exec`, one machine killed in the middle of it,
which `--check` then names, `--status`, `ray down`, and nothing left running. Needs root, sshd,
rsync and ip; where these or namespaces are missing it says so and ends with 0. Six minutes on two
busy cores.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
STUDY = "tests/cluster/study.toml"
NAME, BRIDGE, NETWORK = "grid-drill", "grid-br", "10.199.7"
NODES = ("head", "worker1", "worker2")
PATIENCE = 900
SSHD = """
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
"""


def sh(command: str, **options: object) -> str:
    done = subprocess.run(  # noqa: S602
        command, shell=True, text=True, check=False, capture_output=True, **options
    )
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def what_is_missing() -> str:
    if os.geteuid() != 0:
        return "root"
    tools = [name for name in ("sshd", "ssh", "rsync", "ip", "unshare") if not shutil.which(name)]
    if tools:
        return tools[0]
    probe = "unshare --net --pid --fork --mount --uts --mount-proc true"
    allowed = subprocess.run(probe.split(), check=False, capture_output=True).returncode == 0
    return "" if allowed else "leave to make namespaces"


class Machine:
    """One machine: a network namespace, a process namespace with sshd, and a home of its own."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name, self.address = f"grid-{name}", f"{NETWORK}.{number}"
        home = folder / name
        home.mkdir()
        sh(f"ip netns add {self.name}")
        sh(f"ip link add {self.name} type veth peer name eth0 netns {self.name}")
        sh(f"ip link set {self.name} master {BRIDGE} up")
        sh(f"ip -n {self.name} addr add {self.address}/24 dev eth0")
        sh(f"ip -n {self.name} link set eth0 up; ip -n {self.name} link set lo up")
        # Without a way out Ray takes 127.0.0.1 for the node's address.
        sh(f"ip -n {self.name} route add default via {NETWORK}.1")
        inside = [f"hostname {self.name}", *_kept_of_root(home)]
        inside += [f"mount --rbind {home} /root", "mkdir -p /tmp/ray /run/sshd"]
        inside += ["mount -t tmpfs tmpfs /tmp/ray", "mount -t tmpfs tmpfs /dev/shm"]
        sshd = shutil.which("sshd")
        inside += [f"exec {sshd} -D -e -f {folder}/sshd_config -o ListenAddress={self.address}"]
        spaces = "unshare --pid --fork --mount --uts --mount-proc --kill-child"
        with (folder / f"{name}.log").open("w") as log:
            self.process = subprocess.Popen(
                [*f"ip netns exec {self.name} {spaces} bash -ec".split(), "\n".join(inside)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Return what runs on it with this in its name, sshd and its sessions left out."""
        if self.process.poll() is not None:
            return []
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:  # it ended meanwhile
                continue
            if part in line and ("ray" in line or "mlflow" in line) and "sshd" not in line:
                found.append(process)
        return found

    def kill(self) -> None:
        for process in psutil.Process(self.process.pid).children():
            process.kill()
        self.process.kill()
        self.process.wait()


def _kept_of_root(home: Path) -> list[str]:
    """Have a new home at /root keep this Python and the one behind it, if they lie there."""
    mounts = []
    for path in map(Path, (sys.base_prefix, sys.prefix)):
        if path.is_relative_to("/root"):
            kept = home / path.relative_to("/root")
            kept.mkdir(parents=True)
            mounts.append(f"mount --rbind {path} {kept}")
    return mounts


@contextmanager
def machines(folder: Path) -> Iterator[dict[str, Machine]]:
    for name in ("key", "host_key"):
        sh(f"ssh-keygen -q -t ed25519 -N '' -f {folder}/{name}")
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    sh(f"ip link add {BRIDGE} type bridge; ip link set {BRIDGE} up")
    sh(f"ip addr add {NETWORK}.1/24 dev {BRIDGE}")
    made: dict[str, Machine] = {}
    try:
        for number, name in enumerate(NODES, start=11):
            made[name] = Machine(name, number, folder)
        yield made
    finally:
        for machine in made.values():
            if machine.process.poll() is None:
                machine.kill()
        for name in NODES:
            # The link first: it would outlive its namespace by seconds.
            sh(f"ip link del grid-{name}; ip netns del grid-{name}; true")
        sh(f"ip link del {BRIDGE}; rm -f /tmp/ray/cluster-{NAME}.*")


def write_cluster_file(folder: Path, nodes: dict[str, Machine]) -> Path:
    """Fill cluster-local.yaml in: these machines, this environment instead of a new one."""
    config = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
    workers = [nodes[name].address for name in NODES[1:]]
    config["cluster_name"] = NAME
    config["provider"] |= {"head_ip": nodes["head"].address, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": f"{folder}/key"}
    config["file_mounts"] = {
        "~/robustness-grid": str(ROOT),
        "~/.ray/auth_token": f"{folder}/home/.ray/auth_token",
    }
    setup = config["setup_commands"]
    assert "venv" in setup[-2]
    assert "pip install" in setup[-1]
    setup[-2:] = [f"ln -sfn {sys.prefix} ~/grid"]
    setup[0] = setup[0].replace("/mnt/shared", f"{folder}/shared")
    for part in ("head", "worker"):
        starts = config[f"{part}_start_ray_commands"]
        starts[-1] = starts[-1].replace("ray start", "ray start --num-cpus=1")
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def wait_for(what: str, condition: object, patience: float = PATIENCE) -> None:
    print(f"waiting for {what}", flush=True)
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {patience:.0f} s")
        time.sleep(0.5)


def drill(folder: Path, nodes: dict[str, Machine]) -> None:
    environment = os.environ | {
        "HOME": f"{folder}/home",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    (folder / "home" / ".ray").mkdir(parents=True)
    (folder / "home" / ".ray" / "auth_token").write_text(os.urandom(32).hex())
    cluster = write_cluster_file(folder, nodes)
    wait_for("sshd", lambda: all(m.process.poll() is None for m in nodes.values()))
    print(sh(f"ray up -y --no-config-cache {cluster}", env=environment, cwd=ROOT)[-300:])
    command = f"cd ~/robustness-grid && python grid/run.py --study {STUDY} --workers 2"

    def on_head(options: str = "") -> list[str]:
        return ["ray", "exec", "--no-config-cache", str(cluster), f"{command} {options}"]

    said = sh(shlex.join(on_head(f"--check --wait {PATIENCE}")), env=environment, cwd=ROOT)
    print(said)
    assert "3 nodes, 3 CPUs" in said
    driver = subprocess.Popen(on_head(), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    results = folder / "shared" / "results"
    wait_for("a checkpoint", lambda: driver.poll() or list(results.glob("trials/*/epoch-*.pt")))
    doomed = next(nodes[n] for n in NODES[1:] if nodes[n].processes("TrainWorker"))
    doomed.kill()
    print(f"killed {doomed.name}", flush=True)
    code = driver.wait(timeout=PATIENCE)
    assert code == 0, f"the study ended with {code}"
    assert len(list(results.glob("trials/*/weights.safetensors"))) == 1
    checked = subprocess.run(
        on_head("--check --wait 1"),
        cwd=ROOT,
        env=environment,
        text=True,
        check=False,
        capture_output=True,
    )
    assert checked.returncode == 1, checked.stdout
    assert f"no Ray on {doomed.address}" in checked.stdout
    said = sh(shlex.join(on_head("--status")), env=environment, cwd=ROOT)
    print(said)
    assert "1 trials: 1 finished" in said
    assert "1 of 1 cells judged" in said
    print(sh(f"ray down -y {cluster}", env=environment, cwd=ROOT)[-200:])
    left = [nodes[name] for name in NODES]
    wait_for("raylets to end", lambda: not any(m.processes("raylet/raylet") for m in left), 120)


def main() -> None:
    if missing := what_is_missing():
        print(f"skipped: this needs {missing}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="grid-nodes-") as name:
        folder = Path(name)
        with machines(folder) as nodes:
            drill(folder, nodes)
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if name in str(p.info["cmdline"])]
        assert not left, f"still running: {left}"
    print("done: a machine died, the study did not")


if __name__ == "__main__":
    main()
