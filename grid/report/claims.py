"""The paper's claims as data, each with the paired test that decides it here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from evaluators.paired import Paired
from grid.published import published
from grid.report.tables import digests_of, over_seeds
from grid.report.verdicts import Verdicts
from grid.studies import Column, Row, Table
from trainables.store.tracking import TrialRun

Kind = Literal["ahead", "behind", "level", "no gain", "none survive", "collapses"]
Verdict = Literal[
    "reproduced", "not reproduced", "too little data to say", "cannot be judged", "not judged yet"
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MARGIN = 0.05  # two models within five points are level


@dataclass(frozen=True)
class Claim:
    """One claim: a row minus a reference row, by `table/label`, in a column of the row's table.

    ahead, behind: the difference is above or below 0. level: within five points of 0. no gain:
    not more than five points above it. none survive: the row itself is not. collapses: the row's
    training does. `also`: further labels of a row and a reference in the same tables, which differ
    as the first two do; the claim is of the mean over these pairs. `published`: the paper's
    difference in points, where it is stated as one.
    `headline`: where the transformer is compared with the CNN, for the answer to the study's
    question; `sign`: -1 where a difference above 0 speaks for the CNN.
    """

    statement: str
    kind: Kind
    row: tuple[str, str]
    reference: tuple[str, str] = ("", "")
    column: str = ""
    published: float | None = None
    headline: str = ""
    sign: int = 1
    also: tuple[tuple[str, str], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[tuple[str, str], tuple[str, str]], ...]:
        """Return what is compared: each row with its reference, by table and label."""
        table, reference = self.row[0], self.reference[0]
        others = (((table, ours), (reference, theirs)) for ours, theirs in self.also)
        return ((self.row, self.reference), *others)


CLAIMS = (
    Claim(
        "A ResNet-50 that was trained cleanly does not survive AutoAttack",
        "none survive",
        ("T1", "ResNet-50"),
        column="AutoAttack 4/255",
    ),
    Claim(
        "A DeiT-S that was trained cleanly does not survive AutoAttack",
        "none survive",
        ("T1", "DeiT-S"),
        column="AutoAttack 4/255",
    ),
    Claim(
        "Under adversarial training with GELU a CNN is as robust as a transformer",
        "level",
        ("T2", "ResNet-50 GELU"),
        ("T2", "DeiT-S"),
        "AutoAttack 4/255",
        headline="under AutoAttack after adversarial training",
        sign=-1,
    ),
    Claim(
        "GELU in place of ReLU makes an adversarially trained CNN more robust",
        "ahead",
        ("T2", "ResNet-50 GELU"),
        ("T2", "ResNet-50 ReLU"),
        "AutoAttack 4/255",
    ),
    Claim(
        "AdamW does not help an adversarially trained CNN",
        "no gain",
        ("T2", "ResNet-50 with AdamW"),
        ("T2", "ResNet-50 ReLU"),
        "PGD-100",
    ),
    Claim(
        "Under the CNN's recipe an adversarially trained DeiT-S loses clean accuracy",
        "behind",
        ("T2", "DeiT-S, CNN recipe (M-SGD, no strong augmentation)"),
        ("T2", "DeiT-S"),
        "Clean",
    ),
    Claim(
        "Under the CNN's recipe an adversarially trained DeiT-S loses robust accuracy",
        "behind",
        ("T2", "DeiT-S, CNN recipe (M-SGD, no strong augmentation)"),
        ("T2", "DeiT-S"),
        "PGD-100",
    ),
    Claim(
        "Without an eased-in curriculum adversarial training of DeiT-S collapses",
        "collapses",
        ("T2", "DeiT-S without curriculum"),
    ),
    Claim(
        "With strong augmentation adversarial training of a CNN collapses",
        "collapses",
        ("T2", "ResNet-50 with strong augmentation"),
    ),
    Claim(
        "Against texture patches DeiT-S is ahead of ResNet-50 under its own recipe",
        "ahead",
        ("T3", "DeiT-S"),
        ("T3", "ResNet-50"),
        "TPA",
        28.0,
        headline="under texture patches",
    ),
    Claim(
        "With RandAugment and CutMix a CNN is ahead of the transformer against texture patches",
        "ahead",
        ("T4", "randaug+cutmix"),
        ("T3", "DeiT-S"),
        "TPA",
    ),
    Claim(
        "CutMix makes a CNN more robust against texture patches",
        "ahead",
        ("T4", "cutmix"),
        ("T4", "none"),
        "TPA",
        also=(
            ("randaug+cutmix", "randaug"),
            ("mixup+cutmix", "mixup"),
            ("randaug+mixup+cutmix", "randaug+mixup"),
        ),
    ),
    Claim(
        "Under one recipe the transformer is ahead on natural adversarial images",
        "ahead",
        ("T5", "DeiT-S"),
        ("T5", "ResNet-50*"),
        "ImageNet-A",
        headline="on natural adversarial images",
    ),
    Claim(
        "Under one recipe the transformer errs less on corrupted images",
        "behind",
        ("T5", "DeiT-S"),
        ("T5", "ResNet-50*"),
        "ImageNet-C error",
        headline="on corrupted images",
        sign=-1,
    ),
    Claim(
        "Under one recipe the transformer is ahead on stylized images",
        "ahead",
        ("T5", "DeiT-S"),
        ("T5", "ResNet-50*"),
        "Stylized",
        headline="on stylized images",
    ),
    Claim(
        "A cosine schedule in place of steps makes a CNN err less on corrupted images",
        "behind",
        ("T6", "cosine, SGD"),
        ("T6", "step, SGD"),
        "ImageNet-C error",
    ),
    Claim(
        "AdamW in place of SGD makes a CNN err more on corrupted images",
        "ahead",
        ("T6", "cosine, AdamW"),
        ("T6", "cosine, SGD"),
        "ImageNet-C error",
    ),
    Claim(
        "The transformer's schedule and optimizer leave it its lead on natural adversarial images",
        "behind",
        ("T6", "cosine, AdamW"),
        ("T5", "DeiT-S"),
        "ImageNet-A",
    ),
    Claim(
        "The CNN's best augmentation leaves the transformer its lead on natural adversarial images",
        "behind",
        ("T7", "randaug+cutmix"),
        ("T5", "DeiT-S"),
        "ImageNet-A",
    ),
    Claim(
        "A smaller transformer leads a smaller CNN on natural adversarial images",
        "ahead",
        ("T8", "DeiT-Mini"),
        ("T8", "ResNet-18-Best"),
        "ImageNet-A",
    ),
    Claim(
        "Distillation does not close the CNN's gap on natural adversarial images",
        "behind",
        ("T9", "ResNet-50*, teacher DeiT-S"),
        ("T9", "DeiT-S, the teacher"),
        "ImageNet-A",
    ),
    Claim(
        "In 300 epochs ResNet-101 does not reach DeiT-S on natural adversarial images",
        "behind",
        ("T11", "ResNet-101-Best, 300 epochs"),
        ("T11", "DeiT-S, 300 epochs"),
        "ImageNet-A",
    ),
    Claim(
        "In 300 epochs ResNet-200 does not reach DeiT-S on natural adversarial images",
        "behind",
        ("T11", "ResNet-200-Best, 300 epochs"),
        ("T11", "DeiT-S, 300 epochs"),
        "ImageNet-A",
    ),
    Claim(
        "A hybrid with self-attention is ahead of the CNN on natural adversarial images",
        "ahead",
        ("T10", "Hybrid-DeiT"),
        ("T10", "ResNet-50"),
        "ImageNet-A",
    ),
)


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
    tables: Sequence[Table], seeds: int, verdicts: Verdicts, runs: Mapping[str, TrialRun]
) -> list[Judgement]:
    """Judge every claim whose rows are in the tables."""
    rows = {(table.name, row.label): row for table in tables for row in table.rows}
    columns = {(table.name, c.label): c for table in tables for c in table.columns}
    found = []
    for claim in CLAIMS:
        if claim.row not in rows:
            continue
        row = rows[claim.row]
        if claim.kind == "collapses":
            outcomes = [runs.get(digest) for digest in digests_of(row.recipe, seeds)]
            found.append(_judge_collapse(claim, outcomes))
        elif claim.kind == "none survive":
            column = columns[claim.row[0], claim.column]
            found.append(_judge_alone(claim, row, column, runs, seeds))
        elif all(place in rows for pair in claim.pairs for place in pair):
            pairs = [(rows[ours], rows[theirs]) for ours, theirs in claim.pairs]
            column = columns[claim.row[0], claim.column]
            differences = [verdicts.compare(*pair, column, seeds) for pair in pairs]
            if None in differences:
                found.append(_not_judged(claim, pairs, column, runs, seeds))
            else:
                paired = _mean([difference for difference in differences if difference])
                found.append(_judged(claim, _test(column, pairs), paired))
    return found


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
    judged = [found for found in metrics if column.score in found]
    if len(judged) < len(digests):
        return _not_judged(claim, [(row,)], column, runs, seeds)
    value, low, high = (figure / 100 for figure in over_seeds(judged, column.score))
    own = Paired(value, low, high, int(judged[0][f"{column.score}/n"]), None)
    return _judged(claim, _test(column, [(row,)]), own)


def _judged(claim: Claim, test: str, paired: Paired) -> Judgement:
    verdict = decide(claim.kind, paired.low, paired.high)
    return Judgement(claim, verdict, test, paired, _published_difference(claim))


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
        published=_published_difference(claim),
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


def decide(kind: Kind, low: float, high: float) -> Verdict:
    """Decide a claim by the interval of its difference, in shares."""
    holds, fails = {
        "ahead": (low > 0, high < 0),
        "behind": (high < 0, low > 0),
        "level": (low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN),
        "no gain": (high < MARGIN, low > MARGIN),
        "none survive": (high < MARGIN, low > MARGIN),
    }[kind]
    if holds:
        return "reproduced"
    return "not reproduced" if fails else "too little data to say"


def _published_difference(claim: Claim) -> float | None:
    """Return the paper's figure behind a claim, in points: a difference, or of one row its own."""
    if claim.published is not None:
        return claim.published
    ours = published(*claim.row, claim.column)
    if claim.kind == "none survive":
        return ours.value if ours else None
    theirs = published(*claim.reference, claim.column)
    return ours.value - theirs.value if ours and theirs and not claim.also else None


def answer(judgements: Sequence[Judgement]) -> str:
    """Answer the study's question in a paragraph: where the transformer is ahead, and where not."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "not to be told apart": []}
    for judgement in judgements:
        if judgement.claim.headline and judgement.paired:
            standing, text = _standing(judgement.claim, judgement.paired)
            found[standing].append(text)
    parts = [f"{standing} {' and '.join(texts)}" for standing, texts in found.items() if texts]
    here = f"Here the transformer is {'; '.join(parts)}. " if parts else ""
    counts = Counter(judgement.verdict for judgement in judgements)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{here}Of {len(judgements)} claims of the paper: {told}."


def _standing(claim: Claim, paired: Paired) -> tuple[str, str]:
    """Say how the transformer stands to the CNN by the interval of their difference."""
    ends = [
        100 * claim.sign * value + 0.0 for value in (paired.difference, paired.low, paired.high)
    ]
    value, low, high = ends[0], min(ends), max(ends)
    text = f"{claim.headline} ({value:+.1f} points [{low:+.1f}, {high:+.1f}], n = {paired.n})"
    if low > 0:
        return "ahead", text
    return ("behind" if high < 0 else "not to be told apart"), text
