"""A trial's team: Ray Train starts the workers, and each trains as one process alone would."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util import get_node_ip_address

from trainables.ray_internals import fed_here, node_leaves
from trainables.store.storage import below
from trainables.watchdog import counting_steps


def train_team(trial: dict[str, Any], *, starts: int) -> None:
    """Train until the trial is over; ControllerError where its team cannot start so many times."""
    gpus = {"GPU": trial["gpus"]} if trial["gpus"] else {}
    # TorchTrainer's base: torch would triple the memory of what a team has on the head.
    DataParallelTrainer(
        _work,
        train_loop_config=trial,
        scaling_config=train.ScalingConfig(
            num_workers=trial["workers"],
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": trial["threads"]} | gpus | trial["kind"],
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name=trial["digest"],
            storage_path=below(trial["storage"], "train"),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(controller_failure_limit=starts),
        ),
    ).fit()


def _work(trial: dict[str, Any]) -> None:
    """Train as one worker of the team; every worker reports, Tune takes the first one's report."""
    from ray.train.torch import get_device
    from torch import cuda, distributed

    from trainables.running import next_result, open_trial
    from trainables.train.team import Team

    device = get_device() if trial["gpus"] else "cpu"
    if trial["gpus"]:
        cuda.set_device(device)  # as TorchTrainer does: collectives run on the current one
    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    with socket.create_server(("", 0)) as free:
        meeting_place = f"tcp://{get_node_ip_address()}:{free.getsockname()[1]}"
    address, backend = broadcast_from_rank_zero(meeting_place), "nccl" if trial["gpus"] else "gloo"
    half_an_hour = timedelta(minutes=30)  # nccl's own are 10, and the first worker reads for others
    distributed.init_process_group(backend, address, half_an_hour, team.size, team.rank)
    source = fed_here(trial["source"], trial["threads"], trial["gpus"])
    running = open_trial(trial | {"device": str(device), "source": source}, team, node_leaves)
    over = False
    while not over:
        with counting_steps(trial["hung_after"]):
            result = next_result(running)
        # Tune must not take the trial for over while its workers are being put away.
        over = result.pop("done")
        train.report(result)
