"""What `python -m evaluators` does: judge a model of any origin, shard after shard, and report."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evaluators.base import device_named
from evaluators.judging import Cells, evaluators_named
from evaluators.own_model import PROBED, OwnModel, probe
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.layers import Classifier, Program
from trainables.models import MODELS, OWN, TIMM_PREFIX, model_named
from trainables.networks import build_classifier, classifier_named
from trainables.options import again
from trainables.pretrained import code_of, load_weights, local_file, preprocessing_of
from trainables.recipe import Preprocessing, Recipe
from trainables.scale import Scale, scale_of_recipe
from trainables.store.checkpoint import recipe_of
from trainables.weights import read_content

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions

HALF = (0.5, 0.5, 0.5)


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    subject = load_subject(options, source)
    scale, classifier = _with_budgets(subject.scale, options), subject.classifier
    name = f"{subject.name}-{subject.digest}-{scale.name}"
    folder = options.ledger or Path("results/ledgers", name)
    data = load_data(scale, source)
    # All that an answer follows from but for the question.
    normalisation = classifier.mean.tolist(), classifier.std.tolist()
    folders = sorted(source.folders.items())
    judged = repr((subject.digest, classifier, normalisation, scale, source.root, folders))
    evaluators = evaluators_named(options.evaluators, scale, options.epsilon)
    print(*subject.said, options.images_line(scale), sep="\n")
    notes: list[str] = []
    if subject.model not in MODELS:
        _, notes = probe(classifier.to(device).eval(), data.held_out.images[:PROBED])
    cells, is_whole = Cells(evaluators, data, folder, judged, device), False
    with suppress(KeyboardInterrupt):
        for evaluator, store in cells.stores.items():
            print(f"{evaluator.name}: {store.total} images")
            cells.judge(evaluator, classifier)
        is_whole = True
    print(cells.scores(f"{subject.name} at scale {scale.name}", notes))
    if not is_whole:
        print(f"Cut short. Judge the other images with: {again()}")
        return False
    cells.write_ledgers()
    for store in cells.stores.values():
        store.clear()
    print(f"Ledgers: {folder}")
    return True


def _with_budgets(scale: Scale, options: JudgeOptions) -> Scale:
    """Return the scale with the images and patches that the options state."""
    images, default = options.attack_images, scale.patch
    patch = replace(
        default,
        images=images or default.images,
        patches=options.patches or default.patches,
        area=options.patch_area or default.area,
    )
    patch.side(scale.image_size)
    if images is None:
        return replace(scale, patch=patch)
    return replace(scale, patch=patch, attack_subset=images, autoattack_subset=images)


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


def load_subject(options: JudgeOptions, source: DataSource) -> Subject:
    """Build the model that the options, or the weights file's own header, name; load it.

    ValueError.
    """
    weights, sha256 = _weights(options), options.sha256
    in_file = weights and not weights.startswith(TIMM_PREFIX)
    content = read_content(local_file(weights, sha256), sha256) if in_file else b""
    if model := options.model or ("" if in_file else weights):
        scale, arguments = _scale(options, model, source), options.arguments()
        classifier = classifier_named(
            model, scale, activation=options.activation, arguments=arguments
        )
    else:
        recipe = _recipe(options, content, source)
        model, scale, classifier = recipe.model, scale_of_recipe(recipe), build_classifier(recipe)
    notes = load_weights(weights, classifier, sha256=sha256) if weights else ()
    if model_named(model).family == OWN and not isinstance(classifier.backbone, Program):
        classifier.backbone = OwnModel(classifier.backbone, 1)
    said = [f"Model: {model}; weights: {weights or 'as the model brings them'}"]
    said += [f"Weights: {note}" for note in notes]
    name = Path(weights).stem if in_file else Path((weights or model).rpartition(":")[2]).name
    digest = _digest(classifier, content, code_of(model))
    return Subject(classifier, scale, model, name, digest, tuple(said))


def _weights(options: JudgeOptions) -> str:
    """Return where the weights are, "" where the model brings its own; ValueError if neither."""
    model = options.model or ""
    of_timm = model.startswith(TIMM_PREFIX)
    if options.pretrained and (options.weights or not of_timm):
        raise ValueError(
            "--pretrained stands for timm's weights of --model timm:NAME: for others give "
            "--weights, or what the model takes, like --model-arg pretrained=True"
        )
    if not (options.pretrained or options.weights) and (of_timm or model in {"", *MODELS}):
        remedy = "--pretrained for timm's own, or --weights for others" if of_timm else "--weights"
        raise ValueError(f"{model or 'a model'} needs its weights: give {remedy}")
    if options.model_arg and not model:
        raise ValueError("--model-arg goes with --model")
    return model if options.pretrained else options.weights or ""


def _scale(options: JudgeOptions, model: str, source: DataSource) -> Scale:
    """Return the data's scale as the model sees it: as the options say, or as timm does."""
    scale = scale_of(options.scale, source, image_size=options.image_size)
    cropped = Preprocessing(squash=False if options.crop else None)
    return scale.preprocessed(preprocessing_of(model) | cropped | options.preprocessing())


def _recipe(options: JudgeOptions, content: bytes, source: DataSource) -> Recipe:
    """Return the recipe in a weights file's header, with what the options change.

    ValueError where it was trained on other data than those of the options.
    """
    recipe = recipe_of(content, options.weights or "")
    header = recipe.preprocessing
    half = recipe.pixel_range == "half" and not (header.mean or header.std)
    stated = Preprocessing(mean=HALF, std=HALF) if half else Preprocessing()
    preprocessing, activation = stated | header | options.preprocessing(), options.activation
    try:
        if options.scale not in (None, recipe.scale, recipe.scale.partition("-")[0]):
            raise ValueError(f"--scale {options.scale} is another")
        scale_of(recipe.scale, source)
        load_data(scale_of_recipe(recipe), source)
    except ValueError as error:
        raise ValueError(
            f"{options.weights} was trained at scale {recipe.scale}: {error}"
        ) from None
    return recipe.replace(preprocessing=preprocessing, activation=activation or recipe.activation)


def _digest(classifier: Classifier, content: bytes, code: bytes) -> str:
    """Return 12 hex digits of a weights file, or of the weights themselves, and of code."""
    sha256 = hashlib.sha256(content)
    for name, value in () if content else classifier.state_dict().items():
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    sha256.update(code)
    return sha256.hexdigest()[:12]
