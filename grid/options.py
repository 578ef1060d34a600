"""The options of `python grid/run.py`."""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from grid.axes import AXES, SETTABLE
from grid.plan import Sizes
from grid.space import BASE
from grid.study import DEFAULT, QUICK, STUDIES
from trainables.options import Address, Count, DataOptions, Names, Options, Words, option, rare
from trainables.recipe import unknown
from trainables.scale import scale_names
from trainables.watchdog import HUNG_SECONDS

MODES = ("plan", "check", "status", "report", "pull", "pack")
SIZES = ("minutes", "epochs", "train-images", "eval-images")  # of a quick look
LOCAL = "local"
NotNegative = Annotated[float, Field(ge=0)]
# Where `ray start` writes it.
TEMPORARY = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "/tmp")  # noqa: S108
STARTED_HERE = Path(TEMPORARY, "ray", "ray_current_cluster")
CONNECT_SECONDS = 2
POWER = 0.8
EVALUATOR_SHARE = 1 / 8


def _points(text: str) -> float:
    """Read a difference as '5points', or '5', as a share; ValueError."""
    stated = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:points?)?", text)
    if not stated or not 0 < float(stated[1]) < 100:
        raise ValueError(
            f"{text!r} is no difference like 5points, of more than 0 and less than 100"
        )
    return float(stated[1]) / 100


class PlaceOptions(Options):
    """Where the results are."""

    groups: ClassVar[dict[str, str]] = {"results": "places"}

    results: Path = option(
        Path("results"),
        "folder of all that a run makes, or GRID_RESULTS; nodes share it, or --storage",
        "DIR",
    )
    mlflow: Address | None = option(
        None, "MLflow server, or MLFLOW_TRACKING_URI (default: a database in the results)", "URI"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_environment(cls, values: dict[str, Any]) -> dict[str, Any]:
        named = {
            "results": "GRID_RESULTS",
            "mlflow": "MLFLOW_TRACKING_URI",
            "storage": "GRID_STORAGE",
        }
        there = {field: os.environ.get(name) for field, name in named.items()}
        return {f: text for f, text in there.items() if text and f in cls.model_fields} | values


class UiOptions(PlaceOptions):
    """Show the results in MLflow's pages, to this machine alone, until Ctrl-C."""

    prog: ClassVar[str] = "robustness-grid ui"

    port: int = option(5000, "port on 127.0.0.1", "N", ge=1, le=65535)


class RunOptions(PlaceOptions, DataOptions):
    """Train and judge the models of a study, and write its report.

    The same command again continues: finished trials and cells are skipped.
    """

    prog: ClassVar[str] = "python grid/run.py"
    groups: ClassVar[dict[str, str]] = {
        **DataOptions.groups,
        **PlaceOptions.groups,
        "minutes": "a quick look",
        "detect": "a design",
        "plan": "instead of a run",
        "storage": "cluster",
        "workers": "workers of each trial",
    }

    study: str = option(
        DEFAULT, f"{', '.join(STUDIES)}, or a .toml file (a quick look: {QUICK})", "NAME|FILE"
    )
    tables: Names = option((), "only these tables, e.g. T5 T7", "TABLE")
    evaluators: Names = option((), "only these evaluators, e.g. clean pgd", "NAME")
    only: Words = option(
        (), "only trials of these values or labels, e.g. family=resnet epochs=5,10", "AXIS=VALUE"
    )
    set: Words = option(
        (), "fields of every recipe, which make other trials, e.g. precision=bf16", "FIELD=VALUE"
    )
    seeds: Count | None = option(
        None,
        "train each recipe N times (default: the study's replicates; else what headline claims "
        "compare 3 or 7 times, but at imagenet, and all others once)",
        "N",
    )
    scale: str | None = option(
        None, f"{', '.join(scale_names())} (default: folder with --data DIR, or digits)", "NAME"
    )
    minutes: float | None = option(
        None,
        "choose the sizes below that are not stated so that a report is there in about so many "
        "minutes on this machine, as loaded as it is at the start",
        "M",
        ge=1,
    )
    epochs: Count | None = option(None, "in place of the study's 100, others in proportion", "N")
    train_images: Count | None = rare(None, "train by so many images, by class as in all", "N")
    eval_images: Count | None = option(None, "judge by so many of the held-out images", "N")
    detect: Annotated[float, BeforeValidator(_points)] | None = option(
        None,
        "the least difference that a study's claims are to tell, as 5points: each gets the images "
        "that it needs, and --plan says how many (default: 10points at digits, elsewhere none: "
        "the scale's numbers of images)",
        "POINTS",
    )
    power: Annotated[float, Field(gt=0, lt=1)] = rare(POWER, "of --detect: the chance", "P")
    exact: bool = rare(
        False,
        "run all of AutoAttack on every image, where the scale bounds what its last attacks, run "
        "on a random slice of the images, would break",
    )
    attacks_in: Literal["float32", "bf16"] = rare(
        "float32",
        "precision in which pgd and autoattack seek: bf16 is faster on GPUs, and their cells are "
        "others; what they find counts where float32 errs, too",
        "PRECISION",
    )
    plan: bool = option(False, "print trials, hours, disk and cost")
    check: bool = option(False, "look at data, disk, memory, device and a cluster's nodes")
    status: bool = option(False, "print how far the study is")
    watch: bool = rare(False, "with --status: print it again and again while the run goes on")
    report: bool = option(False, "write the report again")
    pull: Address | None = rare(
        None, "bring a cluster's study from its --storage into the results", "PLACE"
    )
    pack: Address | None = rare(
        None, "pack the class folders of --data into shards in a folder, s3:// or gs://", "PLACE"
    )
    all: bool = rare(False, "with --plan: print every trial as well")
    seconds_per_unit: NotNegative | None = rare(
        None,
        "with --plan: a worker's seconds for a unit of work, at digits a core's second, elsewhere "
        "an epoch of 10^9 multiply-accumulates an image (default: as finished trials took)",
        "X",
    )
    trials_at_once: Count | None = rare(
        None, "with --plan: trials side by side (default: as this machine has cores for)", "N"
    )
    dollars_per_gpu_hour: NotNegative | None = rare(None, "with --plan: price of a GPU-hour", "D")
    wait: Count = rare(
        600, "with --check: seconds to wait for the nodes that the cluster file promises", "SECONDS"
    )
    storage: Address | None = rare(
        None,
        "folder, s3:// or gs:// of trials' checkpoints, or GRID_STORAGE (default: the results)",
        "PLACE",
    )
    address: str | None = option(
        None,
        "Ray cluster HOST:PORT, or local (default: RAY_ADDRESS, that of `ray start`, or none)",
        "ADDRESS",
    )
    workers: Count = option(1, "worker processes per trial", "N")
    cpus_per_worker: Count = rare(1, "CPU cores per worker", "C")
    gpus_per_worker: NotNegative = option(
        0.0, "GPUs per worker; with 0.75 of each, evaluators judge beside trials", "G"
    )
    evaluator_share: Annotated[float, Field(ge=0, le=1)] = rare(
        EVALUATOR_SHARE,
        "of the GPUs, evaluators hold so many while trials wait; they borrow all that are free, "
        "and a trial larger than the share may have it, too",
        "SHARE",
    )
    numerics: Literal["exact", "fast"] | None = rare(
        None,
        "exact: a resumed training has the same bits; fast: TF32, fused attention, the fastest "
        "kernels (default: fast on GPUs, else exact)",
        "HOW",
    )
    compile: bool = rare(False, "train through torch.compile: faster on a GPU, with other bits")
    hung_after: Annotated[float, Field(gt=0)] = rare(
        HUNG_SECONDS, "restart a worker or evaluator that makes no step for so long", "SECONDS"
    )

    @model_validator(mode="before")
    @classmethod
    def _looks_quickly(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"study": QUICK} | values if values.keys() & set(SIZES) else values

    @model_validator(mode="after")
    def _has_one_mode(self) -> Self:
        chosen = [f"--{mode}" for mode in MODES if getattr(self, mode)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: give one")
        for name, mode in (
            *((name, "plan") for name in ("all", "seconds_per_unit", "trials_at_once")),
            *(("dollars_per_gpu_hour", "plan"), ("wait", "check"), ("power", "detect")),
            ("watch", "status"),
            ("pack", "data"),
        ):
            if name in self.model_fields_set and not getattr(self, mode):
                raise ValueError(f"--{name.replace('_', '-')} goes with --{mode}")
        return self

    @property
    def sizes(self) -> Sizes:
        """The sizes that are stated, of a quick look."""
        return Sizes(self.train_images or 0, self.eval_images or 0, self.epochs or 0)

    def values_by_axis(self) -> dict[str, tuple[str, ...]]:
        """Return the values that --only leaves of each axis; ValueError."""
        words = " ".join(self.only).split()
        known = (*AXES, BASE)
        return {axis: tuple(text.split(",")) for axis, text in _pairs("only", words, "axis", known)}

    def settings(self) -> dict[str, Any]:
        """Return the values that --set gives fields of every recipe; ValueError."""
        settings: dict[str, Any] = {}
        for field, value in _pairs("set", self.set, "field", SETTABLE):
            if field in settings:
                raise ValueError(f"--set has two values of {field}; leave one out")
            settings[field] = _as_in_a_study_file(value)
        return settings


def _pairs(
    option: str, words: Iterable[str], kind: str, known: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield the parts of words like NAME=VALUE; ValueError on one that is not, or names none."""
    for word in words:
        name, _, value = word.partition("=")
        if not value:
            raise ValueError(f"--{option} wants {kind.upper()}=VALUE, not {word!r}")
        if name.partition(".")[0] not in known:  # a dot leads into a field
            raise ValueError(f"--{option}: {unknown(kind, name, known)}")
        yield name, value


def _as_in_a_study_file(text: str) -> Any:
    """Read a value as a study file would have it, or as text where that is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def cluster_address(address: str | None) -> str | None:
    """Return the address of the Ray cluster to use, or None to start Ray on this machine alone.

    It is the one that is named, here or in RAY_ADDRESS, or the one that `ray start` joined here.
    ValueError where the named one does not answer.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address == LOCAL:
        return None
    if not address:
        # Whoever else may write in /tmp could name a cluster of theirs, which runs what it likes.
        trusted = STARTED_HERE.exists() and STARTED_HERE.stat().st_uid in (0, os.getuid())
        joined = STARTED_HERE.read_text().strip() if trusted else ""
        return joined if _answers(joined) else None
    if not _answers(address):
        raise ValueError(
            f"no Ray cluster answers at {address}; it wants HOST:PORT, as 10.0.0.5:6379"
        )
    return address


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            return bool(host)
    except (OSError, OverflowError, ValueError):  # nobody there; a port or a host that cannot be
        return False
