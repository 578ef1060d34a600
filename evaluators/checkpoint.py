"""What `python -m evaluators` does: judge a model of any origin, shard after shard, and report."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators import ERRORS
from evaluators.base import device_named
from evaluators.judging import Cells, attacking, evaluators_named
from evaluators.own_model import PROBED, OwnModel, fingerprint, probe
from trainables.data.listing import DataSource, scale_of
from trainables.data.load import load_data
from trainables.layers import Classifier
from trainables.models import MODELS, OWN, TIMM_PREFIX, model_named
from trainables.networks import build_classifier, classifier_named
from trainables.options import again
from trainables.pretrained import preprocessing_of
from trainables.recipe import Recipe
from trainables.scale import Scale, scale_of_recipe
from trainables.store.checkpoint import recipe_of
from trainables.store.tensors import read_content
from trainables.weights import load_weights, local_file

if TYPE_CHECKING:
    from evaluators.options import JudgeOptions


def judge_checkpoint(options: JudgeOptions) -> bool:
    """Judge, print, write and log; False where Ctrl-C cut it short. ValueError."""
    device = device_named(options.device)
    source = options.source()
    classifier, scale, said = load_subject(options, source)
    scale = _with_budgets(scale, options)
    data = load_data(scale, source)
    print(*said, options.images_line(scale), sep="\n")
    probed = data.held_out.images[:PROBED]
    _, remarks = probe(classifier.to(device).eval(), probed)
    name = Path((options.weights or options.model or "").rpartition(":")[2]).name
    place = options.model or ""
    code = Path(place if place.endswith(".pt2") else place.rpartition(":")[0])  # of a user
    is_code = code.suffix in (".py", ".pt2")
    digest = fingerprint(classifier, probed, code.read_bytes() if is_code else b"")
    folder = options.ledger or Path("results/ledgers", f"{name}-{digest}-{scale.name}")
    judged = repr((digest, scale, source.root, sorted(source.folders.items())))
    evaluators = evaluators_named(options.evaluators, scale, options.epsilon)
    cells, is_whole = Cells(evaluators, data, folder, judged, device), False
    print(*(f"{e.name}: {store.total} images" for e, store in cells.stores.items()), sep="\n")
    with suppress(KeyboardInterrupt):
        cells.judge(classifier)
        is_whole = True
    print(cells.scores(f"{name} at scale {scale.name}", remarks))
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
    images = options.attack_images
    budget: dict[str, Any] = {"patches": options.patches, "area": options.patch_area}
    patch = replace(scale.patch, **{name: value for name, value in budget.items() if value})
    patch.side(scale.image_size)
    if options.jpeg and not {ERRORS, "c-bar"} & {*options.evaluators}:
        raise ValueError(
            f"--jpeg {options.jpeg} is of {ERRORS} and c-bar: name one in --evaluators"
        )
    stated: dict[str, Any] = {"stored_jpeg": options.jpeg or 0, "attacks_in": options.attacks_in}
    scale = replace(scale, patch=patch, **stated)
    return attacking(scale, images) if images else scale


def load_subject(options: JudgeOptions, source: DataSource) -> tuple[Classifier, Scale, list[str]]:
    """Build the model that the options, or the weights file's own header, name; load its weights.

    Return it, the data's scale as it sees them, and lines that say what it is made of. ValueError.
    """
    model, weights = options.model, _weights(options)
    if model or not weights or weights.startswith(TIMM_PREFIX):
        model = model or weights
        scale = scale_of(options.scale, source, image_size=options.image_size)
        scale = scale.preprocessed(preprocessing_of(model) | options.preprocessing())
        classifier = classifier_named(
            model, scale, activation=options.activation, arguments=options.arguments()
        )
    else:
        path = local_file(weights, options.sha256)
        recipe = _recipe(options, read_content(path, options.sha256), source)
        model, scale, classifier = recipe.model, scale_of_recipe(recipe), build_classifier(recipe)
    notes = load_weights(weights, classifier, sha256=options.sha256) if weights else ()
    if model_named(model).family == OWN:
        classifier.backbone = OwnModel(classifier.backbone, 1)
    said = [f"Model: {model}; weights: {weights or 'as the model brings them'}"]
    return classifier, scale, said + [f"Weights: {note}" for note in notes]


def _weights(options: JudgeOptions) -> str:
    """Return where the weights are, "" where the model brings its own; ValueError if neither."""
    model, weights = options.model or "", options.weights or ""
    of_timm = model.startswith(TIMM_PREFIX)
    if options.pretrained and (weights or not of_timm):
        raise ValueError(
            "--pretrained stands for timm's weights of --model timm:NAME; give others by --weights"
        )
    if options.model_arg and not model:
        raise ValueError("--model-arg goes with --model")
    if options.pretrained:
        return model
    if not weights and (of_timm or model in {"", *MODELS}):
        remedy = "--pretrained for timm's own, or --weights" if of_timm else "--weights"
        raise ValueError(f"{model or 'a model'} needs its weights: give {remedy}")
    return weights


def _recipe(options: JudgeOptions, content: bytes, source: DataSource) -> Recipe:
    """Return the recipe in a weights file's header, with what the options change.

    ValueError where it was trained on other data than those of the options.
    """
    recipe = recipe_of(content, options.weights or "")
    try:
        if options.scale not in (None, recipe.scale, recipe.scale.partition("-")[0]):
            raise ValueError(f"--scale {options.scale} is another")
        scale_of(recipe.scale, source)
        load_data(scale_of_recipe(recipe), source)
    except ValueError as error:
        raise ValueError(
            f"{options.weights} was trained at scale {recipe.scale}: {error}"
        ) from None
    return recipe.replace(
        preprocessing=recipe.input | options.preprocessing(),
        activation=options.activation or recipe.activation,
    )
