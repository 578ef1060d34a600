"""How soon trainings reach an accuracy: `python -m benchmarks.speed --scale NAME [--data DIR]`.

The rows of the shipped study `speed`, a seed each: processor seconds until so many held-out images
are right as the target says, those of all epochs, and the last accuracy; what a training itself
judges counts. On one thread the seconds of a busy machine can be compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import DEVICE
from grid.plan import Sizes, with_sizes
from grid.study import load_study
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.networks import build_classifier
from trainables.train.loop import accuracy, train


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each row as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="cifar10")
    parser.add_argument("--data", type=Path, help="where the scale's images lie")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    source = DataSource(root=options.data) if options.data else DataSource()
    study = load_study("speed")
    sizes = {"reduced": study.reduced, "reduced_epochs": study.reduced_epochs}
    scale = with_sizes(scale_of(options.scale, source), Sizes(), **sizes)
    data = load_data(scale, source)
    print(f"{'':28}{'to ' + format(options.target, '.0%'):>10}{'in all':>10}{'accuracy':>10}")
    for row in study.tables[0].rows:
        recipe, seconds, reached, right = scale.shrink(row.recipe), 0.0, None, 0.0
        classifier, began = build_classifier(recipe), time.process_time()
        for _ in train(recipe, classifier, data, device=DEVICE):
            seconds += time.process_time() - began
            right = accuracy(classifier, data.held_out, device=DEVICE)
            if reached is None and right >= options.target:
                reached = seconds
            began = time.process_time()
        first = f"{reached:.1f} s" if reached is not None else "never"
        print(f"{row.label:28}{first:>10}{seconds:>8.1f} s{right:>10.1%}", flush=True)


if __name__ == "__main__":
    main()
