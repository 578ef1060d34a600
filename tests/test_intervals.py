"""Intervals that are no Wilson's: against statsmodels and scipy on known verdicts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import bootstrap
from statsmodels.stats.weightstats import DescrStatsW

from evaluators import SEVERITIES
from evaluators.base import Batch, verdicts
from evaluators.corruption_kinds import KINDS
from evaluators.corruptions import Corruptions
from evaluators.texture_patch import TexturePatchAttack
from trainables.scale import DIGITS

N = 60
BATCH = Batch(torch.zeros(N, 3, 4, 4), torch.zeros(N, dtype=torch.long), tuple(map(str, range(N))))


def test_the_error_under_corruptions_has_the_percentile_bootstrap_over_images():
    rng = np.random.default_rng(0)
    skill_N = rng.uniform(0.2, 1.0, N)  # an image is easy or hard in all its corruptions
    wrong = {(k, s): rng.uniform(size=N) > skill_N for k in KINDS for s in SEVERITIES}
    ledger = pa.concat_tables(
        verdicts(BATCH, f"{kind}-{severity}", torch.from_numpy(errs.astype(int)))
        for (kind, severity), errs in wrong.items()
    )
    score = next(s for s in Corruptions(DIGITS).summarize(ledger) if s.name == "corruptions")
    per_image = np.mean(list(wrong.values()), axis=0)
    expected = bootstrap((per_image,), np.mean, method="percentile", n_resamples=5000, rng=1)
    assert score.value == pytest.approx(per_image.mean())
    assert score.n == N
    # Two bootstraps of 1,000 and 5,000 resamples differ by chance.
    assert score.low == pytest.approx(expected.confidence_interval.low, abs=0.008)
    assert score.high == pytest.approx(expected.confidence_interval.high, abs=0.008)


def test_mean_queries_have_the_normal_interval_of_statsmodels():
    queries = [int(q) for q in np.random.default_rng(0).integers(25, 800, N)]
    wrong, stage = torch.ones(N, dtype=torch.long), ["patch-1"] * N
    ledger = pa.concat_tables(
        verdicts(BATCH, question, wrong, stage=stage, queries=queries)
        for question in ("tpa/clean", "tpa", "tpa-random")
    )
    found = {s.name: s for s in TexturePatchAttack(DIGITS).summarize(ledger)}["tpa/queries"]
    low, high = DescrStatsW(queries).zconfint_mean()
    assert found.value == pytest.approx(np.mean(queries))
    assert (found.low, found.high) == pytest.approx((low, high))
