"""The options of the commands: declared as typed fields, read by pydantic-settings."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self
from urllib.parse import quote, unquote

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliVariadicArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from trainables.data.listing import GIBIBYTE, DataSource
from trainables.data.registry import STORED_SETS
from trainables.recipe import unknown

HELP_ALL = "--help-all"
Count = Annotated[int, Field(ge=1)]
# Several words after one option, with spaces or commas between them.
Split = BeforeValidator(lambda words: words.split(",") if isinstance(words, str) else words)
# The same, with spaces only: pydantic-settings joins by commas what `verbatim` has quoted.
Verbatim = BeforeValidator(
    lambda words: [unquote(word) for word in words.split(",")] if isinstance(words, str) else words
)


def option(
    default: Any,
    description: str,
    metavar: str = "",
    *,
    verbatim: bool = False,
    advanced: bool = False,
    **bounds: Any,
) -> Any:
    """Declare an option: its default (... for none), what it does, and what its value is called.

    verbatim: its words may hold commas and quotes. advanced: only --help-all shows it.
    """
    shown: dict[str, Any] = {"metavar": metavar or None, "verbatim": verbatim, "advanced": advanced}
    return Field(default, description=description, json_schema_extra=shown, **bounds)


class Options(BaseSettings):
    """A command's options, from its words alone: the environment sets none.

    Each class that adds fields is a group of the help, under the first line of its docstring.
    """

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_enforce_required=True,
        validate_default=False,
    )
    prog: ClassVar[str]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def read(cls, words: Sequence[str] | None) -> Self:
        """Read the words; wrong ones end the command with exit code 2 and say what is right."""
        usage = f"{cls.prog} [options]"
        parser = _Parser(prog=cls.prog, usage=usage, description=cls.__doc__, allow_abbrev=False)
        arguments = list(sys.argv[1:] if words is None else words)
        source = cls.add_to(parser, advanced=HELP_ALL in arguments)
        try:
            return CliApp.run(cls, cli_args=arguments, cli_settings_source=source)
        except (ValidationError, SettingsError) as error:
            parser.error(_in_plain_words(error))

    @classmethod
    def add_to(
        cls, parser: argparse.ArgumentParser, *, advanced: bool = True
    ) -> CliSettingsSource[argparse.ArgumentParser]:
        """Add the options to a parser, in their groups; the help may leave out the advanced."""
        owners = {
            name: owner
            for owner in reversed(cls.__mro__)
            if issubclass(owner, Options)
            for name in inspect.get_annotations(owner)
        }
        groups: dict[type, Any] = {}
        for owner in dict.fromkeys(reversed(owners.values())):
            title = str(owner.__doc__).splitlines()[0].rstrip(".").lower()
            groups[owner] = parser if owner is cls else parser.add_argument_group(title)

        def add(_: Any, *flags: str, **settings: Any) -> None:
            name = settings["dest"]
            field = cls.model_fields[name]
            extra: Any = field.json_schema_extra
            if extra["metavar"]:
                settings["metavar"] = extra["metavar"]
            if extra["verbatim"]:
                settings["type"] = quote
            if settings.get("nargs") == "*":
                settings["action"] = "extend"
            text = f"{field.description}{_default_text(field.default)}".replace("%", "%%")
            settings["help"] = text if advanced or not extra["advanced"] else argparse.SUPPRESS
            groups[owners[name]].add_argument(*flags, **settings)

        extras: Any = [field.json_schema_extra for field in cls.model_fields.values()]
        if any(extra["advanced"] for extra in extras):
            parser.add_argument(HELP_ALL, action="help", help="show every option and exit")

        return CliSettingsSource(cls, root_parser=parser, add_argument_method=add)


def _default_text(default: Any) -> str:
    if default in (None, False, ()) or default is PydanticUndefined:
        return ""
    values = default if isinstance(default, tuple) else (default,)
    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f" (default: {' '.join(words)})"


class _Parser(argparse.ArgumentParser):
    """Names the nearest option beside one that is not known."""

    def error(self, message: str) -> NoReturn:
        known = re.findall(r"--[a-z][\w.-]*", self.format_help())
        for word in re.findall(r"(?<!\S)--[^\s=]+", message.partition("unrecognized")[2]):
            if near := difflib.get_close_matches(word, known, n=1):
                message += f". Did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: {message}\n")


def _in_plain_words(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    first = error.errors()[0]
    name = str(first["loc"][0]).replace("_", "-") if first["loc"] else ""
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"--{name}: {said}" if name else said
    return f"--{name} {first['input']!r}: {said[0].lower()}{said[1:]}"


def without_password(text: str) -> str:
    """Return a path or URI; ValueError where it holds a password that would end up in logs."""
    if re.search(r"://[^@]*:[^@]*@", text):
        raise ValueError(
            f"a password in a {text.partition(':')[0]} URI is shown to whoever lists processes or "
            "reads logs; it belongs in the environment: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return text


Address = Annotated[str, BeforeValidator(without_password)]


class DataOptions(Options):
    """Data."""

    data: Path | None = option(None, "train/ and val/ (or test/), class folders below", "DIR")
    image_size: Count | None = option(None, "side in pixels, for --scale folder", "N")
    hold_out: float = option(
        0.0,
        "judge by this share of each class's train images where there is no val/ or test/",
        "SHARE",
        ge=0,
        lt=1,
        advanced=True,
    )
    stored: CliVariadicArg[Annotated[tuple[str, ...], NoDecode, Split]] = option(
        (),
        f"where further sets lie (default: NAME/ below the data): {', '.join(STORED_SETS)}",
        "NAME=DIR",
        advanced=True,
    )
    download: bool = option(False, "fetch CIFAR-10's archive where it is not there")
    data_workers: int = option(
        0,
        "processes that decode and augment for each trial; 0: the trial's own",
        "N",
        ge=0,
        advanced=True,
    )
    data_memory: float = option(
        2.0,
        "what decoded images may take, once per machine; those of an exact size, like CIFAR-10's, "
        "are in memory in any case",
        "GIB",
        ge=0,
        lt=2**20,
        advanced=True,
    )

    @field_validator("stored")
    @classmethod
    def _names_a_set(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            name, equals, _ = word.partition("=")
            if not equals:
                raise ValueError(f"{word!r} is not NAME=DIR, like textures=/data/textures")
            if name not in STORED_SETS:
                raise ValueError(unknown("set", name, STORED_SETS))
        return words

    def source(self, *, cache: Path | None = None) -> DataSource:
        """Return the data source that is named; ValueError on a folder that is not there."""
        folders = {name: Path(path) for name, _, path in (w.partition("=") for w in self.stored)}
        for name, path in folders.items():
            if not os.path.isdir(path):  # noqa: PTH112 - it is False, too, where a name is too long
                title = STORED_SETS[name].title
                raise ValueError(f"--stored {name}={path} is not a folder: it wants {title}")
        return DataSource(
            root=self.data.absolute() if self.data else None,
            stored=tuple((name, path.absolute()) for name, path in folders.items()),
            hold_out=self.hold_out,
            memory_bytes=int(self.data_memory * GIBIBYTE),
            workers=self.data_workers,
            download=self.download,
            cache=cache.absolute() if cache else None,
        )


def fraction(text: str, kind: str, example: str) -> Fraction:
    """Read a number above 0 and at most 1, such as 4/255, 0.25/255 or 0.025; ValueError."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = _exact(numerator) / (_exact(denominator) if slash else 1)
    except (ValueError, ArithmeticError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} is no {kind}: above 0 and at most 1, like {example}")
    return value


def _exact(text: str) -> Fraction:
    # The exact fraction of 1e-999999999 would take hours.
    return Fraction(float(text) if "e" in text.lower() else Decimal(text))
