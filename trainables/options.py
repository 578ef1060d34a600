"""What the commands share of their options: those of the data, and how a value is read."""

from __future__ import annotations

import argparse
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from trainables.data.listing import GIBIBYTE, DataSource
from trainables.data.registry import STORED_SETS


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the data lies and how it is read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="train/ and val/ (or test/), class folders below"
    )
    group.add_argument(
        "--image-size", type=count, metavar="N", help="side in pixels, for --scale folder"
    )
    group.add_argument(
        "--hold-out",
        type=_share,
        default=0.0,
        metavar="F",
        help="judge by this share of each class's train images where there is no val/ or test/",
    )
    for name, stored in STORED_SETS.items():
        group.add_argument(
            f"--{name}",
            type=Path,
            dest=f"stored {name}",
            metavar="DIR",
            help=f"{stored.title}: {stored.layout} (default: {name}/ below the data)",
        )
    group.add_argument(
        "--download", action="store_true", help="fetch CIFAR-10's archive where it is not there"
    )
    group.add_argument(
        "--skip-damaged", action="store_true", help="go on without unreadable images"
    )
    group.add_argument(
        "--data-workers",
        type=count_or_none,
        default=0,
        metavar="N",
        help="processes that decode and augment for each trial (default: 0, its own)",
    )
    group.add_argument(
        "--data-memory",
        type=_bytes,
        default=2 * GIBIBYTE,
        metavar="GIB",
        help="what decoded images may take, once per machine (default: 2); those of an exact "
        "size, like CIFAR-10's, are in memory in any case",
    )


def uri_without_password(text: str) -> str:
    """Take a path or URI as an argument, unless a password in it would end up in logs."""
    if re.search(r"://[^@]*:[^@]*@", text):
        raise argparse.ArgumentTypeError(
            f"a password in a {text.partition(':')[0]} URI is shown to whoever lists processes or "
            "reads logs; it belongs in the environment: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return text


def source_of(options: argparse.Namespace, *, cache: Path | None = None) -> DataSource:
    """Return the data source that the options name; ValueError on a folder that is not there."""
    paths = {name: getattr(options, f"stored {name}") for name in STORED_SETS}
    stored = tuple((name, path.absolute()) for name, path in paths.items() if path is not None)
    for name, path in stored:
        if not os.path.isdir(path):  # noqa: PTH112 - it is False, too, where a name is too long
            raise ValueError(f"--{name} {path} is not a folder: it wants {STORED_SETS[name].title}")
    return DataSource(
        root=options.data.absolute() if options.data else None,
        stored=stored,
        hold_out=options.hold_out,
        skip_damaged=options.skip_damaged,
        memory_bytes=options.data_memory,
        workers=options.data_workers,
        download=options.download,
        cache=cache.absolute() if cache else None,
    )


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    return _whole(text, least=1)


def count_or_none(text: str) -> int:
    """Read a whole number of at least 0."""
    return _whole(text, least=0)


def amount(text: str) -> float:
    """Read a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def fraction(text: str, what: str, example: str) -> Fraction:
    """Read a number above 0 and at most 1, such as 4/255, 0.25/255 or 0.025."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = _exact(numerator) / (_exact(denominator) if slash else 1)
    except (ValueError, ArithmeticError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {what}: above 0 and at most 1, like {example}"
        )
    return value


def _exact(text: str) -> Fraction:
    # The exact fraction of 1e-999999999 would take hours.
    return Fraction(float(text) if "e" in text.lower() else Decimal(text))


def _whole(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _share(text: str) -> float:
    value = amount(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, like 0.2")
    return value


def _bytes(text: str) -> int:
    gibibytes = amount(text)
    if gibibytes >= 2**20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gibibytes")
    return int(gibibytes * GIBIBYTE)
