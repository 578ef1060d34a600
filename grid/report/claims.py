"""A study's claims, each decided by a paired test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from evaluators.base import Column
from evaluators.intervals import Paired
from grid.report.tables import digests_of, over_seeds
from grid.report.verdicts import Verdicts
from grid.study import Claim, Row, Study, Table, Test
from trainables.store.tracking import TrialRun

Verdict = Literal[
    "reproduced", "not reproduced", "too little data to say", "cannot be judged", "not judged yet"
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MARGIN = 0.05  # two models within five points are level


@dataclass(frozen=True)
class Judgement:
    """A claim, the paired difference in shares that was found, and what follows.

    Of one row alone `paired` is its own score, as its table shows it. Where there is none,
    `outcome` says how the trainings ended.
    """

    claim: Claim
    verdict: Verdict
    test: str
    paired: Paired | None = None
    published: float | None = None
    outcome: str = ""


def judge_claims(
    claims: Iterable[Claim],
    tables: Sequence[Table],
    seeds: int,
    verdicts: Verdicts,
    runs: Mapping[str, TrialRun],
) -> list[Judgement]:
    """Judge every claim whose rows are in the tables."""
    rows = {(table.name, row.label): row for table in tables for row in table.rows}
    columns = {(table.name, c.name): c for table in tables for c in table.shown}
    figures = {(t.name, *cell): value for t in tables for cell, (value, _) in t.published.items()}
    judgements = []
    for claim in claims:
        if claim.row not in rows:
            continue
        row = rows[claim.row]
        if claim.test == "collapses":
            outcomes = [runs.get(digest) for digest in digests_of(row.recipe, seeds)]
            judgements.append(_judge_collapse(claim, outcomes))
            continue
        column = columns.get((claim.row[0], claim.column))
        if column is None:
            outcome = "these data have no such score"
            judgements.append(Judgement(claim, "cannot be judged", claim.column, outcome=outcome))
            continue
        if claim.test == "none survive":
            judgement = _judge_alone(claim, row, column, runs, seeds)
        elif all(place in rows for pair in claim.pairs for place in pair):
            pairs = [(rows[ours], rows[theirs]) for ours, theirs in claim.pairs]
            differences = [verdicts.compare(*pair, column, seeds) for pair in pairs]
            judged = [difference for difference in differences if difference]
            judgement = (
                _judged(claim, _test(column, pairs), _mean(judged))
                if len(judged) == len(pairs)
                else _not_judged(claim, pairs, column, runs, seeds)
            )
        else:
            continue
        judgements.append(replace(judgement, published=_published(claim, figures)))
    return judgements


def _judge_collapse(claim: Claim, runs: Sequence[TrialRun | None]) -> Judgement:
    test = f"{claim.row[1]} ({claim.row[0]}): the outcome of its training"
    ended = [run.outcome for run in runs if run and run.outcome in ("finished", "collapsed")]
    if len(ended) < len(runs):
        return Judgement(claim, "not judged yet", test)
    count = ended.count("collapsed")
    verdict: Verdict = "too little data to say"
    if count in (0, len(ended)):
        verdict = "reproduced" if count else "not reproduced"
    return Judgement(claim, verdict, test, outcome=f"{count} of {len(ended)} collapsed")


def _judge_alone(
    claim: Claim, row: Row, column: Column, runs: Mapping[str, TrialRun], seeds: int
) -> Judgement:
    digests = digests_of(row.recipe, seeds)
    metrics = [runs[digest].metrics for digest in digests if digest in runs]
    judged = [entry for entry in metrics if column.score in entry]
    if len(judged) < len(digests):
        return _not_judged(claim, [(row,)], column, runs, seeds)
    value, low, high = (figure / 100 for figure in over_seeds(judged, column.score))
    alone = Paired(value, low, high, int(judged[0][f"{column.score}/n"]), None)
    return _judged(claim, _test(column, [(row,)]), alone)


def _judged(claim: Claim, test: str, paired: Paired) -> Judgement:
    verdict = decide(claim.test, paired.low, paired.high)
    return Judgement(claim, verdict, test, paired)


def _not_judged(
    claim: Claim,
    compared: Sequence[tuple[Row, ...]],
    column: Column,
    runs: Mapping[str, TrialRun],
    seeds: int,
) -> Judgement:
    """Say which trainings ended without a model to judge; a collapsed one never has one."""
    ended = [
        (row.label, runs[digest].outcome)
        for rows in compared
        for row in rows
        for digest in digests_of(row.recipe, seeds)
        if digest in runs and runs[digest].outcome in ("collapsed", "failed", "blocked")
    ]
    fell = any(outcome == "collapsed" for _, outcome in ended)
    outcome = ", ".join(dict.fromkeys(f"{label} {outcome}" for label, outcome in ended))
    return Judgement(
        claim,
        "cannot be judged" if fell else "not judged yet",
        _test(column, compared),
        outcome=outcome,
    )


def _mean(pairs: Sequence[Paired]) -> Paired:
    """Return the mean difference of pairs of models: of several, as over seeds."""
    if len(pairs) == 1:
        return pairs[0]
    ends = [{"": p.difference, "/low": p.low, "/high": p.high} for p in pairs]
    difference, low, high = (figure / 100 for figure in over_seeds(ends, ""))
    return Paired(difference, low, high, min(p.n for p in pairs), None)


def _test(column: Column, compared: Sequence[tuple[Row, ...]]) -> str:
    rows = " and ".join(" minus ".join(row.label for row in rows) for rows in compared)
    how = ", paired" if len(compared[0]) > 1 else ""
    mean = f"mean of {len(compared)} pairs, " if len(compared) > 1 else ""
    return f"{mean}{rows} under {column.title}{how}, 95 % interval"


def decide(test: Test, low: float, high: float) -> Verdict:
    """Decide a claim by the interval of its difference, in shares."""
    holds, fails = {
        "ahead": (low > 0, high < 0),
        "behind": (high < 0, low > 0),
        "level": (low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN),
        "no gain": (high < MARGIN, low > MARGIN),
        "none survive": (high < MARGIN, low > MARGIN),
    }[test]
    if holds:
        return "reproduced"
    return "not reproduced" if fails else "too little data to say"


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
        if judgement.claim.headline and judgement.paired:
            standing, text = _standing(judgement.claim, judgement.paired)
            standings[standing].append(text)
    parts = [f"{standing} {' and '.join(texts)}" for standing, texts in standings.items() if texts]
    here = f"Here {study.subject} is {'; '.join(parts)}. " if parts else ""
    counts = Counter(judgement.verdict for judgement in judgements)
    verdicts = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
    return f"{here}Of {len(judgements)} claims of the study: {verdicts}."


def _standing(claim: Claim, paired: Paired) -> tuple[str, str]:
    """Say how the study's subject stands by the interval of a difference."""
    ends = [
        100 * claim.sign * value + 0.0 for value in (paired.difference, paired.low, paired.high)
    ]
    value, low, high = ends[0], min(ends), max(ends)
    text = f"{claim.headline} ({value:+.1f} points [{low:+.1f}, {high:+.1f}], n = {paired.n})"
    if low > 0:
        return "ahead", text
    return ("behind" if high < 0 else "not to be told apart"), text
