from __future__ import annotations

import pytest

from grid.axes import AXES, SETTABLE, check_settings
from grid.plan import build_plan, enumerate_trials
from grid.study import Study, load_study
from tests.axis_values import VALUES
from tests.paper import (
    BASES,
    CURRICULA,
    LIBRARY,
    STUDY,
    adversarial_resnet50,
    deit,
    resnet50,
    resnet_aligned,
    with_axes,
    with_axis,
)
from trainables.scale import CIFAR10, DIGITS, IMAGENET


def table(name):
    return next(table for table in STUDY.tables if table.name == name)


def recipes(name):
    return {row.label: row.recipe for row in table(name).rows}


def test_paper_has_every_table_of_the_study():
    assert [t.name for t in STUDY.tables] == [f"T{i}" for i in range(1, 12)]
    assert len(table("T4").rows) == len(table("T7").rows) == 8


def test_equal_rows_of_tables_are_one_trial():
    plan = build_plan(STUDY, DIGITS)
    own = next(t for t in plan if "T1 ResNet-50" in t.serves)
    assert {"T3 ResNet-50", "T4 none", "T5 ResNet-50", "T6 step, SGD"} <= set(own.serves)
    assert len({trial.digest for trial in plan}) == len(plan.trials) == 39
    assert plan.requests == 53


def test_best_is_the_winning_cell_of_the_augmentation_table():
    assert (
        recipes("T7")["randaug+cutmix"] == BASES["resnet50_best"] == recipes("T8")["ResNet-50-Best"]
    )


def test_recipes_resolve_to_the_studys_hyperparameters():
    aligned = resnet_aligned()
    assert (aligned.learning_rate, aligned.weight_decay, aligned.batch_size) == (5e-4, 0.05, 256)
    assert (aligned.scheduler, aligned.warmup_epochs, aligned.label_smoothing) == ("cosine", 5, 0.1)
    transformer = deit()
    assert (transformer.learning_rate, transformer.batch_size) == (2e-3, 2048)
    attacked = adversarial_resnet50()
    assert (attacked.learning_rate, attacked.batch_size, attacked.warmup_rate) == (1.6, 4096, 0.1)
    assert (attacked.micro_batch, attacked.accumulation, attacked.label_smoothing) == (1024, 4, 0.1)
    assert (attacked.norm, attacked.ghost_batch, attacked.adversary.plain_start) == (
        "ghost",
        64,
        0.2,
    )
    smooth = recipes("T2")["ResNet-50 GELU"]
    assert (smooth.learning_rate, smooth.micro_batch, smooth.accumulation) == (0.8, 512, 8)
    eased = recipes("T2")["DeiT-S"]
    assert (eased.learning_rate, eased.warmup_epochs) == (4e-3, 10)
    assert len(eased.curriculum) == 11
    assert not recipes("T2")["DeiT-S without curriculum"].curriculum


def test_cross_recipes_differ_only_in_what_they_cross():
    own, crossed = recipes("T2")["ResNet-50 ReLU"], recipes("T2")["ResNet-50 with AdamW"]
    changed = {k for k in type(own).model_fields if getattr(own, k) != getattr(crossed, k)}
    assert changed == {
        "optimizer",
        "learning_rate",
        "weight_decay",
        "warmup_epochs",
        "warmup_rate",
    }
    strong = recipes("T2")["ResNet-50 with strong augmentation"]
    changed = {k for k in type(own).model_fields if getattr(own, k) != getattr(strong, k)}
    assert changed == {"augmentations"}


def test_labels_are_smoothed_in_every_adversarial_training():
    assert {recipe.label_smoothing for recipe in recipes("T2").values()} == {0.1}


def test_full_is_the_whole_product_for_every_seed():
    plan = build_plan(load_study("full"), DIGITS, seeds=2)
    assert len(plan.trials) == 2 * 2 * 3 * 2 * 2 * 2 * 8 * 2 * 2 == 3072
    assert len(load_study("full").axes) == 8


@pytest.mark.parametrize("scale", [DIGITS, IMAGENET])
def test_teachers_are_trials_and_come_before_their_students(scale):
    plan = build_plan(STUDY, scale, tables=["T9"])
    position = {trial.digest: i for i, trial in enumerate(plan)}
    students = [trial for trial in plan if trial.recipe.teacher]
    assert len(students) == 2
    assert len(plan.trials) == 4
    assert all(position[s.recipe.teacher.digest()] < position[s.digest] for s in students)


def test_a_students_teacher_shrinks_and_is_seeded_with_it():
    plan = build_plan(STUDY, DIGITS, tables=["T9"], seeds=2)
    for student in (trial.recipe for trial in plan if trial.recipe.teacher):
        assert student.teacher.scale == "digits"
        assert student.teacher.epochs == 10
        assert student.teacher.seed == student.seed


def test_digits_shrink_by_the_stated_rule():
    shrunk = DIGITS.shrink(deit(epochs=300))
    assert (shrunk.epochs, shrunk.warmup_epochs, shrunk.batch_size) == (30, 0.5, 32)
    assert (shrunk.randaug_magnitude, shrunk.mix_probability) == (2, 0.25)
    attacked = DIGITS.shrink(adversarial_resnet50())
    assert attacked.adversary.epsilon == pytest.approx(16 / 255)
    assert (attacked.forward_batch, attacked.ghost_batch, attacked.accumulation) == (64, 32, 1)
    assert attacked.warmup_rate == pytest.approx(0.1 / 16)


def test_longest_trials_come_first():
    costs = [trial.cost for trial in build_plan(STUDY, DIGITS, tables=["T8", "T11"])]
    assert costs == sorted(costs, reverse=True)


def test_one_at_a_time_varies_one_axis_of_the_base():
    axes = {"activation": ("gelu", "silu"), "epochs": (50,)}
    found, refused = enumerate_trials(resnet50(), axes, mode="one-at-a-time")
    assert not refused
    assert found == [
        resnet50(),
        resnet50().replace(activation="gelu"),
        resnet50().replace(activation="silu"),
        resnet50().replace(epochs=50),
    ]


def test_impossible_combinations_are_refused_with_the_reason():
    axes = {"family": ("resnet", "deit"), "norm": ("batch", "ghost")}
    found, refused = enumerate_trials(resnet50(), axes)
    assert len(found) == 3
    assert refused[0][0] == "family=deit norm=ghost"
    assert "needs batch normalisation" in refused[0][1]


def test_axes_bring_what_belongs_to_them():
    grown = with_axis(deit(), "size", "large")
    assert grown == deit().replace(model="deit_base")
    back = with_axis(with_axis(resnet50(), "training", "adversarial"), "training", "clean")
    assert back == resnet50()
    eased = with_axis(deit(), "curriculum", "study")
    assert with_axis(eased, "curriculum", "none").curriculum == ()
    convnext = with_axis(resnet50(), "model", "timm:convnext_tiny")
    assert (convnext.family, convnext.optimizer) == ("timm", "sgd")


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
    assert {trial.recipe.family for trial in plan if "teacher of" not in trial.serves[0]} == {
        "deit"
    }
    with pytest.raises(ValueError, match=r"activation=tanh; values there: gelu, relu"):
        build_plan(STUDY, DIGITS, only={"activation": ("tanh",)})


def test_only_the_evaluators_asked_for_are_asked():
    plan = build_plan(STUDY, DIGITS, tables=["T1"], evaluators=["clean"])
    assert {trial.evaluators for trial in plan} == {("clean",)}
    with pytest.raises(ValueError, match="no trial here asks evaluator 'stylized'; they ask auto"):
        build_plan(STUDY, DIGITS, tables=["T1"], evaluators=["stylized"])


README_SIZES = """
| Res18*      | 67.83 |  1.92 | 64.14 |  7.92 |
| Res50*      | 76.28 |  4.53 | 55.62 |  8.17 |
| Res101*     | 77.97 |  8.84 | 49.19 | 11.60 |
| Res18-best  | 66.81 |  2.03 | 62.65 |  9.45 |
| Res50-best  | 75.74 |  6.32 | 52.25 | 10.77 |
| Res101-best | 77.83 | 11.49 | 47.35 | 13.28 |
| DeiT-Mini   | 72.89 |  8.19 | 54.68 |  9.88 |
| DeiT-Small  | 76.82 | 12.21 | 47.99 | 12.98 |
"""
README_DISTILLATION = """
| DeiT-Small teacher | 76.8 | 12.2 | 48.0 | 13.0 |
| Res50* student     | 76.7 |  5.2 | 54.2 |  9.8 |
| Res50* teacher     | 76.3 |  4.5 | 55.6 |  8.2 |
| DeiT-S student     | 76.2 | 10.9 | 49.3 | 11.9 |
"""


@pytest.mark.parametrize(("name", "readme"), [("T8", README_SIZES), ("T9", README_DISTILLATION)])
def test_tables_show_the_readmes_figures_in_the_readmes_order(name, readme):
    lines = [line.strip("|").split("|")[1:] for line in readme.strip().splitlines()]
    columns = ("clean", "natural", "corruptions", "stylized-cropped")
    found = [[table(name).published.get((r.label, c)) for c in columns] for r in table(name).rows]
    values = [[figure[0] for figure in row] for row in found if all(row)]
    assert values == [[float(cell) for cell in line] for line in lines]


def test_a_figure_whose_attack_no_source_names_is_not_published():
    columns = {column for table in STUDY.tables for _, column in table.published}
    assert {column for column in columns if column.startswith("pgd")} == {"pgd-100"}


def write(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return str(path)


GOOD = """
name = "activation"
base = "resnet50"
evaluators = ["clean"]
[set]
size = "small"
[axes]
activation = ["relu", "silu"]
augmentation = ["none", "randaug+cutmix"]
"""


def test_a_study_file_is_a_study(tmp_path):
    study = load_study(write(tmp_path, GOOD))
    assert study == Study(
        name="activation",
        base=resnet50(),
        axes={"activation": ("relu", "silu"), "augmentation": ("none", "randaug+cutmix")},
        evaluators=("clean",),
        set={"size": "small"},
        bases=BASES,
        curricula=CURRICULA,
    )
    plan = build_plan(study, DIGITS)
    assert len(plan.trials) == 4
    assert {trial.recipe.model for trial in plan} == {"resnet18"}
    assert all(trial.evaluators == ("clean",) for trial in plan)


def test_a_curriculum_table_can_be_given_in_a_study_file(tmp_path):
    row = "randaug_magnitude=4, mix_probability=0.5, cutmix_alpha=1.0, switch_probability=0.5"
    text = f'name="c"\nbase="deit_small"\n[set]\ncurriculum=[{{epoch=0, {row}}}]\n'
    (trial,) = build_plan(load_study(write(tmp_path, text)), IMAGENET)
    assert [row.randaug_magnitude for row in trial.recipe.curriculum] == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 3", "name: Input should be a valid string, not 3"),
        (GOOD + "\n[colour]\n", "unknown key 'colour'; one of name, title"),
        (GOOD.replace("resnet50", "vgg"), "unknown base 'vgg'; one of"),
        (GOOD.replace("activation =", "activations ="), "unknown axis 'activations'; one of"),
        (GOOD.replace('["clean"]', '"clean"'), "evaluators: Input should be a valid tuple"),
        ("name = ", "is not TOML"),
        (GOOD.replace('name = "activation"', 'name = "../up"'), "name: String should match"),
    ],
)
def test_a_wrong_study_file_names_file_key_and_what_was_expected(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"study\.toml") as error:
        load_study(write(tmp_path, text))
    assert message in str(error.value)


def test_unknown_studies_and_unreadable_files_teach(tmp_path):
    with pytest.raises(ValueError, match=r"unknown study 'ful'; one of bai2021, .*'full'"):
        load_study("ful")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_study(str(tmp_path / "none.toml"))
    with pytest.raises(ValueError, match=r"'bai2021': unknown table 'T12'; one of T1, T2"):
        build_plan(STUDY, DIGITS, tables=["T12"])


@pytest.mark.parametrize("base", BASES)
def test_every_base_can_be_trained_at_every_scale(base):
    for scale in (DIGITS, CIFAR10, IMAGENET):
        shrunk = scale.shrink(BASES[base])
        assert shrunk.batch_size == shrunk.forward_batch * shrunk.accumulation
        assert shrunk.batch_size <= scale.data_set.train_images / 8


def test_a_rate_that_departs_from_the_studys_departs_from_the_scales_in_proportion():
    axes = {"optimizer": ("sgd", "adamw"), "learning_rate": (0.05, 0.1), "weight_decay": (2e-4,)}
    study = Study(name="rates", base=resnet50(), axes=axes)
    asked = [trial.recipe for trial in build_plan(study, DIGITS)]
    rates = {(recipe.optimizer, recipe.learning_rate) for recipe in asked}
    assert rates == {("sgd", 0.05), ("sgd", 0.1), ("adamw", 0.8), ("adamw", 1.6)}
    assert {recipe.weight_decay for recipe in asked} == {2e-4}
    assert {(r.batch_size, r.epochs) for r in asked} == {(64, 10)}
    attacked = adversarial_resnet50()
    for recipe, batch in ((attacked, 4096), (resnet50(), 256)):
        half = recipe.replace(batch_size=batch // 2, micro_batch=None)
        assert DIGITS.shrink(half).batch_size == 32
        assert DIGITS.shrink(half).learning_rate == DIGITS.shrink(recipe).learning_rate


def test_axes_may_be_named_in_any_order():
    axes = {"learning_rate": (0.05,), "weight_decay": (3e-4,), "optimizer": ("adamw",)}
    backwards = dict(reversed(axes.items()))
    found = [
        [
            trial.digest
            for trial in build_plan(Study(name="any", base=resnet50(), axes=named), IMAGENET)
        ]
        for named in (axes, backwards)
    ]
    assert found[0] == found[1]
    (recipe,), _ = enumerate_trials(resnet50(), axes)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.optimizer) == (0.05, 3e-4, "adamw")


def with_all(study, **settings):
    return study.model_copy(update={"settings": settings})


@pytest.mark.parametrize(("scale", "most"), [(IMAGENET, 256), (DIGITS, 64)])
def test_what_is_set_for_all_is_so_in_every_trial_and_row_teachers_too(scale, most):
    asked = with_all(STUDY, precision="bf16", micro_batch=256)
    plan, plain = build_plan(asked, scale), build_plan(STUDY, scale)
    assert (len(plan.trials), plan.requests) == (len(plain.trials), plain.requests) == (39, 53)
    assert {trial.recipe.precision for trial in plan} == {"bf16"}
    assert all(trial.recipe.micro_batch == min(most, trial.recipe.batch_size) for trial in plan)
    assert not {trial.digest for trial in plan} & {trial.digest for trial in plain}
    digests = {trial.digest for trial in plan}
    assert {row.recipe.digest() for table in plan.tables for row in table.rows} <= digests
    taught = [trial.recipe.teacher for trial in plan if trial.recipe.teacher]
    assert {teacher.digest() for teacher in taught} <= digests


def test_what_is_set_for_all_is_told_and_leaves_the_labels_of_published_figures():
    plan = build_plan(with_all(STUDY, precision="bf16", micro_batch=128), IMAGENET, tables=["T5"])
    (found,) = plan.tables
    own = table("T5")
    assert found.question == f"{own.question} (every trial: precision=bf16 micro_batch=128)"
    assert [row.label for row in found.rows] == [row.label for row in own.rows]
    assert all(trial.name.endswith("bf16 100ep seed0 micro_batch=128") for trial in plan)
    assert found.published[found.rows[0].label, "clean"][0] == 76.9


def test_epochs_set_for_all_are_the_studys_own():
    plan = build_plan(with_all(STUDY, epochs=50), DIGITS, tables=["T5"])
    assert {trial.recipe.epochs for trial in plan} == {5}


def test_what_is_set_for_all_comes_after_the_axes():
    base = with_axis(resnet50(), "micro_batch", 128)
    axes = {"training": ("clean", "adversarial"), "teacher": ("none", "deit_small")}
    study = Study(name="s", base=base, axes=axes, bases=BASES)
    study = with_all(study, micro_batch=64, precision="fp16")
    plan = build_plan(study, IMAGENET)
    assert len(plan.trials) == 5
    assert {(t.recipe.micro_batch, t.recipe.precision) for t in plan} == {(64, "fp16")}


def test_fields_are_set_at_once():
    changed = with_axes(adversarial_resnet50(), {"batch_size": 128, "micro_batch": 64})
    assert (changed.batch_size, changed.micro_batch) == (128, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch": 96}, r"--set micro_batch=96: resnet50 relu sgd .* is not divisible by"),
        ({"micro_batch": 512}, r"resnet50 relu sgd .* batch_size 256 is not divisible by"),
        ({"micro_batch": 32}, r"resnet50 relu sgd step none AT ghost .* which does not divide it"),
        ({"precision": "bf17"}, r"precision: Input should be 'float32', 'bf16' or 'fp16', not"),
        ({"norm": "ghost"}, r"deit_small .* needs batch normalisation"),
        ({"scheduler": "cosine"}, "one trial of T1 ResNet-50 and T6 cosine, SGD"),
        ({"epochs": 100}, r"makes one trial of T7 randaug\+cutmix and T11 ResNet-50-Best, 300"),
    ],
)
def test_what_cannot_be_set_for_all_is_refused_with_the_trial(settings, message):
    with pytest.raises(ValueError, match=message):
        build_plan(with_all(STUDY, **settings), IMAGENET)


def test_an_axis_that_is_set_for_all_is_refused():
    study = Study(name="s", base=resnet50(), axes={"activation": ("relu", "gelu")})
    with pytest.raises(
        ValueError, match=r"activation=silu is set .* varies activation \(relu, gelu"
    ):
        build_plan(with_all(study, activation="silu"), DIGITS)
    assert len(build_plan(with_all(study, precision="bf16"), DIGITS).trials) == 2


FIXED = """
name = "alike"
base = "resnet50"
[set]
micro_batch = 64
label_smoothing = 0.3
learning_rate = 0.0123
[axes]
family = ["resnet", "deit"]
augmentation = ["none", "randaug+mixup+cutmix"]
"""


def test_what_a_study_file_sets_wins_over_what_its_axes_bring(tmp_path):
    plan = build_plan(load_study(write(tmp_path, FIXED)), IMAGENET)
    found = {(t.recipe.micro_batch, t.recipe.label_smoothing, t.recipe.learning_rate) for t in plan}
    assert (found, len(plan.trials)) == ({(64, 0.3, 0.0123)}, 4)
    # What is not set still comes with the family.
    assert {(t.recipe.family, t.recipe.batch_size) for t in plan} == {
        ("resnet", 256),
        ("deit", 2048),
    }


def holds(recipe, axis, value):
    if axis in ("augmentation", "augmentations"):
        return "+".join(recipe.augmentations) == value.replace("none", "")
    if axis == "curriculum":
        return len(recipe.curriculum) == {"none": 0, "study": 11}.get(str(value), 1)
    if axis == "teacher":
        return (recipe.teacher.model if recipe.teacher else "none") == value
    if axis == "adversary":
        return recipe.adversary.steps == value["steps"]
    return getattr(recipe, axis) == value


@pytest.mark.parametrize("axis", [axis for axis in AXES if VALUES[axis]])
def test_every_field_that_is_set_holds_beside_every_axis_or_is_refused(axis):
    kept = tried = 0
    pairs = [(field, value) for field in AXES for value in VALUES[field]]
    for field, value in pairs:
        for base in (resnet50(), deit(), BASES["adversarial_resnet50_gelu"]):
            study = Study(name="s", base=base, axes={axis: VALUES[axis]}, set={field: value})
            try:
                check_settings(study.settings, study.axes)
            except ValueError as error:
                # Both are about one thing, and both values are named.
                assert f"{field}={value} is set" in str(error)
                assert f"the study varies {axis} ({VALUES[axis][0]}" in str(error)
                continue
            found, refused = enumerate_trials(
                base, study.axes, settings=study.settings, library=LIBRARY
            )
            left_out = {combination for combination, _ in refused}
            assert all(reason for _, reason in refused)
            varied = [v for v in VALUES[axis] if f"{axis}={v}" not in left_out]
            for recipe, own in zip(found, varied, strict=True):
                assert holds(recipe, field, value), (field, value, own)
                assert holds(recipe, axis, own), (field, value, own)
                if recipe.teacher and field in SETTABLE:
                    assert holds(recipe.teacher, field, value), (field, value, own)
            kept, tried = kept + len(found), tried + len(found) + len(refused)
    assert kept > tried / 2


SHORTENED = "a warm-up of more than 4 epochs is shortened in proportion"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("[set]\nepochs = 4\n", {}),
        ("[axes]\nepochs = [4]\n", {}),
        ("", {"epochs": 4}),
        ("[set]\nepochs = 50\n", {"epochs": 4}),
        ("[axes]\nepochs = [4]\noptimizer = ['adamw']\n", {}),
        ("[set]\nepochs = 4\n[axes]\noptimizer = ['adamw']\n", {}),
    ],
)
def test_epochs_that_end_before_the_warm_up_shorten_it_and_the_plan_says_so(
    tmp_path, text, settings
):
    study = load_study(write(tmp_path, f'name = "short"\nbase = "resnet50_aligned"\n{text}'))
    plan = build_plan(with_all(study, **(study.settings | settings)), IMAGENET)
    (trial,) = plan
    assert (trial.recipe.epochs, trial.recipe.warmup_epochs) == (4, 0.2)
    assert plan.notes == (SHORTENED,)


def test_every_rows_and_teachers_warm_up_is_shortened_in_proportion_to_its_own_epochs():
    plan = build_plan(with_all(STUDY, epochs=4), IMAGENET, tables=["T2", "T9"])
    assert {trial.recipe.warmup_epochs for trial in plan} == {0.2, 0.4}
    taught = [trial.recipe.teacher for trial in plan if trial.recipe.teacher]
    assert {(teacher.epochs, teacher.warmup_epochs) for teacher in taught} == {(4, 0.2)}
    assert plan.notes == (SHORTENED,)


def test_a_warm_up_that_fits_or_is_set_is_left_alone():
    plan = build_plan(with_all(STUDY, epochs=10), IMAGENET, tables=["T9"])
    assert {trial.recipe.warmup_epochs for trial in plan} == {5}
    assert plan.notes == ()
    with pytest.raises(ValueError, match="warm-up of 5 epochs is longer than the training of 4"):
        build_plan(with_all(STUDY, epochs=4, warmup_epochs=5.0), IMAGENET, tables=["T9"])


def test_a_study_that_has_no_trial_left_says_why(tmp_path):
    study = with_all(load_study(write(tmp_path, GOOD)), size="small", precision="bf17")
    with pytest.raises(ValueError, match=r"all 4 are refused; the first, size=small precision=bf1"):
        build_plan(study, DIGITS)


def test_values_that_only_hold_together_are_read(tmp_path):
    text = FIXED.replace("micro_batch = 64", "micro_batch = 96\nbatch_size = 192")
    plan = build_plan(load_study(write(tmp_path, text)), IMAGENET)
    assert {(t.recipe.batch_size, t.recipe.micro_batch) for t in plan} == {(192, 96)}
    ghosts = FIXED.replace("micro_batch = 64", 'norm = "ghost"').replace('"resnet", ', "")
    with pytest.raises(ValueError, match="norm 'ghost' needs batch normalisation"):
        build_plan(load_study(write(tmp_path, ghosts)), IMAGENET)


def test_values_are_tried_of_every_axis():
    assert VALUES.keys() == set(AXES)
    assert [axis for axis in AXES if not VALUES[axis]] == ["distillation"]


def test_a_recipe_that_a_scale_cannot_shrink_is_named():
    asked = with_all(STUDY, batch_size=300, micro_batch=100)
    with pytest.raises(ValueError, match=r"deit_small .* at scale digits: a batch of 5 is odd"):
        build_plan(asked, DIGITS, tables=["T1"])


def test_what_a_trial_is_cannot_be_set_for_all():
    assert set(SETTABLE) < set(AXES)
    assert not {"model", "family", "size", "teacher", "training", "seed"} & set(SETTABLE)
