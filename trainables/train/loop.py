"""The training loop: one generator of epoch reports that knows neither Ray nor MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, cast

import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import Lookahead
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainables.data.augment import TrainBatches, mix, seed_of
from trainables.data.base import Data, Split, to_unit
from trainables.layers import Classifier, use_set
from trainables.recipe import Distillation, Recipe
from trainables.scale import scale_named
from trainables.train import adversary
from trainables.train.adversary import FoldedClassifier, attacked, folded, pgd_iterates
from trainables.train.draws import BatchDraws, draws, seeded
from trainables.train.exactness import exact, fast
from trainables.train.optim import build_optimizer, rate_at
from trainables.train.team import ALONE, Team, gathered
from trainables.watchdog import beat

Outcome = Literal["training", "finished", "collapsed"]
EVALUATION_BATCH = 256
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = "probe/pgd-10"
PROBE_STEPS = 10
FINITE_MARGIN = 1.0001  # in MART's logarithm, as in its authors' code
STEPS_BETWEEN = 10  # in long epochs, before workers ask each other again whether to save
PATIENCE_SHARE = 0.1  # of the epochs at chance: a collapse
LEAST_PATIENCE = 3


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch did, or the first `forward` forward batches of the epoch after it.

    `metrics` are this epoch's figures; `state` is all that training goes on from, `judged` the
    classifier whose weights are judged: their tensors are the live ones, valid until the next
    report is asked for. `pace`: see `TrainBatches`.
    """

    epoch: int
    forward: int
    metrics: dict[str, float]
    outcome: Outcome
    reason: str
    state: dict[str, Any]
    judged: Classifier
    pace: tuple[float, float]


class _Training:
    """What a training needs; it has the state of an earlier report, if any."""

    def __init__(
        self,
        recipe: Recipe,
        classifier: Classifier,
        data: Data,
        device: torch.device,
        teacher: Classifier | None,
        start: dict[str, Any] | None,
        compiled: bool,
        is_fast: bool,
        team: Team,
    ) -> None:
        (fast if is_fast else exact)(device)
        classifier.to(device)
        self.recipe, self.classifier, self.data = recipe, classifier, data
        self.device, self.teacher, self.team = device, teacher, team
        self.network = gathered(classifier, team)  # the classifier, or DDP around it
        self.optimizer = build_optimizer(recipe, classifier)
        self.mean = ModelEmaV3(classifier, recipe.ema_decay) if recipe.ema_decay else None
        self.scaler = GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.forward, self.rate = 0, 0.0  # of the epoch under way: forward batches done; last rate
        self.loss = torch.zeros((), device=device)  # the sum over those, of this worker's part
        if start is not None:
            classifier.load_state_dict(start["model"])
            self.optimizer.load_state_dict(start["optimizer"])
            if self.mean is not None:
                self.mean.module.load_state_dict(start["mean"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(start["scaler"])
            if losses := start.get("losses"):
                self.forward = start["forward"]
                self.loss += losses[team.rank] if len(losses) == team.size else fmean(losses)
        if teacher is not None:
            teacher.to(device).eval().requires_grad_(False)
        self.twin: FoldedClassifier | None = None
        if recipe.adversary and recipe.norm != "ghost":  # ghosts differ, so none is folded
            self.twin = folded(classifier.eval(), to_unit(data.train.images[:1].to(device)))
        workers, pin = data.workers, device.type == "cuda"
        self.batches = TrainBatches(recipe, data.train, workers=workers, pin=pin, team=team)
        self.draws = draws(classifier.backbone)  # whether the network draws at random
        self.logits: Callable[[Tensor], Tensor]
        self.logits = _compiled(self.network) if compiled else self.network

    @property
    def judged(self) -> Classifier:
        """The classifier whose weights are stored and judged."""
        is_mean = self.mean is not None and self.recipe.ema_evaluated
        return cast(Classifier, self.mean.module) if self.mean and is_mean else self.classifier


def _compiled(network: nn.Module) -> nn.Module:
    """Compile a network, once for all sets of a ghost normalisation's statistics."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    return cast(nn.Module, torch.compile(network))


def train(
    recipe: Recipe,
    classifier: Classifier,
    data: Data,
    *,
    device: torch.device,
    teacher: Classifier | None = None,
    start: dict[str, Any] | None = None,
    compiled: bool = False,
    is_fast: bool = False,
    team: Team = ALONE,
    due: Callable[[], bool] = lambda: False,
) -> Iterator[EpochReport]:
    """Train a classifier by its recipe; report after every epoch, and within one where `due`.

    `start` is the `state` of an earlier report: training goes on behind it with the same bits as
    if it had never stopped, because every random draw follows from (seed, epoch, image) alone.
    A collapse ends the training: an outcome, not an error. A recipe with a teacher needs it here.
    `compiled`: the weight steps go through torch.compile, and are no longer the same bits. Nor are
    they where `is_fast`, by which a GPU computes as `fast` says.
    Every worker of a team calls this with the same arguments and gets the same metrics.
    """
    if (teacher is None) != (recipe.teacher is None):
        raise ValueError("a teacher is needed by a recipe that names one, and by no other")
    training = _Training(recipe, classifier, data, device, teacher, start, compiled, is_fast, team)
    history: list[dict[str, float]] = list(start["history"]) if start else []
    steps = training.batches.steps
    every = max(1, min(steps // 100, STEPS_BETWEEN))
    for epoch in range(len(history), recipe.epochs):
        for forward in _train_epoch(training, epoch):
            step = forward // recipe.accumulation
            if step < steps and step % every == 0 and team.any(due()):
                yield _report(training, history)
        history.append(_measured(training, epoch))
        report = _report(training, history)
        yield report
        if report.outcome == "collapsed":
            return


def _measured(training: _Training, epoch: int) -> dict[str, float]:
    """Close an epoch: return its mean loss and its last rate, and measure what is due after it."""
    recipe, classifier, data = training.recipe, training.classifier, training.data
    # A scaler may have skipped all steps so far: an optimizer's state must not begin with ours.
    if isinstance(training.optimizer, Lookahead) and training.optimizer.state_dict()["state"]:
        training.optimizer.sync_lookahead()
    scale, device, team = scale_named(recipe.scale), training.device, training.team
    loss = float(team.total(training.loss)) / team.size / training.forward
    metrics = {"epoch": epoch + 1.0, "train/loss": loss, "train/rate": training.rate}
    training.forward, training.loss = 0, torch.zeros_like(training.loss)
    if row := recipe.curriculum_row(epoch):
        fields = row.model_dump(exclude={"epoch"})
        metrics |= {f"curriculum/{name}": float(value) for name, value in fields.items()}
    if recipe.adversary:
        probed = data.train.subset(scale.probe_images, seed=0)
        metrics[PROBE] = probe(recipe, classifier, probed, device=device, team=team)
    if (epoch + 1) % scale.validate_every == 0 or epoch + 1 == recipe.epochs:
        right = accuracy(training.judged, data.held_out, device=device, team=team)
        metrics["held_out/accuracy"] = right
    return metrics


def _report(training: _Training, history: list[dict[str, float]]) -> EpochReport:
    recipe, scaler, team = training.recipe, training.scaler, training.team
    losses = torch.zeros(team.size, device=training.device)
    losses[team.rank] = training.loss
    n = min(scale_named(recipe.scale).probe_images, len(training.data.train))
    classes = len(training.data.class_names)
    reason = collapse_reason(recipe, history, num_classes=classes, n=n) if history else ""
    outcome: Outcome = "finished" if len(history) == recipe.epochs else "training"
    return EpochReport(
        epoch=len(history),
        forward=training.forward,
        metrics=history[-1] if history else {},
        outcome="collapsed" if reason else outcome,
        reason=reason,
        judged=training.judged,
        pace=training.batches.pace,
        state={
            "model": training.classifier.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "history": list(history),
            "forward": training.forward,
            "losses": team.total(losses).tolist() if training.forward else [],
            **({"scaler": scaler.state_dict()} if scaler.is_enabled() else {}),
            **({"mean": training.mean.module.state_dict()} if training.mean else {}),
        },
    )


def _train_epoch(training: _Training, epoch: int) -> Iterator[int]:
    """Train what is left of an epoch; yield the forward batches done after every step."""
    recipe, optimizer = training.recipe, training.optimizer
    training.classifier.train()
    for images, views in training.batches.epoch(epoch, training.forward):
        beat()
        step, micro = divmod(training.forward, recipe.accumulation)
        if micro == 0:
            training.rate = rate_at(recipe, epoch, step, training.batches.steps)
            for group in optimizer.param_groups:
                group["lr"] = training.rate * group.get("lr_scale", 1)
            optimizer.zero_grad()
        use_set(training.classifier, micro)
        network, last = training.network, micro + 1 == recipe.accumulation
        # A team's gradients are gathered with the last forward batch of a step only.
        is_apart = isinstance(network, DistributedDataParallel) and not last
        gathering = cast(DistributedDataParallel, network).no_sync() if is_apart else nullcontext()
        with _named_memory(training, len(views)), gathering:
            loss = _batch_loss(training, images, views, epoch, training.forward)
            scaled = training.scaler.scale(loss / recipe.accumulation)
            scaled.backward()  # type: ignore[no-untyped-call]
        training.loss += loss.detach()
        training.forward += 1
        if last:
            if recipe.clip_grad:
                training.scaler.unscale_(optimizer)
                parameters = list(training.classifier.parameters())
                dispatch_clip_grad(parameters, recipe.clip_grad, recipe.clip_mode)
            training.scaler.step(optimizer)
            training.scaler.update()
            if training.mean:
                training.mean.update(training.classifier)
            yield training.forward


def _batch_loss(
    training: _Training, images: Tensor, views: Tensor, epoch: int, forward: int
) -> Tensor:
    """Return the loss of one forward batch: mixed, attacked and taught as the recipe says.

    images: this worker's part of the batch; views: their numbers (data/augment.py). A team's member
    returns its part's loss.
    """
    recipe, classifier, team = training.recipe, training.classifier, training.team
    images = images.to(training.device, non_blocking=True)
    labels = training.data.train.labels
    labels = labels[views % len(labels)].to(training.device)
    if recipe.mixes:
        images, labels = team.with_mirror(images), team.with_mirror(labels)
    inputs, targets = mix(
        recipe,
        to_unit(images),
        labels,
        num_classes=len(training.data.class_names),
        epoch=epoch,
        step=forward,
    )
    inputs, targets = (team.own_of(v, mirrored=recipe.mixes) for v in (inputs, targets))
    clean = inputs
    if recipe.adversary:
        step, micro = divmod(forward, recipe.accumulation)
        batch = inputs, targets, views
        inputs = adversary.training_attack(
            recipe, classifier, *batch, epoch=epoch, step=step, micro=micro, twin=training.twin
        )
    half = PRECISIONS[recipe.precision]
    drawn = _drawn(training, epoch, forward)
    with torch.autocast(training.device.type, half, enabled=half is not torch.float32), drawn:
        clean_BK = training.logits(clean).float() if recipe.adversarial_loss != "ce" else None
        logits_BK = training.logits(inputs).float()
        if recipe.distillation and training.teacher is not None:
            with torch.no_grad():
                taught_BK = training.teacher(inputs).float()
    if clean_BK is None:
        loss = training_loss(recipe, logits_BK, targets)
    else:
        loss = divergence_loss(recipe, clean_BK, logits_BK, targets)
    if recipe.distillation and training.teacher is not None:
        loss = distillation_loss(recipe.distillation, loss, logits_BK, taught_BK)
    return loss


def _drawn(training: _Training, epoch: int, forward: int) -> AbstractContextManager[object]:
    """Return the context in which a network draws what follows from the forward batch alone.

    Of a compiled network it follows from the worker too.
    """
    if not training.draws:
        return nullcontext()
    recipe, device, team = training.recipe, training.device, training.team
    key = (recipe.seed, epoch, 8, forward)
    if training.logits is not training.network:
        return seeded(device, seed_of(*key, team.rank))
    generator = torch.Generator(device).manual_seed(seed_of(*key))
    return BatchDraws(generator, recipe.forward_batch, team.own)


@contextmanager
def _named_memory(training: _Training, images: int) -> Iterator[None]:
    """Say of a step that runs out of memory which trial and batch it was, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        recipe = training.recipe
        half = max(1, recipe.forward_batch // 2)
        lighter = ", or --set precision=bf16" if recipe.precision == "float32" else ""
        raise torch.OutOfMemoryError(
            f"{recipe.describe()} ({recipe.digest()}): a batch of {images} images does not fit the "
            f"memory of {training.device}: give --set micro_batch={half}, which keeps the total "
            f"batch of {recipe.batch_size}{lighter}; or the same in [set] of a study file"
        ) from error


def training_loss(recipe: Recipe, logits_BK: Tensor, targets: Tensor) -> Tensor:
    """Return the loss on labels_B (smoothed here) or on soft targets_BK (already so).

    bce: timm's binary cross-entropy of each class, the mean over classes and images.
    """
    smoothing = 0.0 if targets.is_floating_point() else recipe.label_smoothing
    if recipe.loss == "bce":
        loss = BinaryCrossEntropy(smoothing, target_threshold=recipe.bce_threshold)
        return cast(Tensor, loss(logits_BK, targets))
    return F.cross_entropy(logits_BK, targets, label_smoothing=smoothing)


def divergence_loss(
    recipe: Recipe, clean_BK: Tensor, adversarial_BK: Tensor, targets: Tensor
) -> Tensor:
    """Return the loss of TRADES or MART, the mean over images.

    trades: of the clean images, and beta * KL(clean || adversarial) (Zhang et al. 2019; their
    trades.py). mart: of the adversarial images, boosted by -log(1 - the likeliest wrong class), and
    beta * KL * (1 - the clean image's true class) (Wang et al. 2020; their mart.py).
    """
    assert recipe.adversary is not None
    beta = recipe.adversary.beta
    clean, adversarial = clean_BK.log_softmax(dim=1), adversarial_BK.log_softmax(dim=1)
    divergence_B = F.kl_div(adversarial, clean, log_target=True, reduction="none").sum(dim=1)
    if recipe.adversary.loss == "trades":
        return training_loss(recipe, clean_BK, targets) + beta * divergence_B.mean()
    true_B1 = targets[:, None]
    wrong_B = adversarial.exp().scatter(1, true_B1, 0).amax(dim=1)
    boost = -torch.log(FINITE_MARGIN - wrong_B).mean()
    unsure_B = 1 - clean.exp().gather(1, true_B1).squeeze(1)
    loss = training_loss(recipe, adversarial_BK, targets) + boost
    return loss + beta * (unsure_B * divergence_B).mean()


def distillation_loss(
    distillation: Distillation, loss: Tensor, logits_BK: Tensor, taught_BK: Tensor
) -> Tensor:
    """Blend a loss on the labels with the soft divergence from the teacher's plain logits."""
    tau = distillation.tau
    student, teacher = (F.log_softmax(z_BK / tau, dim=1) for z_BK in (logits_BK, taught_BK))
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return (1 - distillation.alpha) * loss + distillation.alpha * tau**2 * divergence


def chance_limit(num_classes: int, n: int) -> float:
    """Return the highest accuracy on n images that guessing reaches in 19 of 20 cases."""
    chance = 1 / num_classes
    return chance + 1.645 * math.sqrt(chance * (1 - chance) / n)


def collapse_reason(
    recipe: Recipe, history: Sequence[Mapping[str, float]], *, num_classes: int, n: int
) -> str:
    """Say why a training has collapsed, or '' while it has not.

    Collapsed: the loss is not finite; or the PGD-10 probe (n images) stays at chance for a tenth
    of the epochs, at least three, after the warm-up of rate and epsilon, while the training loss
    falls.
    """
    last = history[-1]
    if not math.isfinite(last["train/loss"]):
        return f"the training loss became {last['train/loss']} in epoch {last['epoch']:.0f}"
    patience = max(LEAST_PATIENCE, math.ceil(PATIENCE_SHARE * recipe.epochs))
    recent = history[-patience:]
    eased = max(recipe.warmup_epochs, recipe.adversary.epsilon_epochs if recipe.adversary else 0)
    if len(recent) < patience or recent[0]["epoch"] <= eased:
        return ""
    limit = chance_limit(num_classes, n)
    stuck = all(entry.get(PROBE, math.inf) <= limit for entry in recent)
    if stuck and last["train/loss"] < recent[0]["train/loss"]:
        return (
            f"PGD-{PROBE_STEPS} accuracy was at chance ({last[PROBE]:.1%}) in the {patience} "
            f"epochs up to {last['epoch']:.0f} while the training loss fell"
        )
    return ""


def accuracy(
    classifier: Classifier, split: Split, *, device: torch.device, team: Team = ALONE
) -> float:
    """Return the share of a split's images that the classifier, in eval mode, gets right."""

    @torch.inference_mode()
    def predict(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        logits_BK: Tensor = classifier(images_BCHW)
        return logits_BK.argmax(dim=1)

    classifier.eval()
    return _share_right(predict, split, EVALUATION_BATCH, device=device, team=team)


def probe(
    recipe: Recipe,
    classifier: Classifier,
    split: Split,
    *,
    device: torch.device,
    team: Team = ALONE,
) -> float:
    """Return the accuracy of an adversarial training's model under PGD-10 from the images."""
    assert recipe.adversary is not None
    epsilon, norm = recipe.adversary.epsilon, recipe.adversary.norm

    def predict(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        shown = classifier, images_BCHW, labels_B
        _, final_BCHW = next(pgd_iterates(*shown, epsilon=epsilon, stops=(PROBE_STEPS,), norm=norm))
        with torch.no_grad():
            logits_BK: Tensor = classifier(final_BCHW)
        return logits_BK.argmax(dim=1)

    batch = min(EVALUATION_BATCH, recipe.forward_batch)
    with attacked(classifier):
        return _share_right(predict, split, batch, device=device, team=team)


def _share_right(
    predict: Callable[[Tensor, Tensor], Tensor],
    split: Split,
    batch: int,
    *,
    device: torch.device,
    team: Team,
) -> float:
    """Return the share of a split's images predicted as their labels; out of memory halves them."""

    def right(places: Tensor) -> Tensor:
        labels_B = split.labels[places].to(device)
        try:
            return (predict(to_unit(split.images[places].to(device)), labels_B) == labels_B).sum()
        except torch.OutOfMemoryError:
            if len(places) <= 1:
                raise
        first, second = places.chunk(2)
        return right(first) + right(second)

    total = torch.zeros((), dtype=torch.long, device=device)
    for places in torch.split(torch.arange(len(split))[team.own], batch):
        beat()
        total += right(places)
    return int(team.total(total)) / len(split)
