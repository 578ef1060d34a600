"""The design of a run: how many images each claim's cells get, by what is known of its models."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pydantic import PositiveInt, TypeAdapter

from evaluators import DRAWING, answering, column_named, evaluator_of, images_of_score
from grid.options import RunOptions
from grid.plan import Plan, format_seconds
from grid.power import STEP, Design, Goal, Noise
from grid.study import Study
from grid.table import Claim, trainings_compared
from trainables.scale import Scale
from trainables.store.results import DATABASE, DESIGNED
from trainables.store.storage import below, read_file, write_file

if TYPE_CHECKING:
    from trainables.store.tracking import Tracker

DESIGNS = TypeAdapter(dict[str, dict[str, PositiveInt]])
Cell = tuple[str, str]  # a trial's digest, and an evaluator
ASSUMED_OF_ERRORS = Noise(discordance=0.02, binary=False)  # of means over many answers an image


@dataclass(frozen=True)
class Designed:
    """A study's goal, and by claim its design and the cells that it is about."""

    goal: Goal
    designs: tuple[tuple[Design, frozenset[Cell]], ...]

    def described(self, seconds: Mapping[Cell, float], *, briefly: bool = False) -> Iterator[str]:
        """Say of every claim what it gets, what that tells, what it needs and what judging takes.

        seconds: of each cell; none: not known. briefly: in one line for all.
        """
        goal, count = self.goal, len(self.designs)
        heading = (
            f"To tell {100 * goal.difference:g} points with power {goal.power:g}, each of "
            f"{count} claims at level {goal.alpha:.2g} (0.05 over all, as Holm corrects)"
        )
        if briefly:
            count = sum(claim.detectable <= goal.difference + STEP / 2 for claim, _ in self.designs)
            detect = f"--detect {100 * goal.difference:g}points"
            yield f"{heading}: {count} can; {detect} says what others need"
            return
        yield f"{heading}:"
        for claim, cells in self.designs:
            spent = sum(seconds.get(cell, 0.0) for cell in cells)
            takes = f", {format_seconds(spent)} to judge" if spent >= 1 else ""
            yield (
                f"{claim.images:>7} images tell {100 * claim.detectable:4.1f} points, "
                f"needs {_needs(claim)}{takes}: {claim.claim.says}"
            )


def with_design(
    options: RunOptions, study: Study, plan: Plan, scale: Scale, held_out: int
) -> tuple[Plan, Designed | None]:
    """Return a plan whose cells draw the images that the claims about them need, and the design.

    Cells that no claim is about draw the scale's `unclaimed_images`.

    Storage and MLflow server remember each design that was run, so that the same command again asks
    the same, as do others on the server, and none judges fewer images than one before. The design
    is None where it is remembered, but for --plan, and where no difference is asked for. held_out:
    so many images there are. ValueError where a difference is asked for, and the plan has no claim
    that images decide.
    """
    claims = _decided(study, plan, scale)
    if options.detect and not claims:
        has = "none that these trials and evaluators decide" if study.claims else "none"
        raise ValueError(
            f"--detect says what a study's claims are to tell, and study {study.name!r} has {has}"
        )
    if not scale.detect or not claims:
        return plan, None
    place = below(options.storage or str(options.results), DESIGNED)
    goal = Goal.of_claims(scale.detect, options.power, len(claims))
    stored, server = read_file(place), _server(options, scale)
    shared = server.shared(DESIGNED) if server else None
    known = _designs(place, stored)
    for other, theirs in _designs(f"{DESIGNED} of {options.mlflow}", shared).items():
        here = known.get(other, {})
        known[other] = {cell: max(here.get(cell, 0), theirs.get(cell, 0)) for cell in here | theirs}
    question = repr((goal, sorted(sorted(cells) for _, cells, _ in claims)))
    key, design = hashlib.sha256(question.encode()).hexdigest()[:12], None
    few = _few(plan, scale.unclaimed_images, known)
    if options.plan or key not in known:
        measured, designs = _measured(options, study, plan, scale), []
        for claim, cells, trainings in claims:
            available, draws, error = images_of_score(claim.column, scale, held_out)
            noise = (ASSUMED_OF_ERRORS if error else Noise()).updated(measured.get(claim.says))
            of_claim = goal.design(claim, trainings, noise, available, every=not draws)
            designs.append((of_claim, cells))
        design = Designed(goal, tuple(designs))
        least: dict[str, int] = defaultdict(int, few)
        for of_claim, cells in designs:
            least |= {name: max(of_claim.images, least[name]) for name in map(" ".join, cells)}
        known.setdefault(key, least)
    content = json.dumps(known, indent=1).encode()
    if content != stored and not options.plan:
        write_file(place, content)
    if server and content != shared and not options.plan:
        server.shared(DESIGNED, content)
    images: dict[str, Counter[str]] = defaultdict(Counter)
    for cell in few | known[key]:
        digest, _, evaluator = cell.partition(" ")
        images[digest][evaluator] = max(counts.get(cell, 0) for counts in (few, *known.values()))
    trials = tuple(replace(trial, images=images[trial.digest]) for trial in plan)
    return replace(plan, trials=trials), design


def _few(plan: Plan, images: int, known: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return so many images for each cell that draws some and has not been judged by more.

    A design without such a number is an older one: other cells of its trials drew the scale's.
    """
    older = [cells for cells in known.values() if images not in cells.values()]
    trials = {cell.split()[0] for cells in older for cell in cells}
    designed = set[str]().union(*known.values())
    drawn = (f"{t.digest} {name}" for t in plan for name in t.evaluators if name in DRAWING)
    free = (cell for cell in drawn if cell in designed or cell.split()[0] not in trials)
    return dict.fromkeys(free, images) if images else {}


def _server(options: RunOptions, scale: Scale) -> Tracker | None:
    """Return the MLflow server that commands share; for a plan, none where it does not answer."""
    with suppress(ValueError) if options.plan else nullcontext():
        if options.mlflow:
            from grid.status import open_tracker

            return open_tracker(options.results, options.mlflow, scale)
    return None


def _designs(place: str, content: bytes | None) -> dict[str, dict[str, int]]:
    """Return the designs that a file holds, by key; ValueError where it is damaged."""
    try:
        return DESIGNS.validate_json(content) if content is not None else {}
    except ValueError:
        raise ValueError(
            f"{place} is damaged: remove it, and cells are designed anew and judged again"
        ) from None


def _decided(
    study: Study, plan: Plan, scale: Scale
) -> list[tuple[Claim, frozenset[Cell], tuple[int, ...]]]:
    """Return the claims that a plan's cells decide, each with these and the trainings of a side.

    Several pairs count as trainings of one side.
    """
    rows = {(table.name, row.label): row for table in plan.tables for row in table.rows}
    judged = {(trial.digest, name) for trial in plan for name in trial.evaluators}
    decided = []
    for claim in (c for c in study.claims if c.column and c.places <= rows.keys()):
        evaluator = answering(evaluator_of(claim.column), scale)
        several = [rows[place] for pair in claim.pairs for place in pair if any(place)]
        seeds = trainings_compared(several)
        cells = frozenset((digest, evaluator) for r in several for digest in r.digests[:seeds])
        sides = tuple(seeds if row.recipe.epochs else 1 for row in several)
        if cells <= judged:
            decided.append((claim, cells, (len(claim.pairs),) if claim.also else sides))
    return decided


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
