from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from evaluators.base import Batch, verdicts
from evaluators.paired import compare, image_scores, mcnemar


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (10, 2), (0, 6), (41, 59)])
def test_the_exact_mcnemar_is_statsmodels(gained, lost):
    table = [[50, lost], [gained, 20]]
    expected = 1.0 if gained == lost == 0 else reference_mcnemar(table, exact=True).pvalue
    assert mcnemar(gained, lost) == pytest.approx(float(expected), abs=1e-12)


def test_a_difference_is_taken_on_the_images_that_both_have():
    ours = {"a": 1.0, "b": 1.0, "c": 0.0, "only ours": 0.0}
    reference = {"a": 0.0, "b": 1.0, "c": 0.0, "only theirs": 1.0}
    found = compare([ours], [reference])
    assert (found.n, found.p) == (3, 1.0)
    assert found.difference == pytest.approx(1 / 3)
    assert found.low == pytest.approx(0.0)
    assert found.high == pytest.approx(1.0)


def test_the_bootstrap_covers_as_a_normal_interval_does_on_many_images():
    ours = {str(i): float(i % 10 < 8) for i in range(2000)}
    reference = {str(i): float((i // 10) % 10 < 7) for i in range(2000)}
    found = compare([ours], [reference])
    assert found.difference == pytest.approx(0.1)
    # Independent: the variance is 0.8 * 0.2 + 0.7 * 0.3.
    reach = 1.96 * (0.37 / 2000) ** 0.5
    assert found.low == pytest.approx(0.1 - reach, abs=0.004)
    assert found.high == pytest.approx(0.1 + reach, abs=0.004)


def test_images_that_all_agree_leave_room_for_those_unseen():
    answers = {str(i): float(i % 2) for i in range(50)}
    found = compare([answers], [answers])
    # Clopper and Pearson's bound of 0 in 50 is 1 - 0.025 ** (1 / 50).
    assert found.difference == 0
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 50))


def test_seeds_are_averaged_image_by_image_and_have_no_mcnemar():
    ours = [{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    reference = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}]
    found = compare(ours, reference)
    assert (found.difference, found.n, found.p) == (0.5, 2, None)


def test_models_without_a_common_image_are_not_compared():
    assert compare([{"a": 1.0}], [{"b": 1.0}]) is None


def test_scores_of_images_are_their_survival_and_for_corruptions_their_error():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ("a", "b"))
    ledger = pa.concat_tables(
        [
            verdicts(batch, "fog-1", torch.tensor([0, 0])),
            verdicts(batch, "fog-2", torch.tensor([1, 0])),
        ]
    )
    assert image_scores(ledger, "fog-1") == {"a": 1.0, "b": 0.0}
    assert image_scores(ledger, "corruptions") == {"a": 0.5, "b": 1.0}
    assert image_scores(ledger, "corruptions/mCE") is None
