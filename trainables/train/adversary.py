"""Projected gradient descent within a norm's ball, for training and for evaluation.

It may ascend a twin of the classifier, whose batch normalisation is folded into the convolutions
before it: the same logits, a third faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import cast

import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, fx, nn
from torch.nn import functional as F

from trainables.layers import Classifier, GhostBatchNorm2d, by_own_ghost
from trainables.recipe import Adversary, Recipe
from trainables.train.exactness import exact, settings_restored, uniform
from trainables.train.norms import NORMS, random_start
from trainables.train.team import SharedBatchNorm2d, SharedGhostBatchNorm2d
from trainables.watchdog import beat

TOLERANCE = 1e-4
Norm = nn.BatchNorm2d | GhostBatchNorm2d
OURS = (GhostBatchNorm2d, SharedBatchNorm2d, SharedGhostBatchNorm2d)


@contextmanager
def attacked(module: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode with frozen weights; both are put back on leaving.

    Eval mode: the attack must not move running statistics. Frozen: it wants input gradients only.
    """
    was_training = module.training
    trainable = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        module.train(was_training)


def pgd_iterates(
    classifier: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    targets: Tensor,
    *,
    epsilon: float | Tensor,
    stops: Sequence[int],
    step_size: float | None = None,
    start_BCHW: Tensor | None = None,
    norm: str = "linf",
) -> Iterator[tuple[int, Tensor]]:
    """Ascend the cross-entropy from the images or a start; yield (steps, iterate) at each stop.

    A step is `step_size` (None: epsilon / 4) times the norm's ascent of the gradient: in the
    max-norm its sign. One trajectory passes through all stops. targets: labels_B or soft
    targets_BK. Iterates stay within `epsilon`, a number or (B, 1, 1, 1), of the images and in
    [0, 1]. Call under `attacked`. Source: Madry et al. (2018), section 2.1; STUDY section 3.
    """
    length = epsilon / 4 if step_size is None else step_size
    within, ascent = NORMS[norm].ball(images_BCHW, epsilon), NORMS[norm].ascent
    current = (images_BCHW if start_BCHW is None else start_BCHW).detach()
    for step in range(1, max(stops) + 1):
        beat()
        current = current.detach().requires_grad_(True)
        loss = F.cross_entropy(classifier(current), targets, reduction="sum")
        if not loss.requires_grad:
            raise ValueError(
                "attacks need gradients, and the model's logits have none: torch.no_grad(), "
                ".detach() or numpy inside? clean, corruptions and audit need none"
            )
        (gradient,) = torch.autograd.grad(loss, current)
        with torch.no_grad():
            current = within(current + length * ascent(gradient, current))
        if step in stops:
            yield step, current


def apgd(
    adversary: Adversary, classifier: nn.Module, images: Tensor, targets: Tensor, start: Tensor
) -> Tensor:
    """Ascend the cross-entropy by AutoPGD; return each image's iterate of the highest loss.

    images, start: (B, C, H, W); targets: labels_B or soft targets_BK. Call under `attacked`.
    Source: Croce and Hein (2020), algorithm 1, as pyautoattack has it.
    """
    attack = APGDAttack(
        classifier,
        n_iter=adversary.steps,
        norm=adversary.norm.capitalize(),
        eps=adversary.epsilon,
        device=images.device,
    )
    attack.init_hyperparam(images)

    def loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        beat()
        return F.cross_entropy(logits_BK, targets, reduction="none")

    attack.loss, attack.ce_loss_targeted = "ce-targeted", loss  # its own takes labels only
    labels_B = targets.argmax(dim=1) if targets.is_floating_point() else targets
    # It draws a start of its own, even where it has one.
    with torch.random.fork_rng(devices=[]):
        best_BCHW, *_ = attack.attack_single_run(
            images.contiguous(), labels_B, x_init=start.contiguous()
        )
    return cast(Tensor, best_BCHW)


def training_attack(
    recipe: Recipe,
    classifier: nn.Module,
    images_BCHW: Tensor,
    targets: Tensor,
    places_B: Tensor,
    *,
    epoch: int,
    step: int,
    micro: int = 0,
    twin: FoldedClassifier | None = None,
) -> Tensor:
    """Attack a training batch by the recipe's adversary, on its labels_B or soft targets_BK.

    places_B: the images' numbers, for their draws. step, micro: the optimizer step of the epoch and
    the forward batch within it. The model is in eval mode meanwhile, each image normalised by its
    own ghost's running statistics where it has ghosts; its folded `twin` is asked in its place
    where there is one. as-published: gradients in half precision. trades: the attack is on the
    answers to the clean images.
    """
    assert recipe.adversary is not None
    adversary = recipe.adversary.in_epoch(epoch)
    start_BCHW = training_start(
        recipe, adversary, images_BCHW, places_B, epoch=epoch, step=step, micro=micro
    )
    half = half_precision(images_BCHW.device, enabled=recipe.protocol == "as-published")
    with attacked(classifier), by_own_ghost(classifier), half:
        if twin is not None:
            twin.refresh()
        victim = classifier if twin is None else twin
        if adversary.loss == "trades":
            # The cross-entropy on the clean answers is their divergence, but for a constant.
            with torch.no_grad():
                targets = victim(images_BCHW).softmax(dim=1)
        if adversary.attack == "apgd":
            return apgd(adversary, victim, images_BCHW, targets, start_BCHW)
        ((_, final_BCHW),) = pgd_iterates(
            victim,
            images_BCHW,
            targets,
            epsilon=adversary.epsilon,
            step_size=adversary.step_size,
            stops=(adversary.steps,),
            start_BCHW=start_BCHW,
            norm=adversary.norm,
        )
    return final_BCHW


def half_precision(device: torch.device, *, enabled: bool) -> torch.autocast:
    """Return the half precision of attacks as published: float16, on CPUs bfloat16."""
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else None, enabled)


def in_bf16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a model as a function that computes in bfloat16, and returns float32."""

    def logits(images_BCHW: Tensor) -> Tensor:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16):
            logits_BK: Tensor = model(images_BCHW)
        return logits_BK.float()

    return logits


def training_start(
    recipe: Recipe,
    adversary: Adversary,
    images_BCHW: Tensor,
    places_B: Tensor,
    *,
    epoch: int,
    step: int,
    micro: int = 0,
) -> Tensor:
    """Return where a training attack starts.

    corrected: each image at random in its ball with chance 1 - plain_start, else at itself.
    as-published: the whole batch at random if a normal draw exceeds plain_start.
    """
    key = (recipe.seed, epoch, step)
    epsilon, norm = adversary.epsilon, adversary.norm
    started_BCHW = random_start(
        images_BCHW, places_B, epsilon=epsilon, key=(*key, "start"), norm=norm
    )
    if recipe.protocol == "as-published":
        drawn = float(uniform(torch.zeros(1, dtype=torch.long), (), key=(*key, micro, "batch")))
        return started_BCHW if drawn > NormalDist().cdf(adversary.plain_start) else images_BCHW
    draws_B = uniform(places_B.to(images_BCHW.device), (), key=(*key, "plain"))
    plain_B = draws_B < adversary.plain_start
    return torch.where(plain_B.view(-1, 1, 1, 1), images_BCHW, started_BCHW)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, OURS) or super().is_leaf_module(m, module_qualified_name)


class FoldedClassifier(nn.Module):
    """A classifier in eval mode, each of its convolutions merged with the norm behind it.

    It shares every other parameter with the classifier; after the classifier's weights have
    changed, `refresh` brings the merged ones up to date. Only input gradients flow through it.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        graph = _Tracer().trace(classifier)
        self._network = fx.GraphModule(classifier, graph)
        # Each convolution, the norm behind it, and both merged.
        self.merged = [self._merge(node) for node in graph.nodes if self._is_foldable(node)]
        self._network.recompile()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the present weights and running statistics."""
        for convolution, norm, merged in self.merged:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, var = norm.running_mean, norm.running_var
            if isinstance(norm, GhostBatchNorm2d):
                mean, var = mean[0, : norm.features], var[0, : norm.features]
            gain = norm.weight.flatten() * (var + norm.eps).rsqrt()
            shift = norm.bias.flatten() - mean * gain
            weight, bias = convolution.weight, convolution.bias
            merged.weight.copy_(weight * gain.view(-1, 1, 1, 1))
            merged.bias.copy_(shift if bias is None else shift + gain * bias)  # type: ignore[union-attr]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        beat()
        return cast(Tensor, self._network(images_BCHW))

    def _is_foldable(self, node: fx.Node) -> bool:
        norm, before = self._module_of(node), node.args[0] if node.args else None
        return (
            type(norm) in (nn.BatchNorm2d, *OURS)
            and isinstance(before, fx.Node)
            and type(self._module_of(before)) is nn.Conv2d
            and len(before.users) == 1
        )

    def _module_of(self, node: fx.Node) -> nn.Module | None:
        return self._network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _merge(self, node: fx.Node) -> tuple[nn.Conv2d, Norm, nn.Conv2d]:
        before = cast(fx.Node, node.args[0])
        convolution = cast(nn.Conv2d, self._module_of(before))
        norm = cast(Norm, self._module_of(node))
        merged = copy.deepcopy(convolution).to(memory_format=torch.channels_last)
        merged.bias = nn.Parameter(norm.bias.detach().clone().flatten())
        before.target = f"folded_{before.name}"
        self._network.add_submodule(before.target, merged.requires_grad_(False))
        node.replace_all_uses_with(before)
        node.graph.erase_node(node)
        return convolution, norm, merged


@torch.no_grad()
def folded(classifier: Classifier, images_BCHW: Tensor) -> FoldedClassifier | None:
    """Fold a classifier in eval mode; None where nothing folds or its logits would change.

    Its logits on `images_BCHW` are the classifier's to within 1e-4 of their largest.
    """
    if not any(isinstance(module, Norm) for module in classifier.modules()):
        return None
    try:
        twin = FoldedClassifier(classifier)
    except Exception:  # a user's forward pass may do what cannot be traced in any way
        return None
    with settings_restored(images_BCHW.device):
        exact(images_BCHW.device)  # TF32 would differ by more
        expected = classifier(images_BCHW)
        difference = (twin(images_BCHW) - expected).abs().max()
    same = difference <= TOLERANCE * expected.abs().max().clamp(min=1)
    return twin if same and twin.merged else None
