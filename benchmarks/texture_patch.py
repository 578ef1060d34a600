"""Queries a second of TexturePatchAttack against the same search, one image at a time.

The reference is the plain way to write it: for each image a policy of torch modules, a Python
loop that pastes one patch after another, one forward pass of that image's samples a step.
The second reference puts each pasted sample to the model as it is made, a batch of one. Both
sides: same model, images, textures, budget and stopping rules, float32, fixed success rule;
the draws differ, so queries do, and the ratio is of queries per second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.measure import DEVICE, Figure, device_seconds, require, seconds
from benchmarks.pgd import trained
from evaluators.texture_patch import LSTMPolicy, PatchSearch, Task
from evaluators.textures import StoredTextures
from grid.studies import deit, resnet50
from trainables.data.base import load_data, to_unit
from trainables.models import Classifier
from trainables.scale import DIGITS, PatchBudget
from trainables.train.folding import folded

TINY = torch.finfo(torch.float32).eps
ALIKE = 0.15  # of the images: what two searches with other draws may differ by


class PlainPolicy(nn.Module):
    """One image's policy, of torch's own modules."""

    def __init__(self, spaces: tuple[int, ...]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 30) for n in spaces[:-1])
        self.cell = nn.LSTMCell(30, 30)
        self.heads = nn.ModuleList(nn.Linear(30, n) for n in spaces)

    def forward(self, samples: int) -> tuple[Tensor, Tensor]:
        inputs = hidden = state = torch.zeros(samples, 30, device=DEVICE)
        actions, log_probability = [], torch.zeros(samples, device=DEVICE)
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
    policy = PlainPolicy((places, places, len(textures), places, places)).to(DEVICE)
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


def task_for(model: Classifier, count: int) -> Task:
    """Return held-out images that the model gets right, with random grey textures."""
    split = load_data(DIGITS).held_out
    images, labels = to_unit(split.images.to(DEVICE)), split.labels.to(DEVICE)
    with torch.no_grad():
        right = (model(images).argmax(dim=1) == labels).nonzero().flatten()[:count]
    draw = torch.Generator().manual_seed(0)
    shape = (10, DIGITS.patch.textures, 1, DIGITS.image_size, DIGITS.image_size)
    stored = StoredTextures(
        torch.rand(shape, generator=draw).repeat(1, 1, 3, 1, 1), tuple(range(10)), "noise"
    )
    return Task(
        images=images[right],
        goal=labels[right],
        textures=stored.textures.to(DEVICE),
        palette=(labels[right] + 1) % 10,
        generators=(),
    )


def compare(*, quick: bool) -> Iterator[Figure]:
    """Yield the ratio of queries a CPU second for both families and both references."""
    budget = replace(DIGITS.patch, patches=1, steps=3, samples=4) if quick else DIGITS.patch
    for recipe in (resnet50(), deit()):
        model = trained(recipe, epochs=1 if quick else 6)
        task = task_for(model, 2 if quick else 50)
        sides: dict[str, Callable[[], tuple[int, int]]] = {
            "ours": lambda m=model, t=task: batched_search(m, t, budget),
            "one image": lambda m=model, t=task: plain_search(m, t, budget, singly=False),
            "one paste": lambda m=model, t=task: plain_search(m, t, budget, singly=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        broken: dict[str, int] = {}
        for _ in range(1 if quick else 5):
            for name, search in sides.items():
                rate, broken[name] = queries_a_second(search)
                rates[name].append(rate)
        told = f"{list(broken.values())} of {len(task.goal)} images broken"
        few = max(2.0, ALIKE * len(task.goal))
        require(max(broken.values()) - min(broken.values()) <= few, told)
        for name in ("one image", "one paste"):
            yield Figure(
                name=f"texture patch attack of {recipe.model}, ours / {name} at a time",
                values=tuple(a / b for a, b in zip(rates["ours"], rates[name], strict=True)),
                target=10,
                same=told,
            )


def queries_a_second(search: Callable[[], tuple[int, int]]) -> tuple[float, int]:
    """Return the queries of a CPU second, and the images broken."""
    found: list[tuple[int, int]] = []
    took = seconds(lambda: found.append(search()), device_seconds)
    ((queries, broken),) = found
    return queries / took, broken
