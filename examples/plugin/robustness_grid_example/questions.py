"""An evaluator, an attack and a corruption. Pixels are in [0, 1], normalisation in the model."""

import torch
from torch.nn import functional as F

from evaluators.base import Column, Evaluator, verdicts


class Mirrored(Evaluator):
    """Top-1 accuracy on mirrored images."""

    name = "mirrored"  # as in pyproject.toml
    columns = (Column("mirrored", "Mirrored"),)

    @torch.inference_mode()
    def judge(self, classifier, batch):
        mirrored = batch.images.flip(-1)
        predicted = classifier(mirrored).argmax(dim=1)
        return verdicts(batch, self.name, predicted, judged_BCHW=mirrored)


def fgsm(model, images, labels, epsilon, generator):
    """Step by epsilon along the signs of the gradient at a random point of the ball."""
    start = images + epsilon * torch.empty_like(images).uniform_(-1, 1, generator=generator)
    start.requires_grad_(True)
    loss = F.cross_entropy(model(start), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start)
    return images + epsilon * gradient.sign()  # the caller cuts it to the ball and to [0, 1]


def occlusion(images, severity, generator):
    """Grey out a square of each image: two tenths of its side at severity 1, six tenths at 5."""
    side = images.shape[-1]
    square = side * (severity + 1) // 10
    corners = torch.randint(side - square + 1, (len(images), 2), generator=generator)
    for image, (top, left) in zip(images, corners.tolist(), strict=True):
        image[:, top : top + square, left : left + square] = 0.5
    return images
