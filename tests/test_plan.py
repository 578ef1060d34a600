"""Recipe x axes x scale -> trials, with the study's values worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from grid.axes import AXES, SETTABLE, check_settings, with_settings
from grid.plan import build_plan, enumerate_trials
from grid.study import Study, load_study
from tests.paper import (
    BASES,
    CURRICULA,
    STUDY,
    adversarial_resnet50,
    deit,
    resnet50,
    resnet_aligned,
    with_axes,
    with_axis,
)
from trainables.recipe import Preprocessing
from trainables.scale import CIFAR10, DIGITS, IMAGENET

ROW = {
    "epoch": 0,
    "randaug_magnitude": 4,
    "mix_probability": 0.5,
    "cutmix_alpha": 1.0,
    "switch_probability": 0.5,
}
# Values of every axis.
VALUES = {
    "model": ("resnet18", "deit_base", "timm:convnext_tiny"),
    "family": ("resnet", "deit"),
    "size": ("small", "large"),
    "optimizer": ("sgd", "adamw", "lamb"),
    "augmentation": ("none", "cutmix", "randaug+mixup+cutmix"),
    "training": ("clean", "adversarial"),
    "curriculum": ("none", "study", (ROW,)),
    "teacher": ("none", "resnet50"),
    "scale": ("imagenet",),
    "activation": ("relu", "silu"),
    "learning_rate": (0.0123,),
    "weight_decay": (0.003,),
    "scheduler": ("step", "cosine", "poly"),
    "warmup_epochs": (3.0,),
    "warmup_rate": (0.002,),
    "floor_rate": (3e-6,),
    "epochs": (4, 60),
    "batch_size": (512,),
    "augmentations": ("none", "randaug+mixup+cutmix"),
    "randaug_magnitude": (5,),
    "mixup_alpha": (0.3,),
    "cutmix_alpha": (0.7,),
    "mix_probability": (0.4,),
    "switch_probability": (0.2,),
    "label_smoothing": (0.3,),
    "curriculum_epochs": (50,),
    "norm": ("batch", "ghost"),
    "ghost_batch": (32,),
    "micro_batch": (64,),
    "pixel_range": ("data", "half"),
    "precision": ("float32", "bf16"),
    "adversary": ({"epsilon": "2/255", "step_size": "1/255", "steps": 3},),
    "distillation": (),
    "protocol": ("as-published",),
    "init": ("timm:resnet18.a1_in1k",),
    "init_sha256": (),
    "preprocessing": ({"size": 32, "squash": True},),
    "seed": (3,),
    "model_args": ({"drop_rate": 0.1},),
    "drop_path": (0.1,),
    "dropout": (0.2,),
    "optimizer_args": ({"eps": 1e-7},),
    "layer_decay": (0.75,),
    "clip_grad": (1.0,),
    "clip_mode": (),
    "ema_decay": (0.99,),
    "ema_evaluated": (True,),
    "lookahead": (True,),
    "scheduler_args": ({"decay_rate": 0.5},),
    "warmup_prefix": (True,),
    "cooldown_epochs": (1,),
    "randaug_layers": (3,),
    "randaug_std": (0.0,),
    "color_jitter": (0.4,),
    "erasing": (0.25,),
    "repeats": (3,),
    "flip": (False,),
    "least_crop": (0.2,),
    "train_sizes": ((160,),),
    "loss": ("bce",),
    "bce_threshold": (),
    "warm_start": ("none", "resnet50"),
    "reset_head": (False,),
}


def row(name, label):
    table = next(table for table in STUDY.tables if table.name == name)
    return next(row.recipe for row in table.rows if row.label == label)


def spanned(base, axes, **keys):
    study = Study(name="s", bases=BASES, curricula=CURRICULA, base=base, axes=axes, **keys)
    combinations, refused = enumerate_trials(study, IMAGENET)
    return [request.recipe for request in combinations], refused


def with_all(study, **settings):
    return study.model_copy(update={"settings": settings})


def test_equal_rows_of_tables_are_one_trial():
    plan = build_plan(STUDY, DIGITS, seeds=1)
    own = next(t for t in plan if "T1 ResNet-50" in t.serves)
    assert {"T3 ResNet-50", "T4 none", "T5 ResNet-50", "T6 step, SGD"} <= set(own.serves)
    assert len({trial.digest for trial in plan}) == len(plan.trials) == 39
    assert plan.requests == 53


def test_recipes_resolve_to_the_studys_hyperparameters():
    aligned = resnet_aligned()
    assert (aligned.learning_rate, aligned.weight_decay, aligned.batch_size) == (5e-4, 0.05, 256)
    assert (aligned.scheduler, aligned.warmup_epochs, aligned.label_smoothing) == ("cosine", 5, 0.1)
    assert (deit().learning_rate, deit().batch_size) == (2e-3, 2048)
    attacked = adversarial_resnet50()
    assert (attacked.learning_rate, attacked.batch_size, attacked.warmup_rate) == (1.6, 4096, 0.1)
    assert (attacked.micro_batch, attacked.accumulation, attacked.label_smoothing) == (1024, 4, 0.1)
    assert (attacked.norm, attacked.ghost_batch) == ("ghost", 64)
    assert attacked.adversary.plain_start == 0.2
    smooth = row("T2", "ResNet-50 GELU")
    assert (smooth.learning_rate, smooth.micro_batch, smooth.accumulation) == (0.8, 512, 8)
    eased = row("T2", "DeiT-S")
    assert (eased.learning_rate, eased.warmup_epochs, len(eased.curriculum)) == (4e-3, 10, 11)


def test_cross_recipes_differ_only_in_what_they_cross():
    fields = {"optimizer", "learning_rate", "weight_decay", "warmup_epochs", "warmup_rate"}
    crossed = {"with AdamW": fields, "with strong augmentation": {"augmentations"}}
    own = row("T2", "ResNet-50 ReLU")
    for label, expected in crossed.items():
        other = row("T2", f"ResNet-50 {label}")
        differing = {k for k in type(own).model_fields if getattr(own, k) != getattr(other, k)}
        assert differing == expected


def test_what_headline_claims_compare_is_trained_seven_times_or_three_unless_stated():
    plan = build_plan(STUDY, DIGITS)
    seeds = {f"{t.name}/{row.label}": row.seeds for t in plan.tables for row in t.rows}
    # T3's claim and T5's; T1's rows and T4's "none" are the same models, of which they take one.
    assert {seeds[n] for n in ("T3/ResNet-50", "T3/DeiT-S", "T5/ResNet-50*")} == {7}
    assert {seeds[n] for n in ("T1/DeiT-S", "T4/none")} == {1}
    # T2's GELU claim: adversarial training.
    assert {n for n, times in seeds.items() if times == 3} == {"T2/DeiT-S", "T2/ResNet-50 GELU"}
    assert {seeds["T4/cutmix"], seeds["T2/ResNet-50 ReLU"]} == {1}
    seeded = Counter(trial.recipe.seed for trial in plan)
    assert seeded == {0: 39, 1: 5, 2: 5, 3: 3, 4: 3, 5: 3, 6: 3}
    assert plan.notes == ("the rows of headline claims are trained 3 or 7 times, all others once",)
    assert len(build_plan(STUDY, IMAGENET).trials) == 39
    assert len(build_plan(STUDY, DIGITS, tables=["T4"]).trials) == 8
    stated = STUDY.model_copy(update={"replicates": 2})
    assert {row.seeds for table in build_plan(stated, DIGITS).tables for row in table.rows} == {2}


def test_full_is_the_whole_product_for_every_seed():
    plan = build_plan(load_study("full"), DIGITS, seeds=2)
    assert len(plan.trials) == 2 * 2 * 3 * 2 * 2 * 2 * 8 * 2 * 2 == 3072


@pytest.mark.parametrize("scale", [DIGITS, IMAGENET])
def test_teachers_are_trials_shrunk_and_seeded_as_their_students_and_come_before_them(scale):
    plan = build_plan(STUDY, scale, tables=["T9"], seeds=2)
    position = {trial.digest: i for i, trial in enumerate(plan)}
    students = [trial for trial in plan if trial.recipe.teacher]
    assert (len(students), len(plan.trials)) == (4, 8)
    for student in students:
        teacher = student.recipe.teacher
        assert position[teacher.digest()] < position[student.digest]
        assert (teacher.scale, teacher.seed) == (scale.name, student.recipe.seed)
        assert teacher.epochs == {"digits": 10, "imagenet": 100}[scale.name]


def test_digits_shrink_by_the_stated_rule():
    shrunk = DIGITS.shrink(deit(epochs=300))
    assert (shrunk.epochs, shrunk.warmup_epochs, shrunk.batch_size) == (30, 0.5, 32)
    assert (shrunk.randaug_magnitude, shrunk.mix_probability) == (2, 0.25)
    attacked = DIGITS.shrink(adversarial_resnet50())
    assert attacked.adversary.epsilon == pytest.approx(16 / 255)
    assert (attacked.forward_batch, attacked.ghost_batch, attacked.accumulation) == (64, 32, 1)
    assert attacked.warmup_rate == pytest.approx(0.1 / 16)


@pytest.mark.parametrize("base", BASES)
def test_every_base_can_be_trained_at_every_scale(base):
    for scale in (DIGITS, CIFAR10, IMAGENET):
        shrunk = scale.shrink(BASES[base])
        assert shrunk.batch_size == shrunk.forward_batch * shrunk.accumulation
        assert shrunk.batch_size <= scale.data_set.train_images / 8


def test_a_rate_that_departs_from_the_studys_departs_from_the_scales_in_proportion():
    axes = {"optimizer": ("sgd", "adamw"), "learning_rate": (0.05, 0.1), "weight_decay": (2e-4,)}
    plan = build_plan(Study(name="rates", base=resnet50(), axes=axes), DIGITS)
    rates = {(trial.recipe.optimizer, trial.recipe.learning_rate) for trial in plan}
    assert rates == {("sgd", 0.05), ("sgd", 0.1), ("adamw", 0.8), ("adamw", 1.6)}
    assert {(t.recipe.weight_decay, t.recipe.batch_size) for t in plan} == {(2e-4, 64)}
    for recipe, batch in ((adversarial_resnet50(), 4096), (resnet50(), 256)):
        half = DIGITS.shrink(recipe.replace(batch_size=batch // 2, micro_batch=None))
        assert half.batch_size == 32
        assert half.learning_rate == DIGITS.shrink(recipe).learning_rate


def test_longest_trials_come_first():
    costs = [trial.cost for trial in build_plan(STUDY, DIGITS, tables=["T8", "T11"])]
    assert costs == sorted(costs, reverse=True)


def test_one_at_a_time_varies_one_axis_of_the_base():
    axes = {"activation": ("gelu", "silu"), "epochs": (50,)}
    recipes, refused = spanned(resnet50(), axes, mode="one-at-a-time")
    changes = ({}, {"activation": "gelu"}, {"activation": "silu"}, {"epochs": 50})
    assert (recipes, refused) == ([resnet50().replace(**change) for change in changes], [])


def test_impossible_combinations_are_refused_with_the_reason():
    axes = {"family": ("resnet", "deit"), "norm": ("batch", "ghost")}
    recipes, ((combination, reason),) = spanned(resnet50(), axes)
    assert (len(recipes), combination) == (3, "family=deit norm=ghost")
    assert "needs batch normalisation" in reason
    study = Study(name="s", base=resnet50(), axes={"activation": ("relu", "silu")})
    with pytest.raises(ValueError, match=r"all 2 are refused; the first, precision=bf17"):
        build_plan(with_all(study, precision="bf17"), DIGITS)


def test_axes_bring_what_belongs_to_them_in_any_order():
    assert with_axis(deit(), "size", "large") == deit().replace(model="deit_base")
    back = with_axis(with_axis(resnet50(), "training", "adversarial"), "training", "clean")
    assert back == resnet50()
    eased = with_axis(deit(), "curriculum", "study")
    assert with_axis(eased, "curriculum", "none").curriculum == ()
    convnext = with_axis(resnet50(), "model", "timm:convnext_tiny")
    assert (convnext.family, convnext.optimizer) == ("timm", "sgd")
    axes = {"learning_rate": 0.05, "weight_decay": 3e-4, "optimizer": "adamw"}
    changed = with_axes(resnet50(), axes)
    assert changed == with_axes(resnet50(), dict(reversed(axes.items())))
    assert (changed.learning_rate, changed.weight_decay, changed.optimizer) == (0.05, 3e-4, "adamw")
    together = with_axes(adversarial_resnet50(), {"batch_size": 128, "micro_batch": 64})
    assert (together.batch_size, together.micro_batch) == (128, 64)


@pytest.mark.parametrize(
    ("axis", "value", "message"),
    [
        ("colour", "red", "unknown axis 'colour'"),
        ("family", "mixer", "family 'mixer' has no size 'base'"),
        ("size", "tiny", r"has no size 'tiny'; one of \['base', 'huge', 'large', 'small'\]"),
        ("training", "fast", "unknown training 'fast'"),
        ("curriculum", "steep", "unknown curriculum 'steep'"),
        ("teacher", "vit", "unknown teacher 'vit'; one of none, resnet50,"),
    ],
)
def test_unknown_axes_and_values_teach(axis, value, message):
    with pytest.raises(ValueError, match=message):
        with_axis(resnet50(), axis, value)


def test_only_keeps_the_trials_with_the_values():
    plan = build_plan(STUDY, DIGITS, only={"family": ("deit",), "epochs": ("10",)})
    rows = [trial for trial in plan if "teacher of" not in trial.serves[0]]
    assert {(trial.recipe.family, trial.recipe.epochs) for trial in rows} == {("deit", 10)}
    with pytest.raises(ValueError, match=r"activation=tanh; values there: gelu, relu"):
        build_plan(STUDY, DIGITS, only={"activation": ("tanh",)})


def test_only_the_chosen_evaluators_judge():
    for asked, judging in (("clean", "clean"), ("pgd-100", "pgd")):
        plan = build_plan(STUDY, DIGITS, tables=["T1"], evaluators=[asked])
        assert {trial.evaluators for trial in plan} == {(judging,)}
    with pytest.raises(ValueError, match="no trial here asks evaluator 'stylized'; they ask auto"):
        build_plan(STUDY, DIGITS, tables=["T1"], evaluators=["stylized"])


@pytest.mark.parametrize(("scale", "most"), [(IMAGENET, 256), (DIGITS, 64)])
def test_settings_hold_in_every_trial_and_in_teachers_of_rows(scale, most):
    plan = build_plan(with_all(STUDY, precision="bf16", micro_batch=256), scale, seeds=1)
    assert (len(plan.trials), plan.requests) == (39, 53)
    assert {trial.recipe.precision for trial in plan} == {"bf16"}
    assert all(trial.recipe.micro_batch == min(most, trial.recipe.batch_size) for trial in plan)
    digests = {trial.digest for trial in plan}
    assert {row.recipe.digest() for table in plan.tables for row in table.rows} <= digests
    teachers = [trial.recipe.teacher for trial in plan if trial.recipe.teacher]
    assert {teacher.digest() for teacher in teachers} <= digests


def test_a_setting_of_preprocessing_leaves_what_a_recipe_has_beside_it():
    recipe = BASES["resnet50"].replace(preprocessing=Preprocessing(size=64, crop=0.9))
    changed = with_settings(recipe, {"preprocessing": {"size": 32}})
    assert changed.preprocessing == Preprocessing(size=32, crop=0.9)


def test_names_tell_each_value_of_an_axis_once():
    axes = {"drop_path": (0.0, 0.1), "clip_grad": (1.0,)}
    plan = build_plan(Study(name="s", base=resnet50(), axes=axes), IMAGENET)
    assert {trial.name.removesuffix(f" {trial.digest[:6]}") for trial in plan} == {
        "resnet50 relu sgd step none clip_grad=1.0 100ep seed0 drop_path=0.0",
        "resnet50 relu sgd step none drop_path=0.1 clip_grad=1.0 100ep seed0",
    }


def test_tables_and_names_tell_the_settings_and_keep_the_published_figures():
    study = with_all(STUDY, precision="bf16", micro_batch=128)
    plan = build_plan(study, IMAGENET, tables=["T5"])
    (table,) = plan.tables
    assert table.question.endswith(" (every trial: precision=bf16 micro_batch=128)")
    assert {trial.name for trial in plan} == {
        f"{row.label} {row.recipe.digest()[:6]}" for row in table.rows
    }
    assert table.published[table.rows[0].label, "clean"][0] == 76.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 96}, r"--set micro_batch=96: resnet50 relu sgd .* is not divisible by"),
        ({"micro_batch": 32}, r"resnet50 relu sgd step none AT ghost .* which does not divide it"),
        ({"precision": "bf17"}, r"precision: Input should be 'float32', 'bf16' or 'fp16', not"),
        ({"norm": "ghost"}, r"deit_small .* needs batch normalisation"),
        ({"scheduler": "cosine"}, "one trial of T1 ResNet-50 and T6 cosine, SGD"),
        ({"epochs": 100}, r"makes one trial of T7 randaug\+cutmix and T11 ResNet-50-Best, 300"),
        ({"epochs": 4, "warmup_epochs": 5.0}, "warm-up of 5 epochs is longer than the training"),
    ],
)
def test_settings_that_no_row_can_have_are_refused_with_the_row(settings, message):
    with pytest.raises(ValueError, match=message):
        build_plan(with_all(STUDY, **settings), IMAGENET)


def test_a_recipe_that_a_scale_cannot_shrink_is_named():
    with pytest.raises(ValueError, match=r"resnet50 .* at scale digits: a batch of 75 is odd"):
        build_plan(with_all(STUDY, batch_size=300, micro_batch=100), DIGITS, tables=["T5"])


def test_a_batch_far_from_the_studys_is_cut_to_what_few_images_allow_and_the_rate_follows():
    ours = {"learning_rate": 0.004, "weight_decay": 0.0}
    deit, resnet = BASES["deit_small"], BASES["resnet50"]
    # 1,200 images in at least 8 steps: 128. The study's 256 images are 64 here, 2048 are 512.
    large = DIGITS.shrink(resnet.replace(batch_size=2048, learning_rate=0.8))
    assert (large.batch_size, large.learning_rate) == (128, pytest.approx(0.8 * 128 / 512))
    lamb = DIGITS.shrink(resnet.replace(optimizer="lamb", batch_size=2048, **ours))
    assert (lamb.batch_size, lamb.learning_rate) == (128, pytest.approx(0.004 * 0.25))
    # DeiT's 2048 are 32 here: 256 would be 4, and half of 32 is the least.
    small = DIGITS.shrink(deit.replace(batch_size=256))
    assert (small.batch_size, small.learning_rate) == (16, pytest.approx(0.002 * 2))


def holds(recipe, axis, value):
    if axis in ("augmentation", "augmentations"):
        return "+".join(recipe.augmentations) == value.replace("none", "")
    if axis == "curriculum":
        return len(recipe.curriculum) == {"none": 0, "study": 11}.get(str(value), 1)
    if axis in ("teacher", "warm_start"):
        other = getattr(recipe, axis)
        return (other.model if other else "none") == value
    if axis == "preprocessing":
        return value.items() <= recipe.preprocessing.chosen().items()
    if axis == "adversary":
        return recipe.adversary.steps == value["steps"]
    return getattr(recipe, axis) == value


@pytest.mark.parametrize("axis", [axis for axis in AXES if VALUES[axis]])
def test_every_setting_holds_beside_every_axis_or_is_refused(axis):
    planned = tried = 0
    pairs = [(field, value) for field in AXES for value in VALUES[field]]
    for field, value in pairs:
        for base in (deit(), BASES["adversarial_resnet50_gelu"]):
            axes, settings = {axis: VALUES[axis]}, {field: value}
            try:
                check_settings(settings, axes)
            except ValueError as error:
                # Both are about one thing, and both values are named.
                assert f"{field}={value} is set" in str(error)
                assert f"the study varies {axis} ({VALUES[axis][0]}" in str(error)
                continue
            recipes, refused = spanned(base, axes, set=settings)
            left_out = {combination for combination, reason in refused if reason}
            varied = [v for v in VALUES[axis] if f"{axis}={v}" not in left_out]
            for recipe, own in zip(recipes, varied, strict=True):
                assert holds(recipe, field, value), (field, value, own)
                assert holds(recipe, axis, own), (field, value, own)
                if recipe.teacher and field in SETTABLE:
                    assert holds(recipe.teacher, field, value), (field, value, own)
            planned, tried = planned + len(recipes), tried + len(recipes) + len(refused)
    assert planned > tried / 2


def test_values_are_tried_of_every_axis():
    assert VALUES.keys() == set(AXES)


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({}, {"epochs": 4}),
        ({"epochs": (4,)}, {}),
        ({"epochs": (4,), "optimizer": ("adamw",)}, {}),
        ({"optimizer": ("adamw",)}, {"epochs": 4}),
    ],
)
def test_epochs_that_end_before_the_warm_up_shorten_it_and_the_plan_says_so(axes, settings):
    study = with_all(Study(name="short", base=resnet_aligned(), axes=axes), **settings)
    plan = build_plan(study, IMAGENET)
    (trial,) = plan
    assert (trial.recipe.epochs, trial.recipe.warmup_epochs) == (4, 0.2)
    assert plan.notes == ("a warm-up of more than 4 epochs is shortened in proportion",)


def test_every_rows_and_teachers_warm_up_is_shortened_in_proportion_to_its_own_epochs():
    plan = build_plan(with_all(STUDY, epochs=4), IMAGENET, tables=["T2", "T9"])
    assert {trial.recipe.warmup_epochs for trial in plan} == {0.2, 0.4}
    teachers = [trial.recipe.teacher for trial in plan if trial.recipe.teacher]
    assert {(teacher.epochs, teacher.warmup_epochs) for teacher in teachers} == {(4, 0.2)}
    plan = build_plan(with_all(STUDY, epochs=10), IMAGENET, tables=["T9"])
    assert ({trial.recipe.warmup_epochs for trial in plan}, plan.notes) == ({5}, ())


def test_a_clean_warm_start_is_the_recipe_itself_without_its_adversary():
    robust = with_settings(
        BASES["resnet50"],
        {"adversary": {"epsilon": "4/255", "step_size": "4/255"}, "warm_start": "clean"},
        {"model": "resnet18"},
    )
    assert robust.warm_start == BASES["resnet50"].replace(model="resnet18")
    assert robust.adversary.epsilon == 4 / 255


def test_a_warm_start_may_have_axes_of_its_own():
    changes = {"adversary": {"epsilon": "4/255", "step_size": "4/255"}, "seed": 5}
    base = BASES["deit_small"].replace(seed=5)
    start = {"epochs": 4, "erasing": 0.25}
    robust = with_axes(BASES["deit_small"], {**changes, "warm_start": start})
    assert robust.warm_start == base.replace(epochs=4, warmup_epochs=0.2, erasing=0.25)
    assert (robust.epochs, robust.erasing) == (100, 0.0)
    with pytest.raises(ValueError, match=r"warm_start: unknown axis 'epoch'.*'epochs'"):
        with_axes(BASES["deit_small"], {"warm_start": {"epoch": 4}})


def test_a_warm_start_is_a_trial_of_the_plan_and_counts_before_the_one_that_needs_it(tmp_path):
    file = tmp_path / "warm.toml"
    file.write_text(
        """
name = "warm"
[bases.robust]
extends = "resnet50"
"adversary" = { epsilon = "4/255", step_size = "4/255" }
warm_start = "resnet50"
[[tables]]
name = "W"
question = "From a clean start"
columns = ["clean"]
rows = [{ label = "robust", base = "robust" }]
"""
    )
    plan = build_plan(load_study(str(file)), IMAGENET)
    clean = BASES["resnet50"]
    assert [trial.recipe.warm_start for trial in plan] == [None, clean]
    first, second = plan
    assert first.recipe == clean
    assert first.serves == (f"warm start of {second.digest}",)
    assert plan.longest_chain == first.cost + second.cost
