"""Everything that determines a trial's weights, as one frozen, typed, validated value."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from trainables.models import MODELS, OWN, TIMM_PREFIX, model_named

ACTIVATIONS = (
    *("relu", "gelu", "silu", "softplus", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu"),
    *("gelu_tanh", "quick_gelu", "mish", "hard_swish", "hard_mish", "hard_sigmoid", "sigmoid"),
    *("tanh", "identity"),
)
Augmentation = Literal["randaug", "augmix", "3augment", "mixup", "cutmix"]
Scheduler = Literal["step", "cosine", "tanh", "multistep", "poly", "wsd", "rsqrt", "constant"]
Protocol = Literal["corrected", "as-published"]
Norm = Literal["batch", "ghost"]
Ball = Literal["linf", "l2"]
PixelRange = Literal["data", "half"]
Precision = Literal["float32", "bf16", "fp16"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)
POLICIES = ("randaug", "augmix", "3augment")  # an image takes one of them
STUDY_OPTIMIZERS = ("sgd", "adamw")  # torch's, as in the study; others are timm's
STUDY_SCHEDULERS = ("step", "cosine")
# Beyond these a number is a slip of the keyboard.
MOST_EPOCHS = 100_000
MOST_STEPS = 10_000
MOST_IMAGES = 2**20
LARGEST_SEED = 2**32 - 1
HALF = (0.5, 0.5, 0.5)
LONGEST_WORD = 40  # letters of a field in a recipe's description
# The fields of a recipe of 0 epochs that change its weights, or what they are.
OF_CHECKPOINT = (
    *("scale", "model", "activation", "epochs", "pixel_range"),
    *("init", "init_sha256", "preprocessing"),
)
# The fields that change the memory of a training step.
OF_STEP = {
    *("scale", "model", "model_args", "norm", "optimizer", "ema_decay", "precision", "batch_size"),
    *("micro_batch", "train_sizes", "preprocessing", "adversary", "distillation", "activation"),
    *("dropout", "drop_path", "optimizer_args", "layer_decay", "ghost_batch"),
}


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, which words are, and the nearest of them."""
    words = list(known)
    return f"unknown {kind} {word!r}; one of {', '.join(words)}{nearest(word, words)}"


def check_known(kind: str, word: str, known: Collection[str]) -> str:
    """Return a word; ValueError where it is not known."""
    if word not in known:
        raise ValueError(unknown(kind, word, known))
    return word


def nearest(word: str, known: Iterable[str]) -> str:
    """Ask whether the nearest known word is meant; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


def one_of(kind: str, known: Collection[str]) -> AfterValidator:
    """Return the validator of a name that must be among the known ones."""
    return AfterValidator(lambda name: check_known(kind, name, known))


def check_model(name: str) -> str:
    """Return a model's name; ValueError where none can have it; nothing is built."""
    try:
        return model_named(name).name
    except ValueError as error:
        import timm

        of_timm = (f"{TIMM_PREFIX}{n}" for n in (*timm.list_models(), *timm.list_pretrained()))
        raise ValueError(f"{error}{nearest(name, [*MODELS, *of_timm])}") from None


def _runs_no_code(name: str) -> str:
    """Return a model's name; ValueError where it names code that is not installed as a model.

    Recipes stand in study files and in weights files, which may be a stranger's.
    """
    if model_named(name).family == OWN:
        raise ValueError(
            f"model {name!r} runs code, and studies and weights files run none: install it as a "
            "model (docs/model.md), or judge it by the evaluators' command"
        )
    return name


def problem(error: ValueError, prefix: str = "") -> str:
    """Say in a sentence the first problem of a ValueError; of a validation's, at which key.

    prefix: of a key, as users write it.
    """
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    # An option's words have no number that their users know.
    parts = [str(p) for p in first["loc"] if p != "[key]" and (not prefix or isinstance(p, str))]
    key = prefix + ".".join(parts) if parts else ""
    text = first["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    if first["type"] not in ("value_error", "missing"):
        words = re.findall("'([^']+)'", text) if first["type"] == "literal_error" else []
        text = f"{text}, not {first['input']!r}{nearest(str(first['input']), words)}"
    return f"{key}: {text}" if key else text


def format_augmentations(augmentations: Iterable[str]) -> str:
    """Write a set of augmentations as users do: 'randaug+cutmix', or 'none'."""
    return "+".join(augmentations) or "none"


def parse_augmentations(value: Any) -> Any:
    """Read a set of augmentations, given as names or as text like 'randaug+cutmix' or 'none'."""
    if isinstance(value, str):
        value = () if value in ("", "none") else value.split("+")
    if not isinstance(value, list | tuple):
        return value
    for name in map(str, value):
        if name not in AUGMENTATIONS:
            raise ValueError(f"{unknown('augmentation', name, AUGMENTATIONS)}; join them by +")
    return tuple(name for name in AUGMENTATIONS if name in value)


def with_tuples(value: Any) -> Any:
    """Return the value with tuples for lists, at any depth."""
    if isinstance(value, dict):
        return {key: with_tuples(inner) for key, inner in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value


# Keyword arguments of a library's function.
Arguments = Annotated[dict[str, Any], BeforeValidator(with_tuples)]


def check_optimizer(name: str) -> str:
    """Return an optimizer's name; ValueError where it is neither the study's nor timm's."""
    if name not in STUDY_OPTIMIZERS:
        from timm.optim import list_optimizers

        if name not in (known := list_optimizers()):
            near = nearest(name, [*STUDY_OPTIMIZERS, *known])
            allowed = f"{', '.join(STUDY_OPTIMIZERS)}, or one of timm's {len(known)}{near}"
            raise ValueError(f"unknown optimizer {name!r}; {allowed}")
    return name


def parse_radius(value: Any) -> Any:
    """Read a radius for pixels in [0, 1], given as a number or as text like '4/255'."""
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        try:
            value = float(numerator) / float(denominator) if slash else float(numerator)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"epsilon {value!r} is neither a number nor like '4/255'") from None
    return value


Side = Annotated[int, Field(ge=4, le=2048)]  # of an image, in pixels
Radius = Annotated[float, BeforeValidator(parse_radius), Field(gt=0)]


def per_channel(name: str, numbers: Sequence[float], channels: int = 3) -> tuple[float, ...]:
    """Return a normalisation's numbers, given as one or one a channel; ValueError for others."""
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name} has {len(numbers)} numbers, and the images {channels} channels")
    if not all(0 <= number <= 1 for number in numbers) or (name == "std" and 0 in numbers):
        stated = " ".join(f"{number:g}" for number in numbers)
        raise ValueError(f"{name} {stated} is of other units: pixels are in [0, 1], divide by 255")
    return tuple(numbers) if len(numbers) == channels else tuple(numbers) * channels


class Frozen(BaseModel):
    """A value that is checked strictly as it is made, and does not change."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, values: Any) -> Any:
        known = [field.validation_alias or name for name, field in cls.model_fields.items()]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                raise ValueError(unknown("key", str(key), map(str, known)))
        return values


class Adversary(Frozen):
    """Adversarial training: each batch is attacked before it is learned from.

    epsilon and step_size are radii in `norm` for pixels in [0, 1]. `plain_start` is the chance
    that an image's attack starts at the image itself instead of at random in its ball. attack:
    pgd; apgd, whose step begins at twice epsilon and follows its own rule (Croce and Hein 2020), so
    that `step_size` does not count. loss: ce, the cross-entropy of the attacked images; trades
    (Zhang et al. 2019) and mart (Wang et al. 2020), which weigh a divergence by `beta`; the default
    is of both authors' code. epsilon grows from 0 over the first `epsilon_epochs`, epoch by epoch,
    linearly or as a sine from its trough to its crest (Debenedetti et al. 2023, src/attacks.py).
    FGSM-RS (Wong et al. 2020) is pgd of one step of 1.25 epsilon.
    """

    norm: Ball = "linf"
    attack: Literal["pgd", "apgd"] = "pgd"
    epsilon: Radius
    steps: int = Field(default=1, gt=0, le=MOST_STEPS)
    step_size: Radius | None = None
    plain_start: float = Field(default=0, ge=0, le=1)
    loss: Literal["ce", "trades", "mart"] = "ce"
    beta: float = Field(default=6, gt=0)
    epsilon_schedule: Literal["linear", "sine"] = "linear"
    epsilon_epochs: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _can_be(self) -> Adversary:
        if self.step_size is None and self.attack == "pgd":
            raise ValueError("attack 'pgd' needs a step_size; 'apgd' has a rule of its own")
        if self.norm == "linf" and (most := max(self.epsilon, self.step_size or 0)) >= 1:
            raise ValueError(
                f"epsilon {most:g} is outside (0, 1): pixels are in [0, 1], write {most:g}/255"
            )
        if self.loss == "trades" and self.plain_start:
            raise ValueError(
                "the divergence of loss 'trades' has no gradient at the image itself: plain_start "
                "must be 0"
            )
        return self

    @property
    def inert(self) -> tuple[str, ...]:
        """The fields that have no effect beside the others."""
        inert = {
            "step_size": self.attack == "apgd",
            "beta": self.loss == "ce",
            "epsilon_schedule": not self.epsilon_epochs,
        }
        return tuple(name for name, is_so in inert.items() if is_so)

    def describe(self) -> str:
        """Name what differs from the study's adversary beside radii: 'AT l2 apgd-2 trades-6'."""
        words = [
            "l2" if self.norm == "l2" else "",
            f"{self.attack}-{self.steps}" if (self.attack, self.steps) != ("pgd", 1) else "",
            f"{self.loss}-{self.beta:g}" if self.loss != "ce" else "",
            f"{self.epsilon_schedule}-{self.epsilon_epochs:g}ep" if self.epsilon_epochs else "",
        ]
        return " ".join(["AT", *filter(None, words)])

    def __str__(self) -> str:
        """Say the fields that count, as a person would: 'apgd epsilon=4/255 steps=2'."""
        words = []
        for name, value in self.model_dump(exclude_defaults=True, exclude=set(self.inert)).items():
            is_pixels = self.norm == "linf" and name in ("epsilon", "step_size")
            number = f"{value * 255:.4g}/255" if is_pixels else value
            words.append(str(value) if isinstance(value, str) else f"{name}={number}")
        return " ".join(words)

    def in_epoch(self, epoch: int) -> Adversary:
        """Return this adversary with the epsilon of an epoch (from 0), which may be 0."""
        if epoch >= self.epsilon_epochs:
            return self
        share = epoch / self.epsilon_epochs
        if self.epsilon_schedule == "sine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.model_copy(update={"epsilon": share * self.epsilon})


class Distillation(Frozen):
    """Learn from a teacher's plain logits beside the labels; the teacher is a trial of its own.

    loss = (1 - alpha) * cross-entropy + alpha * tau^2 * KL(teacher || student) at temperature tau.
    The divergence is summed over classes and averaged over images.
    """

    teacher: Recipe
    alpha: float = Field(default=0.5, ge=0, le=1)
    tau: float = Field(default=1, gt=0)


class CurriculumRow(Frozen):
    """The augmentation of one epoch of a curriculum; cutmix_alpha 0 leaves CutMix out."""

    epoch: int = Field(ge=0)
    randaug_magnitude: int = Field(ge=0, le=10)
    mix_probability: float = Field(ge=0, le=1)
    cutmix_alpha: float = Field(ge=0)
    switch_probability: float = Field(ge=0, le=1)


class Preprocessing(Frozen):
    """How an image becomes a model's input; what is None is as the data set has it.

    size: the side in pixels. squash: both sides are brought to it; otherwise the shorter side is
    brought to size / crop, rounded down, and the middle square is cut out (timm's crop_pct). mean,
    std: of the normalisation inside the model, one number or one a channel, for pixels in [0, 1].
    """

    size: Side | None = None
    crop: float | None = Field(default=None, gt=0, le=1)
    squash: bool | None = None
    interpolation: Interpolation | None = None
    mean: Annotated[tuple[float, ...] | None, BeforeValidator(with_tuples)] = None
    std: Annotated[tuple[float, ...] | None, BeforeValidator(with_tuples)] = None

    def geometry(self) -> Preprocessing:
        """Return how images are brought to a size, without the normalisation inside the model."""
        return self.model_copy(update={"mean": None, "std": None})

    def chosen(self) -> dict[str, Any]:
        """Return the fields that are not left to the data set."""
        return {name: value for name, value in self if value is not None}

    def __or__(self, other: Preprocessing) -> Preprocessing:
        """Return this preprocessing with the fields that another chooses."""
        return self.model_copy(update=other.chosen())

    def __str__(self) -> str:
        """Say the fields that are chosen, as a person would: '224 px, crop 0.9, bicubic'."""
        parts = [f"{self.size} px" if self.size else "", "squash" if self.squash else ""]
        parts += [f"crop {self.crop:.4g}" if self.crop else "", self.interpolation or ""]
        for name in ("mean", "std"):
            if numbers := getattr(self, name):
                parts.append(f"{name} {' '.join(f'{number:g}' for number in numbers)}")
        return ", ".join(filter(None, parts))

    def beyond(self, other: Preprocessing) -> Preprocessing:
        """Return the fields that are chosen otherwise than another preprocessing has them."""
        changed = {k: v for k, v in self.chosen().items() if v != getattr(other, k)}
        return Preprocessing(**changed)


class Recipe(Frozen):
    """Everything that determines the weights; equal digests mean equal weights.

    Rates are peak rates at the total batch; `warmup_epochs` may be fractional; magnitudes and
    alphas count only where their augmentation is on. `micro_batch` images pass the model at once
    (None: the whole batch) and their gradients accumulate to the total batch. `curriculum` is
    written for a training of `curriculum_epochs` and stretched to this one. `pixel_range` half
    normalises by mean and std 0.5. `precision` is that of the weight step's forward pass, fp16 with
    a scaled loss; attacks are float32. `activation` own leaves the network's. `init`: where the
    first weights come from, of whatever origin (`trainables.pretrained`), "": drawn by the seed;
    with 0 epochs they are the last as well. `init_sha256`: of that file, which it then is, wherever
    it lies. `preprocessing` departs from the data set's. Source of the values: STUDY section 3.

    What the study does not vary. Optimizers other than sgd and adamw, and schedulers other than
    step and cosine, are timm's, with `optimizer_args` and `scheduler_args` (of its
    create_optimizer_v2 and create_scheduler_v2). The last `cooldown_epochs` have the floor rate;
    `warmup_prefix` has the schedule begin behind the warm-up. `ema_decay`: of the mean of the
    weights (0: none), which is what is stored and judged unless `ema_evaluated` is false.
    `lookahead`: timm's, around the optimizer (after Zhang et al. 2019; k 6, alpha 0.5): its slow
    weights begin as those after six steps, and are taken after every epoch, too.
    `color_jitter`: torchvision's strength of brightness, contrast and saturation, beside a policy
    too. `erasing`: the chance of timm's random erasing, before images are mixed. `repeats`: of
    each image in an epoch, whose length stays (Hoffer et al. 2020). `least_crop`: least share of
    an image's area that a random crop leaves; stated, images in memory are cropped too instead of
    shifted. `train_sizes`: image sides, each for an equal part of the training; held-out
    images and () have the data's. `model_args`: of the network. `drop_path`, `dropout`: its
    drop_path_rate and drop_rate. `warm_start`: a trial whose last weights are the first ones.
    `reset_head`: the first weights' head is left out even where it fits.
    """

    scale: str
    model: Annotated[str, AfterValidator(check_model), AfterValidator(_runs_no_code)]
    activation: Annotated[str, one_of("activation", (*ACTIVATIONS, "own"))] = "relu"
    model_args: Arguments = {}
    drop_path: float = Field(default=0, ge=0, lt=1)
    dropout: float = Field(default=0, ge=0, lt=1)
    optimizer: Annotated[str, AfterValidator(check_optimizer)]
    optimizer_args: Arguments = {}
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    clip_grad: float | None = Field(default=None, gt=0)
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    ema_decay: float = Field(default=0, ge=0, lt=1)
    ema_evaluated: bool = True
    lookahead: bool = False
    scheduler: Scheduler
    scheduler_args: Arguments = {}
    warmup_prefix: bool = False
    cooldown_epochs: int = Field(default=0, ge=0)
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_rate: float = Field(default=1e-6, ge=0)
    floor_rate: float = Field(default=1e-5, ge=0)
    epochs: int = Field(ge=0, le=MOST_EPOCHS)
    batch_size: int = Field(gt=0, le=MOST_IMAGES)
    augmentations: Annotated[tuple[Augmentation, ...], BeforeValidator(parse_augmentations)] = ()
    randaug_magnitude: int = Field(default=9, ge=0, le=10)
    randaug_layers: int = Field(default=2, gt=0)
    randaug_std: float = Field(default=0.5, ge=0)
    color_jitter: float = Field(default=0, ge=0, le=1)
    erasing: float = Field(default=0, ge=0, le=1)
    repeats: int = Field(default=1, gt=0)
    flip: bool = True
    least_crop: float | None = Field(default=None, gt=0, le=1)
    train_sizes: Annotated[tuple[Side, ...], BeforeValidator(with_tuples)] = ()
    mixup_alpha: float = Field(default=0.8, gt=0)
    cutmix_alpha: float = Field(default=1.0, gt=0)
    mix_probability: float = Field(default=1.0, ge=0, le=1)
    switch_probability: float = Field(default=0.5, ge=0, le=1)
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    loss: Literal["ce", "bce"] = "ce"
    bce_threshold: float | None = Field(default=None, ge=0, lt=1)
    curriculum: Annotated[tuple[CurriculumRow, ...], BeforeValidator(with_tuples)] = ()
    curriculum_epochs: int = Field(default=100, gt=0, le=MOST_EPOCHS)
    norm: Norm = "batch"
    ghost_batch: int = Field(default=64, gt=0, le=MOST_IMAGES)
    micro_batch: int | None = Field(default=None, gt=0, le=MOST_IMAGES)
    pixel_range: PixelRange = "data"
    precision: Precision = "float32"
    adversary: Adversary | None = None
    distillation: Distillation | None = None
    protocol: Protocol = "corrected"
    init: str = ""
    init_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    warm_start: Recipe | None = None
    reset_head: bool = False
    preprocessing: Preprocessing = Preprocessing()
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    @model_validator(mode="after")
    def _is_sound(self) -> Recipe:
        for text, is_so in (self._impossible() | self._unconnected()).items():
            if is_so:
                raise ValueError(text)
        return self

    def _impossible(self) -> dict[str, bool]:
        rows, batch = [row.epoch for row in self.curriculum], self.forward_batch
        is_ghost = self.norm == "ghost"
        return {
            "a training of 0 epochs needs the weights that it has: init": (
                not self.epochs and not self.init
            ),
            "a training of 0 epochs learns nothing from a teacher: leave one out": (
                not self.epochs and self.distillation is not None
            ),
            f"warm-up of {self.warmup_epochs:g} epochs is longer than the training of "
            f"{self.epochs} epochs": self.warmup_epochs > self.epochs > 0,
            f"batch_size {self.batch_size} is not divisible by micro_batch {self.micro_batch}: no "
            "accumulation reaches the total batch": self.batch_size % batch > 0,
            f"a batch of {batch} is odd: mixup and cutmix pair its images": (
                self.mixes and batch % 2 == 1
            ),
            f"norm 'ghost' needs batch normalisation, and {self.model} has none": (
                is_ghost and not model_named(self.model).batch_norm
            ),
            f"ghost batch normalisation splits a batch of {batch} into virtual batches of "
            f"{self.ghost_batch}, which does not divide it": (
                is_ghost and batch % self.ghost_batch > 0
            ),
            f"the curriculum has rows for epochs {rows}; they must be 0, 1, 2, ... without a gap": (
                rows != list(range(len(rows)))
            ),
            "a curriculum sets randaug, mixup and cutmix per epoch: augmentations must have them": (
                bool(rows) and {*self.augmentations} != {"randaug", "mixup", "cutmix"}
            ),
        }

    def _unconnected(self) -> dict[str, bool]:
        """Name a field that has no effect without another, and two that exclude each other."""
        policies = [name for name in POLICIES if name in self.augmentations]
        return {
            f"{' and '.join(policies)} exclude each other": len(policies) > 1,
            "clip_mode says how to clip: state clip_grad": (
                self.clip_mode != "norm" and self.clip_grad is None
            ),
            "ema_evaluated is about the mean of weights: state ema_decay": (
                not self.ema_evaluated and not self.ema_decay
            ),
            "bce_threshold is of loss 'bce'": self.bce_threshold is not None and self.loss != "bce",
            f"loss 'bce' and adversarial loss {self.adversarial_loss!r} exclude each other": (
                self.loss == "bce" and self.adversarial_loss != "ce"
            ),
            "loss 'mart' needs one label an image: leave mixup and cutmix out": (
                self.mixes and self.adversarial_loss == "mart"
            ),
            "attacks as-published may start at the image itself, where the divergence of loss "
            "'trades' has no gradient: protocol must be 'corrected'": (
                self.protocol == "as-published" and self.adversarial_loss == "trades"
            ),
            f"epsilon_epochs are more than the {self.epochs} epochs of the training": bool(
                self.epochs and self.adversary and self.adversary.epsilon_epochs > self.epochs
            ),
            f"{len(self.train_sizes)} train_sizes are more than {self.epochs} epochs": (
                len(self.train_sizes) > self.epochs > 0
            ),
            f"cooldown of {self.cooldown_epochs} epochs leaves none of {self.epochs}": (
                self.epochs > 0 and self.cooldown_epochs >= self.epochs
            ),
            "init and warm_start are both about the first weights: leave one out": (
                bool(self.init and self.warm_start)
            ),
            "a training of 0 epochs has the weights of init, not of warm_start": (
                not self.epochs and self.warm_start is not None
            ),
            "reset_head is about first weights: state init or warm_start": (
                self.reset_head and not (self.init or self.warm_start)
            ),
        }

    @property
    def family(self) -> str:
        return model_named(self.model).family

    @property
    def size(self) -> str:
        return model_named(self.model).size

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that targets are soft."""
        return "mixup" in self.augmentations or "cutmix" in self.augmentations

    @property
    def input(self) -> Preprocessing:
        """The preprocessing; `pixel_range` half is a mean and std of 0.5 unless it states some."""
        stated = self.preprocessing
        as_data = self.pixel_range == "data" or stated.mean or stated.std
        return stated if as_data else stated | Preprocessing(mean=HALF, std=HALF)

    @property
    def forward_batch(self) -> int:
        """How many images pass the model at once."""
        return self.micro_batch or self.batch_size

    @property
    def accumulation(self) -> int:
        """How many forward batches make one optimizer step."""
        return self.batch_size // self.forward_batch

    @property
    def origin(self) -> str:
        """Where the first weights come from, briefly: 'best.pth (sha256 1a2b3c4d)', or ''."""
        if not self.init_sha256:
            return self.init
        return f"{self.init.rpartition('/')[2]} (sha256 {self.init_sha256[:8]})"

    @property
    def teacher(self) -> Recipe | None:
        """The recipe whose trained model this one learns from."""
        return self.distillation.teacher if self.distillation else None

    @property
    def prerequisites(self) -> tuple[Recipe, ...]:
        """The recipes that have to be trained before this one."""
        return tuple(filter(None, (self.teacher, self.warm_start)))

    @property
    def training(self) -> str:
        """'clean' or 'adversarial'."""
        return "adversarial" if self.adversary else "clean"

    @property
    def adversarial_loss(self) -> str:
        """The adversary's loss; 'ce' without one as well."""
        return self.adversary.loss if self.adversary else "ce"

    def curriculum_row(self, epoch: int) -> CurriculumRow | None:
        """Return the row of an epoch (from 0), or None without a curriculum.

        Epoch e of E uses the row of epoch floor(e * curriculum_epochs / E); the last row holds on.
        """
        if not self.curriculum:
            return None
        written_for = epoch * self.curriculum_epochs // self.epochs
        return self.curriculum[min(written_for, len(self.curriculum) - 1)]

    def train_size(self, epoch: int) -> int | None:
        """Return the side of the images of an epoch (from 0), None for the data's."""
        if not self.train_sizes:
            return None
        return self.train_sizes[epoch * len(self.train_sizes) // self.epochs]

    def with_seed(self, seed: int) -> Recipe:
        """Return this recipe, and those that it needs, with another seed."""
        return self.with_prerequisites(lambda recipe: recipe.with_seed(seed)).replace(seed=seed)

    def with_prerequisites(self, change: Callable[[Recipe], Recipe]) -> Recipe:
        """Return this recipe with its teacher and its warm start changed."""
        changes: dict[str, Any] = {}
        if self.distillation:
            teacher = change(self.distillation.teacher)
            changes["distillation"] = self.distillation.model_copy(update={"teacher": teacher})
        if self.warm_start:
            changes["warm_start"] = change(self.warm_start)
        return self.replace(**changes) if changes else self

    def replace(self, **changes: Any) -> Self:
        """Return this recipe with some fields changed, validated again."""
        fields = {name: getattr(self, name) for name in Recipe.model_fields}
        return type(self).model_validate(fields | changes)

    def effective(self) -> dict[str, Any]:
        """Return the fields that can change the weights, as JSON values."""
        fields = self.model_dump(mode="json")
        chosen = self.preprocessing.model_dump(mode="json", exclude_none=True)
        fields["preprocessing"] = chosen
        self._by_digest(fields)
        if not self.epochs:
            fields = {name: fields[name] for name in OF_CHECKPOINT}
        by_row, randaug = bool(self.curriculum), "randaug" in self.augmentations
        inert = {
            **{name: getattr(self, name) == default for name, default in BEYOND_STUDY.items()},
            "randaug_magnitude": not randaug or by_row,
            "mixup_alpha": "mixup" not in self.augmentations,
            "cutmix_alpha": "cutmix" not in self.augmentations or by_row,
            "mix_probability": not self.mixes or by_row,
            "switch_probability": not {"mixup", "cutmix"} <= set(self.augmentations) or by_row,
            "warmup_rate": self.warmup_epochs == 0,
            "floor_rate": self.scheduler in ("step", "multistep", "constant"),
            "ghost_batch": self.norm != "ghost",
            "curriculum_epochs": not by_row,
            "randaug_layers": not randaug or self.randaug_layers == 2,
            "randaug_std": not randaug or self.randaug_std == 0.5,
            "init": not self.init or bool(self.init_sha256),
            "init_sha256": not self.init_sha256,
            "preprocessing": not self.preprocessing.chosen(),
        }
        return {name: value for name, value in fields.items() if not inert.get(name, False)}

    def _by_digest(self, fields: dict[str, Any]) -> None:
        """Put digests in the place of other trials' recipes, and drop an adversary's inert fields.

        fields: dumped ones.
        """
        for name in self.adversary.inert if self.adversary else ():
            fields["adversary"].pop(name, None)
        if self.distillation:
            fields["distillation"]["teacher"] = self.distillation.teacher.digest()
        if self.warm_start:
            fields["warm_start"] = self.warm_start.digest()

    def digest(self) -> str:
        """Return the trial's identity: 12 hex digits of canonical JSON.

        It covers the effective fields that differ from their defaults, so that a new field with a
        default changes no digest.
        """
        changed = self.model_dump(mode="json", exclude_defaults=True)
        self._by_digest(changed)
        identity = {name: changed[name] for name in self.effective() if name in changed}
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Name the recipe as a person would, e.g. 'resnet50 relu sgd step none 16ep seed0'.

        Fields that the study does not vary are named where they have an effect and are short.
        """
        origin = f"of {self.origin}" if self.init else ""
        if not self.epochs:
            return f"{self.model} {'as published' if self.init == self.model else origin}"
        extras = [
            self.adversary.describe() if self.adversary else "",
            "curriculum" if self.curriculum else "",
            "ghost" if self.norm == "ghost" else "",
            f"teacher={self.teacher.model}" if self.teacher else "",
            f"after={self.warm_start.digest()}" if self.warm_start else "",
            "as-published" if self.protocol == "as-published" else "",
            self.precision if self.precision != "float32" else "",
            *(word for word in self._beyond_study() if len(word) <= LONGEST_WORD),
        ]
        start = [self.model, origin, self.activation, self.optimizer, self.scheduler]
        parts = [*start, format_augmentations(self.augmentations), *extras]
        return " ".join([*filter(None, parts), f"{self.epochs}ep seed{self.seed}"])

    def _beyond_study(self) -> Iterator[str]:
        """Yield the fields beyond the study that have an effect, as axes: 'drop_path=0.1'."""
        for name, default in BEYOND_STUDY.items():
            value = getattr(self, name)
            if value == default or name == "warm_start":
                continue
            parts = {name: value}
            if isinstance(value, dict):
                parts = {f"{name}.{key}": part for key, part in value.items()}
            texts = {
                a: ",".join(map(str, v)) if isinstance(v, tuple) else v for a, v in parts.items()
            }
            yield " ".join(f"{axis}={text}" for axis, text in texts.items())


# The fields that the study does not vary, and their defaults, with which they have no effect.
BEYOND_STUDY = {
    name: Recipe.model_fields[name].get_default(call_default_factory=True)
    for name in (
        *("model_args", "drop_path", "dropout", "optimizer_args", "layer_decay"),
        *("clip_grad", "clip_mode", "ema_decay", "ema_evaluated", "lookahead"),
        *("scheduler_args", "warmup_prefix", "cooldown_epochs", "color_jitter"),
        *("erasing", "repeats", "flip"),
        *("least_crop", "train_sizes", "loss", "bce_threshold", "warm_start", "reset_head"),
    )
}


def check_team(recipe: Recipe, size: int) -> None:
    """Raise ValueError where a recipe's batches do not divide among `size` workers."""
    parts, name = recipe.forward_batch, f"forward batch of {recipe.forward_batch}"
    if recipe.norm == "ghost":
        parts //= recipe.ghost_batch
        name = f"{parts} ghost batches of {recipe.ghost_batch}"
    if parts % size:
        allowed = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
        said = f"{recipe.describe()}: its {name} cannot be shared by {size} workers"
        raise ValueError(f"{said}; their number must be one of {allowed}")
