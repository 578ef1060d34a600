"""The random draws of a network in training: dropout and stochastic depth.

They follow from (seed, epoch, forward batch) alone. Networks draw by modules and by functions, so
the functions of torch behind both are taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
# Functions that draw where no generator reaches.
UNREACHED = (
    *(F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.rand, torch.randn, torch.randperm, torch.bernoulli),
)


class BatchDraws(TorchFunctionMode):
    """Have dropout and stochastic depth draw for a whole forward batch, by one generator.

    batch: its images; own: which of them pass through the network, so that a team's member draws
    what one worker does. ValueError where a network draws otherwise.
    """

    def __init__(self, generator: Generator | None, batch: int, own: slice = slice(None)) -> None:
        super().__init__()
        self._generator, self._batch, self._own = generator, batch, own
        self._part = len(range(batch)[own])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.bernoulli_:
            return self._bernoulli(*args, **options)
        if func is F.dropout:
            return self._dropout(*args, **options)
        in_attention = func is F.scaled_dot_product_attention and options.get("dropout_p")
        if in_attention or (func in UNREACHED and options.get("training", True)):
            raise ValueError(f"it draws by {func.__name__}, which no seed reaches")
        return func(*args, **options)

    def _bernoulli(self, values: Tensor, p: float) -> Tensor:
        """Fill the values of this part of a batch, whose images may be in several rows each."""
        rows, left = divmod(len(values), self._part)
        if left:
            raise ValueError(f"it draws {len(values)} rows for {self._part} images")
        whole = values.new_empty((self._batch, rows, *values.shape[1:]))
        whole.bernoulli_(p, generator=self._generator)
        return values.copy_(whole[self._own].flatten(0, 1))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not p:
            return input
        return input * self._bernoulli(torch.empty_like(input), 1 - p) / (1 - p)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Have all draws of torch follow from a seed, for compiled networks, which take no mode."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def draws(network: nn.Module) -> bool:
    """Tell whether a network in training draws at random."""
    rates = [float(getattr(network, "drop_rate", 0))]
    for module in network.modules():
        if isinstance(module, DROPOUTS):
            rates.append(module.p)
        elif isinstance(module, DropPath):
            rates.append(module.drop_prob or 0)
    return max(rates) > 0
