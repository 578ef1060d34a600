"""Axes: how a recipe changes when one thing that a study varies is set on it.

Pure, but that a file of first weights is read to be known by its sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from trainables.models import TIMM_PREFIX, model_named, model_of
from trainables.pretrained import REMOTE, located, preprocessing_of
from trainables.recipe import (
    Adversary,
    CurriculumRow,
    Distillation,
    Preprocessing,
    Recipe,
    check_known,
    check_model,
    format_augmentations,
    parse_augmentations,
    problem,
    unknown,
)
from trainables.scale import AT_BATCH, published_settings

CLEAN = "clean"  # as a warm start
AT_FORWARD = 1024  # images a forward batch: 256 on each of 4 GPUs, 4 batches a step
CURRICULUM_EPOCHS = 100  # that a library's curricula are written for
OF_WEIGHTS = ("label", "weights", "sha256", "model", "activation", "preprocessing")  # a row's keys
# What a recipe has to state, and nothing follows from without a training.
NO_TRAINING: dict[str, Any] = {
    **{"epochs": 0, "optimizer": "sgd", "scheduler": "step"},
    **{"learning_rate": 1.0, "weight_decay": 0.0, "batch_size": 1},
}


@dataclass(frozen=True)
class Library:
    """What a study's files name: bases, which may be teachers, and curricula."""

    bases: Mapping[str, Recipe] = field(default_factory=dict)
    curricula: Mapping[str, tuple[CurriculumRow, ...]] = field(default_factory=dict)
    folder: Path = Path()  # from which it names weights files


@contextmanager
def at_key(key: str) -> Iterator[None]:
    """Say in a ValueError under which key it was raised."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {problem(error)}") from None


def with_axes(recipe: Recipe, values: Mapping[str, Any], library: Library | None = None) -> Recipe:
    """Return the recipe with some axes set, in whatever order they are named.

    An axis is a field of the recipe, or one that brings other fields along: family (or timm:NAME)
    and size choose the model; optimizer brings its rate, decay, batch and warm-up; augmentation
    brings label smoothing 0.1; training 'adversarial' brings the study's adversary, batch, warm-up,
    smoothing and ghost batches; curriculum is 'none', one of the library or a table of rows;
    teacher and warm_start are bases of the library, warm_start = "clean" is the recipe's own
    training without its adversary, a table this training with axes of its own; init brings its
    sha256, the network's own activation and timm's preprocessing. A dot leads into a field:
    adversary.steps, optimizer_args.betas.

    Axes that bring fields along come first, so that a named field wins. Epochs that would end
    before the warm-up shorten it in proportion. ValueError where a value, or all of them together,
    cannot be.
    """
    for axis in values:
        check_axis(axis)
        own_start = axis == "warm_start" and isinstance(values[axis], dict)
        if axis in _NAMED and not (isinstance(values[axis], str) or own_start):
            raise ValueError(f"{axis} is a name, not {values[axis]!r}")
    library = library or Library()
    values = with_origin(dict(values) | _looked_up(values, library), library.folder)
    draft = recipe
    for axis in sorted(values.keys() & _SETTERS.keys(), key=AXES.index):
        draft = _SETTERS[axis](draft, values[axis])
    dotted = {axis: value for axis, value in values.items() if "." in axis}
    fields = {axis: v for axis, v in values.items() if axis not in (*_SETTERS, *dotted)}
    epochs = fields.get("epochs")
    if isinstance(epochs, int) and 0 < epochs < draft.warmup_epochs:
        fields = {"warmup_epochs": draft.warmup_epochs * epochs / draft.epochs} | fields
    for axis, value in dotted.items():
        name, _, part = axis.partition(".")
        whole = fields.get(name, getattr(draft, name))
        if whole is None:
            raise ValueError(f"{axis}: the recipe has no {name}")
        fields[name] = {**dict(whole), part: value}
    start = {} if fields.get("warm_start") == CLEAN else fields.get("warm_start")
    if isinstance(start, dict):
        draft = draft.replace(**fields | {"warm_start": None})
        with at_key("warm_start"):
            fields = {"warm_start": with_axes(draft.replace(adversary=None), start, library)}
    changed = draft.replace(**fields)
    if changed.training != values.get("training", changed.training):
        raise ValueError(f"training {values['training']!r} and an adversary exclude each other")
    return changed


def check_axis(name: str) -> str:
    """Return an axis's name; ValueError where a recipe has none of it."""
    whole, _, part = name.partition(".")
    if name not in AXES and not (part and whole in PARTED):
        raise ValueError(unknown("axis", name, AXES))
    return name


def with_origin(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return axes with the place and sha256 of `init` and what the weights bring along.

    Unless stated: the network's own activation, and the preprocessing that timm has for them.
    """
    if not values.get("init"):
        return dict(values)
    init, sha256 = located(str(values["init"]), str(values.get("init_sha256", "")), folder)
    stated = Preprocessing.model_validate(values.get("preprocessing", {}))
    fields = {"init": init, "init_sha256": sha256, "preprocessing": preprocessing_of(init) | stated}
    return {"activation": "own", **values, **fields}


def recipe_of_weights(values: Mapping[str, Any], folder: Path, scale: str) -> Recipe:
    """Return the recipe of a row of weights, which a study's file in `folder` states.

    The model, its activation and its preprocessing are as stated, else as the weights say: those of
    timm by their name, those of this project by their header. ValueError teaches what is wrong.
    """
    if wrong := [key for key in values if key not in OF_WEIGHTS]:
        raise ValueError(
            f"{unknown('key', wrong[0], OF_WEIGHTS)} (weights are not trained; `init` is)"
        )
    init, sha256 = located(str(values["weights"]), str(values.get("sha256", "")), folder)
    fields: dict[str, Any] = {"activation": "own", "preprocessing": Preprocessing()}
    if init.startswith(TIMM_PREFIX):
        fields["model"] = init
    elif "model" not in values:
        fields |= _fields_of_header(init)
    fields |= {key: values[key] for key in ("model", "activation") if key in values}
    stated = Preprocessing.model_validate(values.get("preprocessing", {}))
    fields["preprocessing"] = preprocessing_of(fields["model"]) | fields["preprocessing"] | stated
    return Recipe(scale=scale, init=init, init_sha256=sha256, **NO_TRAINING, **fields)


def _fields_of_header(init: str) -> dict[str, Any]:
    """Return what the header of a weights file of this project says of its model; ValueError."""
    from trainables.store.checkpoint import recipe_of

    try:
        header = recipe_of(b"" if init.startswith(REMOTE) else Path(init).read_bytes(), init)
    except ValueError:
        raise ValueError(f"{init} does not say whose weights it is: add model") from None
    names = ("model", "activation", "pixel_range", "preprocessing")
    return {name: getattr(header, name) for name in names}


def _looked_up(values: Mapping[str, Any], library: Library) -> dict[str, Any]:
    """Return the curriculum and the other trials that the values name."""
    named: dict[str, Any] = {}
    if isinstance(name := values.get("curriculum"), str):
        if name != "none" and name not in library.curricula:
            known = ["none", *library.curricula, "a table of rows"]
            raise ValueError(unknown("curriculum", name, known))
        named["curriculum"] = library.curricula.get(name, ())
        named["curriculum_epochs"] = values.get("curriculum_epochs", CURRICULUM_EPOCHS)
    for axis, known in (("teacher", ["none"]), ("warm_start", ["none", CLEAN])):
        if isinstance(name := values.get(axis), str) and name != CLEAN:
            check_known(axis, name, [*known, *library.bases])
            named[axis] = library.bases.get(name)
    return named


def with_settings(
    recipe: Recipe,
    settings: Mapping[str, Any],
    axes: Mapping[str, Any] | None = None,
    library: Library | None = None,
) -> Recipe:
    """Return the recipe with some axes, and with what is set for every trial and its teachers.

    What is set wins over what an axis brings along. A teacher has its own model, training and
    seed. ValueError where the trial or a teacher cannot be so.
    """
    settable = {a: value for a, value in settings.items() if a.partition(".")[0] in SETTABLE}

    def for_all(other: Recipe) -> Recipe:
        if not other.epochs:
            return other
        with at_key(f"teacher {other.describe()}"):
            return with_settings(other, settable, library=library)

    changed = with_axes(recipe, {**(axes or {}), **settings}, library)
    return changed.with_prerequisites(for_all)


def check_settings(settings: Mapping[str, Any], axes: Mapping[str, Iterable[Any]]) -> None:
    """Raise ValueError where two of what is set and what is varied are about the same thing."""
    uses = {axis: f"{axis}={value} is set for every trial" for axis, value in settings.items()}
    for axis, values in axes.items():
        varied = f"the study varies {axis} ({', '.join(map(str, values))})"
        if axis in uses:
            raise ValueError(f"{uses[axis]}, and {varied}: leave one out")
        uses[axis] = varied
    for one, other in _SAME:
        if one in uses and other in uses:
            raise ValueError(f"{uses[one]}, and {uses[other]}: both choose the {one}")


def format_settings(settings: Mapping[str, Any]) -> str:
    """Write settings as users do: 'precision=bf16 micro_batch=256'."""
    return " ".join(f"{axis}={value}" for axis, value in settings.items())


# Setters change drafts, whose fields `with_axes` validates together at its end.


def _changed(recipe: Recipe, **fields: Any) -> Recipe:
    return recipe.model_copy(update=fields)


def _with_model(recipe: Recipe, model: str) -> Recipe:
    changed = _changed(recipe, model=check_model(model))
    if changed.family == recipe.family or recipe.adversary:
        return changed
    return _with_optimizer(changed, recipe.optimizer)


def _with_optimizer(recipe: Recipe, optimizer: str) -> Recipe:
    settings = published_settings(recipe.model, optimizer)
    changed = _changed(recipe, optimizer=optimizer, micro_batch=None, **settings)
    return _adversarial(changed) if recipe.adversary else changed


def _with_augmentation(recipe: Recipe, augmentations: Any) -> Recipe:
    names = parse_augmentations(augmentations)
    smoothing = 0.1 if names or recipe.adversary else 0.0
    return _changed(recipe, augmentations=names, label_smoothing=smoothing)


def _with_training(recipe: Recipe, training: str) -> Recipe:
    if check_known("training", training, ("adversarial", "clean")) == "adversarial":
        return _adversarial(recipe)
    changed = _changed(recipe, adversary=None, norm="batch", pixel_range="data", warmup_rate=1e-6)
    changed = _with_optimizer(changed, recipe.optimizer)
    return _with_augmentation(changed, changed.augmentations)


def _adversarial(recipe: Recipe) -> Recipe:
    """Adversarial training as in the study: total batch 4096, the rate in proportion.

    Labels are smoothed with and without augmentation: the default of main_adv_res.py, which
    advres.sh leaves as it is.
    """
    sgd, model = recipe.optimizer == "sgd", model_named(recipe.model)
    cnn = model.settings == "cnn"
    ghosts = {"norm": "ghost", "ghost_batch": 64, "micro_batch": AT_FORWARD}
    return _changed(
        recipe,
        adversary=Adversary(epsilon=4 / 255, step_size=4 / 255, plain_start=0.2 if cnn else 0.0),
        pixel_range="half",
        batch_size=AT_BATCH,
        learning_rate=recipe.learning_rate * (AT_BATCH / recipe.batch_size),
        warmup_epochs=5.0 if sgd else 10.0,
        warmup_rate=0.1 if sgd else 1e-6,
        label_smoothing=0.1,
        **(ghosts if cnn and model.batch_norm else {}),
    )


_SETTERS: dict[str, Callable[[Recipe, Any], Recipe]] = {
    "model": _with_model,
    "family": lambda recipe, family: _with_model(
        recipe, family if family.startswith(TIMM_PREFIX) else model_of(family, recipe.size)
    ),
    "size": lambda recipe, size: _with_model(recipe, model_of(recipe.family, size)),
    "optimizer": _with_optimizer,
    "augmentation": _with_augmentation,
    "training": _with_training,
    "curriculum": lambda recipe, rows: _changed(
        recipe, curriculum=rows, curriculum_epochs=recipe.epochs
    ),
    "teacher": lambda recipe, teacher: _changed(
        recipe, distillation=Distillation(teacher=teacher) if teacher else None
    ),
    "preprocessing": lambda recipe, chosen: _changed(
        recipe, preprocessing=recipe.preprocessing | Preprocessing.model_validate(chosen)
    ),
}
_NAMED = ("model", "family", "size", "optimizer", "training", "teacher", "warm_start")
# Fields with parts, which an axis may name behind a dot.
PARTED = {
    *("adversary", "distillation", "preprocessing"),
    *("model_args", "optimizer_args", "scheduler_args"),
}
AXES = tuple(dict.fromkeys((*_SETTERS, *Recipe.model_fields)))
# Pairs of axes of which one would undo the other.
_SAME = (
    *(("model", "family"), ("model", "size")),
    *(("augmentation", "augmentations"), ("teacher", "distillation")),
)
# What a table's row or column is about, and what --scale and --seeds choose.
_NOT_FOR_ALL = {
    *("model", "family", "size", "training", "adversary", "teacher", "distillation"),
    *("scale", "seed", "init", "init_sha256", "warm_start"),
}
SETTABLE = tuple(axis for axis in AXES if axis not in _NOT_FOR_ALL)


def axis_value(recipe: Recipe, axis: str, library: Library) -> str:
    """Return the value a recipe has on an axis, as a user would write it."""
    if axis in ("augmentation", "augmentations"):
        return format_augmentations(recipe.augmentations)
    if axis in ("teacher", "distillation", "warm_start"):
        return _base_of(recipe.warm_start if axis == "warm_start" else recipe.teacher, library)
    if axis == "curriculum":
        return _curriculum_name(recipe.curriculum, library)
    name, _, part = axis.partition(".")
    value = getattr(recipe, name)
    if part:
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return str(value)


def _base_of(teacher: Recipe | None, library: Library) -> str:
    """Return the base that a recipe was shrunk from, by what no scale changes."""
    if not teacher:
        return "none"
    unscaled = attrgetter(
        "model", "activation", "optimizer", "scheduler", "augmentations", "pixel_range"
    )
    names = (name for name, base in library.bases.items() if unscaled(base) == unscaled(teacher))
    return next(names, teacher.model)


def _curriculum_name(rows: tuple[CurriculumRow, ...], library: Library) -> str:
    if not rows:
        return "none"
    names = (name for name, known in library.curricula.items() if known == rows)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:4]
    return next(names, f"{len(rows)}-rows-{digest}")
