"""Whether what recipes name can be built and used: models, optimizers and schedules.

It imports torch and timm only for what departs from the study.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainables.models import STUDY_FAMILIES
from trainables.recipe import BEYOND_STUDY, STUDY_OPTIMIZERS, STUDY_SCHEDULERS, Recipe

# The fields that each part of a training is built from.
FIELDS = {
    "model": (
        *("scale", "model", "model_args", "activation", "norm", "drop_path", "dropout"),
        *("preprocessing", "train_sizes", "layer_decay"),
    ),
    "optimizer": ("optimizer", "optimizer_args"),
    "schedule": ("scheduler", "scheduler_args", "warmup_prefix", "cooldown_epochs", "epochs"),
}


def check_buildable(recipe: Recipe, checked: dict[str, str]) -> None:
    """Raise ValueError where a part of a recipe, or of one that it needs, cannot be built or used.

    A model takes an image of every size, an optimizer makes a step and a schedule has a rate. What
    the study's own recipes name is sound. checked: the problem of each part that was built, or '',
    by what it is built from; it grows.
    """
    for part in _beyond_study(recipe):
        built_from = f"{part} {[getattr(recipe, name) for name in FIELDS[part]]}"
        if built_from not in checked:
            checked[built_from] = _problem_of(part, recipe)
        if problem := checked[built_from]:
            raise ValueError(problem)
    for other in recipe.prerequisites:
        check_buildable(other, checked)


def _beyond_study(recipe: Recipe) -> Iterator[str]:
    """Yield the parts of a training that are not as in the study."""
    named = {
        "model": recipe.family not in STUDY_FAMILIES or recipe.preprocessing.size is not None,
        "optimizer": recipe.optimizer not in STUDY_OPTIMIZERS,
        "schedule": recipe.scheduler not in STUDY_SCHEDULERS,
    }
    for part, fields in FIELDS.items():
        beyond = any(getattr(recipe, n) != BEYOND_STUDY[n] for n in fields if n in BEYOND_STUDY)
        if (named[part] or beyond) and (part == "model" or recipe.epochs):
            yield part


def _problem_of(part: str, recipe: Recipe) -> str:
    """Say why a part of a recipe cannot be built or used; '' where it can."""
    from trainables.networks import check_sizes
    from trainables.train.optim import check_step, learning_rate

    try:
        if part == "model":
            check_sizes(recipe)
        elif part == "optimizer":
            check_step(recipe)
        else:
            learning_rate(recipe, 0)
    except ValueError as error:
        return str(error)
    return ""
