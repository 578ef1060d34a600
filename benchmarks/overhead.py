"""What a trial costs beyond its own training, beside a TorchTrainer inside a Tune function.

Ours is the real command on a study of small trials, with no cells, so that evaluators do not share
the cores: (wall x lanes - work) / trials, from when the first trial after the two that pay for
imports starts. The other is the way that Ray's guide shows, with nothing to train, one trial at a
time: what a second trial adds to a run of one. Both are measured in turns.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, require, seconds
from trainables.store.tracking import Tracker

STUDY = 'name = "overhead"\nbase = "resnet50"\nevaluators = []\n[set]\nsize = "small"\n'
LANES = 2


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the seconds that a trial takes beyond its training, ours and the nested way's."""
    trials, epochs, repeats = (3, 1, 1) if quick else (14, 17, 5)
    nested = (lambda: 0.0) if quick else nested_overhead
    turns = [(overhead(trials, epochs=epochs), nested()) for _ in range(repeats)]
    yield Figure(
        name="a trial beyond its training",
        values=tuple(our_s for our_s, _ in turns),
        target=0.5,
        better="less",
        unit="s",
        same=f"{trials} trials finished",
    )
    yield Figure(
        name="a trial beyond its training, TorchTrainer in a Tune function",
        values=tuple(their_s for _, their_s in turns),
        target=10,
        unit="s",
        same="2 trials finished",
    )


def overhead(trials: int, *, epochs: int) -> float:
    """Return the seconds that a trial of the real command costs beyond its training."""
    with tempfile.TemporaryDirectory() as folder:
        study, results = Path(folder) / "study.toml", Path(folder) / "results"
        study.write_text(f"{STUDY}epochs = {epochs}\n")
        command = [sys.executable, "grid/run.py", "--study", str(study), "--seeds", str(trials)]
        subprocess.run([*command, "--results", str(results)], check=True, capture_output=True)  # noqa: S603
        tracker = Tracker(
            f"sqlite:///{results}/mlflow.db",
            experiment="robustness-digits",
            artifacts=results / "artifacts",
        )
        runs = sorted(tracker.trials().values(), key=lambda run: run.start_time)
        require(len(runs) == trials, f"{len(runs)} of {trials} trials finished")
        # The first trial of each lane pays for its actor's imports.
        counted = runs[LANES:]
        wall = (max(run.end_time for run in counted) - counted[0].start_time) / 1000
        work = sum(tracker.seconds(run) for run in counted)
    return (wall * LANES - work) / len(counted)


def nested_overhead() -> float:
    """Return the seconds that a second trial takes, one worker each and nothing to train."""
    import ray

    ray.init(
        address="local",
        num_cpus=LANES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            alone, both = (
                seconds(lambda n=n: fit_nested(n, Path(folder) / str(n))) for n in (1, 2)
            )
    finally:
        ray.shutdown()
    return both - alone


def fit_nested(trials: int, storage: Path) -> None:
    """Run trials, one after another, each of which starts a TorchTrainer of one worker."""
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            lambda: None,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(storage), name=f"nested-{config['number']}"),
        ).fit()

    found = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.01}),
        param_space={"number": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(storage), name="tune", verbose=0),
    ).fit()
    require(not found.errors, str(found.errors))
