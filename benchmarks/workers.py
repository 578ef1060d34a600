"""What a step of adversarial training costs each worker of a team: `python -m benchmarks.workers`.

It falls as 1/N where N workers share a batch, and stays where each has a batch's worth of images.
Processor time, so that few cores serve as well as many: waits for one another do not count, and
neither does the first epoch. Images are enlarged to 64 px, so that a step is work, not messages.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from grid.study import base_named
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.recipe import Adversary, Preprocessing
from trainables.scale import DIGITS, scale_of_recipe
from trainables.train.exactness import exact
from trainables.train.loop import train
from trainables.train.team import Team

WORKERS = (1, 2, 4, 8)
IMAGES = 128  # of a batch, or of each worker's part of one
EPOCHS = 2
ENLARGED = Preprocessing(size=64)
ATTACK = Adversary(epsilon="16/255", step_size="16/255")


def main() -> None:
    """Measure each number of workers twice, and print the seconds a step and their ratio to one."""
    print(f"{'workers':>8}{'images':>8}{'a worker':>9}{'ms a step':>11}{'of one':>8}{'work':>7}")
    for is_fixed_in_total in (True, False):
        one = 0.0
        for workers in WORKERS:
            batch = IMAGES if is_fixed_in_total else IMAGES * workers
            with tempfile.TemporaryDirectory() as folder:
                multiprocessing.spawn(_work, (folder, workers, batch), nprocs=workers)
                seconds = max(float(file.read_text()) for file in Path(folder).glob("worker-*"))
            one = one or seconds
            figures = (
                f"{1000 * seconds:>11.1f}{seconds / one:>8.2f}{batch / workers / IMAGES:>7.2f}"
            )
            print(f"{workers:>8}{batch:>8}{batch // workers:>9}{figures}", flush=True)


def _work(rank: int, folder: str, size: int, batch: int) -> None:
    """Train as one worker, and write its processor seconds a step after the first epoch."""
    exact(torch.device("cpu"))
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    recipe = DIGITS.shrink(base_named("resnet50")).replace(
        batch_size=batch, epochs=EPOCHS, warmup_epochs=0, adversary=ATTACK, preprocessing=ENLARGED
    )
    training = train(
        recipe,
        build_classifier(recipe),
        load_data(scale_of_recipe(recipe)),
        device=torch.device("cpu"),
        team=Team(rank, size),
    )
    next(training)
    began = time.process_time()
    for _ in training:
        pass
    steps = (EPOCHS - 1) * (DIGITS.data_set.train_images // batch)
    Path(folder, f"worker-{rank}").write_text(str((time.process_time() - began) / steps))
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    main()
