"""A tiny convolutional classifier of the digits, trained in two seconds."""

import torch
from torch import nn

from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.train.loop import train

RECIPE = Recipe(
    scale="digits",
    model="resnet18",
    optimizer="adamw",
    learning_rate=1e-2,
    weight_decay=1e-4,
    scheduler="cosine",
    epochs=12,
    batch_size=64,
)


class Watched(nn.Module):
    """A network that remembers the images it was shown: to attack them, and to judge them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.attacked: list[torch.Tensor] = []
        self.judged: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (self.attacked if images.requires_grad else self.judged).append(images.detach().clone())
        return self.inner(images)


def trained_classifier() -> Classifier:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 9, 10),
        )
    classifier = Classifier(network, DIGITS.data_set.mean, DIGITS.data_set.std)
    for _ in train(RECIPE, classifier, load_data(DIGITS), device=torch.device("cpu")):
        pass
    return classifier.eval()
