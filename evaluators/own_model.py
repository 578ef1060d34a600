"""A user's model or function as a classifier, what is said of it, and how it is left."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainables.data.base import to_unit
from trainables.layers import Classifier

PROBED = 8  # images
SAME = 1e-4  # of the largest logit: what float32 sums differ by from batch to batch


class OwnModel(nn.Module):
    """A model or function from images to logits, in float32 outside and its own precision inside.

    `draws` > 1: the logarithm of the mean of the probabilities of so many passes, whose gradient is
    that of the expectation over a random model's noise (EOT; Athalye et al. 2018; Salman et al.
    2019, equation 6).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], draws: int) -> None:
        super().__init__()
        self.function, self.draws = function, draws
        self.inside = nn.ModuleList([] if isinstance(function, nn.Module) else _modules(function))
        self.training = self.inside.training = False  # the modes that are there are the model's
        self.contiguous = False
        dtypes = (weight.dtype for weight in self.parameters() if weight.is_floating_point())
        self.precision = next(dtypes, torch.float32)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{name}, draws={self.draws}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.to(self.precision)
        if self.contiguous:
            images_BCHW = images_BCHW.contiguous()
        if self.draws == 1:
            return self.function(images_BCHW).float()
        draws = [self.function(images_BCHW).float().log_softmax(1) for _ in range(self.draws)]
        return torch.stack(draws).logsumexp(0) - math.log(self.draws)


def _modules(function: Any) -> list[nn.Module]:
    """Return the models that a function calls, as far as its names and attributes tell."""
    values = [getattr(function, "__self__", None), *vars(function).values()]
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        values += [*names.nonlocals.values(), *names.globals.values()]
    return [value for value in values if isinstance(value, nn.Module)]


def classifier_of(model: Any, channels: int, mean: Any, std: Any, *, draws: int = 1) -> Classifier:
    """Return a classifier of any model or function; ValueError where it is neither."""
    if not callable(model):
        raise ValueError(
            f"the model is {type(model).__name__}: an nn.Module, or a function of images, is needed"
        )
    if isinstance(model, type):
        raise ValueError(f"the model is the class {model.__name__}: give {model.__name__}(...)")
    if isinstance(model, Classifier):
        if mean is not None or std is not None:
            raise ValueError("the model normalises by itself: leave out mean and std")
        inside = (b.flatten().tolist() for b in (model.mean, model.std))
        return Classifier(
            model.backbone if draws == 1 else OwnModel(model.backbone, draws), *inside
        )
    both = (_of_channels("mean", mean, 0.0, channels), _of_channels("std", std, 1.0, channels))
    return Classifier(OwnModel(model, draws), *both)


def _of_channels(name: str, value: Any, default: float, channels: int) -> tuple[float, ...]:
    numbers = torch.as_tensor(default if value is None else value).float().flatten().tolist()
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name} has {len(numbers)} numbers, and the images {channels} channels")
    if not all(0 <= number <= 1 for number in numbers) or (name == "std" and 0 in numbers):
        raise ValueError(f"{name} {value} is of other units: pixels are in [0, 1], divide by 255")
    return tuple(numbers) if len(numbers) == channels else tuple(numbers) * channels


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's weights, None of one without; ValueError for several."""
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"the model's weights are on {names}: move it to one device with weights")
    return devices.pop() if devices else None


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model's modes, frozen weights and device back on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(weight, weight.requires_grad) for weight in model.parameters()]
    device = device_of(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, requires_grad in frozen:
            weight.requires_grad_(requires_grad)
        if device:
            model.to(device)


def probe(classifier: Classifier, images: Tensor, *, by_gradient: str) -> tuple[int, list[str]]:
    """Show a model some images; return how many classes it answers among, and what to know of it.

    by_gradient: an attack that needs gradients, '' for none. ValueError where the model cannot be
    judged: with the hint that helps.
    """
    images = to_unit(images).to(classifier.mean.device)
    logits = _first_answer(classifier, images)
    shape = tuple(logits.shape)
    if logits.ndim != 2 or shape[0] != len(images) or shape[1] < 2:
        raise ValueError(
            f"the model returns {shape} for {len(images)} images, not ({len(images)}, classes) "
            "logits" + ("; of one logit z, give [0, z]" if shape[1:] == (1,) else "")
        )
    if not logits.isfinite().all():
        raise ValueError("the model's logits of the first images are NaN or infinite")
    if by_gradient:
        _check_gradient(classifier, images[:1], by_gradient)
    return shape[1], list(_remarks(classifier, images, logits))


@torch.no_grad()
def _first_answer(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the model's logits; where it cannot take channels last in memory, without it."""
    own = classifier.backbone
    try:
        return _tensor_of(classifier, images)
    except RuntimeError as error:
        if isinstance(own, OwnModel):
            own.contiguous = True
            try:
                return _tensor_of(classifier, images)
            except RuntimeError:
                pass
        raise ValueError(
            f"the model cannot take images {tuple(images.shape)}: {str(error).splitlines()[0]}"
        ) from error


def _tensor_of(classifier: Classifier, images: Tensor) -> Tensor:
    own, answer = classifier.backbone, None
    if isinstance(own, OwnModel):
        normalised = (images - classifier.mean) / classifier.std
        shown = normalised.to(own.precision)
        answer = own.function(shown.contiguous() if own.contiguous else shown)
        if not isinstance(answer, Tensor):
            raise ValueError(_no_tensor(answer))
    logits: Tensor = classifier(images)
    return logits


def _no_tensor(answer: Any) -> str:
    said, hint = f"the model returns {type(answer).__name__}, not a tensor of logits", ""
    entries: list[tuple[str, Any]] = []
    if isinstance(answer, Mapping):
        entries = [(f"[{key!r}]", value) for key, value in answer.items()]
    elif isinstance(answer, Sequence):
        entries = [(f"[{place}]", value) for place, value in enumerate(answer)]
    elif hasattr(answer, "logits"):
        entries = [(".logits", answer.logits)]
    tensors = [(key, value) for key, value in entries if isinstance(value, Tensor)]
    for key, _ in sorted(tensors, key=lambda e: (e[1].ndim != 2, "logits" not in e[0]))[:1]:
        hint = f": give lambda x: model(x){key}"
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in tensors)
        hint += f" (it has {shapes})"
    return said + hint


def _check_gradient(classifier: Classifier, image: Tensor, evaluator: str) -> None:
    with torch.enable_grad():
        logits = classifier(image.clone().requires_grad_(True))
    if not logits.requires_grad:
        raise ValueError(
            f"{evaluator} needs gradients, and the model's logits have none: torch.no_grad(), "
            ".detach() or numpy inside? clean, stylized and corruptions need none"
        )


@torch.no_grad()
def _remarks(classifier: Classifier, images: Tensor, logits: Tensor) -> Iterator[str]:
    """Say what makes verdicts doubtful: randomness, answers that hang on the batch, a softmax."""
    own = classifier.backbone
    if isinstance(own, OwnModel) and own.precision != torch.float32:
        name = str(own.precision).removeprefix("torch.")
        yield f"the model computes in {name}: attacks see pixels rounded to it"
    if differ(classifier(images), logits):
        draws = own.draws if isinstance(own, OwnModel) else 1
        yield (
            "the model answers the same images differently each time: verdicts are not repeatable; "
            + (
                f"eot={draws} averages {draws} draws"
                if draws > 1
                else "eot=20 attacks and judges the mean of 20 draws"
            )
        )
    elif len(images) > 1 and differ(classifier(images[:1]), logits[:1]):
        yield "an image's answer hangs on the other images of its batch: so do its verdicts"
    ones = logits.sum(dim=1)
    if (logits >= 0).all() and (ones - 1).abs().max() < 1e-3:
        yield (
            "the model returns probabilities: attacks by gradient need logits, without a softmax"
        )


def differ(logits: Tensor, others: Tensor) -> bool:
    """Tell whether logits differ by more than rounding."""
    return bool((logits - others).abs().max() > SAME * others.abs().max().clamp(min=1))


@torch.no_grad()
def fingerprint(classifier: Classifier, images: Tensor) -> str:
    """Return 12 hex digits of a model: structure, weights, normalisation, precision and answers."""
    digest = hashlib.sha256(repr(classifier).encode())
    for name, tensor in (*classifier.named_parameters(), *classifier.named_buffers()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content.tobytes())
    logits = classifier(to_unit(images).to(classifier.mean.device))
    if not differ(classifier(to_unit(images).to(classifier.mean.device)), logits):
        digest.update(repr(logits.argmax(dim=1).tolist()).encode())
    return digest.hexdigest()[:12]
