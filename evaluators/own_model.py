"""A user's model or function as a classifier, what is said of it, and how it is left."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainables.data.base import to_unit
from trainables.layers import Classifier
from trainables.recipe import per_channel
from trainables.train.exactness import settings_restored

PROBED = 8  # images
ROUNDING = 1e-4  # of float32 sums


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
        dtypes = (weight.dtype for weight in self.parameters() if weight.is_floating_point())
        self.precision = next(dtypes, torch.float32)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{name}, draws={self.draws}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # Contiguous: a model may flatten by view(), which channels last in memory forbid.
        images_BCHW = images_BCHW.to(self.precision).contiguous()
        if self.draws == 1:
            return self._logits(images_BCHW)
        draws = [self._logits(images_BCHW).log_softmax(1) for _ in range(self.draws)]
        return torch.stack(draws).logsumexp(0) - math.log(self.draws)

    def _logits(self, images_BCHW: Tensor) -> Tensor:
        answer = self.function(images_BCHW)
        if not hasattr(answer, "float"):  # as a tensor has, and the proxy of torch.fx
            raise ValueError(_no_tensor(answer))
        return answer.float()


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
    is_ours = isinstance(model, Classifier) and mean is None and std is None
    if is_ours:
        model, mean, std = model.backbone, model.mean, model.std
    backbone = model if is_ours and draws == 1 else OwnModel(model, draws)
    stated = {"mean": 0.0 if mean is None else mean, "std": 1.0 if std is None else std}
    numbers = {n: torch.as_tensor(v).float().flatten().tolist() for n, v in stated.items()}
    return Classifier(backbone, **{n: per_channel(n, v, channels) for n, v in numbers.items()})


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's weights, None of one without; ValueError for several."""
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"the model's weights are on {names}: move it to one device with weights")
    return devices.pop() if devices else None


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Judge under gradients; put a model's modes and device, and torch's settings, back."""
    modes = [(module, module.training) for module in model.modules()]
    home = device_of(model)
    try:
        with settings_restored(device), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if home:
            model.to(home)


@torch.no_grad()
def probe(classifier: Classifier, images: Tensor) -> tuple[int, list[str]]:
    """Show a model some images; return how many classes it answers among, and remarks on it.

    ValueError where the model cannot be judged, with the hint that helps.
    """
    images = to_unit(images).to(classifier.mean.device)
    try:
        logits = classifier(images)
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot take images {tuple(images.shape)}: {str(error).splitlines()[0]}"
        ) from error
    shape = tuple(logits.shape)
    if logits.ndim != 2 or shape[0] != len(images) or shape[1] < 2:
        raise ValueError(
            f"the model returns {shape} for {len(images)} images, not ({len(images)}, classes) "
            "logits" + ("; of one logit z, give [0, z]" if shape[1:] == (1,) else "")
        )
    if not logits.isfinite().all():
        raise ValueError("the model's logits of the first images are NaN or infinite")
    remarks = []
    if not _repeats(classifier, images, logits):
        draws = getattr(classifier.backbone, "draws", 1)
        remarks.append(
            "the model answers the same images differently each time: verdicts are not repeatable; "
            + (f"eot={draws} averages {draws} draws" if draws > 1 else "eot=20 averages 20 draws")
        )
    if (logits >= 0).all() and (logits.sum(dim=1) - 1).abs().max() < 1e-3:
        remarks.append("the model returns probabilities: attacks by gradient need logits")
    return shape[1], remarks


def _no_tensor(answer: Any) -> str:
    """Say what a model returns in place of a tensor, and where in it the logits seem to be."""
    entries = answer if isinstance(answer, Mapping) else {}
    if isinstance(answer, tuple | list):
        entries = dict(enumerate(answer))
    places = [place for place, value in entries.items() if getattr(value, "ndim", 0) == 2]
    hint = f": give lambda x: model(x)[{places[0]!r}]" if places else ""
    return f"the model returns {type(answer).__name__}, not a tensor of logits{hint}"


def _repeats(classifier: Classifier, images: Tensor, logits: Tensor) -> bool:
    return torch.allclose(classifier(images), logits, rtol=ROUNDING, atol=ROUNDING)


@torch.no_grad()
def fingerprint(classifier: Classifier, images: Tensor, code: bytes = b"") -> str:
    """Return 12 hex digits of a model: structure, code, weights, normalisation and answers."""
    digest = hashlib.sha256(repr(classifier).encode() + code)
    for name, tensor in (*classifier.named_parameters(), *classifier.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    images = to_unit(images).to(classifier.mean.device)
    logits = classifier(images)
    if _repeats(classifier, images, logits):
        digest.update(repr(logits.argmax(dim=1).tolist()).encode())
    return digest.hexdigest()[:12]
