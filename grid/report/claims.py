"""A study's claims, each decided by a paired test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from evaluators.base import Column
from evaluators.intervals import Paired, mean_of
from evaluators.ledger import CONFIDENCE
from grid.power import MARGIN, POWER
from grid.report.tables import FilledTable, saturation
from grid.report.verdicts import Verdicts
from grid.study import Study
from grid.table import LEADS, Claim, Row, Test, trainings_compared
from trainables.store.tracking import STOPPED

Decision = Literal[
    "reproduced",
    "not reproduced",
    "saturated",
    "too little data to say",
    "cannot be judged",
    "not judged yet",
]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
OPEN: Decision = "too little data to say"
REVERSED = ("behind", "no gain", "none survive")  # tests that favour the other side of the row's
SUPPORTS: Mapping[Test, tuple[float, float]] = {
    "ahead": (0.0, math.inf),
    "behind": (0.0, math.inf),
    "level": (-MARGIN, MARGIN),
    "no gain": (-MARGIN, math.inf),
    "none survive": (-MARGIN, math.inf),
}


@dataclass(frozen=True)
class Judgement:
    """A claim, the paired difference in shares behind it, and what was decided.

    `paired` and `published`, which is in points, are the side that the claim favours minus the
    other, so that more supports the claim, whatever the column measures; "none survive" favours 0
    over the row. `single` is the decision by the claim's own 95 % interval, whose p is `p`;
    `decision` is by `corrected`, the p corrected for the number of claims. `trainings` says over
    how many the interval is. `outcome`: how the trainings ended where no difference is known, or
    why it is saturated. `row_sign`: 1 where more says that the claim's row is the better model, -1
    where the worse; of a headline the row is the study's subject. `least`: the difference
    that the run is to tell, 0 where none is stated: models that are nearer than that, or than five
    points, are level, and a lead that is surely below it is none. `detectable`: the difference that
    the judged images and trainings tell with power 0.8 beside the study's other claims.
    """

    claim: Claim
    decision: Decision
    test: str
    paired: Paired | None = None
    published: float | None = None
    outcome: str = ""
    single: Decision = "not judged yet"
    p: float | None = None
    corrected: float | None = None
    trainings: str = ""
    row_sign: Literal[1, -1] = 1
    least: float = 0.0
    detectable: float | None = None

    @property
    def supports(self) -> tuple[float, float]:
        """Return between which differences the claim holds, in shares; an end may be infinite."""
        low, high = SUPPORTS.get(self.claim.test, (-math.inf, math.inf))
        if self.claim.test not in ("level", "no gain"):
            return low, high
        return min(low, -self.least), max(high, self.least)

    @property
    def has_two_nulls(self) -> bool:
        """Whether a lead is told from none, and from the least that counts."""
        return self.claim.test in LEADS and self.least > 0

    def decided(self, confidence: float) -> Decision:
        """Decide by the interval at a confidence; what only a floor or ceiling makes alike is void.

        `outcome` says where models are at one.
        """
        assert self.paired and self.paired.at
        low, high = self.paired.at(confidence)
        decision = decide(replace(self.paired, low=low, high=high), self.supports, self.least)
        alike = "reproduced" if self.supports[0] < 0 else "not reproduced" if high >= 0 else OPEN
        return "saturated" if self.outcome and decision in (OPEN, alike) else decision


def judge_claims(
    claims: Iterable[Claim],
    tables: Sequence[FilledTable],
    verdicts: Verdicts,
    *,
    least: float = 0.0,
) -> list[Judgement]:
    """Judge every claim whose rows are in the tables, and correct for their number.

    least: the difference that the run is to tell.
    """
    rows = {(table.name, row.label): row for table in tables for row in table.rows}
    columns = {(table.name, c.name): c for table in tables for c in table.shown}
    figures = {(t.name, *cell): value for t in tables for cell, (value, _) in t.published.items()}
    judgements = []
    for claim in claims:
        pairs = [[rows.get(place) for place in pair if any(place)] for pair in claim.pairs]
        compared = [tuple(filter(None, pair)) for pair in pairs]
        if any(None in pair for pair in pairs):
            continue
        if claim.test == "collapses":
            judgements.append(_judge_collapse(claim, compared[0][0], verdicts))
        elif column := columns.get((claim.row[0], claim.column)):
            published = None if column.stands_in else _published(claim, figures)
            judgements.append(_judge(claim, compared, column, verdicts, published, least))
        else:
            lacking = "these data have no such score"
            none: Decision = "cannot be judged"
            judgements.append(Judgement(claim, none, claim.column, outcome=lacking, single=none))
    return corrected(judgements)


def corrected(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Return judgements decided at a family-wise error of 5 %, corrected as by Holm (1979).

    The family is every claim that a difference may decide, judged already or not. A lead that
    counts from `least` on has two null hypotheses, none and so much, of which one at most is true:
    each is tested on its one side, and the claim stays in the family with the other one when the
    first is rejected (Shaffer 1986).
    """
    ps = {
        place: 1.0 if j.p is None else j.p
        for place, j in enumerate(judgements)
        if j.claim.test != "collapses" and j.decision != "cannot be judged"
    }
    one_sided = {place: p / (1 + judgements[place].has_two_nulls) for place, p in ps.items()}
    decided, left, reached = list(judgements), len(ps), 0.0
    for place, p in sorted(one_sided.items(), key=lambda item: item[1]):
        reached = max(reached, min(1.0, left * p), ps[place])
        decided[place] = _decided(judgements[place], reached, len(ps))
        left -= not judgements[place].has_two_nulls
    return decided


def _decided(judgement: Judgement, corrected: float, claims: int) -> Judgement:
    """Decide at the confidence at which the correction tests the claim, one of so many."""
    if judgement.p is None:
        return judgement
    assert judgement.paired and judgement.paired.at
    error = 1 - CONFIDENCE
    first = 1 - error * (2 if judgement.has_two_nulls else 1) / claims
    # A normal quantile of the power is half the width of the interval that leaves so much out.
    widths = [high - low for low, high in map(judgement.paired.at, (first, 2 * POWER - 1))]
    return replace(
        judgement,
        single=judgement.decided(CONFIDENCE),
        decision=judgement.decided(1 - error * judgement.p / corrected),
        corrected=corrected,
        detectable=sum(widths) / 2,
    )


def _why_saturated(paired: Paired, column: Column) -> str:
    """Say where both sides are within five points of the floor or ceiling; '' where not."""
    if not paired.sides or not (end := saturation(paired.sides, column)):
        return ""
    counts = list(dict.fromkeys(f"{share * paired.n:.3g}" for share in paired.sides))
    at = f"both at {counts[0]}" if len(counts) == 1 else f"at {' and '.join(counts)}"
    other = "a weaker attack or easier" if end == "floor" else "a stronger attack or harder"
    return f"{at} of {paired.n}, the {end}: {other} images would help, not more images"


def _judge(
    claim: Claim,
    compared: Sequence[tuple[Row, ...]],
    column: Column,
    verdicts: Verdicts,
    published: float | None,
    least: float,
) -> Judgement:
    """Judge a claim by a difference; `published` is the row's side minus the other.

    Each row counts by as many trainings as all that it is compared with have.
    """
    trained = any(row.recipe.epochs for rows in compared for row in rows)
    seeds = trainings_compared(row for rows in compared for row in rows)
    compared = [tuple(replace(row, seeds=seeds) for row in rows) for rows in compared]
    flipped = claim.test in REVERSED
    towards = None if published is None else 0.0 - published if flipped else published
    judgement = Judgement(
        claim,
        "not judged yet",
        _test(column, compared, flipped=flipped) + _counting(claim, least),
        published=towards,
        trainings=_trainings(seeds) if trained else "",
        row_sign=-1 if flipped != column.error else 1,
        least=least,
    )
    if (paired := _difference(compared, column, verdicts)) is None:
        decision, outcome = _undecided(compared, verdicts)
        return replace(judgement, decision=decision, single=decision, outcome=outcome)
    paired = paired.reversed() if flipped else paired
    judgement = with_difference(judgement, paired)
    return replace(judgement, outcome=_why_saturated(paired, column))


def with_difference(judgement: Judgement, paired: Paired) -> Judgement:
    """Return a judgement with its difference and the p of that, before any correction."""
    bounds = filter(math.isfinite, judgement.supports)
    p = max(map(paired.p_of, bounds))  # of a zone both bounds have to be left out
    if judgement.has_two_nulls and paired.difference < judgement.least:
        p = min(p, paired.p_of(judgement.least))
    return replace(judgement, p=p, paired=paired)


def _counting(claim: Claim, least: float) -> str:
    """Say which lead counts as none, where the least difference to be told is stated."""
    said = f"; not told from none, a lead surely below {100 * least:g} points counts as none"
    return said * (claim.test in LEADS and least > 0)


def _trainings(seeds: int) -> str:
    return "in this one training" if seeds == 1 else f"over {seeds} trainings of each row"


def _judge_collapse(claim: Claim, row: Row, verdicts: Verdicts) -> Judgement:
    test = f"{row.label} ({claim.row[0]}): the outcome of its training"
    digests, runs = row.digests, verdicts.runs
    outcomes = [runs[digest].outcome for digest in digests if digest in runs]
    if STOPPED in outcomes:
        stopped = _undecided([(row,)], verdicts)[1]
        return Judgement(claim, OPEN, test, outcome=stopped, single=OPEN)
    ended = [outcome for outcome in outcomes if outcome in ("finished", "collapsed")]
    if len(ended) < len(digests):
        return Judgement(claim, "not judged yet", test)
    count = ended.count("collapsed")
    decision = OPEN
    if count in (0, len(digests)):
        decision = "reproduced" if count else "not reproduced"
    outcome, trainings = f"{count} of {len(digests)} collapsed", _trainings(len(digests))
    return Judgement(claim, decision, test, outcome=outcome, single=decision, trainings=trainings)


def _difference(
    compared: Sequence[tuple[Row, ...]], column: Column, verdicts: Verdicts
) -> Paired | None:
    """Return the mean difference of pairs of rows, or one row's own score minus 0.

    None where not all of it is judged.
    """
    pairs = [paired for rows in compared if (paired := verdicts.difference(rows, column))]
    if len(pairs) < len(compared):
        return None
    return pairs[0] if len(pairs) == 1 else mean_of(pairs)


def _undecided(compared: Sequence[tuple[Row, ...]], verdicts: Verdicts) -> tuple[Decision, str]:
    """Say which trainings ended without a model to judge; a collapsed one never has one.

    One that was stopped early has one only where more is asked of it.
    """
    runs = verdicts.runs
    ended = [
        (row.label, runs[digest])
        for rows in compared
        for row in rows
        for digest in row.digests
        if digest in runs and runs[digest].outcome in ("collapsed", "failed", "blocked", STOPPED)
    ]
    texts = dict.fromkeys(
        f"{label} {run.outcome}" + f" ({run.reason})" * (run.outcome == STOPPED)
        for label, run in ended
    )
    outcomes = {run.outcome for _, run in ended}
    decision = OPEN if STOPPED in outcomes else "not judged yet"
    return "cannot be judged" if "collapsed" in outcomes else decision, ", ".join(texts)


def _test(column: Column, compared: Sequence[tuple[Row, ...]], *, flipped: bool) -> str:
    sides = ([row.label for row in rows] for rows in compared)
    ordered = (["0", *side] if len(side) == 1 else side[:: -1 if flipped else 1] for side in sides)
    rows = " and ".join(map(" minus ".join, ordered))
    how = ", paired" if len(compared[0]) > 1 else ""
    mean = f"mean of {len(compared)} pairs, " if len(compared) > 1 else ""
    return f"{mean}{rows} under {column.title}{how}"


def decide(paired: Paired, supports: tuple[float, float], least: float = 0.0) -> Decision:
    """Decide a claim by the interval of its difference and the differences that support it.

    A lead is refuted, too, where the interval leaves out `least`, from which on it counts.
    """
    low, high = supports
    if low < paired.low and paired.high < high:
        return "reproduced"
    beyond = paired.high < (low or least) or high < paired.low
    return "not reproduced" if beyond else OPEN


def _published(claim: Claim, figures: Mapping[tuple[str, str, str], float]) -> float | None:
    """Return the published figure behind a claim, in points: a difference, or of one row its own.

    figures: by table, row and column.
    """
    if claim.published is not None:
        return claim.published
    ours = figures.get((*claim.row, claim.column))
    if claim.test == "none survive":
        return ours
    theirs = figures.get((*claim.of, claim.column))
    return None if ours is None or theirs is None or claim.also else ours - theirs


def answer(study: Study, judgements: Sequence[Judgement]) -> str:
    """Answer the study's question in a paragraph: where its subject is ahead, and where not."""
    standings: dict[str, list[str]] = {"ahead": [], "behind": [], "not to be told apart": []}
    for judgement in judgements:
        if judgement.claim.headline and (p := judgement.paired):
            of_row = p if judgement.row_sign > 0 else p.reversed()
            value, low, high = (100 * v for v in (of_row.difference, of_row.low, of_row.high))
            standing = "ahead" if low > 0 else "behind" if high < 0 else "not to be told apart"
            interval = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}], n = {p.n}"
            standings[standing].append(f"{judgement.claim.headline} ({interval})")
    parts = [f"{standing} {' and '.join(texts)}" for standing, texts in standings.items() if texts]
    by_itself = f"Here, each comparison by itself, {study.subject} is"
    here = f"{by_itself} {'; '.join(parts)}. " if parts else ""
    counts = Counter(judgement.decision for judgement in judgements)
    decisions = ", ".join(f"{counts[d]} {d}" for d in DECISIONS if counts[d])
    return f"{here}Of {len(judgements)} claims of the study, decided together: {decisions}."
