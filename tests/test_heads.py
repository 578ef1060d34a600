"""A head that is wider than the data: matched by class, judged among all classes and the data's."""

from dataclasses import replace

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from evaluators import autoattack
from evaluators.autoattack import AutoAttack
from evaluators.base import Clean, judge_images, match_head
from evaluators.natural import Natural
from evaluators.pgd import PGD
from evaluators.stylized import Stylized
from trainables.data.base import Data, to_unit
from trainables.data.load import load_data
from trainables.data.registry import folder_data_set
from trainables.layers import Classifier
from trainables.scale import DIGITS, scale_for
from trainables.train.adversary import folded

CPU = torch.device("cpu")
SYNSETS = ImageNetInfo().label_names()


class Brightness(nn.Module):
    """1,000 fixed logits a class of brightness: dark images, and bright ones."""

    def __init__(self, dark, bright):
        super().__init__()
        convolution = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(convolution.weight)
        self.network = nn.Sequential(convolution, nn.BatchNorm2d(3))
        logits = [[{**dark}.get(k, 0.0), {**bright}.get(k, 0.0)] for k in range(1000)]
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        brightness = self.network(images).mean(dim=(1, 2, 3))
        return torch.stack([1 - brightness, brightness], dim=1) @ self.logits.T


def two_classes(*names: str) -> Data:
    """Eight dark images of the first class, eight bright ones of the second."""
    data = load_data(DIGITS)
    labels = torch.tensor([0, 1]).repeat(8)
    images = (labels * 200 + 20).byte()[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    held_out = replace(data.held_out, images=images, labels=labels, ids=data.held_out.ids[:16])
    return replace(data, train=held_out, held_out=held_out, class_names=names)


def scores(evaluator, classifier, data):
    ledger = judge_images(evaluator, classifier, data, device=CPU)
    return {score.name: score.value for score in evaluator.summarize(ledger)}


def classifier(dark, bright):
    return Classifier(Brightness(dark, bright), (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (("n02105641", "n01440764"), (229, 0)),
        (("Old_English_sheepdog", "tench"), (229, 0)),
        (("229", "0000"), (229, 0)),
        (("n02105641", "tench"), (229, 0)),
    ],
)
def test_classes_are_matched_by_wordnet_id_by_name_and_by_index(names, places):
    columns = two_classes(*names).columns_of_head(1000)
    assert columns[:3] == (*places, 1)
    assert sorted(columns) == list(range(1000))


def test_heads_of_larger_imagenets_are_matched_by_their_own_lists():
    columns = two_classes("n02105641", "n01440764").columns_of_head(21_841)
    assert columns[:2] == tuple(
        ImageNetInfo("imagenet-22k").label_names().index(name)
        for name in ("n02105641", "n01440764")
    )


def test_a_head_of_the_datas_own_size_keeps_its_order():
    assert two_classes("n02105641", "n01440764").columns_of_head(2) is None
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    plain = Classifier(network, (0.0,) * 3, (1.0,) * 3)
    ledger = judge_images(Clean(DIGITS), plain, load_data(DIGITS), device=CPU)
    assert plain.columns is None
    assert set(ledger["question"].to_pylist()) == {"clean"}


@pytest.mark.parametrize(
    ("names", "outputs", "said"),
    [
        (("a", "b"), 1, r"among 1 classes, and the data have 2; 2 of these are unknown .* 'a'"),
        (("n02105641", "n0144076"), 1000, r"; 1 of these .*first 'n0144076'.*mean 'n01440764'\?"),
        (("n02105641", "crane"), 1000, r"first 'crane'"),  # a bird and a machine
        (("7", "1000"), 1000, r"first '1000'"),
        (("tench", "n01440764"), 1000, r"2 of these are .* named twice, the first 'tench'"),
        (("cat", "dog"), 30, r"first 'cat': name classes by WordNet id"),
    ],
)
def test_a_head_that_cannot_be_matched_is_refused_by_the_class(names, outputs, said):
    with pytest.raises(ValueError, match=said):
        two_classes(*names).columns_of_head(outputs)


def test_answers_among_all_classes_and_among_those_present_are_both_named():
    """Dark images look like class 5, which the data lack; then like the sheepdog, 229."""
    data = two_classes("n02105641", "n01440764")
    wide = classifier({5: 9.0, 229: 2.0}, {0: 9.0})
    assert scores(Clean(DIGITS), wide, data) == {"clean": 0.5, "clean-present": 1.0}
    assert scores(Natural(DIGITS), wide, data).keys() == {"natural", "natural-present"}
    assert scores(Stylized(DIGITS), wide, data).keys() >= {"stylized", "stylized-present"}
    ledger = judge_images(Clean(DIGITS), wide, data, device=CPU)
    answers = dict(zip(ledger["label"].to_pylist(), ledger["predicted"].to_pylist(), strict=True))
    assert answers == {0: 0, 1: 1}  # the last of each label: among those present


def test_attacks_answer_in_the_datas_order():
    data = two_classes("n02105641", "n01440764")
    sound = classifier({229: 9.0}, {0: 9.0})
    assert scores(PGD(DIGITS), sound, data)["pgd-100"] == 1.0
    assert scores(AutoAttack(DIGITS), sound, data)["autoattack/clean"] == 1.0
    turned = two_classes("n01440764", "n02105641")
    assert scores(Clean(DIGITS), sound, turned) == {"clean": 0.0, "clean-present": 0.0}
    assert not any("columns" in name for name in sound.state_dict())


def test_autoattack_targets_the_classes_of_the_head_and_not_of_the_data_alone(monkeypatch):
    data, targets = two_classes("n02105641", "n01440764"), {}

    def record(victims, run, _):
        targets[victims.stage] = set(run.ranks.tolist())

    for stage in autoattack.STAGES:
        monkeypatch.setitem(autoattack._ATTACKS, stage, record)
    of_two = scale_for(
        folder_data_set(image_size=16, num_classes=2, train_images=9, content="0" * 8)
    )
    judge_images(AutoAttack(of_two), classifier({229: 9.0}, {0: 9.0}), data, device=CPU)
    likeliest = set(range(2, 11))  # nine other classes of the head
    assert targets == {"apgd-ce": {2}, "apgd-t": likeliest, "fab-t": likeliest, "square": {2}}


def test_a_folded_network_answers_in_the_datas_order_too():
    data, wide = two_classes("n02105641", "n01440764"), classifier({229: 9.0}, {0: 9.0}).eval()
    match_head(wide, data, CPU)
    images = to_unit(data.held_out.images)
    twin = folded(wide, images)
    assert twin is not None
    assert torch.allclose(twin(images), wide(images), atol=1e-5)
    assert twin(images)[0, 0] > twin(images)[0, 1]
