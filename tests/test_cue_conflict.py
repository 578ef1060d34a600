"""cue-conflict: the stimuli as published, sixteen categories of ImageNet's classes, shape bias."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from evaluators import column_named
from evaluators.base import judge_images
from evaluators.stylized import CueConflict, Stylized
from trainables.data.listing import class_list
from trainables.data.load import load_data
from trainables.data.registry import SIXTEEN_CLASSES, folder_data_set
from trainables.layers import Classifier
from trainables.scale import DIGITS, IMAGENET

CPU = torch.device("cpu")
SYNSETS = class_list("imagenet_synsets.txt")
CUT = folder_data_set(image_size=16, num_classes=10, train_images=1200, content="0" * 8)
TEN = tuple(sorted(SYNSETS[place] for place in (0, 217, 281, 404, 491, 497, 566, 569, 571, 574)))
# Shape and texture, and the grey by which the model knows the stimulus.
STIMULI = {
    "cat/cat1-dog2": 0,
    "cat/cat7-elephant1": 50,
    "dog/dog10-cat3": 100,
    "bear/bear2-bear1": 150,
}


class ByGrey(nn.Module):
    """Give each grey of the stimuli a probability of 0.6 for one place, 0.4 spread over others.

    `answers`: for each grey, the place of the 0.6 and those that share the 0.4.
    """

    def __init__(self, answers, outputs=1000):
        super().__init__()
        logits = torch.full((4, outputs), -30.0)
        for row, (most, others) in enumerate(answers):
            logits[row, others] = torch.tensor(0.4 / len(others)).log()
            logits[row, most] = torch.tensor(0.6).log()
        self.register_buffer("logits", logits)

    def forward(self, images):
        return self.logits[(images.mean(dim=(1, 2, 3)) * 255 / 50).round().long()]


def classifier(answers, outputs=1000):
    return Classifier(ByGrey(answers, outputs), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def source(tmp_path):
    """Digits under the names of ten of ImageNet's classes, beside four stimuli."""
    for category in SIXTEEN_CLASSES:
        (tmp_path / category).mkdir()
    for name, grey in STIMULI.items():
        Image.new("RGB", (224, 224), (grey,) * 3).save(tmp_path / f"{name}.png")
    digits = load_data(DIGITS)
    return replace(digits, data_set=CUT, class_names=TEN, roots={"cue-conflict": tmp_path})


def scores(evaluator, model, data):
    ledger = judge_images(evaluator, model, data, device=CPU)
    return {score.name: (score.value, score.n) for score in evaluator.summarize(ledger)}


DOGS = list(range(152, 160))
CAT, DOG, ELEPHANT, BEAR = (281, [281]), (207, [207]), (385, [385]), (294, [294])


def test_the_shape_bias_is_of_the_images_whose_cues_differ(source):
    """By shape, by texture, by neither; the bear of bear's texture counts for accuracy alone."""
    evaluator = CueConflict(DIGITS)
    model = classifier([CAT, ELEPHANT, ELEPHANT, BEAR])
    assert scores(evaluator, model, source) == {
        "cue-conflict-16": (0.5, 4),
        "cue-conflict-16/shape-bias": (0.5, 2),
    }


def test_a_category_has_the_average_probability_of_its_classes(source):
    """0.6 on one of six cats is 0.1 a class; 0.4 on the only airplane is more, as published.

    The sum, or the largest one, would be the cat's.
    """
    model = classifier([(281, [404]), CAT, CAT, (294, DOGS)])
    ledger = judge_images(CueConflict(DIGITS), model, source, device=CPU)
    predicted = {row["image_id"]: row["predicted"] for row in ledger.to_pylist()}
    names = [list(SIXTEEN_CLASSES)[predicted[name]] for name in STIMULI]
    assert names == ["airplane", "cat", "cat", "bear"]


def test_the_head_is_read_in_imagenets_order_whatever_the_data_hold(source):
    model = classifier([CAT, CAT, DOG, BEAR])
    some = scores(CueConflict(DIGITS), model, source)
    assert model.columns is not None
    whole = replace(source, class_names=SYNSETS)
    assert scores(CueConflict(DIGITS), model, whole) == some
    assert model.columns is None
    assert some["cue-conflict-16/shape-bias"] == (1.0, 3)


def test_a_head_of_other_classes_is_refused(source):
    ten = replace(source, class_names=tuple("abcdefghij"))
    model = classifier([(0, [1])] * 4, outputs=10)
    with pytest.raises(ValueError, match="ImageNet's 1000 classes, and this one answers among 10"):
        judge_images(CueConflict(DIGITS), model, ten, device=CPU)


def test_what_is_not_as_published_is_named(source):
    root, model = source.roots["cue-conflict"], classifier([CAT, CAT, DOG, BEAR])
    at_scale = replace(source, data_set=replace(IMAGENET.data_set, image_size=16))
    with pytest.raises(ValueError, match=r"not the cue-conflict stimuli .* lacks 13 of 16 classes"):
        CueConflict(IMAGENET).identity(at_scale)
    Image.new("RGB", (224, 224)).save(root / "dog" / "dog.png")
    with pytest.raises(ValueError, match="dog/dog does not name shape and texture: cat/cat7-el"):
        judge_images(CueConflict(DIGITS), model, source, device=CPU)
    (root / "dog" / "dog.png").unlink()
    (root / "truck").rmdir()
    with pytest.raises(ValueError, match=r"lacks 1 classes; first: \['truck'\]"):
        CueConflict(DIGITS).identity(source)


def test_without_the_stimuli_it_is_the_cue_conflict_of_the_data():
    data = load_data(DIGITS)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), (0.3,) * 3, (0.35,) * 3)
    made = scores(CueConflict(DIGITS), model, data)
    stylized = scores(Stylized(DIGITS), model, data)
    assert made == {name.replace("stylized", "cue-conflict"): s for name, s in stylized.items()}
    assert CueConflict(DIGITS).identity(data)["data"] == "cue conflict (digits)"
    column = column_named("cue-conflict-16/shape-bias")
    assert column.at("digits", made).title == "Shape bias (digits)"
    assert column.at("digits", made).score in made
    assert column.at("imagenet", made).title == "Shape bias (imagenet, generated)"
    stored = ("cue-conflict-16", "cue-conflict-16/shape-bias")
    assert column.at("digits", stored).title == "Shape bias"
