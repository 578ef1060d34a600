"""The workers that train one trial together: who takes which image, what they sum and share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from trainables.layers import Classifier, GhostBatchNorm2d


@dataclass(frozen=True)
class Team:
    """Worker `rank` of `size`; of a forward batch it takes the images whose index = rank mod size.

    Every draw is made for the whole batch and then parted, so that it does not depend on `size`.
    """

    rank: int = 0
    size: int = 1

    @property
    def own(self) -> slice:
        """This worker's part of a batch."""
        return slice(self.rank, None, self.size)

    @property
    def mirror(self) -> int:
        """The worker that has the mirror images, in every batch, of this worker's images."""
        return self.size - 1 - self.rank

    def with_mirror(self, values: Tensor) -> Tensor:
        """Return this worker's part of a batch with its mirror images, in the batch's order.

        An image is mixed with its mirror image. Their worker has loaded them, and sends them here.
        """
        if self.mirror == self.rank:
            return values
        theirs = torch.empty_like(values := values.contiguous())
        sent = distributed.P2POp(distributed.isend, values, self.mirror)
        received = distributed.P2POp(distributed.irecv, theirs, self.mirror)
        for work in distributed.batch_isend_irecv([sent, received]):
            work.wait()
        both = (values, theirs) if self.rank < self.mirror else (theirs, values)
        return torch.stack(both, dim=1).flatten(0, 1)

    def own_of(self, values: Tensor, *, mirrored: bool) -> Tensor:
        """Return this worker's own of the values of its images, or of these `with_mirror`."""
        if self.size == 1:
            return values
        if mirrored and self.mirror != self.rank:
            values = values[int(self.rank > self.mirror) :: 2]
        return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of the workers' values; no gradient flows through it."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set at any worker."""
        flags = [flag] * self.size
        if self.size > 1:
            distributed.all_gather_object(flags, flag)
        return True in flags

    def shared(self, value: Any) -> Any:
        """Return the first worker's value."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Team()


def gathered(classifier: Classifier, team: Team) -> nn.Module:
    """Return the classifier as the team trains it: its gradients are means over the workers.

    Its batch normalisations are replaced by ones that see the whole batch; names stay.
    """
    if team.size == 1:
        return classifier
    _share_norms(classifier, team)
    # Without the search for unused parameters DDP re-makes its buckets after the first step, and
    # a resumed training would sum in another order than one never stopped.
    return DistributedDataParallel(classifier, find_unused_parameters=True)


def _share_norms(module: nn.Module, team: Team) -> None:
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _replaced(child, SharedBatchNorm2d(child, team)))
        elif type(child) is GhostBatchNorm2d:
            setattr(module, name, _replaced(child, SharedGhostBatchNorm2d(child, team)))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{type(child).__name__} ({name}) normalises by the batch in a way that workers "
                "cannot share; train it with --workers 1"
            )
        else:
            _share_norms(child, team)


def _replaced(old: nn.Module, new: nn.Module) -> nn.Module:
    # The very parameters and buffers: an optimizer may hold them already.
    new._parameters, new._buffers = old._parameters, old._buffers
    return new.train(old.training)


class _Pooled(torch.autograd.Function):
    """Mean and variance over all workers' images, of as many each: one message each way."""

    @staticmethod
    def forward(ctx: Any, own_2C: Tensor, size: int) -> Tensor:
        parts = [torch.empty_like(own_2C) for _ in range(size)]
        distributed.all_gather(parts, own_2C)
        means, variances = torch.stack(parts, dim=1)
        mean_C, ctx.size = means.mean(0), size
        ctx.save_for_backward(own_2C[0] - mean_C)
        return torch.stack([mean_C, (variances + (means - mean_C).square()).mean(0)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        of_mean, of_variance = total / ctx.size
        return torch.stack([of_mean + 2 * ctx.saved_tensors[0] * of_variance, of_variance]), None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all workers' images, on CPUs and GPUs alike.

    torch's own SyncBatchNorm takes GPUs only.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, team: Team) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self._size = team.size

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = input.numel() // input.shape[1] * self._size
        images = input.to(self.weight.dtype)  # statistics of bf16 images are float32, as torch's
        own_2C = torch.stack(torch.var_mean(images, (0, 2, 3), correction=0)[::-1])
        mean_C, variance_C = cast(Tensor, _Pooled.apply(own_2C, self._size)).unbind()
        centred = images - mean_C.view(-1, 1, 1)
        self.running_mean.lerp_(mean_C.detach(), self.momentum)
        unbiased_C = variance_C.detach() * (count / (count - 1))
        self.running_var.lerp_(unbiased_C, self.momentum)
        self.num_batches_tracked.add_(1)
        gain_C = self.weight * (variance_C + self.eps).rsqrt()
        scaled = centred * gain_C.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return scaled.to(input.dtype)


class SharedGhostBatchNorm2d(GhostBatchNorm2d):
    """Ghost batch normalisation whose ghosts are dealt to the workers, each ghost whole.

    Worker r of n holds the ghosts j = r mod n, which are those of its part of the batch.
    """

    def __init__(self, norm: GhostBatchNorm2d, team: Team) -> None:
        ghosts, sets = norm.ghosts // team.size, len(norm.running_mean)
        super().__init__(norm.features, ghosts=ghosts, sets=sets, device="meta")
        self._team = team

    def _normalised(self, side_by_side: Tensor) -> Tensor:
        # [ghost of a worker, worker, channel]: ghost j = worker + size * its place there.
        dealt = (self.ghosts, self._team.size, self.features)
        means = self.running_mean[self.active_set].view(dealt)
        variances = self.running_var[self.active_set].view(dealt)
        mean, variance = (held[:, self._team.rank].flatten() for held in (means, variances))
        normalised = self._by_batch(side_by_side, mean, variance)
        if not self.training:
            return normalised
        statistics = torch.stack([mean, variance])
        parts = [torch.empty_like(statistics) for _ in range(self._team.size)]
        distributed.all_gather(parts, statistics)
        for held, theirs in zip((means, variances), torch.stack(parts, dim=1), strict=True):
            held.copy_(theirs.view(-1, self.ghosts, self.features).transpose(0, 1))
        return normalised
