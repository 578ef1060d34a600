"""Designs of studies: which cells get how many images, remembered and printed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from evaluators import EVALUATORS, column_named, evaluator_named, headline_of, images_of_score
from grid.design import with_design
from grid.options import RunOptions
from grid.plan import build_plan
from grid.run import main
from grid.study import load_study
from trainables.scale import CIFAR10, DIGITS, IMAGENET
from trainables.store.results import DESIGNED

STUDY = load_study("bai2021")


def design_of(results, *words, tables=("T1", "T2"), scale=DIGITS, **chosen):
    options = RunOptions.read(["--results", str(results), "--tables", *tables, *words])
    scale = replace(scale, detect=options.detect or scale.detect)
    plan = build_plan(STUDY, scale, tables=tables, **chosen)
    return with_design(options, STUDY, plan, scale, scale.data_set.held_out_images)


def images_of(plan, table, label):
    row = next(r for t in plan.tables for r in t.rows if (t.name, r.label) == (table, label))
    trials = [trial for trial in plan if trial.digest in row.digests]
    assert len({str(dict(trial.images)) for trial in trials}) == 1  # every seed the same
    return dict(trials[0].images)


def test_a_design_lies_in_the_storage_which_outlives_a_head(tmp_path):
    storage = str(tmp_path / "storage")
    plan, design = design_of(tmp_path / "head", "--storage", storage)
    again, unmade = design_of(tmp_path / "next", "--storage", storage)
    assert design
    assert unmade is None
    assert [trial.images for trial in again] == [trial.images for trial in plan]


def test_commands_on_one_server_have_one_design_whatever_their_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    server = ("--mlflow", f"sqlite:///{tmp_path}/server.db")
    plan, design = design_of(tmp_path / "one", *server)
    assert design
    (tmp_path / "one" / DESIGNED).unlink()
    for results in ("one", "other"):
        again, unmade = design_of(tmp_path / results, *server)
        assert unmade is None
        assert [trial.images for trial in again] == [trial.images for trial in plan]
        assert (tmp_path / results / DESIGNED).exists()  # which --pull brings home


def test_a_cell_gets_the_images_that_its_claims_need_and_others_a_few(tmp_path):
    plan, design = design_of(tmp_path, "--seeds", "1", seeds=1)
    by_claim = {claim.claim.says: claim for claim, _ in design.designs}
    assert len(by_claim) == 7  # of nine claims about T1 and T2 two are about collapses
    gelu = by_claim["GELU in place of ReLU makes an adversarially trained CNN more robust"]
    no_gain = by_claim["AdamW does not help an adversarially trained CNN"]
    level = by_claim["Under adversarial training with GELU a CNN is as robust as a transformer"]
    few = {"pgd": 32, "autoattack-bounded": 32}
    gelus = few | {"autoattack-bounded": level.images}
    assert images_of(plan, "T2", "ResNet-50 GELU") == gelus
    # ReLU is in claims about both of its attacks.
    assert images_of(plan, "T2", "ResNet-50 ReLU") == {
        "autoattack-bounded": gelu.images,
        "pgd": no_gain.images,
    }
    # At 0.05 / 7; Connor's formula has 308.8: (2.690 * 0.5 + 0.842 * sqrt(0.25 - 0.01))^2 / 0.1^2.
    assert no_gain.images == no_gain.needed == 315
    # A lead is tested on one side: 2.450 in place of 2.690, 268.3.
    assert gelu.images == 275
    # Level from both ends: 1.282 in place of 0.842, 389.2.
    assert level.images == 392
    # None of 138 survive: 2.690^2 * 0.95 / 0.05 = 137.5.
    vanillas = few | {"autoattack-small-bounded": 32, "autoattack-bounded": 138}
    assert images_of(plan, "T1", "DeiT-S") == vanillas
    assert images_of(plan, "T2", "DeiT-S without curriculum") == few


@pytest.mark.parametrize("name", [*filter(headline_of, EVALUATORS)])
@pytest.mark.parametrize("scale", [DIGITS, replace(DIGITS, natural_tilt=0.0), IMAGENET, CIFAR10])
def test_what_a_plan_says_of_an_evaluator_is_what_its_class_does(name, scale):
    evaluator, score = evaluator_named(name, scale), headline_of(name)
    draws = evaluator.subset_size is not None
    images = 597 if draws else evaluator.asked_about(597)
    facts = images_of_score(score, replace(scale, autoattack="exact"), 597)
    assert facts == (images, draws, column_named(score).error)


def test_at_full_size_nothing_is_designed_unless_a_difference_is_asked_for(tmp_path):
    plan, design = design_of(tmp_path, scale=IMAGENET)
    assert design is None
    assert not any(trial.images for trial in plan)
    plan, design = design_of(tmp_path, "--detect", "2points", scale=IMAGENET)
    assert images_of(plan, "T2", "ResNet-50 ReLU")["pgd"] > 5000


def test_a_study_may_state_the_difference_where_the_scale_has_one(tmp_path, capsys):
    assert (STUDY.detect_at(DIGITS), STUDY.detect_at(IMAGENET)) == (pytest.approx(0.1), 0)
    coarse = STUDY.model_copy(update={"detect_points": 20.0})
    assert (coarse.detect_at(DIGITS), coarse.detect_at(IMAGENET)) == (pytest.approx(0.2), 0)
    words = ["--plan", "--study", "singh2023-revisiting-at", "--results", str(tmp_path)]
    assert main(words) == 0
    assert "To tell 30 points" in capsys.readouterr().out
    assert main([*words, "--detect", "15points"]) == 0
    assert "To tell 15 points" in capsys.readouterr().out


def test_the_same_command_again_asks_the_same_and_another_never_less(tmp_path):
    first, _ = design_of(tmp_path)
    known = json.loads((tmp_path / DESIGNED).read_text())
    ((key, counts),) = known.items()
    # As if the results had told another number when the design was made.
    cell = next(cell for cell in counts if cell.endswith("pgd"))
    (tmp_path / DESIGNED).write_text(json.dumps({key: counts | {cell: 500}}))
    again, design = design_of(tmp_path)
    digest = cell.split()[0]
    pgd = {t.digest: t.images.get("pgd") for t in again}
    assert design is None
    assert pgd[digest] == 500
    assert pgd | {digest: 0} == {t.digest: t.images.get("pgd") for t in first} | {digest: 0}
    coarse, _ = design_of(tmp_path, "--detect", "30points")
    assert {t.digest: t.images for t in coarse} == {t.digest: t.images for t in again}


def test_an_older_design_leaves_other_cells_of_its_trials_at_what_they_were_judged_by(tmp_path):
    design_of(tmp_path)
    known = json.loads((tmp_path / DESIGNED).read_text())
    ((key, counts),) = known.items()
    claimed = {cell: images for cell, images in counts.items() if images != 32}
    trials = {cell.split()[0] for cell in claimed}
    for older in (key, "another"):
        (tmp_path / DESIGNED).write_text(json.dumps({older: claimed}))
        for _ in range(2):  # the second run asks what the first did
            plan, _ = design_of(tmp_path)
            images = {f"{t.digest} {name}": n for t in plan for name, n in t.images.items()}
            unclaimed = {cell for cell in counts if cell.split()[0] not in trials}
            assert images == claimed | dict.fromkeys(unclaimed, 32)
            assert 0 < len(unclaimed) < len(counts) - len(claimed)


def test_trials_and_evaluators_without_a_claim_get_a_few_when_they_come_later(tmp_path):
    words = {"evaluators": ("clean", "autoattack-small-bounded", "autoattack-bounded")}
    design_of(tmp_path, tables=("T1",), **words)
    before = (tmp_path / DESIGNED).read_text()
    later, design = design_of(tmp_path, tables=("T1",), evaluators=(*words["evaluators"], "pgd"))
    assert design is None  # the claims are the same
    assert {trial.images["pgd"] for trial in later} == {32}
    assert (tmp_path / DESIGNED).read_text() == before


def test_a_plan_is_printed_with_every_claims_design_and_remembers_nothing(tmp_path, capsys):
    results = tmp_path / "results"
    words = ["--plan", "--tables", "T2", "--seeds", "1", "--detect", "20points", "--power", "0.9"]
    assert main([*words, "--results", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (heading,) = [line for line in lines if line.startswith("To tell 20 points with power 0.9")]
    assert "each of 5 claims at level 0.01 " in heading
    (line,) = [line for line in lines if ": AdamW does not help" in line]
    # Connor's formula has 87.9: (2.576 * 0.5 + 1.282 * sqrt(0.25 - 0.04))^2 / 0.2^2.
    assert "82 images tell 20.0 points, needs 82 in this one training" in line
    assert not results.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--detect 0points", "'0points' is no difference like 5points"),
        ("--detect 100points", "'100points' is no difference like 5points"),
        ("--detect much", "'much' is no difference like 5points"),
        ("--detect 5points --power 1", "--power: Input should be less than 1"),
        ("--detect 5points --power 0", "--power: Input should be greater than 0"),
        ("--detect 5points --study full", "study 'full' has none"),
        ("--detect 5points --tables T5 --evaluators pgd", "has none that these trials"),
    ],
)
def test_what_cannot_be_designed_ends_the_command_before_any_compute(
    words, error, tmp_path, capsys
):
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--results", str(tmp_path / "results")])
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"key": {"cell": 0}}', "[]"])
def test_a_damaged_memory_of_designs_is_named(content, tmp_path):
    (tmp_path / DESIGNED).write_text(content)
    with pytest.raises(ValueError, match=rf"{DESIGNED} is damaged: remove it"):
        design_of(tmp_path)


def test_claims_that_need_more_images_than_there_are_say_what_these_tell(tmp_path, capsys):
    words = ["--plan", "--tables", "T5", "T8", "--seeds", "1", "--results", str(tmp_path)]
    assert main([*words, "--detect", "5points"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "A smaller transformer leads a smaller CNN" in line]
    # Four claims, each on one side at 0.0125: Connor's formula has 947, with 2.241 and 0.842.
    assert "needs 971 in this one training" in line
    assert line.strip().startswith("597 images tell ")
    assert float(line.split("tell ")[1].split()[0]) > 5
