"""Confidences in the ledger, the scores read from them, and whether two models err alike."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, log_loss

import evaluators
from evaluators.base import Batch, answers, verdicts
from evaluators.calibration import calibration_scores, severity_errors
from evaluators.intervals import error_consistency
from evaluators.ledger import CONFIDENCES, TEMPERATURES, from_parquet, survival_scores, to_parquet


def ledger_of(logits, labels):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    ids = tuple(f"{place:06}" for place in range(len(labels)))
    batch = Batch(torch.zeros(len(labels), 3, 2, 2), torch.as_tensor(labels), ids)
    return answers(batch, "clean", logits)


def scores_of(ledger):
    return {score.name: score for score in calibration_scores(ledger)}


def test_scores_of_four_images_are_those_counted_by_hand():
    # Sure by 0.9 and 0.9 (right, wrong), by 0.6 and 0.6 (right, right).
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]
    ledger = ledger_of(np.log(probabilities), [0, 1, 0, 0])
    scores = scores_of(ledger)
    assert scores["clean/ece"].value == pytest.approx((0.4 + 0.4) / 2, abs=1e-3)
    assert scores["clean/aurc"].value == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert scores["clean/brier"].value == pytest.approx(
        (0.1**2 + 0.9**2 + 0.4**2 + 0.4**2) / 4, abs=1e-3
    )
    nats = log_loss([0, 1, 0, 0], probabilities)
    assert scores["clean/nll"].value == pytest.approx(nats, rel=1e-3)
    assert ledger["confidence"].to_pylist() == pytest.approx([0.9, 0.9, 0.6, 0.6], rel=1e-3)
    assert ledger["label_confidence"].to_pylist() == pytest.approx([0.9, 0.1, 0.6, 0.6], rel=2e-3)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_an_answer_of_no_finite_logits_counts_as_no_confidence(odd):
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]
    sound = scores_of(ledger_of(np.log(probabilities), [0, 1, 0]))
    scores = scores_of(ledger_of(np.vstack([np.log(probabilities), [odd, 0]]), [0, 1, 0, 1]))
    assert scores.keys() == sound.keys()
    assert all(np.isfinite([s.value, s.low, s.high]).all() for s in scores.values())
    assert scores["clean/brier"].n == 4


def test_a_model_that_is_too_sure_by_two_is_calibrated_at_temperature_two():
    generator = torch.Generator().manual_seed(0)
    honest = 3 * torch.randn(4000, 10, generator=generator)
    labels = honest.softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    too_sure, as_sure = (
        scores_of(ledger_of(2 * honest, labels)),
        scores_of(ledger_of(honest, labels)),
    )
    step = 2 ** (1 / 6)
    assert 2 / step < too_sure["clean/temperature"].value < 2 * step
    assert as_sure["clean/ece"].low == 0  # the truth, which the error itself never reaches
    assert too_sure["clean/ece"].low > 0.05
    for name in ("clean/ece", "clean/nll"):
        scaled = too_sure[f"{name}-scaled"]
        assert scaled.value == pytest.approx(as_sure[name].value, abs=0.02)
        assert scaled.high < too_sure[name].low


def test_each_half_is_judged_at_the_temperature_of_the_other():
    # Images 0 and 2 are best answered ever more surely, 1 and 3 ever less.
    ledger = ledger_of([[1.0, 0.0], [0.0, 1.0]] * 2, [0, 0, 0, 0])
    surest, least = min(TEMPERATURES), max(TEMPERATURES)
    losses = [np.log(1 + np.exp(-1 / least)), np.log(1 + np.exp(1 / surest))]
    scores = scores_of(ledger)
    assert scores["clean/nll-scaled"].value == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_model_that_is_sure_of_another_class_has_a_finite_loss():
    scores = scores_of(ledger_of([[1e9, 0.0], [1e9, 0.0], [0.0, 9.0]], [1, 0, 1]))
    assert all(np.isfinite([s.value, s.low, s.high]).all() for s in scores.values())


def test_an_older_ledger_has_no_confidences_and_is_still_read():
    ledger = ledger_of(torch.eye(3), [0, 1, 2])
    older = to_parquet(ledger.drop_columns(list(CONFIDENCES)), seconds=1.0)
    read, _ = from_parquet(older)
    assert read.schema == ledger.schema
    assert read["confidence"].null_count == 3
    assert not calibration_scores(read)
    later = ledger_of(torch.eye(3), [1, 1, 1])  # of a run that goes on with older shards
    assert not calibration_scores(pa.concat_tables([read, later]))
    assert survival_scores(read) == survival_scores(ledger)
    damaged = to_parquet(ledger.drop_columns(["label"]), seconds=1.0)
    with pytest.raises(ValueError, match="it is no ledger"):
        from_parquet(damaged)


def test_what_is_kept_survives_the_file():
    ledger = ledger_of(
        torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), [0, 1, 2, 3, 0]
    )
    read, _ = from_parquet(to_parquet(ledger, seconds=1.0))
    assert read.equals(ledger)
    assert len(read["tempered"][0].as_py()) == 2 * len(TEMPERATURES)


def test_error_consistency_is_cohens_kappa_of_who_errs_where():
    rng = np.random.default_rng(0)
    first = rng.random(500) < 0.8
    second = np.where(rng.random(500) < 0.6, first, rng.random(500) < 0.7)
    ours, theirs = ({str(i): float(v) for i, v in enumerate(side)} for side in (first, second))
    kappa = error_consistency("clean", ours, theirs)
    assert kappa.value == pytest.approx(cohen_kappa_score(first, second))
    assert kappa.low < kappa.value < kappa.high
    assert error_consistency("clean", ours, ours).value == 1
    assert error_consistency("clean", {"0": 1.0}, {"0": 1.0}) is None
    assert error_consistency("corruptions", {"0": 0.5}, {"0": 0.25}) is None


def test_a_comparison_says_whether_two_models_err_alike():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (images.mean(dim=(1, 2, 3)) > 0.5).long()

    def by_mean(x):
        brightness = x.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-brightness, brightness], dim=1)

    def by_corner(x):
        brightness = x[:, 0, :4, :4].mean(dim=(1, 2)) - 0.5
        return torch.stack([-brightness, brightness], dim=1)

    first, second = (evaluators.evaluate(m, (images, labels)) for m in (by_mean, by_corner))
    assert first.calibration["clean/ece"].n == 40
    compared = evaluators.compare(second, evaluators.evaluate(by_corner, (images, labels)))
    assert compared.kappa["clean"].value == 1
    assert "error consistency" in str(compared)
    assert not evaluators.compare(first, second).kappa  # the first errs on no image


def test_corrupted_images_are_calibrated_at_each_severity_over_all_kinds():
    """At severity 3 two images under two kinds each: sure by 0.9 and 0.6, right in 3 of 4."""
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.4055, 0.0], [0.4055, 0.0]])
    logits[:2, 0] = np.log(9)
    labels, rows = torch.tensor([0, 0, 0, 1]), []
    for kind, places in (("fog", [0, 2]), ("snow", [1, 3])):
        batch = Batch(torch.zeros(2, 1, 1, 1), labels[places], ("a", "b"))
        predicted, kept = logits[places].argmax(1), {"logits_BK": logits[places]}
        rows.append(verdicts(batch, f"{kind}-3", predicted, **kept, tempered=False))
    ledger = pa.concat_tables(rows)
    scores = scores_of(ledger)
    assert set(scores) == {
        f"corruptions/severity-3/{name}" for name in ("ece", "ece-adaptive", "brier", "nll", "aurc")
    }
    ece = scores["corruptions/severity-3/ece"]
    assert (ece.value, ece.n) == (pytest.approx((2 * 0.1 + 2 * 0.1) / 4, abs=1e-3), 2)
    brier = scores["corruptions/severity-3/brier"]
    assert brier.value == pytest.approx((2 * 0.01 + 0.16 + 0.36) / 4, abs=1e-3)
    nll = -(2 * np.log(0.9) + np.log(0.6) + np.log(0.4)) / 4
    assert scores["corruptions/severity-3/nll"].value == pytest.approx(nll, abs=1e-3)
    # The images are resampled, not the answers: brier is 0.01 of a's and 0.26 of b's.
    assert (brier.low, brier.high) == (pytest.approx(0.01, abs=1e-3), pytest.approx(0.26, abs=1e-3))
    assert [s.name for s in severity_errors(ledger)] == ["corruptions/severity-3/ece"]
    older = verdicts(batch, "frost-3", predicted)
    assert not calibration_scores(pa.concat_tables([ledger, older]))
