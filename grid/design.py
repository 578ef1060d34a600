"""The design of a run: how many images each claim's cells get, by what is known of its models."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import PositiveInt, TypeAdapter

from evaluators import answering, column_named, evaluator_named, evaluator_of
from grid.options import RunOptions
from grid.plan import Plan, format_seconds
from grid.power import STEP, Design, Goal, Noise
from grid.study import Study
from grid.table import Claim, Row, trainings_compared
from trainables.scale import Scale
from trainables.store.results import DATABASE
from trainables.store.storage import write_atomically

DESIGNS = TypeAdapter(dict[str, dict[str, PositiveInt]])
FILE = "design.json"  # in the results: images by cell, of every design that was run
Cell = tuple[str, str]  # a trial's digest, and an evaluator
ASSUMED_OF_ERRORS = Noise(discordance=0.02, binary=False)  # of means over many answers an image


@dataclass(frozen=True)
class Designed:
    """A study's goal, and by claim its design and the cells that it is about."""

    goal: Goal
    designs: tuple[tuple[Design, frozenset[Cell]], ...]


def with_design(
    options: RunOptions, study: Study, plan: Plan, scale: Scale, held_out: int
) -> tuple[Plan, Designed | None]:
    """Return a plan whose cells draw the images that the claims about them need, and the design.

    The results remember each design that was run, so that the same command again asks the same, and
    none judges fewer images than one before. The design is None where it is remembered, but for
    --plan, and where no difference is asked for. held_out: so many images there are. ValueError
    where a difference is asked for, and the plan has no claim that images decide.
    """
    claims = _cells_by_claim(study, plan, scale)
    if options.detect and not claims:
        has = "none that these trials and evaluators decide" if study.claims else "none"
        raise ValueError(
            f"--detect says what a study's claims are to tell, and study {study.name!r} has {has}"
        )
    if not scale.detect or not claims:
        return plan, None
    path, goal = options.results / FILE, Goal.of_claims(scale.detect, options.power, len(claims))
    known = _designs_of(path)
    question = repr((goal, sorted(sorted(cells) for cells in claims.values())))
    key, design = hashlib.sha256(question.encode()).hexdigest()[:12], None
    if options.plan or key not in known:
        design = _designed(options, study, plan, scale, goal, held_out)
    if design and key not in known:
        known[key] = _images_by_cell(design)
        if not options.plan:
            write_atomically(path, json.dumps(known, indent=1).encode())
    images: dict[str, dict[str, int]] = defaultdict(dict)
    for cell in known[key]:
        digest, _, evaluator = cell.partition(" ")
        images[digest][evaluator] = max(counts.get(cell, 0) for counts in known.values())
    trials = tuple(replace(trial, images=images[trial.digest]) for trial in plan)
    return replace(plan, trials=trials), design


def _designs_of(path: Path) -> dict[str, dict[str, int]]:
    """Return the designs that results remember, by key; ValueError where their file is damaged."""
    try:
        return DESIGNS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(
            f"{path} is damaged: remove it, and cells are designed anew and judged again"
        ) from None


def _cells_by_claim(study: Study, plan: Plan, scale: Scale) -> dict[Claim, frozenset[Cell]]:
    """Return the cells that decide each claim, of those that a plan judges."""
    rows = {(table.name, row.label): row for table in plan.tables for row in table.rows}
    judged = {(trial.digest, name) for trial in plan for name in trial.evaluators}
    claims = {}
    for claim in (c for c in study.claims if c.column and c.places <= rows.keys()):
        evaluator = answering(evaluator_of(claim.column), scale)
        several = [rows[place] for place in claim.places]
        seeds = trainings_compared(several)
        cells = {(digest, evaluator) for row in several for digest in row.digests[:seeds]}
        if cells <= judged:
            claims[claim] = frozenset(cells)
    return claims


def _designed(
    options: RunOptions, study: Study, plan: Plan, scale: Scale, goal: Goal, held_out: int
) -> Designed:
    """Design every claim by what was measured of its models, or is assumed."""
    rows = {(table.name, row.label): row for table in plan.tables for row in table.rows}
    measured, designs = _measured(options, study, plan, scale), []
    for claim, cells in _cells_by_claim(study, plan, scale).items():
        noise = ASSUMED_OF_ERRORS if column_named(claim.column).error else Noise()
        noise = noise.updated(measured.get(claim.says))
        evaluator = evaluator_named(answering(evaluator_of(claim.column), scale), scale)
        draws = evaluator.subset_size is not None
        available = held_out if draws else evaluator.asked_about(held_out)
        design = goal.design(claim, _trainings(claim, rows), noise, available, every=not draws)
        designs.append((design, cells))
    return Designed(goal, tuple(designs))


def _images_by_cell(design: Designed) -> dict[str, int]:
    """Return the most images that a claim about a cell gets, by 'digest evaluator'."""
    images: dict[str, int] = {}
    for claim, cells in design.designs:
        for cell in map(" ".join, cells):
            images[cell] = max(claim.images, images.get(cell, 0))
    return images


def described(
    design: Designed, seconds: Mapping[Cell, float], *, briefly: bool = False
) -> Iterator[str]:
    """Say of every claim what it gets, what that tells, what it needs and what judging it takes.

    seconds: of each cell; none: not known. briefly: in one line for all.
    """
    goal = design.goal
    heading = (
        f"To tell {100 * goal.difference:g} points with power {goal.power:g}, each of "
        f"{len(design.designs)} claims at level {goal.alpha:.2g} (0.05 over all, as Holm corrects)"
    )
    if briefly:
        count = sum(claim.detectable <= goal.difference + STEP / 2 for claim, _ in design.designs)
        detect = f"--detect {100 * goal.difference:g}points"
        yield f"{heading}: {count} can; {detect} says what others need"
        return
    yield f"{heading}:"
    for claim, cells in design.designs:
        spent = sum(seconds.get(cell, 0.0) for cell in cells)
        takes = f", {format_seconds(spent)} to judge" if spent >= 1 else ""
        yield (
            f"{claim.images:>7} images tell {100 * claim.detectable:4.1f} points, "
            f"needs {_needs(claim)}{takes}: {claim.claim.says}"
        )


def _needs(design: Design) -> str:
    """Say how many images and trainings of each side decide a claim, and from what that follows."""
    noise, several = design.noise, max(design.trainings, default=1)
    origin = f"measured on {noise.images}" if noise.images else "assumed"
    assumed = f"discordance {noise.discordance:.2f}, {origin}"
    if several == 1:
        return f"{design.needed} in this one training ({assumed})"
    spread = f"{assumed}; spread {100 * noise.spread:.1f} points"
    if design.claim.also:
        return f"{design.needed or 'more pairs, not images,'} by {several} pairs ({spread})"
    if design.needed_trainings:
        return f"{design.needed_trainings} trainings a side, not {several} ({spread})"
    return f"{design.needed or 'more'} by {several} trainings a side ({spread})"


def _trainings(claim: Claim, rows: Mapping[tuple[str, str], Row]) -> list[int]:
    """Return how often each side is trained; several pairs count as trainings of one side."""
    if claim.also:
        return [len(claim.pairs)]
    sides = [rows[place] for place in claim.pairs[0] if any(place)]
    seeds = trainings_compared(sides)
    return [seeds if row.recipe.epochs else 1 for row in sides]


def _measured(options: RunOptions, study: Study, plan: Plan, scale: Scale) -> dict[str, Noise]:
    """Return what claims' models were found to vary by, where the results hold them judged."""
    if not options.mlflow and not (options.results / DATABASE).exists():
        return {}
    from grid.report.claims import judge_claims
    from grid.report.tables import tables_of
    from grid.report.verdicts import Verdicts
    from grid.status import open_existing

    with suppress(ValueError):  # no server answers: nothing is known
        tracker = open_existing(options.results, options.mlflow, scale)
        runs = tracker.trials()
        tables = tables_of(study, plan, runs)
        judged = judge_claims(study.claims, tables, Verdicts(tracker, runs))
        return {
            judgement.claim.says: Noise(pair.discordance, pair.spread, pair.n, not column.error)
            for judgement in judged
            if (pair := judgement.paired) and judgement.claim.of != ("", "")
            for column in [column_named(judgement.claim.column)]
        }
    return {}
