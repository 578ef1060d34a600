"""tpa: does the answer withstand square texture patches that a black-box search places?

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from evaluators.base import Batch, Column, Evaluator, verdicts
from evaluators.intervals import mean_score
from evaluators.ledger import Score, by_question, share
from evaluators.memory import images_at_once
from evaluators.pgd import FOLDED_ON
from evaluators.textures import dictionary_for, dictionary_identity
from trainables.data.base import WHOLE, Data, Shard
from trainables.scale import PatchBudget, Scale
from trainables.train.adversary import attacked, folded
from trainables.train.exactness import seed_of

if TYPE_CHECKING:
    from trainables.layers import Classifier

ACTIONS = 5  # row, column, texture, crop row, crop column
WIDTH = 30  # of the embedding and of the LSTM
RATE = 0.03
TINY = torch.finfo(torch.float32).eps  # 1.19e-7
FLAT = 1e-4
FIRST_STOP = 3
BONUS = 100.0  # more than any two rewards differ: they lie between log(1.19e-7) and 0
FORWARD_BATCH = 256
SEED = 0
LEARNS = {"tpa": True, "tpa-random": False}  # does a question's search learn?
FIRST_PATCH = "tpa/patches-1"


@dataclass(frozen=True)
class Task:
    """The images of a search, a row each: each has its own class, textures and generator.

    textures_PTCHW are the palettes in use; `palette` says which is each image's.
    """

    images: Tensor
    labels: Tensor
    textures: Tensor
    palette: Tensor
    generators: tuple[torch.Generator, ...]

    def rows(self, index: Tensor) -> Task:
        """Return the task of some of the images."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            palette=self.palette[index],
            generators=tuple(self.generators[i] for i in index.tolist()),
        )

    def spaces(self, side: int) -> tuple[int, ...]:
        """Return how many values each of the five actions has, for patches of `side` pixels."""
        places = self.images.shape[-1] - side
        return places, places, self.textures.shape[1], places, places

    def uniforms(self, samples: int) -> Tensor:
        """Draw uniforms_MSA in [0, 1) on the CPU, image by image: no batch or device matters."""
        draws = [torch.rand((samples, ACTIONS), generator=g) for g in self.generators]
        return torch.stack(draws).to(self.images.device)


def uniform_actions(uniforms_MSA: Tensor, spaces: Sequence[int]) -> Tensor:
    """Turn uniforms_MSA in [0, 1) into actions_MSA of random search."""
    sizes_A = torch.tensor(spaces, device=uniforms_MSA.device)
    return torch.minimum((uniforms_MSA * sizes_A).long(), sizes_A - 1)


class LSTMPolicy:
    """One embedding, LSTM and five heads per image, stacked; REINFORCE by Adam.

    The parameters are the rows of one matrix, so Adam, which works elementwise, treats each image
    as if it were alone, and an image that is done leaves by its row.
    """

    def __init__(self, task: Task, spaces: tuple[int, ...]) -> None:
        recurrent = [(4 * WIDTH, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (4 * WIDTH,)]
        heads = [shape for size in spaces for shape in ((size, WIDTH), (size,))]
        embeddings = [(size, WIDTH) for size in spaces[:-1]]
        self._shapes: list[tuple[int, ...]] = [*embeddings, *recurrent, *heads]
        self._sizes = [int(torch.Size(shape).numel()) for shape in self._shapes]
        normal = sum(self._sizes[: len(embeddings)])
        rest = sum(self._sizes) - normal
        # torch's own defaults: embeddings from N(0, 1), LSTM and heads from +-1/sqrt(width).
        rows = []
        for generator in task.generators:
            embedded = torch.randn(normal, generator=generator)
            others = (torch.rand(rest, generator=generator) * 2 - 1) / WIDTH**0.5
            rows.append(torch.cat([embedded, others]))
        self._parameters = torch.stack(rows).to(task.images.device).requires_grad_(True)
        self._adam = torch.optim.Adam([self._parameters], lr=RATE)
        self._log_probability = torch.empty(0)

    def sample(self, uniforms_MSA: Tensor) -> Tensor:
        """Turn uniforms_MSA in [0, 1) into actions_MSA by each Categorical's inverse CDF."""
        parts = torch.split(self._parameters, self._sizes, dim=1)
        views = [p.view(-1, *s) for p, s in zip(parts, self._shapes, strict=True)]
        embeddings, cell, heads = views[: ACTIONS - 1], views[4:8], views[8:]
        hidden = state = uniforms_MSA.new_zeros((*uniforms_MSA.shape[:2], WIDTH))
        inputs, total, actions = hidden, uniforms_MSA.new_zeros(()), []
        for step in range(ACTIONS):
            hidden, state = _lstm(cell, inputs, hidden, state)
            weight, bias = heads[2 * step : 2 * step + 2]
            log_p = torch.baddbmm(bias[:, None], hidden, weight.mT).log_softmax(dim=2)
            cumulative = log_p.detach().exp().cumsum(dim=2)
            drawn = uniforms_MSA[..., step, None].contiguous()
            action = torch.searchsorted(cumulative, drawn, right=True).clamp_(
                max=log_p.shape[2] - 1
            )
            total = total + log_p.gather(2, action)[..., 0]
            actions.append(action)
            if step + 1 < ACTIONS:
                inputs = embeddings[step].gather(1, action.expand(-1, -1, WIDTH))
        self._log_probability = total
        return torch.cat(actions, dim=2)

    def learn(self, rewards_MS: Tensor) -> None:
        """Take one REINFORCE step: the last action's reward stands for all five, standardised."""
        centred = rewards_MS - rewards_MS.mean(dim=1, keepdim=True)
        advantage = centred / (rewards_MS.std(dim=1, keepdim=True) + TINY)
        loss = -(advantage * self._log_probability).mean(dim=1).sum()
        (self._parameters.grad,) = torch.autograd.grad(loss, self._parameters)
        self._adam.step()

    def keep(self, index: Tensor) -> None:
        """Drop every image but those at `index`, with its Adam moments."""
        if len(index) == len(self._parameters):
            return
        moments = self._adam.state[self._parameters]
        self._parameters = self._parameters.detach()[index].requires_grad_(True)
        self._adam = torch.optim.Adam([self._parameters], lr=RATE)
        rows = {name: value[index] if value.ndim else value for name, value in moments.items()}
        self._adam.state[self._parameters] = rows


def _lstm(
    cell: Sequence[Tensor], inputs_MSE: Tensor, hidden_MSE: Tensor, state_MSE: Tensor
) -> tuple[Tensor, Tensor]:
    w_input, w_hidden, b_input, b_hidden = cell
    gates = torch.baddbmm((b_input + b_hidden)[:, None], inputs_MSE, w_input.mT)
    gates = torch.baddbmm(gates, hidden_MSE, w_hidden.mT)
    entry, forget, candidate, output = gates.chunk(4, dim=2)
    state = forget.sigmoid() * state_MSE + entry.sigmoid() * candidate.tanh()
    return output.sigmoid() * state.tanh(), state


def paste(task: Task, actions_NA: Tensor, owner_N: Tensor, *, side: int) -> Tensor:
    """Return images_NCHW: each owner's image with the patch that its actions describe."""
    row, column, texture, crop_row, crop_column = actions_NA[:, :, None, None].unbind(dim=1)
    reach = torch.arange(side, device=actions_NA.device)
    down, across = reach[:, None], reach
    palette = task.palette[owner_N, None, None]
    pasted = task.images[owner_N]
    index = torch.arange(len(owner_N), device=pasted.device)[:, None, None]
    patch_NSSC = task.textures[palette, texture, :, crop_row + down, crop_column + across]
    pasted[index, :, row + down, column + across] = patch_NSSC
    return pasted


@dataclass
class Outcome:
    """The images with `patches` patches placed, the classes predicted for them, and the queries."""

    images: Tensor
    predicted: Tensor
    queries: Tensor
    patches: Tensor

    def stages(self, labels: Tensor) -> list[str | None]:
        """Name what broke each image: clean (no patch needed), patch-N, or None."""
        pairs = zip((self.predicted != labels).tolist(), self.patches.tolist(), strict=True)
        return [(f"patch-{n}" if n else "clean") if broken else None for broken, n in pairs]

    def after_first(self, labels: Tensor) -> Outcome:
        """Return the outcome of a search that ends after one patch; its images are not known."""
        predicted = torch.where(self.patches > 1, labels, self.predicted)
        return replace(self, predicted=predicted, patches=self.patches.clamp(max=1))


@dataclass(frozen=True, kw_only=True)
class PatchSearch:
    """The search for patches: all images and all samples of a step in the same forward passes.

    It learns by REINFORCE, or searches at random.
    """

    classifier: nn.Module
    budget: PatchBudget
    learns: bool
    forward_batch: int = FORWARD_BATCH

    def run(self, task: Task, clean_M: Tensor) -> Outcome:
        """Place patches one after another on each image until it is broken or has them all.

        clean_M: the classes predicted without a patch; an image broken by none costs no query.
        """
        none = torch.zeros_like(task.labels)
        outcome = Outcome(task.images.clone(), clean_M.clone(), none, none.clone())
        for _ in range(self.budget.patches):
            standing = (outcome.predicted == task.labels).nonzero().flatten()
            if not len(standing):
                break
            rest = replace(task, images=outcome.images).rows(standing)
            images, predicted, queries = self._place(rest)
            outcome.images[standing] = images
            outcome.predicted[standing] = predicted
            outcome.queries[standing] += queries
            outcome.patches[standing] += 1
        return outcome

    def _place(self, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """Search one patch for every image; return the patched images, predictions and queries.

        An image's best sample is a successful one before any other, then the most rewarded.
        """
        side = self.budget.side(task.images.shape[-1])
        policy = LSTMPolicy(task, task.spaces(side)) if self.learns else None
        sample = policy.sample if policy else partial(uniform_actions, spaces=task.spaces(side))
        everyone = active = torch.arange(len(task.labels), device=task.images.device)
        predicted, queries = task.labels.clone(), torch.zeros_like(active)
        ranks = torch.full_like(active, -torch.inf, dtype=torch.float64)
        actions = torch.zeros((len(active), ACTIONS), dtype=torch.long, device=active.device)
        means = task.images.new_zeros((len(active), self.budget.steps))
        for step in range(self.budget.steps):
            part = task.rows(active)
            actions_MSA = sample(part.uniforms(self.budget.samples))
            rewards_MS, predicted_MS = self._ask(part, actions_MSA, side)
            queries[active] += self.budget.samples
            success_MS = predicted_MS != part.labels[:, None]
            rank, best = (rewards_MS.double() + BONUS * success_MS).max(dim=1)
            better = (rank > ranks[active]).nonzero().flatten()
            rows, best = active[better], best[better]
            ranks[rows] = rank[better]
            actions[rows] = actions_MSA[better, best]
            predicted[rows] = predicted_MS[better, best]
            means[active, step] = rewards_MS.mean(dim=1)
            stops = _stops(predicted[active] != part.labels, means[active, : step + 1], policy)
            going = (~stops).nonzero().flatten()
            if step + 1 == self.budget.steps or not len(going):
                break
            if policy:
                policy.learn(rewards_MS)
                policy.keep(going)
            active = active[going]
        return paste(task, actions, everyone, side=side), predicted, queries

    @torch.no_grad()
    def _ask(self, task: Task, actions_MSA: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Return rewards_MS and the classes predicted_MS of all samples, a query each."""
        count, samples, _ = actions_MSA.shape
        owner_N = torch.arange(count, device=actions_MSA.device).repeat_interleave(samples)
        scores, predicted = [], []
        for actions_NA, owner in zip(
            torch.split(actions_MSA.flatten(0, 1), self.forward_batch),
            torch.split(owner_N, self.forward_batch),
            strict=True,
        ):
            scores_NK = self.classifier(paste(task, actions_NA, owner, side=side)).softmax(dim=1)
            scores.append(scores_NK.gather(1, task.labels[owner, None])[:, 0])
            predicted.append(scores_NK.argmax(dim=1))
        score_MS, predicted_MS = (torch.cat(p).view(count, samples) for p in (scores, predicted))
        return (1 - score_MS + TINY).log(), predicted_MS


def _stops(broken_M: Tensor, means_MT: Tensor, policy: LSTMPolicy | None) -> Tensor:
    """Say which images stop after their T-th step: broken ones and, if it learns, level rewards."""
    if means_MT.shape[1] < FIRST_STOP:
        return torch.zeros_like(broken_M)
    level = means_MT[:, -3:].diff(n=2, dim=1)[:, 0].abs() < FLAT
    return broken_M | level if policy else broken_M


class TexturePatchAttack(Evaluator):
    """Survival under up to N texture patches, by REINFORCE (tpa) and by random search beside it.

    tpa/patches-1 is tpa's search after one patch: at scale digits all four, the study's budget,
    leave 0 % of a clean-trained ResNet-50, one leaves 48 to 64 % (seeds 0 to 2, 50 images), so
    tables and claims of generated data are about one.
    Both have the same budget and, per image, the same textures: those of one random class, not
    the true one, of the dictionary stored with the data or else built from them. Budgets (images
    x patches x steps x samples), of each of the two searches: imagenet 5000 x 4 x 50 x 500, digits
    50 x 4 x 8 x 25. An image draws from a generator of its own, seeded by its id, so its verdict
    does not depend on its batch.
    """

    name = "tpa"
    columns = (
        Column("tpa", "TPA", "TPA, 1 patch", counterpart_score=FIRST_PATCH),
        Column(FIRST_PATCH, "TPA, 1 patch", "TPA, 4 patches", counterpart_score="tpa"),
        Column("tpa-random", "Random patches"),
    )
    least_shard = 1

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.budget = scale.patch
        self.subset_size = self.budget.images
        self._dictionary: Mapping[int, Tensor] = {}

    def identity(self, source: Data) -> dict[str, Any]:
        channels, height, width = source.held_out.images.shape[1:]
        if channels != 3 or height != width:
            size = f"{channels} x {height} x {width}"
            raise ValueError(f"{self.name} takes square images of 3 channels, not {size}")
        return {
            **super().identity(source),
            "budget": {**asdict(self.budget), "images": self.subset_size},
            "seed": SEED,
            "dictionary": dictionary_identity(self.scale, source),
            "questions": (*LEARNS, FIRST_PATCH),
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count the queries of both searches, for the share of the budget that they use up."""
        budget = self.budget
        queries = 2 * budget.patches * budget.steps * budget.samples
        return self.asked_about(held_out) * (1 + withstanding * queries)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        self._dictionary = dictionary_for(self.scale, source)
        return super().batches(source, batch_size=batch_size, shard=shard)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        with attacked(classifier):
            victim = folded(classifier, batch.images[:FOLDED_ON]) or classifier
            at_once = images_at_once(victim, batch.images, most=FORWARD_BATCH)
        parts = []
        for part in batch.parts(at_once):
            with torch.no_grad():
                clean_B = classifier(part.images).argmax(dim=1)
            parts.append(verdicts(part, "tpa/clean", clean_B))
            task = self._task(part)
            for question, learns in LEARNS.items():
                search = PatchSearch(
                    classifier=victim, budget=self.budget, learns=learns, forward_batch=at_once
                )
                generators = tuple(self._generator(question, i) for i in part.ids)
                outcome = search.run(replace(task, generators=generators), clean_B)
                parts.append(
                    verdicts(
                        part,
                        question,
                        outcome.predicted,
                        stage=outcome.stages(part.labels),
                        queries=outcome.queries.tolist(),
                        judged_BCHW=outcome.images if question == self.name else None,
                    )
                )
                if question == self.name:
                    first, labels = outcome.after_first(part.labels), part.labels
                    stages = first.stages(labels)
                    parts.append(verdicts(part, FIRST_PATCH, first.predicted, stage=stages))
        return pa.concat_tables(parts)

    def _task(self, batch: Batch) -> Task:
        """Give each image the textures of a random class: not the true one."""
        chosen, device = [], batch.images.device
        for image_id, label in zip(batch.ids, batch.labels.tolist(), strict=True):
            others = [k for k in self._dictionary if k != label]
            generator = self._generator("class", image_id)
            chosen.append(others[int(torch.randint(len(others), (), generator=generator))])
        used = sorted(set(chosen))
        textures = torch.stack([self._dictionary[k] for k in used])
        if textures.shape[-2:] != batch.images.shape[-2:]:
            raise ValueError(
                f"the dictionary's textures are {tuple(textures.shape[-2:])}, "
                f"the images {tuple(batch.images.shape[-2:])}"
            )
        return Task(
            images=batch.images,
            labels=batch.labels,
            textures=textures.to(device),
            palette=torch.tensor([used.index(k) for k in chosen], device=device),
            generators=(),
        )

    def _generator(self, purpose: str, image_id: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(f"{self.name}/{SEED}/{purpose}/{image_id}"))

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return survival of each question, after each number of patches, and mean queries."""
        scores = super().summarize(ledger)
        most = self.budget.patches * self.budget.steps * self.budget.samples
        rows_of = by_question(ledger)
        for question in LEARNS:
            rows = rows_of[question]
            stages = rows["stage"].to_pylist()
            alive = len(stages) - stages.count("clean")
            for n in range(1, self.budget.patches):
                alive -= stages.count(f"patch-{n}")
                if (name := f"{question}/patches-{n}") not in rows_of:  # but for a question
                    scores.append(share(name, alive, len(stages)))
            queries = rows.filter(pc.greater(rows["queries"], 0))["queries"].to_numpy()
            if len(queries):
                scores.append(mean_score(f"{question}/queries", queries, most=most))
        return scores
