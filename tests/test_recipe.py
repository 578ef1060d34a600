from __future__ import annotations

import hashlib
import json

import pytest
from pydantic import ValidationError

from tests.paper import CURRICULA, adversarial_deit, adversarial_resnet50, deit, resnet50, with_axis
from trainables.recipe import Adversary, CurriculumRow, Distillation, Recipe
from trainables.scale import DIGITS, IMAGENET

ADVERSARY = {"epsilon": 4 / 255, "step_size": 4 / 255}
TRADES = ADVERSARY | {"loss": "trades"}


@pytest.mark.parametrize(
    "change",
    [
        {"adversary": None},
        {"adversary": ADVERSARY | {"epsilon": 8 / 255}},
        {"adversary": ADVERSARY | {"step_size": 2 / 255}},
        {"adversary": ADVERSARY | {"steps": 2}},
        {"adversary": ADVERSARY | {"plain_start": 0.2}},
        {"curriculum": CURRICULA["study"][:-1]},
        {"curriculum_epochs": 50},
        {"protocol": "as-published"},
        {"mixup_alpha": 0.3},
        {"floor_rate": 0.0},
        {"warmup_rate": 1e-5},
        {"pixel_range": "data"},
        {"micro_batch": 512},
        {"seed": 1},
        {"epochs": 99},
        {"activation": "relu"},
    ],
)
def test_an_eased_in_adversarial_recipe_is_told_from_one_that_differs_in_anything(change):
    recipe = adversarial_deit().replace(adversary=ADVERSARY)
    assert recipe.curriculum
    assert recipe.replace(**change).digest() != recipe.digest()


@pytest.mark.parametrize("field", [name for name in CurriculumRow.model_fields if name != "epoch"])
def test_every_value_of_a_curriculum_is_part_of_the_identity(field):
    recipe = adversarial_deit()
    *rows, last = recipe.curriculum
    changed = last.model_copy(update={field: type(getattr(last, field))(0)})
    assert recipe.replace(curriculum=(*rows, changed)).digest() != recipe.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"mixup_alpha": 0.3},
        {"randaug_magnitude": 3},
        {"switch_probability": 0.1},
        {"ghost_batch": 8},
    ],
)
def test_settings_of_what_is_off_do_not_split_trials(change):
    assert resnet50().replace(**change).digest() == resnet50().digest()
    assert "ghost_batch" in change or deit().replace(**change).digest() != deit().digest()


@pytest.mark.parametrize(
    ("beside", "field", "value"),
    [
        ({"attack": "apgd"}, "step_size", 1 / 255),
        ({"loss": "mart"}, "beta", 5.0),
        ({"epsilon_epochs": 4}, "epsilon_schedule", "sine"),
    ],
)
def test_an_adversarys_settings_count_only_beside_what_they_are_of(beside, field, value):
    def digest(*changes):
        adversary = {name: v for change in (ADVERSARY, *changes) for name, v in change.items()}
        return resnet50().replace(adversary=adversary).digest()

    counts = field == "step_size"
    assert (digest({field: value}) != digest()) == counts
    assert (digest(beside, {field: value}) != digest(beside)) != counts
    assert digest(beside) != digest()


def test_a_trainings_cost_follows_from_the_pixels_of_its_images():
    """Half of the epochs at half of the side, so at a quarter of the pixels."""
    recipe = resnet50().replace(train_sizes=(112, 224))
    assert IMAGENET.cost(recipe) == pytest.approx(IMAGENET.cost(resnet50()) * 0.625)


def test_where_no_image_is_flipped_a_recipe_without_flips_is_the_same():
    base = resnet50()
    still = base.replace(flip=False)
    assert DIGITS.shrink(still) == DIGITS.shrink(base)
    assert IMAGENET.shrink(still) != IMAGENET.shrink(base)


def test_digits_have_a_tenth_of_the_epochs_and_a_fourteenth_of_the_side_beyond_the_study_too():
    attack = {"norm": "l2", "epsilon": 3.5, "step_size": 7.0, "epsilon_epochs": 20.0}
    recipe = resnet50().replace(
        adversary=attack,
        cooldown_epochs=10,
        scheduler_args={"decay_epochs": 30},
        train_sizes=(112, 224),
    )
    small = DIGITS.shrink(recipe)
    assert (small.epochs, small.cooldown_epochs) == (10, 1)
    assert small.scheduler_args == {"decay_epochs": 3}
    assert small.train_sizes == (8, 16)
    # The radius is four times as large and the side 16 of 224: 2/7 in all.
    radii = small.adversary.epsilon, small.adversary.step_size, small.adversary.epsilon_epochs
    assert radii == pytest.approx((1.0, 2.0, 2.0))
    # 10 epochs of 1,200 images in batches of 64, not 100 of 1,281,167 in 256: 188 of 500,456 steps.
    mean = DIGITS.shrink(resnet50().replace(ema_decay=0.9999))
    assert 1 - mean.ema_decay == pytest.approx(1e-4 * 500_456 / 187.5, rel=1e-3)


def test_more_train_sizes_than_epochs_are_refused():
    with pytest.raises(ValueError, match="3 train_sizes are more than 2 epochs"):
        resnet50().replace(epochs=2, train_sizes=(96, 128, 160))
    with pytest.raises(ValueError, match="greater than or equal to 4"):
        resnet50().replace(train_sizes=(2,))


def test_an_adversary_says_what_counts():
    adversary = {"norm": "l2", "epsilon": 0.5, "step_size": 0.2, "loss": "trades", "beta": 5.0}
    assert str(Adversary(**adversary)) == "l2 epsilon=0.5 step_size=0.2 trades beta=5.0"
    adversary = {"attack": "apgd", "epsilon": 4 / 255, "steps": 2, "step_size": 0.1, "beta": 5.0}
    assert str(Adversary(**adversary)) == "apgd epsilon=4/255 steps=2"


@pytest.mark.parametrize(
    ("adversary", "passes"),
    [
        (None, 3),  # forward, gradients of the weights and of the inputs
        ({"steps": 2}, 7),
        ({"steps": 2, "attack": "apgd"}, 9),
        ({"steps": 2, "loss": "mart"}, 10),
        ({"steps": 2, "loss": "trades"}, 11),
    ],
)
def test_a_trainings_cost_counts_the_passes_of_its_adversary(adversary, passes):
    plain = resnet50()
    recipe = plain.replace(adversary=adversary and ADVERSARY | adversary)
    assert IMAGENET.cost(recipe) == pytest.approx(IMAGENET.cost(plain) * passes / 3)


def test_the_identity_covers_what_differs_from_a_default():
    recipe = resnet50()
    digests = {recipe.replace(precision=p).digest() for p in ("float32", "bf16", "fp16")}
    assert len(digests) == 3
    assert recipe.replace(precision="bf16").describe().split()[-3] == "bf16"
    # 12 hex digits of the sha256 of the fields that resnet50() sets, in canonical JSON: a new
    # field with a default must not change it.
    fields = (
        '{"batch_size":256,"epochs":100,"learning_rate":0.1,"model":"resnet50",'
        '"optimizer":"sgd","scale":"imagenet","scheduler":"step","weight_decay":0.0001}'
    )
    assert recipe.digest() == hashlib.sha256(fields.encode()).hexdigest()[:12]


def test_a_description_names_what_differs_beyond_the_study_where_it_is_short():
    attack = {"epsilon": 0.1, "step_size": 0.1, "norm": "l2", "attack": "apgd", "steps": 2}
    attack |= {"loss": "trades", "beta": 6.0, "epsilon_schedule": "sine", "epsilon_epochs": 10.0}
    recipe = resnet50().replace(
        drop_path=0.1,
        flip=False,
        optimizer_args={"betas": (0.9, 0.95)},
        model_args={"depths": tuple(range(40))},
        train_sizes=(160, 192),
        adversary=attack,
    )
    assert recipe.describe() == (
        "resnet50 relu sgd step none AT l2 apgd-2 trades-6 sine-10ep drop_path=0.1 "
        "optimizer_args.betas=0.9,0.95 flip=False train_sizes=160,192 100ep seed0"
    )
    assert adversarial_resnet50().describe().split()[5:7] == ["AT", "ghost"]


def test_recipe_survives_json_with_everything_in_it():
    recipe = with_axis(
        with_axis(deit().replace(adversary=ADVERSARY), "curriculum", "study"), "teacher", "resnet50"
    )
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_teacher_is_part_of_the_identity_by_its_own_digest():
    taught = with_axis(deit(), "teacher", "resnet50")
    other = taught.replace(distillation=Distillation(teacher=resnet50().replace(seed=7)))
    assert taught.digest() != other.digest()
    assert taught.effective()["distillation"]["teacher"] == resnet50().digest()
    assert taught.with_seed(3).teacher == resnet50().replace(seed=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "a training of 0 epochs needs the weights that it has"),
        ({"batch_size": 2**30}, "less than or equal to"),
        ({"epochs": 4, "warmup_epochs": 5.0}, "warm-up of 5 epochs is longer"),
        ({"batch_size": 100, "micro_batch": 64}, "not divisible by micro_batch 64"),
        ({"batch_size": 33, "augmentations": "mixup"}, "a batch of 33 is odd"),
        ({"norm": "ghost", "ghost_batch": 48}, "virtual batches of 48, which does not divide"),
        ({"model": "deit_small", "norm": "ghost"}, "deit_small has none"),
        ({"model": "resnet34"}, "unknown model 'resnet34'"),
        ({"augmentations": "randaug+cutout"}, "unknown augmentation 'cutout'"),
        ({"activation": "gleu"}, "tanh, identity, own"),
        ({"model": "torchhub:a/b:c"}, "'torchhub:a/b:c' runs code, and studies and weights files"),
        ({"model": "mine.py:net"}, "install it as a model"),
        ({"model": "net.pt2"}, "install it as a model"),
        ({"epochs": "100"}, "valid integer"),
        ({"adversary": ADVERSARY | {"epsilon": 4}}, r"write 4/255"),
        ({"adversary": {"epsilon": 4 / 255}}, "attack 'pgd' needs a step_size"),
        ({"adversary": TRADES | {"plain_start": 0.2}}, "no gradient at the image itself: plain_s"),
        ({"adversary": TRADES, "protocol": "as-published"}, "protocol must be 'corrected'"),
        ({"adversary": TRADES, "loss": "bce"}, "loss 'bce' and adversarial loss 'trades' exclude"),
        (
            {"adversary": ADVERSARY | {"loss": "mart"}, "augmentations": "cutmix"},
            "loss 'mart' needs one label an image: leave mixup and cutmix out",
        ),
        (
            {"adversary": ADVERSARY | {"epsilon_epochs": 5}, "epochs": 4},
            "epsilon_epochs are more than the 4 epochs",
        ),
        ({"curriculum": CURRICULA["study"]}, "augmentations must have them"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_the_reason(change, message):
    with pytest.raises(ValidationError, match=message):
        resnet50().replace(**change)


def test_a_curriculum_with_a_gap_or_a_value_out_of_range_is_refused():
    first, second, third, *_ = (row.model_dump() for row in CURRICULA["study"])
    with pytest.raises(ValidationError, match="without a gap"):
        deit().replace(curriculum=[first, third])
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        deit().replace(curriculum=[first, second | {"mix_probability": 1.5}])


def test_curriculum_is_stretched_to_the_training():
    recipe = with_axis(deit(), "curriculum", "study")
    assert [recipe.curriculum_row(e).epoch for e in (0, 1, 9, 10, 99)] == [0, 1, 9, 10, 10]
    short = recipe.replace(epochs=12, warmup_epochs=0.6)
    assert [short.curriculum_row(e).epoch for e in (0, 1, 2, 11)] == [0, 8, 10, 10]
    assert isinstance(short.curriculum_row(0), CurriculumRow)
    assert resnet50().curriculum_row(0) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("4/255", 4 / 255), ("0.001", 0.001), (0.5, 0.5), ("4", 0), ("four", 0), ("4/0", 0)],
)
def test_epsilon_is_read_as_people_write_it_or_refused(text, value):
    if value:
        assert Adversary(epsilon=text, step_size=0.1).epsilon == pytest.approx(value)
        return
    with pytest.raises(ValueError, match="epsilon"):
        Adversary(epsilon=text, step_size=0.1)
