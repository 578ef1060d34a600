"""Trainings by a team of real processes over gloo, for the tests of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

from trainables.data.base import Data, Split
from trainables.data.load import load_data
from trainables.layers import GhostBatchNorm2d, use_set
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.train.loop import train
from trainables.train.team import ALONE, Team, gathered

Job = Callable[[Team], Any]


def few_digits() -> Data:
    digits = load_data(DIGITS)

    def head(split: Split, count: int) -> Split:
        parts = {"images": split.images[:count], "labels": split.labels[:count]}
        return Split(**parts, ids=split.ids[:count])

    return Data(
        data_set=digits.data_set,
        train=head(digits.train, 192),
        held_out=head(digits.held_out, 60),
        class_names=digits.class_names,
    )


def in_a_team(folder: Path, size: int, jobs: Sequence[Job]) -> list[list[Any]]:
    """Return what each worker of a team got from each job: answers[worker][job]."""
    multiprocessing.spawn(_work, (str(folder), size, jobs), nprocs=size)
    return [torch.load(folder / f"worker-{rank}.pt") for rank in range(size)]


def _work(rank: int, folder: str, size: int, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    torch.save([job(Team(rank, size)) for job in jobs], f"{folder}/worker-{rank}.pt")
    distributed.destroy_process_group()


def begun(
    recipe: Recipe,
    team: Team = ALONE,
    *,
    start: Any = None,
    end: float = 1,
    dtype: torch.dtype = torch.float,
) -> Any:
    """Return the state of a training after `end` epochs, which `start` may have begun.

    end: 1.5 is after the first step of the second epoch.
    """
    data = few_digits()
    classifier = build_classifier(recipe).to(dtype)
    teacher = build_classifier(recipe.teacher).to(dtype) if recipe.teacher else None
    device = torch.device("cpu")
    reports = train(
        recipe,
        classifier,
        data,
        device=device,
        teacher=teacher,
        start=start,
        team=team,
        due=lambda: end % 1 > 0,
    )
    return next(r.state for r in reports if r.epoch + bool(r.forward) / 2 == end)


def trained(
    recipe: Recipe,
    team: Team = ALONE,
    *,
    stop: float | None = None,
    dtype: torch.dtype = torch.float,
) -> tuple[Any, Any]:
    """Return weights and metrics; with `stop`, of a training cut short there and resumed."""
    start = begun(recipe, team, end=stop, dtype=dtype) if stop else None
    return ended(begun(recipe, team, start=start, end=recipe.epochs, dtype=dtype))


def ended(state: Any) -> tuple[Any, Any]:
    """Return the weights and metrics of a training's state."""
    return {name: value.clone() for name, value in state["model"].items()}, state["history"]


def compiled(recipe: Recipe, team: Team = ALONE) -> float:
    """Return the last loss of a training through torch.compile, without its minutes of inductor."""
    whole = torch.compile
    torch.compile = partial(whole, backend="eager")
    try:
        classifier, device = build_classifier(recipe), torch.device("cpu")
        reports = train(recipe, classifier, few_digits(), device=device, compiled=True, team=team)
        return [report.metrics["train/loss"] for report in reports][-1]
    finally:
        torch.compile = whole


class Norms(nn.Module):
    """Both batch normalisations, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(3)
        self.ghost = GhostBatchNorm2d(3, ghosts=4, sets=2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.ghost(self.plain(images_BCHW))


def through_norms(team: Team = ALONE) -> dict[str, Tensor]:
    """Return outputs, gradients and statistics after two batches, each in double precision."""
    generator = torch.Generator().manual_seed(0)
    images, weights = torch.randn(2, 2, 8, 3, 4, 4, dtype=torch.double, generator=generator)
    norms = Norms().double()
    network = gathered(norms, team)
    found: dict[str, Tensor] = {}
    for index in (0, 1):
        use_set(norms, index)
        own = images[index][team.own].clone().requires_grad_()
        outputs = network(own)
        (outputs.square() * weights[index][team.own]).mean().backward()
        found |= {f"outputs {index}": outputs.detach(), f"inputs {index}": own.grad / team.size}
    found |= {f"gradient {name}": p.grad.clone() for name, p in norms.named_parameters()}
    return found | {name: value.clone() for name, value in norms.named_buffers()}
