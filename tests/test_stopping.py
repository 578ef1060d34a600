"""Trials that are behind others are stopped early, by Tune's own rules; what comes of them."""

from __future__ import annotations

import json

import pytest
from ray.tune.experiment import Trial

from grid.launch import ACCURACY, PROBE, EarlyStopping
from grid.plan import build_plan
from grid.report.claims import judge_claims
from grid.report.tables import tables_of
from grid.report.verdicts import Verdicts
from grid.run import main
from grid.study import EarlyStop, load_study
from tests.driver import ended, start, trials
from tests.test_report import trial_run
from trainables.scale import CIFAR10, DIGITS
from trainables.train.loop import PROBE as MEASURED_PROBE

STUDY = """
name = "stopping"
early_stop = { rule = "asha", grace = 40 }
[bases.good]
extends = "resnet50"
size = "small"
epochs = 130
[bases.bad]
extends = "good"
epochs = 120
learning_rate = 1e-9
[[tables]]
name = "T"
question = "Who is ahead?"
columns = ["clean"]
rows = [{ label = "good", base = "good" }, { label = "bad", base = "bad" }]
[[claims]]
says = "good is ahead"
test = "ahead"
row = "T/good"
of = "T/bad"
column = "clean"
[[claims]]
says = "bad collapses"
test = "collapses"
row = "T/bad"
"""
STUDENT = '{ label = "student", base = "good", epochs = 50, warm_start = "bad" }'
LINE = 'early_stop = { rule = "asha", grace = 40 }\n'


def written(tmp_path, text=STUDY):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def rule_of(rule, *digests, adversary=None, stops_from=3, epochs=9):
    """Return a scheduler of trials alike, and a function that reports one's figures to it."""
    trials = {
        digest: {
            "digest": digest,
            "stops_from": stops_from,
            "recipe": {"epochs": epochs, "adversary": (adversary or {}).get(digest)},
        }
        for digest in digests
    }
    configs = {d: {"trial": json.dumps(trial), "source": None} for d, trial in trials.items()}
    scheduler = EarlyStopping(rule, configs)

    def report(digest, *figures, outcome="training", metric=ACCURACY, attempt="1"):
        trial = Trial("stub", trial_id=f"{digest}-{attempt}", config=configs[digest], stub=True)
        epochs = [{"epoch": float(e), metric: value} for e, value in figures]
        result = {"digest": digest, "epochs": epochs, "outcome": outcome}
        if outcome != "training":
            return scheduler.on_trial_complete(None, trial, result)
        return scheduler.on_trial_result(None, trial, result)

    return scheduler, report


def test_asha_stops_what_is_not_among_the_best_and_says_what_it_was_compared_with():
    scheduler, report = rule_of(EarlyStop(rule="asha", reduction=2), "a", "b", "c")
    assert [report("a", (e, 0.8)) for e in (1, 2, 3)] == ["CONTINUE"] * 3
    assert report("b", (3, 0.9)) == "CONTINUE"
    assert report("c", (2, 0.1)) == "CONTINUE"  # before the grace
    assert report("c", (3, 0.84)) == "STOP"  # the middle of 0.8 and 0.9 is 0.85
    assert scheduler.reasons == {
        "c": "asha, the best 1 in 2 go on: held_out/accuracy was 84.0% after epoch 3, when the "
        "figures of others (2) were 80.0% to 90.0%"
    }


def test_the_median_rule_compares_with_three_others_or_goes_on():
    scheduler, report = rule_of(EarlyStop(rule="median"), *"abcd", stops_from=2)
    for digest, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        assert report(digest, (1, 0.1), (2, value)) == "CONTINUE"
    assert report("d", (1, 0.2), (2, 0.75)) == "STOP"
    assert scheduler.reasons["d"].startswith("median: held_out/accuracy was 75.0% after epoch 2")
    # Over already: no rule is asked again.
    assert report("d", (3, 0.1), outcome="finished") is None


def test_a_trial_that_is_tried_again_is_compared_with_others_and_not_with_itself():
    scheduler, report = rule_of(EarlyStop(rule="asha"), "a", "b")
    assert report("a", (3, 0.8)) == "CONTINUE"
    assert report("a", (3, 0.8), (4, 0.7), attempt="2") == "CONTINUE"
    assert report("a", (9, 0.1), attempt="2") == "CONTINUE"  # its last epoch
    assert report("b", (3, 0.7)) == "STOP"
    assert list(scheduler.reasons) == ["b"]


def test_adversarial_trainings_are_compared_by_the_probe_with_those_of_their_radius():
    assert PROBE == MEASURED_PROBE
    small, large = ({"norm": "linf", "epsilon": epsilon} for epsilon in (0.01, 0.02))
    attacked = {"a": small, "b": large, "c": small}
    scheduler, report = rule_of(EarlyStop(rule="asha"), *"abcd", adversary=attacked)
    assert report("d", (3, 0.9)) == "CONTINUE"
    assert report("a", (3, 0.5), metric=PROBE) == "CONTINUE"
    assert report("b", (3, 0.3), metric=PROBE) == "CONTINUE"
    assert report("c", (3, 0.1)) == "CONTINUE"  # by another metric
    assert report("c", (4, 0.4), metric=PROBE) == "STOP"
    assert list(scheduler.reasons) == ["c"]


def test_a_trial_that_others_need_is_never_stopped(tmp_path):
    text = STUDY.replace('base = "bad" }]', f'base = "bad" }}, {STUDENT}]')
    plan = build_plan(load_study(str(written(tmp_path, text))), DIGITS)
    # A tenth of the epochs at digits; the student trains 5 epochs, the others 13 and 12.
    assert {t.recipe.epochs: t.stops_from for t in plan} == {13: 4, 12: 0, 5: 4}
    _, report = rule_of(EarlyStop(rule="asha"), "a", "b", stops_from=0)
    assert [report(digest, (3, value)) for digest, value in (("a", 0.9), ("b", 0.1))] == [
        "CONTINUE"
    ] * 2


def test_the_grace_is_of_full_size_and_ends_before_the_training(tmp_path):
    study = load_study(str(written(tmp_path)))
    assert {t.stops_from for t in build_plan(study, CIFAR10)} == {round(40 * CIFAR10.epochs_factor)}
    late = load_study(str(written(tmp_path, STUDY.replace("grace = 40", "grace = 120"))))
    plan = build_plan(late, DIGITS)
    assert {t.recipe.epochs: t.stops_from for t in plan} == {13: 12, 12: 0}
    assert "may end 1 of 2 trials, from epoch 12 on" in plan.notes[0]
    off = load_study(str(written(tmp_path, STUDY.replace(LINE, "early_stop = false\n"))))
    assert {t.stops_from for t in build_plan(off, DIGITS)} == {0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"asha"', '"ahsa"', "Did you mean 'asha'"),
        ("grace = 40", "grace = 0", "early_stop.grace"),
        ("grace = 40", "reduction = 1", "early_stop.reduction"),
        ('"asha", grace = 40', '"median", reduction = 3', "reduction belongs to the rule 'asha'"),
        ("\n[bases.good]", "\nplacement.resnet.workers = 2\n[bases.good]", "resnet has several"),
    ],
)
def test_a_wrong_rule_ends_the_command_with_2_before_any_compute(
    tmp_path, old, new, message, capsys
):
    with pytest.raises(SystemExit, match="2"):
        main(["--study", str(written(tmp_path, STUDY.replace(old, new, 1))), "--plan"])
    assert message in capsys.readouterr().err


def test_a_claim_that_needs_a_stopped_trial_has_too_little_data(tmp_path):
    text = STUDY.replace('columns = ["clean"]', 'columns = ["clean", "pgd-10"]')
    study = load_study(str(written(tmp_path, text)))
    plan = build_plan(study, DIGITS)
    good, bad = (row.recipe.digest() for row in plan.tables[0].rows)
    runs = {good: trial_run(good), bad: trial_run(bad, "stopped early", "asha: behind")}
    judged = judge_claims(study.claims, tables_of(study, plan, runs), Verdicts(None, runs))
    said = ("too little data to say", "bad stopped early (asha: behind)")
    assert [(j.decision, j.outcome) for j in judged] == [said, said]
    waiting = Verdicts(None, runs).health(plan).waiting
    assert waiting == {trial.name: ["pgd"] for trial in plan if trial.digest == good}


@pytest.mark.slow
def test_a_stopped_trial_goes_on_once_more_is_asked_and_ends_with_the_same_bits(tmp_path):
    study, results = written(tmp_path), tmp_path / "results"
    # Two cores each: one after the other, the longer first.
    alone, few = ("--cpus-per-worker", "2", "--train-images", "320"), "digits-320train"
    said = ended(start(study, results, *alone))
    runs = {run.outcome: run for run in trials(results, few).values()}
    assert runs.keys() == {"finished", "stopped early"}
    stopped = runs["stopped early"]
    assert "held_out/accuracy was" in stopped.reason
    assert f" {stopped.digest[:6]}: {stopped.reason}" in said
    assert (stopped.logged_epochs, stopped.cells) == (4, {})
    assert list((results / "trials" / stopped.digest).glob("epoch-00004-*.pt"))
    assert not (results / "trials" / stopped.digest / "weights.safetensors").exists()
    assert f"stopped early: {stopped.reason}" in (results / "report" / "tables.md").read_text()
    again = ended(start(study, results, *alone))
    assert "2 done, 0 to train; 0 cells to judge" in again
    assert trials(results, few)[stopped.digest].end_time == stopped.end_time
    whole = written(tmp_path, STUDY.replace(LINE, ""))
    went_on = ended(start(whole, results, *alone))
    assert "1 done, 1 to train; 1 cells to judge" in went_on
    ended(start(whole, tmp_path / "other", *alone))
    ours, theirs = (trials(folder, few)[stopped.digest] for folder in (results, tmp_path / "other"))
    assert (ours.outcome, ours.run_id) == ("finished", stopped.run_id)
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.metrics["clean"] == theirs.metrics["clean"]
