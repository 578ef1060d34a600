"""Sham defences: each hides its gradients, or draws at random, and makes no answer more robust."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.layers import Classifier

WIDTHS = 16, 32
WHOLE = (0.0,) * 3, (1.0,) * 3  # mean and std of a defence: its network normalises


def network(activation: Callable[[], nn.Module] = nn.ReLU, channels: int = 3) -> nn.Sequential:
    """Return an untrained network of three convolutions for the digits."""
    first, second = WIDTHS
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(first),
        activation(),
        nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(second),
        activation(),
        nn.Flatten(),
        nn.Linear(second * 16, 10),
    )


class Wrapped(nn.Module):
    """A network behind a function of its images and before one of its logits."""

    def __init__(self, inner: nn.Module, images: object = None, logits: object = None) -> None:
        super().__init__()
        self.inner = inner
        self.of_images = images or nn.Identity()
        self.of_logits = logits or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.of_logits(self.inner(self.of_images(images)))


def jpeg(images: Tensor) -> Tensor:
    """Save images as JPEG of quality 50 and read them again."""
    results = []
    for image in (images.detach().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=50)
        results.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).float().to(images) / 255


def median(images: Tensor) -> Tensor:
    filtered = median_filter(images.detach().cpu().numpy(), size=(1, 1, 2, 2))
    return torch.from_numpy(filtered).to(images)


def resized_and_padded(images: Tensor) -> Tensor:
    side = images.shape[-1]
    smaller = int(torch.randint(side - 3, side + 1, ()))
    left, top = (int(torch.randint(side - smaller + 1, ())) for _ in "xy")
    images = F.interpolate(images, size=(smaller, smaller), mode="bilinear")
    return F.pad(images, (left, side - smaller - left, top, side - smaller - top))


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class KWinners(nn.Module):
    """Only the largest 15 % of an image's activations pass (Xiao et al. 2020)."""

    share = 0.15

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(int(self.share * flat.shape[1]), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view(x.shape)


class Thermometer(nn.Module):
    """Each value becomes as many ones as it is above levels (Buckman et al. 2018)."""

    levels = 15

    def forward(self, images: Tensor) -> Tensor:
        levels = (torch.arange(self.levels, device=images.device) + 0.5) / self.levels
        return (images.unsqueeze(2) > levels.view(1, 1, -1, 1, 1)).float().flatten(1, 2)


class Decoder(nn.Module):
    """Brings a thermometer code back to values: a fixed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3 * Thermometer.levels, 3, 1, bias=False, groups=3)
        nn.init.constant_(self.convolution.weight, 1 / Thermometer.levels)

    def forward(self, code: Tensor) -> Tensor:
        return self.convolution(code)


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True)


class Pruned(nn.Module):
    """Activations are kept at random, the larger the likelier (Dhillon et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().flatten(1)
        keep = 1 - (1 - size / (size.sum(dim=1, keepdim=True) + 1e-9)) ** size.shape[1]
        drawn = torch.rand_like(keep) < keep
        return (x.flatten(1) * drawn / keep.clamp(min=1e-6)).view(x.shape)


class Sparsified(nn.Module):
    """Activations below their layer's mean vanish; the others keep coarse values."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1).view(-1, 1, 1, 1)
        return ((x - mean).clamp(min=0) * 4).round() / 4 + mean * (x > mean)


class Switching(nn.Module):
    """One of several networks answers: by a draw, or by the parity of the pixels' sum."""

    def __init__(self, members: Sequence[nn.Module], *, at_random: bool) -> None:
        super().__init__()
        self.members, self.at_random = nn.ModuleList(members), at_random

    def forward(self, images: Tensor) -> Tensor:
        if self.at_random:
            return self.members[int(torch.randint(len(self.members), ()))](images)
        logits = torch.stack([member(images) for member in self.members])
        which = (images.detach().flatten(1).sum(dim=1) * 1000).long() % len(self.members)
        return logits[which, torch.arange(len(images))]


class Leaking(nn.Module):
    """Looks the nearest test image up, whose label it leaks."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)
        self.register_buffer("labels", labels)

    def forward(self, images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1), self.images.flatten(1)).argmin(dim=1)
        return 10 * F.one_hot(self.labels[nearest], 10).float()


def within(base: Classifier, layer: Callable[[], nn.Module]) -> Classifier:
    """Return a classifier with a layer after each ReLU, the weights shared."""
    layers: list[nn.Module] = []
    for module in base.backbone:
        layers += [module, layer()] if isinstance(module, nn.ReLU) else [module]
    return Classifier(
        nn.Sequential(*layers), base.mean.flatten().tolist(), base.std.flatten().tolist()
    )


def shams(
    base: Classifier, others: Sequence[nn.Module], winners: nn.Module, leaked: Sequence[Tensor]
) -> dict[str, Classifier]:
    """Return sham defences by name, around a classifier.

    others: further members of an ensemble. winners: one trained with `KWinners`. leaked: the test
    images and labels.
    """
    backbones = {
        "quantised input": Wrapped(base, images=lambda x: (x * 6).round() / 6),
        "JPEG": Wrapped(base, images=jpeg),
        "random resize and pad": Wrapped(base, images=resized_and_padded),
        "k-winners-take-all": winners,
        "logit scaling": Wrapped(base, logits=lambda z: 1e4 * z),
        "saturated sigmoid": Wrapped(base, logits=lambda z: torch.sigmoid(5 * z)),
        "saturated tanh layer": Wrapped(base, logits=Saturated()),
        "thermometer code": Wrapped(base, images=nn.Sequential(Thermometer(), Decoder())),
        "median filter": Wrapped(base, images=median),
        "dropout on": within(base, Dropout),
        "gradient sign flip": Wrapped(base, images=Flip.apply),
        "output rounding": Wrapped(base, logits=lambda z: (z / 4).round()),
        "random logit noise": Wrapped(base, logits=lambda z: z + 4 * torch.randn_like(z)),
        "stochastic pruning": within(base, Pruned),
        "mean-sparsified activations": within(base, Sparsified),
        "ensemble that switches at random": Switching([base, *others], at_random=True),
        "ensemble that switches by input": Switching([base, *others], at_random=False),
        "shattered gradients": Wrapped(base, images=lambda x: x + 0.01 * torch.sin(3000 * x)),
        "random input noise": Wrapped(base, images=lambda x: x + 0.2 * torch.randn_like(x)),
        "label leak": Leaking(*leaked),
    }
    return {name: Classifier(module, *WHOLE).eval() for name, module in backbones.items()}


class Saturated(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return torch.tanh(20 * (logits - logits.amax(dim=1, keepdim=True) / 2))
