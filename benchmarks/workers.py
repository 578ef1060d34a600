"""What a step of adversarial training costs each worker of a team: `python -m benchmarks.workers`.

It falls as 1/N where N workers share a batch, and stays where each has a batch's worth of images,
as far as arithmetic outweighs messages: it does not with the digits' own small ResNet, it does with
a whole ResNet-18 (`--full`). Processor time, so that few cores serve as well as many: waits for one
another do not count, and neither does the first epoch. Images are enlarged to 64 px. Also printed:
the messages that a worker sends in a step beside its gradients, and the bytes of both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from grid.study import base_named
from trainables.data.base import Data, Split
from trainables.data.load import load_data
from trainables.models import TIMM_PREFIX
from trainables.networks import build_classifier
from trainables.recipe import Adversary, Preprocessing
from trainables.scale import DIGITS, scale_of_recipe
from trainables.train.exactness import exact
from trainables.train.loop import train
from trainables.train.team import Team

WORKERS = (1, 2, 4, 8)
EPOCHS = 2
# Images of a batch, or of each worker's part of one; steps of an epoch, and images after it.
SMALL, FULL = (128, 128, 9, 597), (32, 4, 2, 16)
ENLARGED = Preprocessing(size=64)
ATTACK = Adversary(epsilon="16/255", step_size="16/255")
SENDING = ("all_reduce", "all_gather", "batch_isend_irecv")


def main() -> None:
    """Measure each number of workers; print the cost of a step and its ratio to one worker's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="a whole ResNet-18")
    is_full = parser.parse_args().full
    columns = ("workers", "images", "a worker", "ms a step", "of one", "work", "messages", "kB")
    print("".join(f"{column:>10}" for column in (*columns, "gradients")), flush=True)
    total, each, *_ = FULL if is_full else SMALL
    for is_fixed_in_total in (True, False):
        one = 0.0
        for workers in WORKERS:
            batch = total if is_fixed_in_total else each * workers
            with tempfile.TemporaryDirectory() as folder:
                multiprocessing.spawn(_work, (folder, workers, batch, is_full), nprocs=workers)
                measured = [json.loads(f.read_text()) for f in Path(folder).glob("worker-*")]
            seconds, *sent = max(measured)
            one = one or seconds
            work = batch / workers / (total if is_fixed_in_total else each)
            figures = f"{1000 * seconds:>10.0f}{seconds / one:>10.2f}{work:>10.3f}"
            figures += "".join(f"{figure:>10.0f}" for figure in sent)
            print(f"{workers:>10}{batch:>10}{batch // workers:>10}{figures}", flush=True)


def _work(rank: int, folder: str, size: int, batch: int, is_full: bool) -> None:
    """Train as one worker; write processor seconds, messages and kB a step of the last epoch."""
    exact(torch.device("cpu"))
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    recipe = DIGITS.shrink(base_named("resnet50")).replace(
        batch_size=batch, epochs=EPOCHS, warmup_epochs=0, adversary=ATTACK, preprocessing=ENLARGED
    )
    if is_full:
        recipe = recipe.replace(model=f"{TIMM_PREFIX}resnet18")
    *_, steps, held_out = FULL if is_full else SMALL
    data, classifier = load_data(scale_of_recipe(recipe)), build_classifier(recipe)
    data = Data(
        data_set=data.data_set,
        train=_first(data.train, steps * batch),
        held_out=_first(data.held_out, held_out),
        class_names=data.class_names,
    )
    sent: Counter[str] = Counter()
    for name in SENDING:
        setattr(distributed, name, partial(_counted, sent, getattr(distributed, name)))
    team, device = Team(rank, size), torch.device("cpu")
    training = train(recipe, classifier, data, device=device, team=team)
    next(training)
    sent.clear()
    began = time.process_time()
    for _ in training:
        pass
    seconds = (time.process_time() - began) / steps
    gradients = sum(p.numel() * p.element_size() for p in classifier.parameters()) * (size > 1)
    figures = [sent["messages"] / steps, sent["bytes"] / steps / 1000, gradients / 1000]
    Path(folder, f"worker-{rank}").write_text(json.dumps([seconds, *figures]))
    distributed.destroy_process_group()


def _first(split: Split, count: int) -> Split:
    """Return so many images of a split, from its start again where it has fewer."""
    places = torch.arange(count) % len(split.labels)
    ids = tuple(split.ids[place] for place in places.tolist())
    return Split(images=split.images[places], labels=split.labels[places], ids=ids)


def _counted(sent: Counter[str], send: Callable[..., Any], *values: Any) -> Any:
    """Send, and count the message and the bytes that this worker has put into it."""
    own = values[0][0].tensor if type(values[0]) is list and len(values) == 1 else values[-1]
    sent["messages"] += 1
    sent["bytes"] += own.numel() * own.element_size()
    return send(*values)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    main()
