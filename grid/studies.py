"""The study's tables as data: base recipes and axes -> named studies.

Every recipe here carries the study's own values (scale imagenet); a scale shrinks it by its rule.
Source: "Are Transformers More Robust Than CNNs?" (NeurIPS 2021), recipes as in STUDY section 3.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainables.recipe import (
    AUGMENTATIONS,
    TIMM_PREFIX,
    Adversary,
    CurriculumRow,
    Distillation,
    Recipe,
    format_augmentations,
    model_of,
)
from trainables.scale import AT_BATCH, PUBLISHED_SETTINGS

Mode = Literal["product", "one-at-a-time"]
Axes = Mapping[str, tuple[Any, ...]]
STRONG = format_augmentations(AUGMENTATIONS)
AUGMENTATION_SUBSETS = (
    "none",
    "randaug",
    "mixup",
    "cutmix",
    "randaug+mixup",
    "randaug+cutmix",
    "mixup+cutmix",
    "randaug+mixup+cutmix",
)
AT_FORWARD = 1024  # images a forward batch: 256 on each of 4 GPUs, 4 batches a step
AT_GELU_FORWARD = 512  # as released: 128 on each of 4 GPUs, 8 batches a step
ADVERSARIAL_RATE = "adversarial_rate"
AS_RELEASED, BY_RULE = "as-released", "by-rule"
# epoch: RandAug magnitude, mix probability, CutMix alpha, switch probability
_STUDY_CURRICULUM = (
    (1, 0.5, 0.0, 0.0),
    (1, 0.6, 0.0, 0.0),
    (2, 0.7, 0.0, 0.0),
    (3, 0.8, 0.0, 0.0),
    (4, 0.9, 0.0, 0.0),
    (5, 1.0, 0.0, 0.0),
    (6, 1.0, 1.0, 0.1),
    (7, 1.0, 1.0, 0.2),
    (8, 0.9, 1.0, 0.3),
    (9, 0.95, 1.0, 0.4),
    (9, 1.0, 1.0, 0.5),
)
CURRICULA: dict[str, tuple[CurriculumRow, ...]] = {
    "none": (),
    "study": tuple(
        CurriculumRow(
            epoch=epoch,
            randaug_magnitude=magnitude,
            mix_probability=mix,
            cutmix_alpha=alpha,
            switch_probability=switch,
        )
        for epoch, (magnitude, mix, alpha, switch) in enumerate(_STUDY_CURRICULUM)
    ),
}


def with_axis(recipe: Recipe, axis: str, value: Any) -> Recipe:
    """Return the recipe with one axis set, and with it what belongs to that choice.

    family (or timm:NAME) and size choose the model; optimizer brings its rate, decay, batch and
    warm-up; augmentation brings label smoothing 0.1; training 'adversarial' brings the study's
    adversary, batch, warm-up, smoothing and ghost batches; adversarial_rate is the peak rate of an
    adversarially trained ResNet with GELU, 'as-released' (0.8) or 'by-rule' (1.6); curriculum is
    'none', 'study' or a table of rows; teacher names a base. Any other axis is a field of the
    recipe.
    """
    return with_axes(recipe, {axis: value})


def with_axes(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some axes set, in whatever order they are named.

    What brings other fields along comes first; then fields, all at once, so that a field that is
    named wins over one that is brought along; then what goes by fields. Epochs that would end
    before the warm-up shorten it in proportion. ValueError where a value, or all of them together,
    cannot be.
    """
    for axis in values:
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r}; one of {', '.join(AXES)}")
        if axis in _NAMED and not isinstance(values[axis], str):
            raise ValueError(f"{axis} is a name, not {values[axis]!r}")
    draft: Recipe = _Draft.model_validate(_fields_of(recipe))
    for axis in sorted(values.keys() & _SETTERS.keys() - {ADVERSARIAL_RATE}, key=AXES.index):
        draft = _SETTERS[axis](draft, values[axis])
    fields = {axis: value for axis, value in values.items() if axis not in _SETTERS}
    draft = draft.replace(**(fields | _shortened_warmup(draft, fields)))
    if ADVERSARIAL_RATE in values:
        draft = _with_adversarial_rate(draft, values[ADVERSARIAL_RATE])
    changed = Recipe.model_validate(_fields_of(draft))
    if changed.training != values.get("training", changed.training):
        raise ValueError(f"training {values['training']!r} and an adversary exclude each other")
    return changed


class _Draft(Recipe):
    """A recipe while axes are set on it, whose fields are not yet checked together."""

    @model_validator(mode="after")
    def _can_be(self) -> _Draft:
        return self


def _fields_of(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in Recipe.model_fields}


def _shortened_warmup(recipe: Recipe, fields: Mapping[str, Any]) -> dict[str, float]:
    epochs = fields.get("epochs")
    if "warmup_epochs" in fields or not isinstance(epochs, int):
        return {}
    if not 0 < epochs < recipe.warmup_epochs:
        return {}
    return {"warmup_epochs": recipe.warmup_epochs * epochs / recipe.epochs}


def with_settings(
    recipe: Recipe, settings: Mapping[str, Any], axes: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe with some axes, and with what is set for every trial and its teachers.

    What is set wins over what an axis brings along. A teacher has its own model, training and
    seed. ValueError where the trial or a teacher cannot be so.
    """
    changed = with_axes(recipe, {**(axes or {}), **settings})
    if changed.distillation is None:
        return changed
    teacher = changed.distillation.teacher
    try:
        teacher = with_settings(teacher, _of_teachers(settings))
    except ValueError as error:
        raise ValueError(f"teacher {teacher.describe()}: {problem(error)}") from None
    taught = changed.distillation.model_copy(update={"teacher": teacher})
    return changed.replace(distillation=taught)


def warmup_notes(
    recipe: Recipe, settings: Mapping[str, Any], axes: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Say where `with_settings` shortens the warm-up of the recipe or a teacher."""
    values = {**(axes or {}), **settings}
    changed = with_axes(recipe, values)
    whole = with_axes(recipe, {axis: values[axis] for axis in values if axis != "epochs"})
    if whole.warmup_epochs > changed.epochs:
        yield (
            f"the warm-up of {whole.warmup_epochs:g} of {whole.epochs} epochs is shortened to "
            f"{changed.warmup_epochs:g} of {changed.epochs}"
        )
    if changed.teacher:
        yield from warmup_notes(changed.teacher, _of_teachers(settings))


def _of_teachers(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in settings.items() if axis in SETTABLE}


def check_settings(settings: Mapping[str, Any], axes: Axes) -> None:
    """Raise ValueError where two of what is set and what is varied are about the same thing."""
    said = {axis: f"{axis}={value} is set for every trial" for axis, value in settings.items()}
    for axis, values in axes.items():
        varied = f"the study varies {axis} ({', '.join(map(str, values))})"
        if axis in said:
            raise ValueError(f"{said[axis]}, and {varied}: leave one out")
        said[axis] = varied
    for one, other in _SAME:
        if one in said and other in said:
            raise ValueError(f"{said[one]}, and {said[other]}: both choose the {one}")


def format_settings(settings: Mapping[str, Any]) -> str:
    """Write settings as users do: 'precision=bf16 micro_batch=256'."""
    return " ".join(f"{axis}={value}" for axis, value in settings.items())


def _with_model(recipe: Recipe, model: str) -> Recipe:
    changed = recipe.replace(model=model)
    if changed.family == recipe.family or recipe.adversary:
        return changed
    return _with_optimizer(changed, recipe.optimizer)


def _with_family(recipe: Recipe, family: str) -> Recipe:
    if family.startswith(TIMM_PREFIX):
        return _with_model(recipe, family)
    return _with_model(recipe, model_of(family, recipe.size))


def _with_size(recipe: Recipe, size: str) -> Recipe:
    return _with_model(recipe, model_of(recipe.family, size))


def _with_optimizer(recipe: Recipe, optimizer: str) -> Recipe:
    family = recipe.family if recipe.family == "resnet" else "deit"
    settings = PUBLISHED_SETTINGS.get((family, optimizer), {})
    changed = recipe.replace(optimizer=optimizer, micro_batch=None, **settings)
    return _adversarial(changed) if recipe.adversary else changed


def _with_augmentation(recipe: Recipe, augmentations: Any) -> Recipe:
    changed = recipe.replace(augmentations=augmentations)
    smoothed = changed.augmentations or changed.adversary
    return changed.replace(label_smoothing=0.1 if smoothed else 0.0)


def _with_training(recipe: Recipe, training: str) -> Recipe:
    if training not in ("clean", "adversarial"):
        raise ValueError(f"unknown training {training!r}; one of ['adversarial', 'clean']")
    if training == "adversarial":
        return _adversarial(recipe)
    changed = recipe.replace(adversary=None, norm="batch", pixel_range="data", warmup_rate=1e-6)
    changed = _with_optimizer(changed, recipe.optimizer)
    return _with_augmentation(changed, changed.augmentations)


def _adversarial(recipe: Recipe) -> Recipe:
    """Adversarial training as in the study: total batch 4096, the rate in proportion.

    Labels are smoothed with and without augmentation: the default of main_adv_res.py, which
    advres.sh leaves as it is.
    """
    sgd, resnet = recipe.optimizer == "sgd", recipe.family == "resnet"
    return recipe.replace(
        adversary=Adversary(epsilon=4 / 255, step_size=4 / 255, plain_start=0.2 if resnet else 0.0),
        pixel_range="half",
        batch_size=AT_BATCH,
        learning_rate=recipe.learning_rate * (AT_BATCH / recipe.batch_size),
        warmup_epochs=5.0 if sgd else 10.0,
        warmup_rate=0.1 if sgd else 1e-6,
        label_smoothing=0.1,
        **({"norm": "ghost", "ghost_batch": 64, "micro_batch": AT_FORWARD} if resnet else {}),
    )


def _with_adversarial_rate(recipe: Recipe, rule: str) -> Recipe:
    """Set the peak rate of an adversarially trained ResNet with GELU and SGD.

    by-rule: 0.1 per 256 images, as with ReLU. as-released: half of it, since advres.sh accumulates
    8 batches and main_adv_res.py counts 4 (0.1 * 128 * 4 * 4 / 256). Other recipes have one rate.
    """
    if rule not in (AS_RELEASED, BY_RULE):
        raise ValueError(f"unknown adversarial_rate {rule!r}; one of {[AS_RELEASED, BY_RULE]}")
    kind = recipe.family, recipe.activation, recipe.optimizer, recipe.training
    if kind != ("resnet", "gelu", "sgd", "adversarial"):
        return recipe
    rate = 0.1 * recipe.batch_size / 256
    return recipe.replace(learning_rate=rate if rule == BY_RULE else rate / 2)


def _with_curriculum(recipe: Recipe, curriculum: Any) -> Recipe:
    if not isinstance(curriculum, str):
        return recipe.replace(curriculum=curriculum, curriculum_epochs=recipe.epochs)
    if curriculum not in CURRICULA:
        raise ValueError(
            f"unknown curriculum {curriculum!r}; one of {sorted(CURRICULA)}, or a table of rows"
        )
    return recipe.replace(curriculum=CURRICULA[curriculum], curriculum_epochs=100)


def _with_teacher(recipe: Recipe, teacher: str) -> Recipe:
    if teacher == "none":
        return recipe.replace(distillation=None)
    if teacher not in BASES:
        raise ValueError(f"teacher {teacher!r} is not in the plan; one of {sorted(BASES)} or none")
    return recipe.replace(distillation=Distillation(teacher=BASES[teacher]()))


_SETTERS: dict[str, Callable[[Recipe, Any], Recipe]] = {
    "model": _with_model,
    "family": _with_family,
    "size": _with_size,
    "optimizer": _with_optimizer,
    "augmentation": _with_augmentation,
    "training": _with_training,
    ADVERSARIAL_RATE: _with_adversarial_rate,
    "curriculum": _with_curriculum,
    "teacher": _with_teacher,
}
_NAMED = ("model", "family", "size", "optimizer", "training", ADVERSARIAL_RATE, "teacher")
AXES = tuple(dict.fromkeys((*_SETTERS, *Recipe.model_fields)))
# Pairs of axes of which one would undo the other.
_SAME = (
    *(("model", "family"), ("model", "size")),
    *(("augmentation", "augmentations"), ("teacher", "distillation")),
    ("learning_rate", ADVERSARIAL_RATE),
)
# What a table's row or column is about, and what --scale and --seeds choose.
_NOT_FOR_ALL = {
    *("model", "family", "size", "training", "adversary", "teacher", "distillation"),
    *("scale", "seed"),
}
SETTABLE = tuple(axis for axis in AXES if axis not in _NOT_FOR_ALL)


def resnet50() -> Recipe:
    """ResNet-50 under its own recipe. Published: 76.9 top-1 (T5)."""
    return Recipe(
        scale="imagenet",
        model="resnet50",
        activation="relu",
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        scheduler="step",
        epochs=100,
        batch_size=256,
    )


def resnet_aligned(size: str = "base") -> Recipe:
    """ResNet-* under DeiT's whole recipe. Published: ResNet-50* 76.3 top-1 (T5)."""
    recipe = _with_optimizer(_with_size(resnet50(), size), "adamw")
    return _with_augmentation(recipe.replace(scheduler="cosine"), STRONG)


def resnet_best(size: str = "base", *, epochs: int = 100) -> Recipe:
    """ResNet-Best: cosine, SGD, RandAug+CutMix. Published: ResNet-50-Best 75.7 top-1 (T8)."""
    recipe = _with_size(resnet50(), size).replace(scheduler="cosine", epochs=epochs)
    return _with_augmentation(recipe, "randaug+cutmix")


def deit(size: str = "base", *, epochs: int = 100) -> Recipe:
    """DeiT under its own recipe, 300 epochs cut to 100. Published: DeiT-S 76.8 top-1 (T5)."""
    recipe = _with_optimizer(_with_model(resnet50(), model_of("deit", size)), "adamw")
    recipe = recipe.replace(activation="gelu", scheduler="cosine", epochs=epochs)
    return _with_augmentation(recipe, STRONG)


def adversarial_resnet50() -> Recipe:
    """AT ResNet-50 with ReLU. Published under AutoAttack: 26.41 (T2)."""
    return _adversarial(resnet50())


def adversarial_resnet50_gelu() -> Recipe:
    """AT ResNet-50 with GELU, at the released rate. Published under AutoAttack: 35.51 (T2)."""
    recipe = adversarial_resnet50().replace(activation="gelu", micro_batch=AT_GELU_FORWARD)
    return _with_adversarial_rate(recipe, AS_RELEASED)


def adversarial_deit() -> Recipe:
    """AT DeiT-S with its curriculum. Published under AutoAttack: 35.50 (T2)."""
    return _with_curriculum(_adversarial(deit()), "study")


def hybrid_deit() -> Recipe:
    """Hybrid-DeiT: a ResNet-18 trunk feeds DeiT-Mini's blocks, under DeiT's recipe (T10)."""
    return deit().replace(model="hybrid_deit")


BASES: dict[str, Callable[[], Recipe]] = {
    "resnet50": resnet50,
    "resnet50_aligned": resnet_aligned,
    "resnet50_best": resnet_best,
    "deit_small": deit,
    "hybrid_deit": hybrid_deit,
    "adversarial_resnet50": adversarial_resnet50,
    "adversarial_resnet50_gelu": adversarial_resnet50_gelu,
    "adversarial_deit_small": adversarial_deit,
}


@dataclass(frozen=True)
class Column:
    """One column of a table: a score of an evaluator. `evaluator` is the cell that yields it.

    `score` is read on the study's own data. Other data have a `counterpart` of that name, whose
    score is `counterpart_score` ("": the same), or no such column. `own_score`: a score that only
    the study's own data give. `heading`: the column's title where that is not its label.
    """

    label: str
    evaluator: str
    score: str
    counterpart: str = ""
    counterpart_score: str = ""
    own_score: str = ""
    heading: str = ""

    def at(self, scale: str, scores: Collection[str] = ()) -> Column | None:
        """Return the column as a scale shows it; None where its score does not exist there.

        scores: those of the models judged so far, which tell what data they were judged on.
        """
        own = scale == "imagenet"
        if self.own_score and self.evaluator in scores:
            own = self.own_score in scores
        if own or not (self.counterpart or self.own_score):
            return self
        if not self.counterpart:
            return None
        score = self.counterpart_score or self.score
        return replace(self, score=score, heading=f"{self.counterpart} ({scale})")

    @property
    def title(self) -> str:
        """Return the column's honest name."""
        return self.heading or self.label


@dataclass(frozen=True)
class Row:
    """One row of a table: a label and the recipe behind it."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Table:
    """Cells laid out beside the published figures."""

    name: str
    question: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Study:
    """A named set of recipes with the tables they serve.

    `evaluators` run on every trial, beside those that the tables' columns ask for. `placement` maps
    a family to what of its trials' placement is not as usual. `settings` are axes that every trial
    and every teacher has so, whatever other axes bring along.
    """

    name: str
    tables: tuple[Table, ...] = ()
    base: Recipe | None = None
    axes: Axes | None = None
    mode: Mode = "product"
    evaluators: tuple[str, ...] = ("clean", "pgd", "health")
    placement: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


CLEAN = Column("Clean", "clean", "clean")
PGD = tuple(Column(f"PGD-{n}", "pgd", f"pgd-{n}") for n in (5, 10, 50, 100))
PGD_AS_PUBLISHED = tuple(
    Column(f"PGD-{n} as published", "pgd-as-published", f"pgd-as-published-{n}")
    for n in (5, 10, 50, 100)
)


AUTOATTACK = Column("AutoAttack 4/255", "autoattack", "autoattack", "AutoAttack")
AUTOATTACK_SMALL = Column(
    "AutoAttack 0.001", "autoattack-small", "autoattack-small", "AutoAttack, small radius"
)
ATTACKED_CLEAN = Column("Clean, same images", "autoattack", "autoattack/clean")
AUTOATTACK_STAGES = tuple(
    Column(f"after {stage.upper()}", "autoattack", f"autoattack/after-{stage}")
    for stage in ("apgd-ce", "apgd-t", "fab-t")
)
PATCHES = (
    Column("TPA", "tpa", "tpa"),
    Column("TPA, 1 patch", "tpa", "tpa/patches-1"),
    Column("Random patches", "tpa", "tpa-random"),
)
OUT_OF_DISTRIBUTION = (
    CLEAN,
    Column("ImageNet-A", "natural", "natural", "Natural-adversarial", own_score="natural-1000"),
    Column("ImageNet-A, among all 1,000", "natural", "natural-1000", own_score="natural-1000"),
    Column("ImageNet-C error", "corruptions", "corruptions", "Corruptions error"),
    Column("Error, 19 corruptions", "corruptions", "corruptions-19", own_score="corruptions-19"),
    Column("ImageNet-C mCE", "corruptions", "corruptions/mCE", own_score="corruptions/mCE"),
    # Resized and cropped, as the study's commands read it: script/generation_to_ood.sh gives
    # imagenet_robust.py no --already224.
    Column(
        "Stylized",
        "stylized",
        "stylized-cropped",
        "Cue conflict",
        "stylized",
        own_score="stylized-cropped",
    ),
    Column("Stylized, native size", "stylized", "stylized", own_score="stylized-cropped"),
)


EVERY_COLUMN = tuple(
    dict.fromkeys(
        (
            *(*OUT_OF_DISTRIBUTION, *PGD, *PGD_AS_PUBLISHED, *PATCHES, ATTACKED_CLEAN),
            *(AUTOATTACK_SMALL, *AUTOATTACK_STAGES, AUTOATTACK),
        )
    )
)


def _augmentation_rows(base: Recipe) -> tuple[Row, ...]:
    return tuple(Row(s, _with_augmentation(base, s)) for s in AUGMENTATION_SUBSETS)


def _paper_tables() -> tuple[Table, ...]:
    own, cosine = resnet50(), resnet50().replace(scheduler="cosine")
    pair = (Row("ResNet-50", own), Row("DeiT-S", deit()))
    attacks = (CLEAN, *PGD, ATTACKED_CLEAN, AUTOATTACK_SMALL, AUTOATTACK)
    adversarial = (CLEAN, *PGD, ATTACKED_CLEAN, *AUTOATTACK_STAGES, AUTOATTACK)
    patches, ood = (CLEAN, *PATCHES), OUT_OF_DISTRIBUTION
    helps = "Which augmentation helps ResNet-50 against patches"
    return (
        Table("T1", "Vanilla models under attack", pair, attacks),
        Table("T2", "Adversarial training", _adversarial_rows(), adversarial),
        Table("T3", "Patch attacks on vanilla models", pair, patches),
        Table("T4", helps, _augmentation_rows(own), patches),
        Table("T5", "Out of distribution, first look", _first_look_rows(), ood),
        Table("T6", "Align the schedule, then the optimizer", _alignment_rows(own, cosine), ood),
        Table("T7", "Align the augmentation", _augmentation_rows(cosine), ood),
        Table("T8", "Model size", _size_rows(), ood),
        Table("T9", "Distillation", _distillation_rows(), ood),
        Table("T10", "A hybrid of both families", _hybrid_rows(), ood),
        Table("T11", "300 epochs", _long_rows(), ood),
    )


def _adversarial_rows() -> tuple[Row, ...]:
    cnn_recipe = _with_optimizer(_adversarial(deit()), "sgd").replace(scheduler="step")
    resnet = adversarial_resnet50()
    return (
        Row("ResNet-50 ReLU", resnet),
        Row("ResNet-50 GELU", adversarial_resnet50_gelu()),
        Row("DeiT-S", adversarial_deit()),
        Row(
            "DeiT-S, CNN recipe (M-SGD, no strong augmentation)",
            _with_augmentation(cnn_recipe, "none"),
        ),
        Row("DeiT-S without curriculum", _adversarial(deit())),
        Row("ResNet-50 with AdamW", _with_optimizer(resnet, "adamw")),
        Row("ResNet-50 with strong augmentation", _with_augmentation(resnet, STRONG)),
    )


def _first_look_rows() -> tuple[Row, ...]:
    return (
        Row("ResNet-50", resnet50()),
        Row("ResNet-50*", resnet_aligned()),
        Row("DeiT-S", deit()),
    )


def _alignment_rows(own: Recipe, cosine: Recipe) -> tuple[Row, ...]:
    return (
        Row("step, SGD", own),
        Row("cosine, SGD", cosine),
        Row("cosine, AdamW", _with_optimizer(cosine, "adamw")),
    )


def _size_rows() -> tuple[Row, ...]:
    return (
        Row("ResNet-18*", resnet_aligned("small")),
        Row("ResNet-50*", resnet_aligned()),
        Row("ResNet-101*", resnet_aligned("large")),
        Row("ResNet-18-Best", resnet_best("small")),
        Row("ResNet-50-Best", resnet_best()),
        Row("ResNet-101-Best", resnet_best("large")),
        Row("DeiT-Mini", deit("small")),
        Row("DeiT-S", deit()),
        Row("DeiT-B", deit("large")),
    )


def _distillation_rows() -> tuple[Row, ...]:
    return (
        Row("DeiT-S, the teacher", deit()),
        Row("ResNet-50*, teacher DeiT-S", _with_teacher(resnet_aligned(), "deit_small")),
        Row("ResNet-50*, the teacher", resnet_aligned()),
        Row("DeiT-S, teacher ResNet-50*", _with_teacher(deit(), "resnet50_aligned")),
    )


def _hybrid_rows() -> tuple[Row, ...]:
    return (
        Row("ResNet-50", resnet50()),
        Row("Hybrid-DeiT", hybrid_deit()),
        Row("DeiT-S", deit()),
    )


def _long_rows() -> tuple[Row, ...]:
    return (
        Row("ResNet-50-Best, 300 epochs", resnet_best(epochs=300)),
        Row("ResNet-101-Best, 300 epochs", resnet_best("large", epochs=300)),
        Row("ResNet-200-Best, 300 epochs", resnet_best("huge", epochs=300)),
        Row("DeiT-S, 300 epochs", deit(epochs=300)),
    )


FULL_AXES: Axes = {
    "family": ("resnet", "deit"),
    "size": ("small", "base", "large"),
    "activation": ("relu", "gelu"),
    "optimizer": ("sgd", "adamw"),
    "scheduler": ("step", "cosine"),
    "augmentation": AUGMENTATION_SUBSETS,
    "epochs": (100, 300),
    "training": ("clean", "adversarial"),
}


def paper() -> Study:
    """The tables of the paper."""
    return Study(name="paper", tables=_paper_tables())


def full() -> Study:
    """The full product of the axes behind the tables."""
    return Study(name="full", base=resnet50(), axes=FULL_AXES)


STUDIES = {"paper": paper, "full": full}


AxisValue = str | int | float | list[dict[str, int | float]] | dict[str, int | float | str]


class PlacementOfFamily(BaseModel):
    """How the trials of one family are placed; what is not given is as the command has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workers: int | None = Field(None, ge=1)
    min_workers: int | None = Field(None, ge=1)
    cpus: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)


class StudyFile(BaseModel):
    """A user's study: a base recipe, axes over it, and the evaluators to ask."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    base: str
    set: dict[str, AxisValue] = {}
    axes: dict[str, list[AxisValue]] = {}
    mode: Mode = "product"
    evaluators: list[str] = ["clean", "pgd"]
    placement: dict[Literal["resnet", "deit", "hybrid", "timm"], PlacementOfFamily] = {}


def load_study(name_or_file: str) -> Study:
    """Return a study by name or from a TOML file; ValueError says which key is wrong and why."""
    if name_or_file in STUDIES:
        return STUDIES[name_or_file]()
    path = Path(name_or_file)
    if path.suffix != ".toml":
        raise ValueError(
            f"unknown study {name_or_file!r}; one of {sorted(STUDIES)} or the path of a .toml file"
        )
    try:
        parsed = StudyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"study file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"study file {path}: {first_problem(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"study file {path} is not TOML: {error}") from None
    return _study_from(parsed, path)


def _study_from(parsed: StudyFile, path: Path) -> Study:
    if parsed.base not in BASES:
        raise ValueError(f"study file {path}: unknown base {parsed.base!r}; one of {sorted(BASES)}")
    unknown = [axis for axis in (*parsed.set, *parsed.axes) if axis not in AXES]
    if unknown:
        raise ValueError(
            f"study file {path}: unknown axis {unknown[0]!r}; one of {', '.join(AXES)}"
        )
    axes = {axis: tuple(values) for axis, values in parsed.axes.items()}
    try:
        check_settings(parsed.set, axes)
        for axis, value in parsed.set.items():
            _check_value(BASES[parsed.base](), axis, value)
    except ValueError as error:
        raise ValueError(f"study file {path}: {error}") from None
    return Study(
        name=parsed.name,
        base=BASES[parsed.base](),
        axes=axes,
        mode=parsed.mode,
        evaluators=tuple(parsed.evaluators),
        placement={k: v.model_dump(exclude_none=True) for k, v in parsed.placement.items()},
        settings=parsed.set,
    )


def _check_value(base: Recipe, axis: str, value: Any) -> None:
    """Raise ValueError where no recipe can have a value; which trials can, the plan says."""
    refused = []
    for recipe in (base, *(make() for make in BASES.values())):
        try:
            with_axis(recipe, axis, value)
        except ValueError as error:
            refused.append(error)
            continue
        return
    about_fields_together = (
        isinstance(refused[0], ValidationError) and not refused[0].errors()[0]["loc"]
    )
    if not about_fields_together:
        said = problem(refused[0])
        raise ValueError(f"set.{said}" if said.startswith(axis) else f"set.{axis}: {said}")


def first_problem(error: ValidationError) -> str:
    """Say the first thing a validation found wrong: the key, what was expected, what was there."""
    found = error.errors()[0]
    key = ".".join(str(part) for part in found["loc"])
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] in ("value_error", "missing"):
        return f"{key}: {message}" if key else message
    if found["type"] == "extra_forbidden":
        model = PlacementOfFamily if found["loc"][0] == "placement" else StudyFile
        return f"unknown key {key!r}; known keys: {', '.join(model.model_fields)}"
    return f"{key}: {message}, not {found['input']!r}"


def problem(error: ValueError) -> str:
    """Say in one sentence what a ValueError, pydantic's or a plain one, is about."""
    return first_problem(error) if isinstance(error, ValidationError) else str(error)
