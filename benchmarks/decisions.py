"""How often claims are decided wrongly, and whether another processor decides alike.

    python -m benchmarks.decisions                # 10,000 simulated studies of each kind
    python -m benchmarks.decisions --agreement    # the headline rows, trained with other rounding

In a simulated study nothing is so: every claim's true difference lies on the very border of what
supports it, so that each decision is an error; but that a lead is none, where a least difference is
stated. Its verdicts are drawn, and judged as the report judges. The family-wise error is the share
of studies with an error or more: at most 5 %.

Agreement trains what the headline claims of the default study compare, as often as it, by the real
command: once as it is, once with the kernels of a processor without AVX-512, which round
otherwise. The weights differ; the headline verdicts are to be the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from evaluators.intervals import Paired, compare, minus_none
from evaluators.ledger import share
from grid.report.claims import (
    LEADS,
    OPEN,
    Judgement,
    corrected,
    decide,
    judge_claims,
    with_difference,
)
from grid.study import DEFAULT, load_study
from grid.table import Claim, Test

COMMAND = Path(__file__).parents[1] / "grid" / "run.py"
OTHER_ROUNDING = {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "AVX2"}
TESTS: tuple[Test, ...] = ("ahead", "behind", "ahead", "level", "no gain", "none survive")
_with_difference = lru_cache(2**14)(with_difference)  # of counts, which recur
ANSWERED_ANEW = 0.1  # of its images each training answers so many by a draw of its own


@dataclass(frozen=True)
class Kind:
    """A kind of study: so many claims of one training, and of three a side, on so many images.

    spreads: the standard deviation over trainings of each side's accuracy. least: the difference
    that the study is to tell.
    """

    name: str
    single: int
    several: int = 0
    images: tuple[int, ...] = (50, 150, 360)
    spreads: tuple[float, float] = (0.0, 0.0)
    kinds: int = 1  # answers an image, of which its score is the mean
    least: float = 0.0
    tests: tuple[Test, ...] = TESTS


KINDS = (
    Kind("22 claims of one training", 22),
    Kind("17 of one training, 5 of three a side", 17, 5, spreads=(0.02, 0.02)),
    Kind("5 of three a side, which hardly vary", 0, 5, spreads=(0.002, 0.002)),
    Kind("22 of three a side, one varies more", 0, 22, spreads=(0.03, 0.005)),
    Kind("22 mean errors of one training", 22, kinds=15),
    Kind("22 leads, to tell 10 points", 22, images=(360, 597), least=0.1, tests=LEADS),
    Kind("17 of one, 5 of three, to tell 10 points", 17, 5, spreads=(0.03, 0.01), least=0.1),
)


def family_wise_error(kind: Kind, studies: int, seed: int = 0) -> tuple[float, float]:
    """Return the share of studies with a wrong decision, and that before Holm's correction."""
    rng = np.random.default_rng(seed)
    wrong = np.array([_wrong(kind, rng) for _ in range(studies)])
    return float(wrong[:, 0].mean()), float(wrong[:, 1].mean())


def _wrong(kind: Kind, rng: np.random.Generator) -> tuple[bool, bool]:
    """Say of one drawn study whether a claim is decided, and whether one is by itself."""
    trainings = [1] * kind.single + [3] * kind.several
    judged = [
        _judged(kind.tests[place % len(kind.tests)], rng, int(rng.choice(kind.images)), seeds, kind)
        for place, seeds in enumerate(trainings)
    ]
    decided = corrected(judged)
    right = [{OPEN, "not reproduced"} if j.has_two_nulls else {OPEN} for j in decided]
    corrected_or_not = ([j.decision for j in decided], [j.single for j in decided])
    first, single = (
        any(d not in r for d, r in zip(decisions, right, strict=True))
        for decisions in corrected_or_not
    )
    return first, single


def _judged(test: Test, rng: np.random.Generator, images: int, seeds: int, kind: Kind) -> Judgement:
    """Return a claim's judgement on drawn verdicts, its difference on the border of its support."""
    undecided = Judgement(_claim(test), OPEN, "", single=OPEN, least=kind.least)
    border = undecided.supports[0]
    spreads = kind.spreads if seeds > 1 else (0.0, 0.0)  # a claim about one training is of its own
    if test == "none survive":
        side = _side(rng, -border, rng.random((kind.kinds, images)), seeds, spreads[0])
        paired = minus_none(side).reversed()
    elif seeds == kind.kinds == 1:
        discordance = rng.uniform(max(0.06, -border), 0.3)
        halves = (discordance + border) / 2, (discordance - border) / 2, 1 - discordance
        paired = _of_counts(*rng.multinomial(images, halves).tolist())
    else:
        common = rng.random((kind.kinds, images))
        means = (0.6 + border, 0.6)
        drawn = [_side(rng, m, common, seeds, s) for m, s in zip(means, spreads, strict=True)]
        paired = _compared(*drawn)
    # An undecided claim's p is above 0.05: Holm's correction needs to know no more.
    if decide(paired, undecided.supports, kind.least) == OPEN:
        return undecided
    return _with_difference(undecided, paired)


@cache
def _claim(test: Test) -> Claim:
    other = {} if test == "none survive" else {"of": "T/b"}
    return Claim.model_validate(
        {"says": "s", "test": test, "row": "T/a", "column": "clean"} | other
    )


@cache
def _of_counts(gained: int, lost: int, alike: int) -> Paired:
    ours, theirs = np.zeros((2, gained + lost + alike))
    ours[:gained], theirs[gained : gained + lost] = 1, 1
    return _compared([dict(enumerate(map(float, ours)))], [dict(enumerate(map(float, theirs)))])


def _compared(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> Paired:
    paired = compare(ours, theirs)
    assert paired is not None
    return paired


def _side(
    rng: np.random.Generator, mean: float, common: np.ndarray, seeds: int, spread: float
) -> list[dict[int, float]]:
    """Draw the image scores of a side's trainings, an answer where a draw is below its accuracy.

    Both sides share the draws of two thirds of the answers, and the trainings of a side most.
    """
    own = np.where(rng.random(common.shape) < 2 / 3, common, rng.random(common.shape))
    trainings = []
    for accuracy in mean + spread * rng.standard_normal(seeds):
        anew = rng.random(common.shape) < ANSWERED_ANEW
        draws = np.where(anew, rng.random(common.shape), own)
        trainings.append(dict(enumerate((draws < accuracy).mean(axis=0).tolist())))
    return trainings


def headline_study() -> str:
    """Return a study file of what the default study's headline claims compare, and no more."""
    study = load_study(DEFAULT)
    places = {place for claim in study.claims if claim.headline for place in claim.places}
    tables = {table for table, _ in places}
    rows = [(table.name, row.label) for table in study.tables for row in table.rows]
    drop = dict.fromkeys(
        "/".join(place) if place[0] in tables else place[0] for place in rows if place not in places
    )
    return f'name = "headline"\nextends = "{DEFAULT}"\ndrop = {[*drop]}\n'


def agreement(folder: Path) -> Iterator[str]:
    """Train the headline rows with two roundings, and say of each claim how both decide it."""
    path = folder / "headline.toml"
    path.write_text(headline_study())
    decided = []
    for name, environment in (("as it is", {}), ("other rounding", OTHER_ROUNDING)):
        results = folder / name.replace(" ", "-")
        subprocess.run(  # noqa: S603
            [sys.executable, COMMAND, "--study", path, "--results", results, "--address", "local"],
            env=os.environ | environment,
            check=True,
        )
        decided.append(judged(path, results))
    yield from compared(*decided)


def compared(ours: Sequence[Judgement], theirs: Sequence[Judgement]) -> Iterator[str]:
    """Say of each claim how two runs decide it, and of how many alike."""
    for one, other in zip(ours, theirs, strict=True):
        for judgement in (one, other):
            paired = judgement.paired
            ends = (paired.difference, paired.low, paired.high) if paired else ()
            figures = " ".join(f"{100 * end:+.1f}" for end in ends)
            yield f"{judgement.decision}, by itself {judgement.single}, {figures}: {one.claim.says}"
    alike = [one.decision == other.decision for one, other in zip(ours, theirs, strict=True)]
    yield f"{sum(alike)} of {len(alike)} headline verdicts agree"


def judged(study_file: Path, results: Path) -> list[Judgement]:
    """Return the judgements of a study's claims by what a results folder holds, at digits."""
    from grid.plan import build_plan
    from grid.report.tables import tables_of
    from grid.report.verdicts import Verdicts
    from grid.status import open_existing
    from trainables.scale import DIGITS

    study = load_study(str(study_file))
    plan = build_plan(study, DIGITS)
    tracker = open_existing(results, None, DIGITS)
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    verdicts.read_scores(plan)
    return judge_claims(study.claims, tables_of(study, plan, runs), verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the family-wise error of each kind of study, or the agreement of two roundings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--agreement", action="store_true")
    options = parser.parse_args(arguments)
    if options.agreement:
        with tempfile.TemporaryDirectory() as folder:
            for line in agreement(Path(folder)):
                print(line, flush=True)
        return 0
    for kind in KINDS:
        error, single = family_wise_error(kind, options.studies)
        sure = share("", round(error * options.studies), options.studies)
        print(
            f"{kind.name}: family-wise error {100 * error:.2f} % "
            f"[{100 * sure.low:.2f}, {100 * sure.high:.2f}]; each by itself {100 * single:.1f} %",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
