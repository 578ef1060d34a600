"""deploy/slurm.sh on real Slurm daemons in namespaces: stopped, requeued, finished."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.driver import ROOT, SECONDS, study_of_one, trials

TOOLS = ("slurmctld", "slurmd", "sbatch", "unshare", "ip")
MISSING = [name for name in TOOLS if not shutil.which(name)]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {MISSING}"),
]
CONFIGURATION = """
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE
"""
# With the loopback alone Slurm takes no address for its own. It stops the run as it does before a
# time limit, once a checkpoint is there. A requeued job waits until its old credential has expired.
DRILL = """
set -e
ip link set lo up
ip link add grid0 type veth peer name grid1
ip address add 10.199.9.1/24 dev grid0
ip link set grid0 up
slurmctld; slurmd
until sinfo -h -t idle | grep -q idle; do sleep 0.5; done
job=$(sbatch --parsable --nodes=1 --gpus-per-node=0 --time=30 --output={folder}/out.txt \
    deploy/slurm.sh --study {folder}/study.toml)
until ls {folder}/results/trials/*/epoch-* > /dev/null 2>&1; do sleep 0.5; done
scancel --batch --signal=USR1 $job
until squeue -h -j $job -t PENDING | grep -q .; do sleep 0.5; done
cp {folder}/out.txt {folder}/stopped.txt
until scontrol show job $job | grep -qE 'JobState=(COMPLETED|FAILED|CANCELLED)'; do sleep 0.5; done
scontrol show job $job | tee {folder}/job.txt
tail -n 20 {folder}/slurmd.log
"""


def test_a_job_that_reaches_its_limit_stops_is_requeued_and_goes_on():
    # A Unix socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, host = Path(name), socket.gethostname().partition(".")[0]
        for part in ("state", "spool"):
            (folder / part).mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host))
        (folder / "study.toml").write_text(study_of_one(epochs=600))
        environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "GRID_RESULTS": str(folder / "results"),
            "HOME": str(folder),  # of Ray's token
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True)
        # Processes, ports and `ray stop` of its own.
        namespaces = ["unshare", "--pid", "--net", "--fork", "--mount-proc", "--kill-child"]
        script = DRILL.format(folder=folder)
        subprocess.run(
            [*namespaces, "bash", "-c", script],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=SECONDS,
        )
        stopped, ended = (folder / "stopped.txt").read_text(), (folder / "out.txt").read_text()
        assert "Stopped. Continue with:" in stopped
        assert "Trained 1 and judged 1 cells" in ended.removeprefix(stopped)
        job = (folder / "job.txt").read_text()
        assert "JobState=COMPLETED" in job
        assert "Restarts=1" in job
        (run,) = trials(folder / "results").values()
        assert run.outcome == "finished"
        assert run.logged_epochs == 60
