"""Say which versions and hardware trained and judged a study's trials, and where they are mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from trainables.store.tracking import TrialRun

LABELS = {"python": "Python", "cpu": "CPU", "gpu": "GPU"}
UNKNOWN = "unknown"


def describe_provenance(runs: Sequence[TrialRun]) -> str:
    """Return it in sentences: 'Trained with torch 2.15.0. Judged with the same.'"""
    trained = [run.trained for run in runs if run.logged_epochs]
    judged = [run.judged.get(evaluator, {}) for run in runs for evaluator in run.cells]
    if judged and _values(judged) == _values(trained):
        return f"{_sentences('Trained', trained, 'trials')} Judged with the same."
    sentences = (_sentences("Trained", trained, "trials"), _sentences("Judged", judged, "cells"))
    return " ".join(sentence for sentence in sentences if sentence)


def _values(of: Sequence[Mapping[str, str]]) -> set[tuple[tuple[str, str], ...]]:
    return {tuple(sorted(entry.items())) for entry in of}


def _sentences(verb: str, of: Sequence[Mapping[str, str]], unit: str) -> str:
    """Name what all have in common, then every mix with its numbers."""
    alike, mixed = [], []
    for name in dict.fromkeys(name for entry in of for name in entry):
        counts = sorted(Counter(entry.get(name, UNKNOWN) for entry in of).items())
        label = LABELS.get(name, name)
        if len(counts) == 1:
            alike.append(f"{label} {counts[0][0]}")
        else:
            values, numbers = (" and ".join(map(str, part)) for part in zip(*counts, strict=True))
            mixed.append(f"{verb} with {label} {values}: {numbers} {unit}.")
    if not alike and not mixed:
        return f"{verb} with unknown versions." if of else ""
    same = [f"{verb} with {', '.join(alike)}."] if alike else []
    return " ".join(same + mixed)
