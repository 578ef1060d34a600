"""Batch normalisation folded into the convolutions before it: the same logits, a third faster."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, fx, nn

from trainables.networks import Classifier, GhostBatchNorm2d
from trainables.train.team import SharedBatchNorm2d, SharedGhostBatchNorm2d
from trainables.watchdog import beat

TOLERANCE = 1e-4
Norm = nn.BatchNorm2d | GhostBatchNorm2d
OURS = (GhostBatchNorm2d, SharedBatchNorm2d, SharedGhostBatchNorm2d)


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
            gain, shift = _affine(norm)
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


def _affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the gain_C and shift_C that a norm in eval mode comes to."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean, norm.running_var
    if isinstance(norm, GhostBatchNorm2d):
        mean, var = mean[0, : norm.features], var[0, : norm.features]
    gain = norm.weight.flatten() * (var + norm.eps).rsqrt()
    return gain, norm.bias.flatten() - mean * gain


@torch.no_grad()
def folded(classifier: Classifier, images_BCHW: Tensor) -> FoldedClassifier | None:
    """Fold a classifier in eval mode; None where nothing folds or its logits would change.

    Its logits on `images_BCHW` are the classifier's to within 1e-4 of their largest.
    """
    if not any(isinstance(module, Norm) for module in classifier.modules()):
        return None
    try:
        twin = FoldedClassifier(classifier)
    except fx.proxy.TraceError:
        return None
    expected = classifier(images_BCHW)
    difference = (twin(images_BCHW) - expected).abs().max()
    same = difference <= TOLERANCE * expected.abs().max().clamp(min=1)
    return twin if same and twin.merged else None
