"""The options of the commands: typed fields, checked by pydantic and read by argparse."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from trainables.data.listing import GIBIBYTE, DataSource
from trainables.data.registry import FOLDER, STORED_SETS
from trainables.recipe import (
    Interpolation,
    Preprocessing,
    Side,
    nearest,
    per_channel,
    problem,
    unknown,
)
from trainables.scale import Scale
from trainables.store.results import PROJECT

HELP_ALL = "--help-all"
Count = Annotated[int, Field(ge=1)]
Words = tuple[str, ...]  # after one option
Split = BeforeValidator(lambda words: [part for word in words for part in word.split(",")])
Names = Annotated[Words, Split]  # with spaces or commas between them
Numbers = tuple[float, ...]


def option(
    default: Any,
    description: str,
    metavar: str = "",
    *,
    also: str = "",
    advanced: bool = False,
    **bounds: Any,
) -> Any:
    """Declare an option: its default (... for none), what it does, and what its value is called.

    also: a second name of it. advanced: only --help-all shows it.
    """
    shown: dict[str, Any] = {"metavar": metavar or None, "also": also, "advanced": advanced}
    return Field(default, description=description, json_schema_extra=shown, **bounds)


rare = partial(option, advanced=True)


class Options(BaseModel):
    """A command's options; `groups` titles a part of the help by the first option in it."""

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
    )
    prog: ClassVar[str]
    groups: ClassVar[dict[str, str]] = {}

    @classmethod
    def read(cls, words: Sequence[str] | None, prog: str = "") -> Self:
        """Read the words; wrong ones end the command with exit code 2 and say what is right.

        prog: what the user calls the command.
        """
        arguments = list(sys.argv[1:] if words is None else words)
        parser = cls.parser(prog, advanced=HELP_ALL in arguments)
        values, others = parser.parse_known_args(arguments)
        if others:
            known = [f"--{field.alias}" for field in cls.model_fields.values()]
            word = next((word for word in others if word.startswith("--")), others[0])
            parser.error(f"unknown option {word!r}{nearest(word.partition('=')[0], known)}")
        try:
            return cls.model_validate(vars(values))
        except ValidationError as error:
            parser.error(problem(error, "--"))

    @classmethod
    def parser(cls, prog: str = "", *, advanced: bool = True) -> argparse.ArgumentParser:
        """Return the parser of the options; its help may leave out the advanced ones."""
        parser = argparse.ArgumentParser(
            prog=prog or cls.prog,
            usage=f"{prog or cls.prog} [options]",
            description=cls.__doc__,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        parser.add_argument(HELP_ALL, action="help", help="show every option and exit")
        for owner in cls.__mro__:
            group: argparse._ActionsContainer = parser
            for name in inspect.get_annotations(owner):
                if title := cls.groups.get(name):
                    group = parser.add_argument_group(title)
                if name in cls.model_fields:
                    _add(group, cls.model_fields[name], advanced=advanced)
        return parser


def _add(group: argparse._ActionsContainer, field: FieldInfo, *, advanced: bool) -> None:
    extra: Any = field.json_schema_extra
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if field.is_required() or not default else f" (default: {default})"
    settings: dict[str, Any] = {"metavar": extra["metavar"]}
    if field.annotation is bool:
        settings = {"action": "store_true"}
    elif get_origin(field.annotation) is tuple:
        settings |= {"nargs": "*", "action": "extend"}
    is_shown = advanced or not extra["advanced"]
    group.add_argument(
        *filter(None, (f"--{field.alias}", extra["also"])),
        dest=field.alias,
        required=field.is_required(),
        help=f"{field.description}{shown}" if is_shown else argparse.SUPPRESS,
        **settings,
    )


def again(*more: str) -> str:
    """Return the shell's words that run this command here again, whatever is on the PATH.

    more: options for it to have as well.
    """
    return shlex.join([sys.executable, *sys.orig_argv[1:], *more])


def as_typed() -> str:
    """Return the shell's words of this command as a page shows them, without any password."""
    script = Path(sys.argv[0])
    start = ["python", sys.argv[0]] if script.suffix == ".py" else [script.name]
    return re.sub(r"//[^/@\s]+@", "//", shlex.join([*start, *sys.argv[1:]]))


def installed(*words: str) -> str:
    """Return the shell's words that run the installed command, whatever is on the PATH."""
    script = Path(sys.executable).with_name(PROJECT)
    start = [str(script)] if script.exists() else [sys.executable, "-m", "grid.command"]
    return shlex.join([*start, *words])


def stop_on_signals() -> None:
    """Stop on SIGTERM and SIGHUP as on Ctrl-C; one that is ignored stays so (nohup).

    Python drops an interrupt that comes inside a finaliser: it comes again, by SIGALRM.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    else:
        sys.__unraisablehook__(dropped)


def without_password(text: str) -> str:
    """Return a path or URI; ValueError where it holds a password that would end up in logs."""
    if re.search(r"://[^@]*:[^@]*@", text):
        raise ValueError(
            f"a password in a {text.partition(':')[0]} URI is shown to whoever lists processes or "
            "reads logs; it belongs in the environment: AWS_SECRET_ACCESS_KEY for s3://, "
            "MLFLOW_TRACKING_PASSWORD for http://, PGPASSWORD (or ~/.pgpass) for postgresql://"
        )
    return text


Address = Annotated[str, BeforeValidator(without_password)]


def _stored_folders(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Read words NAME=DIR; ValueError on another set, and on a folder that is not there."""
    folders = [(name, path) for name, _, path in (word.partition("=") for word in words)]
    for name, path in folders:
        if name not in STORED_SETS:
            raise ValueError(unknown("set", name, STORED_SETS))
        if not os.path.isdir(path):  # noqa: PTH112 - it is False, too, where a name is too long
            title = STORED_SETS[name].title
            raise ValueError(f"{name}={path} is not a folder: NAME=DIR wants {title}")
    return [(name, Path(path).absolute()) for name, path in folders]


Folders = Annotated[tuple[tuple[str, Path], ...], BeforeValidator(_stored_folders), Split]


class DataOptions(Options):
    """Where the data are, and how they are read."""

    groups: ClassVar[dict[str, str]] = {"data": "data"}

    data: Path | None = option(
        None,
        "train/ and val/ (or test/) with class folders, one folder with --labels, tar shards of "
        "WebDataset, Parquet or Arrow tables of Hugging Face",
        "DIR",
    )
    stage_from: Address = rare(
        "",
        "fill --data from here, on the own disk of each node, before it reads: a folder that all "
        "nodes reach, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER",
        "URI",
    )
    labels: Path | None = option(
        None, "CSV of NAME,LABEL: of images, or of classes (WordNet ids, names or indices)", "FILE"
    )
    image_size: Side | None = option(
        None, "side in px (default: the model's own, or the data's)", "N", also="--input-size"
    )
    resize: Literal["crop", "squash"] | None = rare(
        None, "crop: cut the middle out; squash: shrink both sides (default: crop)", "HOW"
    )
    crop: Annotated[float, Field(gt=0, le=1)] | None = rare(
        None, "of --resize crop: the share of the shorter side (default: 224/256)", "SHARE"
    )
    interpolation: Interpolation | None = rare(
        None, f"{', '.join(get_args(Interpolation))} (default: bilinear)", "NAME"
    )
    mean: Annotated[Numbers, Split] = rare(
        (), "normalisation's mean, one or one a channel, in [0, 1] (default: the data's)", "MEAN"
    )
    std: Annotated[Numbers, Split] = rare(
        (), "the normalisation's deviation, as --mean", "DEVIATION"
    )
    hold_out: Annotated[float, Field(ge=0, le=1)] = rare(
        0.0, "share of the train images to judge by where there is no val/; 1: all", "SHARE"
    )
    stored: Folders = rare(
        (),
        f"where further sets lie (default: NAME/ below the data): {', '.join(STORED_SETS)}",
        "NAME=DIR",
    )
    download: bool = option(False, "fetch CIFAR-10's archive where it is not there")
    data_workers: Annotated[int, Field(ge=0)] | None = rare(
        None,
        "processes that decode and augment for each worker of a trial (default: one less than its "
        "cores, on GPUs its share of the node's; 0: its own)",
        "N",
    )
    data_memory: Annotated[float, Field(ge=0, lt=2**20)] = rare(
        2.0, "what decoded images may take, once per machine, beside those of an exact size", "GIB"
    )

    @field_validator("mean", "std")
    @classmethod
    def _one_a_channel(cls, numbers: Numbers, info: ValidationInfo) -> Numbers:
        return per_channel(str(info.field_name), numbers) if numbers else ()

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.stage_from and not self.data:
            raise ValueError("--stage-from fills a folder: give --data DIR, on a node's own disk")
        if self.crop is not None and self.resize == "squash":
            raise ValueError("--crop is a share that --resize crop cuts out: leave one out")
        return self

    def preprocessing(self) -> Preprocessing:
        """Return how the options bring images to a model; None where they leave it open."""
        return Preprocessing(
            size=self.image_size,
            crop=self.crop,
            squash=self.resize == "squash" if self.resize or self.crop else None,
            interpolation=self.interpolation,
            mean=self.mean or None,
            std=self.std or None,
        )

    def images_line(self, scale: Scale) -> str:
        """Say how a scale's images are brought to a model, and where their size is from."""
        data_set = scale.data_set
        line = f"Images of {scale.name}: {data_set.preprocessing}"
        if data_set.in_memory and (self.crop or self.resize):
            line += "; stored at one size, they are resized whole: --crop and --resize do nothing"
        if not (data_set.in_memory or data_set.squash or data_set.crop):
            line += ", crop 224/256"
        of_folder = self.data and scale.name.startswith(FOLDER)
        if of_folder and not self.image_size and data_set.image_size == data_set.stored_size:
            line += "; the size is the median of the shorter sides, at most 224 (--image-size N)"
        return line

    def source(self, *, cache: Path | None = None) -> DataSource:
        """Return the data source that is named."""
        return DataSource(
            root=self.data.absolute() if self.data else None,
            origin=self.stage_from,
            stored=self.stored,
            hold_out=self.hold_out,
            memory_bytes=int(self.data_memory * GIBIBYTE),
            workers=self.data_workers,
            download=self.download,
            labels=self.labels.absolute() if self.labels else None,
            cache=cache.absolute() if cache else None,
        )


def fraction(text: str, kind: str, example: str, *, most: float = 1) -> Fraction:
    """Read a number above 0 and at most `most`, such as 4/255 or 0.025; ValueError."""
    numerator, _, denominator = text.partition("/")
    try:
        value = Fraction(str(float(numerator))) / Fraction(str(float(denominator or 1)))
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= most:
        raise ValueError(f"{text!r} is no {kind}: above 0 and at most {most:g}, like {example}")
    return value
