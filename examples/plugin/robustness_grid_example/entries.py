"""A model and a data set. Every command reads these: what is heavy is imported in functions."""

from trainables.data.registry import DataSet
from trainables.models import Cost, Model


def tiny_net(scale, norm_layer):
    """One convolution and a linear layer, on normalised images of any size."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2),
        norm_layer(8),  # batch normalisation, as the recipe wants it
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4, scale.num_classes),
    )


def stripes(data_set):
    """Draw grey stripes with noise; return both splits and the names of the classes."""
    import torch

    from trainables.data.base import Split

    draws, side = torch.Generator().manual_seed(0), data_set.image_size

    def split(name, count):
        labels = torch.arange(count) % 2
        phases = torch.randint(4, (count, 1, 1), generator=draws)
        across = (torch.arange(side) + phases) // 2 % 2  # (count, 1, side): two pixels wide
        across = across.expand(-1, side, -1)
        drawn = torch.where(labels.view(-1, 1, 1) == 0, across.mT, across)
        noise = torch.randint(100, (count, 3, side, side), generator=draws)
        images = (90 + 20 * drawn[:, None] + noise).byte()
        return Split(
            images=images, labels=labels, ids=tuple(f"{name}/{n:03d}" for n in range(count))
        )

    held_out = split("held-out", data_set.held_out_images)
    return split("train", data_set.train_images), held_out, data_set.classes


TINY_NET = Model(
    name="tiny-net",
    family="tiny",
    size="base",
    build=tiny_net,
    cost=Cost(parameters=33_624, macs=0.007, seconds=0.1),
)
STRIPES = DataSet(
    name="stripes",
    title="Stripes across and down, 16 px",
    image_size=16,
    num_classes=2,
    classes=("across", "down"),
    train_images=512,
    held_out_images=100,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    package="robustness_grid_example.entries:stripes",
    flip=False,
    counterparts=(),
)
