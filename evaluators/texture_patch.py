"""tpa: does the answer withstand square texture patches that a black-box search places?

Source: Yang et al., "PatchAttack" (ECCV 2020), as set down in STUDY section 5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from evaluators.base import Batch, Column, Evaluator, verdicts
from evaluators.intervals import of_mean
from evaluators.ledger import Score, share
from evaluators.memory import images_at_once
from evaluators.pgd import FOLDED_ON
from evaluators.textures import TextureDictionary, dictionary_for, dictionary_identity
from trainables.data.base import WHOLE, Data, Shard
from trainables.scale import PatchBudget, Scale
from trainables.train.adversary import attacked
from trainables.train.folding import folded

if TYPE_CHECKING:
    from trainables.networks import Classifier

ACTIONS = 5  # row, column, texture, crop row, crop column
WIDTH = 30  # of the embedding and of the LSTM
RATE = 0.03
TINY = torch.finfo(torch.float32).eps  # 1.19e-7
FLAT = 1e-4
FIRST_STOP = 3
BONUS = 100.0  # more than any two rewards differ: they lie between log(1.19e-7) and 0
FORWARD_BATCH = 256


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


class Policy(Protocol):
    """Proposes actions for every image of a task, all images at once."""

    learns: bool

    def sample(self, uniforms_MSA: Tensor) -> Tensor: ...

    def learn(self, rewards_MS: Tensor) -> None: ...

    def keep(self, index: Tensor) -> None: ...


class UniformPolicy:
    """Random search: every action uniform, nothing learned."""

    learns = False

    def __init__(self, task: Task, spaces: tuple[int, ...]) -> None:
        self.spaces = torch.tensor(spaces, device=task.images.device)

    def sample(self, uniforms_MSA: Tensor) -> Tensor:
        """Turn uniforms_MSA in [0, 1) into actions_MSA."""
        return torch.minimum((uniforms_MSA * self.spaces).long(), self.spaces - 1)

    def learn(self, rewards_MS: Tensor) -> None: ...

    def keep(self, index: Tensor) -> None: ...


class LSTMPolicy:
    """One embedding, LSTM and five heads per image, stacked; REINFORCE by Adam.

    The parameters are the rows of one matrix, so Adam, which works elementwise, treats each image
    as if it were alone, and an image that is done leaves by its row.
    """

    learns = True

    def __init__(self, task: Task, spaces: tuple[int, ...]) -> None:
        recurrent = [(4 * WIDTH, WIDTH), (4 * WIDTH, WIDTH), (4 * WIDTH,), (4 * WIDTH,)]
        heads = [shape for size in spaces for shape in ((size, WIDTH), (size,))]
        embeddings = [(size, WIDTH) for size in spaces[:-1]]
        self._shapes: list[tuple[int, ...]] = [*embeddings, *recurrent, *heads]
        self._sizes = [int(torch.Size(shape).numel()) for shape in self._shapes]
        normal = sum(self._sizes[: len(embeddings)])
        rest = sum(self._sizes) - normal
        rows = [_initial(normal, rest, generator) for generator in task.generators]
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
            action = _inverse_cdf(log_p.detach().exp(), uniforms_MSA[..., step])
            total = total + log_p.gather(2, action[..., None])[..., 0]
            actions.append(action)
            if step + 1 < ACTIONS:
                index = action[..., None].expand(-1, -1, WIDTH)
                inputs = embeddings[step].gather(1, index)
        self._log_probability = total
        return torch.stack(actions, dim=2)

    def learn(self, rewards_MS: Tensor) -> None:
        """Take one REINFORCE step: the last action's reward stands for all five, standardised."""
        centred = rewards_MS - rewards_MS.mean(dim=1, keepdim=True)
        advantage = centred / (rewards_MS.std(dim=1, keepdim=True) + TINY)
        loss = -(advantage * self._log_probability).mean(dim=1).sum()
        (self._parameters.grad,) = torch.autograd.grad(loss, self._parameters)
        self._adam.step()

    def keep(self, index: Tensor) -> None:
        """Drop every image but those at `index`, with its Adam moments."""
        moments = self._adam.state[self._parameters]
        self._parameters = self._parameters.detach()[index].requires_grad_(True)
        self._adam = torch.optim.Adam([self._parameters], lr=RATE)
        rows = {name: value[index] if value.ndim else value for name, value in moments.items()}
        self._adam.state[self._parameters] = rows


def _initial(normal: int, rest: int, generator: torch.Generator) -> Tensor:
    # torch's own defaults: embeddings from N(0, 1), LSTM and heads from +-1/sqrt(width).
    embeddings = torch.randn(normal, generator=generator)
    others = (torch.rand(rest, generator=generator) * 2 - 1) / WIDTH**0.5
    return torch.cat([embeddings, others])


def _lstm(
    cell: Sequence[Tensor], inputs_MSE: Tensor, hidden_MSE: Tensor, state_MSE: Tensor
) -> tuple[Tensor, Tensor]:
    w_input, w_hidden, b_input, b_hidden = cell
    gates = torch.baddbmm((b_input + b_hidden)[:, None], inputs_MSE, w_input.mT)
    gates = torch.baddbmm(gates, hidden_MSE, w_hidden.mT)
    entry, forget, candidate, output = gates.chunk(4, dim=2)
    state = forget.sigmoid() * state_MSE + entry.sigmoid() * candidate.tanh()
    return output.sigmoid() * state.tanh(), state


def _inverse_cdf(probability_MSV: Tensor, uniform_MS: Tensor) -> Tensor:
    cumulative = probability_MSV.cumsum(dim=2)
    index = torch.searchsorted(cumulative, uniform_MS[..., None].contiguous(), right=True)
    return index[..., 0].clamp_(max=probability_MSV.shape[2] - 1)


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
    """What a search did to each image of its task.

    images: with `patches` patches placed. predicted, success: of these images; without a patch,
    of the images as they were.
    """

    images: Tensor
    predicted: Tensor
    success: Tensor
    queries: Tensor
    patches: Tensor

    def add(self, index: Tensor, placed: Outcome) -> None:
        """Take over what one more patch did to the images at `index`."""
        self.images[index] = placed.images
        self.predicted[index] = placed.predicted
        self.success[index] = placed.success
        self.queries[index] += placed.queries
        self.patches[index] += placed.patches

    def stages(self) -> list[str | None]:
        """Name what broke each image: clean (no patch needed), patch-N, or None."""
        pairs = zip(self.success.tolist(), self.patches.tolist(), strict=True)
        return [(f"patch-{n}" if n else "clean") if broken else None for broken, n in pairs]


@dataclass(frozen=True)
class Answers:
    """What the classifier says to every sample of every image, each (M, S)."""

    reward: Tensor
    predicted: Tensor
    success: Tensor


class Best:
    """The best sample of each image so far: a successful one before any other, then by reward."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._rank = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        self.actions = torch.zeros((count, ACTIONS), dtype=torch.long, device=device)
        self.predicted = torch.zeros(count, dtype=torch.long, device=device)
        self.success = torch.zeros(count, dtype=torch.bool, device=device)
        self.seen = torch.zeros(count, dtype=torch.bool, device=device)

    def update(self, active_M: Tensor, actions_MSA: Tensor, answers: Answers) -> None:
        """Keep a step's best sample of each active image where it beats the one kept so far."""
        ranks = answers.reward.double() + BONUS * answers.success
        rank, sample = ranks.max(dim=1)
        image = torch.arange(len(active_M), device=active_M.device)
        better = rank > self._rank[active_M]
        rows, image, sample = active_M[better], image[better], sample[better]
        self._rank[rows] = rank[better]
        self.actions[rows] = actions_MSA[image, sample]
        self.predicted[rows] = answers.predicted[image, sample]
        self.success[rows] = answers.success[image, sample]
        self.seen[active_M] |= answers.success.any(dim=1)


PolicyOf = Callable[[Task, tuple[int, ...]], Policy]


@dataclass(frozen=True, kw_only=True)
class PatchSearch:
    """The search for patches: all images and all samples of a step in the same forward passes."""

    classifier: nn.Module
    budget: PatchBudget
    forward_batch: int = FORWARD_BATCH

    def run(self, task: Task, clean_M: Tensor, policy_of: PolicyOf) -> Outcome:
        """Place patches one after another on each image until it is broken or has them all.

        clean_M: the classes predicted without a patch; an image broken by none costs no query.
        """
        none = torch.zeros_like(task.labels)
        broken = clean_M != task.labels
        outcome = Outcome(task.images.clone(), clean_M.clone(), broken, none, none.clone())
        for _ in range(self.budget.patches):
            standing = (~outcome.success).nonzero().flatten()
            if not len(standing):
                break
            rest = replace(task, images=outcome.images).rows(standing)
            outcome.add(standing, self._place(rest, policy_of))
        return outcome

    def _place(self, task: Task, policy_of: PolicyOf) -> Outcome:
        """Search the place and texture of one patch for every image of the task."""
        side = self.budget.side(task.images.shape[-1])
        policy = policy_of(task, task.spaces(side))
        best = Best(len(task.labels), task.images.device)
        everyone = active = torch.arange(len(task.labels), device=task.images.device)
        queries = torch.zeros_like(active)
        means = task.images.new_zeros((len(active), self.budget.steps))
        for step in range(self.budget.steps):
            part = task.rows(active)
            actions_MSA = policy.sample(self._uniforms(part))
            answers = self._ask(part, actions_MSA, side)
            queries[active] += self.budget.samples
            best.update(active, actions_MSA, answers)
            means[active, step] = answers.reward.mean(dim=1)
            going = ~_stops(best.seen[active], means[active, : step + 1], flat=policy.learns)
            if step + 1 == self.budget.steps or not going.any():
                break
            policy.learn(answers.reward)
            if not going.all():
                active = active[going]
                policy.keep(going.nonzero().flatten())
        pasted = paste(task, best.actions, everyone, side=side)
        return Outcome(pasted, best.predicted, best.success, queries, torch.ones_like(queries))

    def _uniforms(self, task: Task) -> Tensor:
        # Drawn image by image on the CPU, so that neither batch nor device changes the draws.
        shape = (self.budget.samples, ACTIONS)
        draws = [torch.rand(shape, generator=generator) for generator in task.generators]
        return torch.stack(draws).to(task.images.device)

    def _ask(self, task: Task, actions_MSA: Tensor, side: int) -> Answers:
        """Put every sample to the classifier; each is one query of its image."""
        count, samples, _ = actions_MSA.shape
        owner_N = torch.arange(count, device=actions_MSA.device).repeat_interleave(samples)
        chunks = zip(
            torch.split(actions_MSA.flatten(0, 1), self.forward_batch),
            torch.split(owner_N, self.forward_batch),
            strict=True,
        )
        parts = [self._forward(task, actions, owner, side) for actions, owner in chunks]
        score, predicted = (torch.cat(p).view(count, samples) for p in zip(*parts, strict=True))
        return Answers((1 - score + TINY).log(), predicted, predicted != task.labels[:, None])

    @torch.inference_mode()
    def _forward(
        self, task: Task, actions_NA: Tensor, owner_N: Tensor, side: int
    ) -> tuple[Tensor, Tensor]:
        """Return the true class's softmax score and the class predicted for each sample.

        Out of memory halves the batch.
        """
        try:
            scores_NK = self.classifier(paste(task, actions_NA, owner_N, side=side)).softmax(dim=1)
            labels_N1 = task.labels[owner_N, None]
            return scores_NK.gather(1, labels_N1)[:, 0], scores_NK.argmax(dim=1)
        except torch.OutOfMemoryError:
            if len(owner_N) == 1:
                raise
        halves = zip(actions_NA.chunk(2), owner_N.chunk(2), strict=True)
        first, second = (self._forward(task, actions, owner, side) for actions, owner in halves)
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _stops(seen_M: Tensor, means_MT: Tensor, *, flat: bool) -> Tensor:
    """Say which images stop after their T-th step: a success seen or, if `flat`, rewards level."""
    if means_MT.shape[1] < FIRST_STOP:
        return torch.zeros_like(seen_M)
    level = means_MT[:, -3:].diff(n=2, dim=1)[:, 0].abs() < FLAT
    return seen_M | level if flat else seen_M


class TexturePatchAttack(Evaluator):
    """Survival under up to N texture patches, by REINFORCE (tpa) and by random search beside it.

    Both have the same budget and, per image, the same textures: those of one random class, not
    the true one. `dictionary`: by default the one stored with the data that `batches` reads, or
    else built from that data.
    Budgets (images x patches x steps x samples), of each of the two searches: imagenet
    5000 x 4 x 50 x 500, digits 50 x 4 x 8 x 25. An image draws from a generator of its own,
    seeded by its id, so its verdict does not depend on its batch.
    """

    name = "tpa"
    columns = (
        Column("tpa", "TPA"),
        Column("tpa/patches-1", "TPA, 1 patch"),
        Column("tpa-random", "Random patches"),
    )
    least_shard = 1

    def __init__(
        self,
        scale: Scale,
        *,
        dictionary: TextureDictionary | None = None,
        budget: PatchBudget | None = None,
        forward_batch: int = FORWARD_BATCH,
        seed: int = 0,
    ) -> None:
        super().__init__(scale)
        self.budget = budget or scale.patch
        self.subset_size = self.budget.images
        if self.budget.samples < 2:
            raise ValueError(f"REINFORCE standardises over samples: 2 or more, not {budget}")
        self.seed, self.forward_batch = seed, forward_batch
        self._stated = self._dictionary = dictionary

    def identity(self, source: Data) -> dict[str, Any]:
        stated = self._stated
        return {
            **super().identity(source),
            "budget": asdict(self.budget),
            "seed": self.seed,
            "dictionary": stated.digest if stated else dictionary_identity(self.scale, source),
        }

    def cost(self, held_out: int, *, withstanding: float) -> float:
        """Count the queries of both searches, for the share of the budget that they use up."""
        budget = self.budget
        queries = 2 * budget.patches * budget.steps * budget.samples
        return self.asked_about(held_out) * (1 + withstanding * queries)

    def batches(self, source: Data, *, batch_size: int, shard: Shard = WHOLE) -> Iterable[Batch]:
        self._dictionary = self._stated or dictionary_for(self.scale, source)
        return super().batches(source, batch_size=batch_size, shard=shard)

    def judge(self, classifier: Classifier, batch: Batch) -> pa.Table:
        with attacked(classifier):
            victim = folded(classifier, batch.images[:FOLDED_ON]) or classifier
            at_once = images_at_once(victim, batch.images, most=self.forward_batch)
        search = PatchSearch(classifier=victim, budget=self.budget, forward_batch=at_once)
        parts = [self._search(classifier, search, part) for part in batch.parts(at_once)]
        return pa.concat_tables(parts)

    def _search(self, classifier: Classifier, search: PatchSearch, batch: Batch) -> pa.Table:
        with torch.no_grad():
            clean_B = classifier(batch.images).argmax(dim=1)
        task = self._task(batch)
        parts = [verdicts(batch, "tpa/clean", clean_B)]
        for question, policy_of in POLICIES.items():
            generators = tuple(self._generator(question, i) for i in batch.ids)
            outcome = search.run(replace(task, generators=generators), clean_B, policy_of)
            parts.append(_rows(batch, question, outcome))
        return pa.concat_tables(parts)

    def _task(self, batch: Batch) -> Task:
        dictionary, device = self._dictionary, batch.images.device
        assert dictionary is not None, "batches come first: they say whose textures"
        chosen = self._palettes(batch, dictionary)
        used = sorted(set(chosen))
        textures = torch.stack([dictionary.of_class(k) for k in used])
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

    def _palettes(self, batch: Batch, dictionary: TextureDictionary) -> tuple[int, ...]:
        """Draw for each image the class whose textures it meets: not the true one."""
        chosen = []
        for image_id, label in zip(batch.ids, batch.labels.tolist(), strict=True):
            others = [k for k in dictionary.classes if k != label]
            if not others:
                raise ValueError(f"the texture dictionary has no class but the true one, {label}")
            generator = self._generator("class", image_id)
            chosen.append(others[int(torch.randint(len(others), (), generator=generator))])
        return tuple(chosen)

    def _generator(self, purpose: str, image_id: str) -> torch.Generator:
        key = f"{self.name}/{self.seed}/{purpose}/{image_id}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    def summarize(self, ledger: pa.Table) -> list[Score]:
        """Return survival of each question, after each number of patches, and mean queries."""
        scores = super().summarize(ledger)
        most = self.budget.patches * self.budget.steps * self.budget.samples
        for question in POLICIES:
            rows = ledger.filter(pc.equal(ledger["question"], question))
            scores += _by_patches(rows, question, self.budget.patches)
            scores += _mean_queries(rows, question, most)
        return scores


def _rows(batch: Batch, question: str, outcome: Outcome) -> pa.Table:
    return verdicts(
        batch,
        question,
        outcome.predicted,
        survived_B=~outcome.success,
        stage=outcome.stages(),
        queries=outcome.queries.tolist(),
        judged_BCHW=outcome.images if question == "tpa" else None,
    )


def _by_patches(rows: pa.Table, question: str, patches: int) -> list[Score]:
    """Return the share that survived the first n patches, for n short of all of them."""
    stages = rows["stage"].to_pylist()
    broken = [stages.count("clean")]
    scores = []
    for n in range(1, patches):
        broken.append(stages.count(f"patch-{n}"))
        scores.append(share(f"{question}/patches-{n}", len(stages) - sum(broken), len(stages)))
    return scores


def _mean_queries(rows: pa.Table, question: str, most: int) -> list[Score]:
    """Return the attacked images' mean queries; none if no image was attacked."""
    queries = rows.filter(pc.greater(rows["queries"], 0))["queries"].to_numpy()
    if not len(queries):
        return []
    low, high = of_mean(queries, least=0, most=most)
    return [Score(f"{question}/queries", float(queries.mean()), low, high, len(queries))]


POLICIES: dict[str, PolicyOf] = {
    "tpa": LSTMPolicy,
    "tpa-random": UniformPolicy,
}
