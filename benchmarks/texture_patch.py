"""Queries a second of TexturePatchAttack against the same search, one image at a time.

The reference is the plain way to write it: for each image a policy of torch modules, a Python
loop that pastes one patch after another, one forward pass of that image's samples a step.
The second reference puts each pasted sample to the model as it is made, a batch of one. Both
sides: same model, images, textures, budget and stopping rules, float32, fixed success rule;
the draws differ, so queries do, and the ratio is of queries per second.

    python benchmarks/texture_patch.py --model resnet50 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from evaluators.texture_patch import LSTMPolicy, PatchSearch, Task
from evaluators.textures import StoredTextures
from grid.studies import deit, resnet50
from trainables.data import load_data, to_unit
from trainables.folding import folded
from trainables.loop import train
from trainables.models import Classifier, build_classifier
from trainables.scale import PatchBudget, Scale, scale_named

RECIPES = {"resnet50": resnet50, "deit_small": deit}
TINY = torch.finfo(torch.float32).eps


class PlainPolicy(nn.Module):
    """One image's policy, of torch's own modules."""

    def __init__(self, spaces: tuple[int, ...]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 30) for n in spaces[:-1])
        self.cell = nn.LSTMCell(30, 30)
        self.heads = nn.ModuleList(nn.Linear(30, n) for n in spaces)

    def forward(self, samples: int) -> tuple[Tensor, Tensor]:
        inputs = hidden = state = torch.zeros(samples, 30)
        actions, log_probability = [], torch.zeros(samples)
        for step, head in enumerate(self.heads):
            hidden, state = self.cell(inputs, (hidden, state))
            choice = torch.distributions.Categorical(logits=head(hidden))
            action = choice.sample()
            log_probability = log_probability + choice.log_prob(action)
            actions.append(action)
            if step < len(self.embeddings):
                inputs = self.embeddings[step](action)
        return torch.stack(actions, dim=1), log_probability


@torch.no_grad()
def scores_of_pasted(
    model: Classifier, image: Tensor, textures: Tensor, actions: Tensor, *, side: int, singly: bool
) -> tuple[Tensor, list[Tensor]]:
    """Paste each sample in turn; return the softmax scores and the pasted images."""
    pasted = []
    for row, column, texture, crop_row, crop_column in actions.tolist():
        patch = textures[texture, :, crop_row : crop_row + side, crop_column : crop_column + side]
        copy = image.clone()
        copy[:, row : row + side, column : column + side] = patch
        pasted.append(copy)
    if singly:
        return torch.cat([model(p[None]) for p in pasted]).softmax(dim=1), pasted
    return model(torch.stack(pasted)).softmax(dim=1), pasted


def plain_patch(
    model: Classifier,
    image: Tensor,
    label: int,
    textures: Tensor,
    budget: PatchBudget,
    *,
    singly: bool,
) -> tuple[Tensor, bool, int]:
    """Search one patch for one image; return the pasted image, success, and the queries."""
    side = budget.side(image.shape[-1])
    places = image.shape[-1] - side
    policy = PlainPolicy((places, places, len(textures), places, places))
    adam = torch.optim.Adam(policy.parameters(), lr=0.03)
    best, kept, success, means, queries = -float("inf"), image, False, [], 0
    for step in range(1, budget.steps + 1):
        actions, log_probability = policy(budget.samples)
        scores, pasted = scores_of_pasted(model, image, textures, actions, side=side, singly=singly)
        queries += len(pasted)
        reward = (1 - scores[:, label] + TINY).log()
        wrong = scores.argmax(dim=1) != label
        rank = reward + 100 * wrong
        chosen = int(rank.argmax())
        if float(rank[chosen]) > best:
            best, kept, success = float(rank[chosen]), pasted[chosen], bool(wrong[chosen])
        means.append(float(reward.mean()))
        advantage = (reward - reward.mean()) / (reward.std() + TINY)
        adam.zero_grad()
        (-(advantage * log_probability).mean()).backward()
        adam.step()
        if step >= 3 and (success or abs(means[-1] - 2 * means[-2] + means[-3]) < 1e-4):
            break
    return kept, success, queries


def plain_search(
    model: Classifier, task: Task, budget: PatchBudget, *, singly: bool
) -> tuple[int, int]:
    """Attack image after image; return all queries and how many images were broken."""
    total = broken = 0
    for image, label, palette in zip(
        task.images, task.goal.tolist(), task.palette.tolist(), strict=True
    ):
        current, success = image, False
        for _ in range(budget.patches):
            current, success, queries = plain_patch(
                model, current, label, task.textures[palette], budget, singly=singly
            )
            total += queries
            if success:
                break
        broken += success
    return total, broken


def batched_search(model: Classifier, task: Task, budget: PatchBudget) -> tuple[int, int]:
    """Attack all images at once by the evaluator's own search."""
    generators = tuple(torch.Generator().manual_seed(i) for i in range(len(task.goal)))
    search = PatchSearch(classifier=folded(model, task.images) or model, budget=budget)
    outcome = search.run(replace(task, generators=generators), task.goal, LSTMPolicy)
    return int(outcome.queries.sum()), int(outcome.success.sum())


def trained(name: str, scale: Scale) -> Classifier:
    """Train the scale's model by its recipe for a few epochs: enough to be worth attacking."""
    recipe = scale.shrink(RECIPES[name]()).replace(epochs=6, warmup_epochs=0.0)
    model = build_classifier(recipe)
    for _ in train(recipe, model, load_data(scale), device=torch.device("cpu")):
        pass
    return model.eval().requires_grad_(False)


def task_for(model: Classifier, scale: Scale, count: int) -> Task:
    """Return held-out images that the model gets right, with random grey textures."""
    split = load_data(scale).held_out
    images = to_unit(split.images)
    right = (model(images).argmax(dim=1) == split.labels).nonzero().flatten()[:count]
    draw = torch.Generator().manual_seed(0)
    shape = (10, scale.patch.textures, 1, scale.image_size, scale.image_size)
    stored = StoredTextures(
        torch.rand(shape, generator=draw).repeat(1, 1, 3, 1, 1), tuple(range(10)), "noise"
    )
    return Task(
        images=images[right],
        goal=split.labels[right],
        textures=stored.textures,
        palette=(split.labels[right] + 1) % 10,
        generators=(),
    )


def measure(run: Callable[[], tuple[int, int]]) -> tuple[float, int, int]:
    """Return queries a second, queries, and images broken."""
    start = time.perf_counter()
    queries, broken = run()
    return queries / (time.perf_counter() - start), queries, broken


def main() -> None:
    """Interleave the sides, print every repeat, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), default="resnet50")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    scale = scale_named("digits")
    model = trained(arguments.model, scale)
    task = task_for(model, scale, arguments.images)
    sides: dict[str, Callable[[], tuple[int, int]]] = {
        "ours": lambda: batched_search(model, task, scale.patch),
        "image at a time": lambda: plain_search(model, task, scale.patch, singly=False),
        "paste at a time": lambda: plain_search(model, task, scale.patch, singly=True),
    }
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{arguments.threads} thread(s), load {os.getloadavg()[0]:.1f}; {arguments.model} at "
        f"{scale.title}; {len(task.goal)} images, {scale.patch}"
    )
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats):
        for name, run in sides.items():
            rate, queries, broken = measure(run)
            rates[name].append(rate)
            print(
                f"{repeat}  {name:16} {rate:8.0f} queries/s  ({queries} queries, {broken} broken)"
            )
    ours = statistics.median(rates.pop("ours"))
    for name, found in rates.items():
        print(f"ours / {name}: {ours / statistics.median(found):.1f}x")


if __name__ == "__main__":
    main()
