"""The networks whose features a texture dictionary is built from: VGG-19, or a small one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluators.weights import read_tensors
from trainables.data.base import Data, Split, to_unit
from trainables.scale import Scale
from trainables.watchdog import beat

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FITTED_IMAGES = 2000  # by the small network


def column(values: Sequence[float]) -> Tensor:
    """Return a number a channel, shaped to meet images (3, H, W)."""
    return torch.tensor(values).view(3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A VGG-like network: `features` in a row, `head` from their output to logits.

    Grams are taken behind `style_layers`, the Grad-CAM behind `cam_layer`.
    """

    features: nn.Sequential
    head: nn.Module
    style_layers: tuple[int, ...]
    cam_layer: int
    mean: Tensor
    std: Tensor
    source: str

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return the network's input for images in [0, 1]."""
        return (images_BCHW - self.mean.to(images_BCHW)) / self.std.to(images_BCHW)

    def averaging(self) -> nn.Sequential:
        """Return the features with average in place of maximum pooling, up to the last Gram."""
        layers = list(self.features)[: max(self.style_layers) + 1]
        return nn.Sequential(
            *(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers)
        )

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.features.to(device)
        self.head.to(device)


def vgg19_network(weights: Path) -> FeatureNetwork:
    """Build VGG-19 from a weights file, .safetensors or .pth read as plain tensors.

    ValueError when the file does not fit torchvision's architecture.
    """
    from torchvision.models import vgg19  # type: ignore[import-untyped]

    state = read_tensors(weights)
    with torch.device("meta"):
        network = vgg19(weights=None)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit VGG-19: {str(error)[:300]}") from None
    network.eval().requires_grad_(False)
    return FeatureNetwork(
        features=network.features,
        head=nn.Sequential(network.avgpool, nn.Flatten(), network.classifier),
        style_layers=(1, 6, 11, 20, 29),
        cam_layer=35,
        mean=column(IMAGENET_MEAN),
        std=column(IMAGENET_STD),
        source="VGG-19",
    )


def small_network(scale: Scale, data: Data, *, seed: int, epochs: int) -> FeatureNetwork:
    """Train a three-convolution network on a scale's own train split; the seed fixes its bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        )
        # Averaged over the image before the last layer: so its Grad-CAM is the class's evidence.
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.class_names))
        )
    network = FeatureNetwork(
        features=features,
        head=head,
        style_layers=(1, 4, 7),
        cam_layer=7,
        mean=column(scale.data_set.mean),
        std=column(scale.data_set.std),
        source=f"a 3-convolution network trained on {data.name} (no VGG-19 weights at hand)",
    )
    _fit(network, data.train, seed=seed, epochs=epochs)
    return network


def _fit(network: FeatureNetwork, split: Split, *, seed: int, epochs: int) -> None:
    model = nn.Sequential(network.features, network.head)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    split = split.subset(FITTED_IMAGES, seed=seed)
    images, batch_size = network.normalised(to_unit(split.images[:])), 50
    for _ in range(epochs):
        order = torch.randperm(len(split), generator=generator)
        for chosen in torch.split(order, batch_size):
            loss = F.cross_entropy(model(images[chosen]), split.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            beat()
    model.eval().requires_grad_(False)
