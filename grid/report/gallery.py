"""The gallery: example images as models were shown them, with what each model said."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from grid.plan import Plan, Trial
from grid.report.verdicts import Verdicts
from trainables.data.listing import WORDNET_ID

CLEAN, ATTACKED, CONFLICT = "clean", "PGD-100", "cue conflict"
# heading -> the evaluator and the question whose images are shown
SHOWN = {
    CLEAN: ("clean", "clean"),
    ATTACKED: ("pgd", "pgd-100"),
    "patched": ("tpa", "tpa"),
    "noise": ("corruptions", "gaussian_noise-3"),
    "blur": ("corruptions", "defocus_blur-3"),
    "fog": ("corruptions", "fog-3"),
    CONFLICT: ("stylized", "stylized"),
}
MODELS = 4
MIDDLE = 128


@dataclass(frozen=True)
class Shot:
    """An image as a data URI, what it is and, where a model was asked, what it said."""

    title: str
    source: str
    said: str = ""
    right: bool = True


@dataclass(frozen=True)
class Strip:
    """One model's shots of one image."""

    model: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Example:
    """One held-out image, the name of the class it shows, and a strip per model."""

    image_id: str
    name: str
    strips: tuple[Strip, ...]


Rows = Mapping[str, Mapping[str, Any]]  # heading -> the ledger's row


def gallery(plan: Plan, verdicts: Verdicts, classes: Sequence[str]) -> list[Example]:
    """Return the examples that the ledgers of a few unlike models hold.

    classes: their names by label.
    """
    names = _Names(enumerate(_readable(classes)))
    images_by_model = {t.name: _kept(t, verdicts) for t in _unlike(plan, verdicts)}
    labels = {
        image_id: rows[CLEAN]["label"]
        for images in images_by_model.values()
        for image_id, rows in images.items()
        if CLEAN in rows
    }
    return [
        Example(
            image_id,
            names[label],
            tuple(
                Strip(model, tuple(_shots(rows[image_id], names)))
                for model, rows in images_by_model.items()
                if image_id in rows
            ),
        )
        for image_id, label in sorted(labels.items())
    ]


class _Names(dict[int, str]):
    """Classes' names by label; a class without one goes by its label."""

    def __missing__(self, label: int) -> str:
        return str(label)


def _readable(classes: Sequence[str]) -> list[str]:
    """Say in words what WordNet ids stand for; other names are left as they are."""
    if not classes or not all(map(WORDNET_ID.fullmatch, classes)):
        return list(classes)
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return [info.label_name_to_description(name).partition(",")[0] for name in classes]


def _unlike(plan: Plan, verdicts: Verdicts) -> list[Trial]:
    """Choose of each family, trained cleanly or adversarially, the trial asked the most."""
    best: dict[tuple[bool, str], tuple[int, Trial]] = {}
    evaluators = {evaluator for evaluator, _ in SHOWN.values()}
    for trial in plan:
        judged = sum(verdicts.is_judged(trial.digest, name) for name in evaluators)
        kind = (trial.recipe.adversary is not None, trial.recipe.family)
        if judged > best.get(kind, (0, trial))[0]:
            best[kind] = (judged, trial)
    return [trial for _, (_, trial) in sorted(best.items(), key=lambda item: item[0])][:MODELS]


def _kept(trial: Trial, verdicts: Verdicts) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the rows that hold an image, by image and heading."""
    rows_by_image: dict[str, dict[str, Mapping[str, Any]]] = {}
    for heading, (evaluator, question) in SHOWN.items():
        ledger = verdicts.ledger(trial.digest, evaluator)
        if ledger is None or "image" not in ledger.column_names:
            continue
        wanted = pc.and_(pc.equal(ledger["question"], question), pc.is_valid(ledger["image"]))
        for row in ledger.filter(wanted).to_pylist():
            rows_by_image.setdefault(row["image_id"], {})[heading] = row
    return rows_by_image


def _shots(rows: Rows, names: Mapping[int, str]) -> Iterator[Shot]:
    for heading, row in rows.items():
        title = heading
        if heading == CONFLICT:
            title += f" (texture {names[int(row['stage'].partition(':')[2])]})"
        right = row["predicted"] == row["label"]
        yield Shot(title, _data_uri(row["image"]), names[row["predicted"]], right)
        if heading == ATTACKED and CLEAN in rows:
            yield _perturbation(rows[CLEAN]["image"], row["image"])


def _perturbation(clean: bytes, attacked: bytes) -> Shot:
    """Show what the attack added, grey where nothing, magnified to the full range."""
    before, after = (
        np.asarray(Image.open(io.BytesIO(png)), dtype=int) for png in (clean, attacked)
    )
    factor = MIDDLE // max(1, int(np.abs(after - before).max()))
    shown = np.clip(MIDDLE + factor * (after - before), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, "png")
    return Shot(f"added, x {factor}", _data_uri(buffer.getvalue()))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
