"""The trial placed in many processes: a Tune function that has Ray Train run a team of workers."""

from __future__ import annotations

import os
from typing import Any

# Where the controller of a trial runs: on the node of the driver, which is not a spot instance.
# It takes none of what workers need, so that no trial can wait for another's workers.
CONTROLLER = {"node:__internal_head__": 0.001}
TRAIN_FOLDER = "train"
# Ray Train takes one report per look at its workers: by default every two seconds.
POLL_SECONDS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
CONTROLLER_FAILURES = 3


def train_together(config: dict[str, Any]) -> None:
    """Train one recipe with config["trial"]["workers"] workers; report each epoch to Tune.

    A worker or a node that dies has the team start again, from the trial's own checkpoint.
    config["trial"]: as of `RecipeTrial`, and workers, gpus (of a worker), max_failures.
    """
    for name, value in POLL_SECONDS.items():
        os.environ.setdefault(name, value)
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trial = config["trial"]
    resources = {"CPU": trial["threads"]} | ({"GPU": trial["gpus"]} if trial["gpus"] else {})
    TorchTrainer(
        _work,
        train_loop_config=trial,
        torch_config=TorchConfig(backend="nccl" if trial["gpus"] else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=trial["workers"],
            use_gpu=bool(trial["gpus"]),
            resources_per_worker=resources,
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name=trial["digest"],
            storage_path=f"{trial['storage']}/{TRAIN_FOLDER}",
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(
                max_failures=trial["max_failures"],
                controller_failure_limit=CONTROLLER_FAILURES,
            ),
        ),
    ).fit()


def _work(trial: dict[str, Any]) -> None:
    """Train as one worker of the team; every worker reports, the first one's word is taken."""
    from ray import train
    from ray.train.torch import get_device

    from trainables.team import Team
    from trainables.trial import next_result, open_trial

    context = train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    device = get_device() if trial["gpus"] else "cpu"
    running = open_trial(trial | {"device": str(device)}, team)
    while True:
        result = next_result(running)
        # Tune must not take the trial for over while its workers are being put away.
        over = result.pop("done")
        train.report(result)
        if over:
            return
