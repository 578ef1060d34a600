"""The model that the judging command's options name, with its weights and preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluators.own_model import OwnModel
from trainables.data.listing import DataSource, scale_of
from trainables.layers import Classifier, Program
from trainables.models import MODELS, OWN, TIMM_PREFIX, model_named
from trainables.networks import build_classifier, check_images, classifier_named, classifier_with
from trainables.pretrained import (
    code_of,
    load_weights,
    local_file,
    num_classes_of,
    preprocessing_of,
)
from trainables.recipe import Preprocessing, Recipe
from trainables.scale import Scale, scale_of_recipe
from trainables.store.checkpoint import recipe_of
from trainables.weights import read_content

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions


@dataclass(frozen=True)
class Subject:
    """What is judged: a classifier, its scale, and the lines that say what it was made of.

    digest: 12 hex digits of the weights and of the user's code, if any.
    """

    classifier: Classifier
    scale: Scale
    model: str
    name: str
    digest: str
    said: tuple[str, ...]


def load_subject(options: JudgeOptions, source: DataSource, device: torch.device) -> Subject:
    """Build the model that the options, or the weights file's own header, name; load it.

    ValueError.
    """
    weights, sha256 = _weights(options), options.sha256
    in_file = weights and not weights.startswith(TIMM_PREFIX)
    content = read_content(local_file(weights, sha256), sha256) if in_file else b""
    if model := options.model or ("" if in_file else weights):
        scale = _scale(options, model, source)
        build = partial(_built, options, model, scale)
    else:
        recipe = _recipe(options, content, weights)
        model, scale = recipe.model, scale_of_recipe(recipe)
        build = partial(build_classifier, recipe)
    load = partial(load_weights, weights, sha256=sha256) if weights else (lambda _: ())
    classifier, notes = classifier_with(build, load, num_classes_of(weights))
    for buffer, value in ((classifier.mean, options.mean), (classifier.std, options.std)):
        if value:
            buffer.copy_(torch.tensor(value).view_as(buffer))
    said = [f"Model: {model}; weights: {weights or 'as the model brings them'}"]
    said += [
        *(f"Weights: {note}" for note in notes),
        *_images_said(options, model, scale, classifier),
    ]
    if model_named(model).family == OWN and not isinstance(classifier.backbone, Program):
        classifier = Classifier(OwnModel(classifier.backbone, 1), *_normalisation(classifier))
    elif model not in MODELS:
        check_images(classifier.to(device).eval(), model, scale.image_size)
    name = Path(weights).stem if in_file else Path((weights or model).rpartition(":")[2]).name
    digest = _digest(classifier, content, code_of(model))
    return Subject(classifier, scale, model, name, digest, tuple(said))


def _images_said(
    options: JudgeOptions, model: str, scale: Scale, classifier: Classifier
) -> Iterator[str]:
    """Say how images are brought to a model, and its normalisation where it is not the scale's."""
    if preprocessing_of(model).chosen():
        yield f"Preprocessing: as timm states for {model}, unless an option says otherwise"
    yield options.images_line(scale)
    mean, std = _normalisation(classifier)
    if not torch.tensor([mean, std]).equal(torch.tensor([scale.data_set.mean, scale.data_set.std])):
        yield f"Normalisation: {Preprocessing(mean=mean, std=std)}, inside the model"


def _normalisation(classifier: Classifier) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(classifier.mean.flatten().tolist()), tuple(classifier.std.flatten().tolist())


def _weights(options: JudgeOptions) -> str:
    """Return where the weights are, "" where the model brings its own; ValueError if neither."""
    model = options.model or ""
    of_timm = model.startswith(TIMM_PREFIX)
    if options.pretrained and options.weights:
        raise ValueError("--pretrained stands for timm's weights, and --weights for others")
    if options.pretrained and not of_timm:
        raise ValueError(
            "--pretrained goes with --model timm:NAME; what else a model loads is its own "
            "argument, like --model-arg pretrained=True"
        )
    if not (options.pretrained or options.weights) and (of_timm or model in {"", *MODELS}):
        remedy = "--pretrained for timm's own, or --weights for others" if of_timm else "--weights"
        raise ValueError(f"{model or 'a model'} needs its weights: give {remedy}")
    if options.arguments() and not model:
        raise ValueError("--model-arg goes with --model")
    return model if options.pretrained else options.weights or ""


def _scale(options: JudgeOptions, model: str, source: DataSource) -> Scale:
    """Return the data's scale as the model sees it: as the options say, or as timm does."""
    scale = scale_of(options.scale, source, image_size=options.image_size)
    stated = preprocessing_of(model).chosen() | ({"squash": False} if options.crop else {})
    stated |= options.preprocessing().chosen()
    return scale.preprocessed(Preprocessing.model_validate(stated))


def _built(options: JudgeOptions, model: str, scale: Scale, outputs: int | None) -> Classifier:
    arguments, activation = options.arguments(), options.activation
    return classifier_named(
        model, scale, activation=activation, arguments=arguments, num_classes=outputs
    )


def _recipe(options: JudgeOptions, content: bytes, weights: str) -> Recipe:
    """Return the recipe in a weights file's header, with what the options change."""
    recipe = recipe_of(content, weights)
    if options.scale not in (None, recipe.scale, recipe.scale.partition("-")[0]):
        raise ValueError(f"{weights} was trained at {recipe.scale}, not {options.scale}")
    stated = recipe.preprocessing.chosen() | options.preprocessing().geometry().chosen()
    changes: dict[str, Any] = {"preprocessing": Preprocessing.model_validate(stated)}
    if options.activation:
        changes["activation"] = options.activation
    return recipe.replace(**changes)


def _digest(classifier: Classifier, content: bytes, code: bytes) -> str:
    """Return 12 hex digits of a weights file, or of the weights themselves, and of code."""
    sha256 = hashlib.sha256(content)
    tensors: Mapping[str, torch.Tensor] = {} if content else classifier.state_dict()
    for name, value in tensors.items():
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    sha256.update(code)
    return sha256.hexdigest()[:12]
