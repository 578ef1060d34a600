"""The Python API: any model on any images, and two models compared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from evaluators import compare, evaluate
from evaluators.__main__ import main
from evaluators.ledger import LEDGER, Score
from evaluators.scores import Scores

ROOT = Path(__file__).parents[1]
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])


class Brightest(nn.Module):
    """Answer which channel is brightest: 10 times the mean of each."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images):
        return self.scale * images.mean(dim=(2, 3))


@pytest.fixture
def coloured():
    """Twelve images, of channels 0, 1, 2 in turn, and the right labels but for the first two."""
    labels = torch.arange(12) % 3
    images = COLOURS[labels][:, :, None, None].expand(-1, -1, 16, 16).clone()
    return images, torch.where(torch.arange(12) < 2, 2, labels)


def quiet(model, data, *arguments, **options):
    return evaluate(model, data, *arguments, progress=False, **options)


def test_ten_of_twelve_images_are_right_in_every_form_of_the_data(coloured):
    images, labels = coloured
    rows = TensorDataset(images, labels)
    forms = {
        "tensors": (images, labels),
        "arrays": (images.numpy(), labels.numpy()),
        "bytes": ((images * 255).round().byte(), labels),
        "channels last": (images.permute(0, 2, 3, 1).numpy(), labels.tolist()),
        "data set": rows,
        "loader": DataLoader(rows, batch_size=5),
    }
    for form, data in forms.items():
        score = quiet(Brightest(), data)["clean"]
        assert (score.value, score.n) == (pytest.approx(10 / 12), 12), form


def test_a_number_of_queries_is_no_percentage():
    queries = Score("tpa/queries", 5750.0, 1133.6, 10366.4, 4)
    scores = Scores((queries,), {"tpa/queries": 1.0}, LEDGER.empty_table(), {})
    assert "tpa/queries  5,750 queries  [1,134, 10,366]  4" in str(scores)


def test_a_table_holds_each_score_and_prints_here_and_in_a_notebook(coloured):
    scores = quiet(Brightest(), coloured, ["clean", "pgd-5"], epsilon="1/255", name="B<1>")
    header, *rows = str(scores).splitlines()[1:4]
    assert header.split() == ["score", "%", "95", "%", "interval", "n", "seconds"]
    assert [row.split()[:2] for row in rows] == [["clean", "83.33"], ["pgd-5", "83.33"]]
    assert "note: pgd: max-norm radius 1/255" in str(scores)
    page = scores._repr_html_()
    assert "<td>83.33</td>" in page
    assert "B&lt;1&gt;" in page
    assert scores.frame.loc["clean", ["value", "n"]].tolist() == [10 / 12, 12]
    assert scores.ledger.num_rows == 24
    (axes,) = scores.plot().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "pgd-5"]
    with pytest.raises(ValueError, match=r"unknown score 'claen'.*Did you mean 'clean'"):
        scores["claen"]


def folder_of(root, images, labels, names="abc"):
    from torchvision.transforms.functional import to_pil_image

    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = root / names[label] / f"{place:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)
    return root


def test_a_folder_is_attacked_by_the_same_radius_as_by_the_command(coloured, tmp_path, capsys):
    folder_of(tmp_path / "val", *coloured)
    torch.save(Brightest().state_dict(), tmp_path / "w.pth")
    code = tmp_path / "brightest.py"
    code.write_text("from tests.test_api import Brightest\n")
    model = ["--model", f"{code}:Brightest", "--weights", str(tmp_path / "w.pth")]
    words = ["--data", str(tmp_path), "--evaluators", "pgd-5", "--ledger", str(tmp_path / "l")]
    assert main([*model, *words]) == 0
    note = "note: pgd: max-norm radius 4/255"
    assert note in capsys.readouterr().out.splitlines()
    assert note in str(quiet(Brightest(), tmp_path, "pgd-5")).splitlines()


@pytest.mark.parametrize("part", ["", "val"])
def test_a_folder_is_judged_whole_or_by_its_val(coloured, tmp_path, part):
    folder_of(tmp_path / "data" / part, *coloured)
    score = quiet(Brightest(), tmp_path / "data")["clean"]
    assert (score.value, score.n) == (pytest.approx(10 / 12), 12)
    for side in (32, 48):
        larger = quiet(
            Brightest(), str(tmp_path / "data"), image_size=side, store=tmp_path / "store"
        )
        assert larger["clean"].value == pytest.approx(10 / 12)
    assert len([*tmp_path.glob("store/*/clean.parquet")]) == 2


def test_a_data_set_of_hugging_face_is_read_with_its_classes(coloured, tmp_path):
    datasets = pytest.importorskip("datasets")
    images, labels = coloured
    folder_of(tmp_path / "train", images, labels)
    stored = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=r"yield str, .* a split of a Hugging Face Dataset"):
        quiet(Brightest(), stored)
    scores = quiet(Brightest(), stored["train"], ["clean", "corruptions"])
    assert scores["clean"].value == pytest.approx(10 / 12)
    assert scores["corruptions"].n == 12  # of all images, not of a hundred
    assert "errors, lower is better" in str(scores)
    smaller = quiet(Brightest(), stored["train"].select(range(6)), image_size=8)
    assert smaller["clean"].n == 6
    arrays = stored["train"].with_format("torch")
    assert quiet(Brightest(), arrays)["clean"].value == pytest.approx(10 / 12)
    renamed = stored["train"].rename_column("label", "genus")
    with pytest.raises(ValueError, match="no column 'label', only 'image', 'genus'"):
        quiet(Brightest(), renamed)


def test_grey_and_oblong_images_are_attacked_and_what_cannot_take_them_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(16, 5))
    images = torch.rand(4, 14, 10)
    with torch.no_grad():
        labels = model(images[:, None]).argmax(dim=1)
    scores = quiet(model, (images, labels), ["clean", "pgd-5", "autoattack"], epsilon=1e-7)
    assert [scores[name].value for name in ("clean", "pgd-5", "autoattack")] == [1, 1, 1]
    assert "4 images of 1 x 14 x 10, 5 classes" in str(scores)
    assert quiet(model, (images, labels), "corruptions")["corruptions"].n == 4
    with pytest.raises(ValueError, match="tpa takes square images of 3 channels, not 1 x"):
        quiet(model, (images, labels), "tpa")


@pytest.mark.parametrize(("side", "radius"), [(64, "8/255"), (65, "4/255")])
def test_the_default_radius_follows_from_the_size_and_is_printed(side, radius):
    data = torch.rand(2, 3, side, side), torch.tensor([0, 1])
    lines = str(quiet(Brightest(), data, "pgd-5")).splitlines()
    assert f"note: pgd: max-norm radius {radius}" in lines


def test_radii_are_text_numbers_or_a_list(coloured):
    """The brightest channel leads by 0.8: a radius of 0.3 leaves it ahead, one of 0.5 does not."""
    for epsilon in ("76.5/255", 0.3):
        scores = quiet(Brightest(), coloured, "pgd-100", epsilon=epsilon)
        assert scores["pgd-100"].value == pytest.approx(10 / 12)
    both = quiet(Brightest(), coloured, "pgd-100", epsilon=["76.5/255", 0.5])
    assert both["pgd-100@76.5/255"].value == pytest.approx(10 / 12)
    assert both["pgd-100@127.5/255"].value == pytest.approx(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": lambda x: (x - 0.5) / 0.2}, r"from -2 to 2, not in \[0, 1\]: normalised"),
        ({"images": lambda x: x * 255}, r"to 230, not in \[0, 1\]: from 0 to 255\? Divide"),
        ({"images": lambda x: x.log() * 0 / 0}, "some pixels are NaN"),
        ({"images": lambda x: x[:0], "labels": lambda y: y[:0]}, "there are no images"),
        ({"images": lambda x: x[0, 0]}, r"shape \(16, 16\), not \(N, channels"),
        ({"images": lambda x: (x * 255).int()}, "images are torch.int32: uint8 from 0 to 255"),
        ({"labels": lambda y: y + 1}, "label 3 is out of range: there are 3 classes"),
        ({"labels": lambda y: -y}, "label -2 is out of range"),
        ({"labels": lambda y: y.float()}, "labels are torch.float32: give whole numbers"),
        ({"labels": lambda y: y[:5]}, "12 images and 5 labels"),
        ({"labels": nn.functional.one_hot}, r"labels are of shape \(12, 3\): one-hot"),
        ({"evaluators": "claen"}, r"unknown evaluator 'claen'.*Did you mean 'clean'"),
        ({"evaluators": []}, "there is no evaluator"),
        ({"epsilon": 8, "evaluators": "pgd"}, "8 is no radius in Linf: .* like 8/255"),
        ({"epsilon": "8/0", "evaluators": "pgd"}, "'8/0' is no radius"),
        ({"epsilon": 0.1}, "epsilon is a radius of pgd, autoattack and .*: clean takes none"),
        ({"mean": 123.7}, "mean 123.7 is of other units"),
        ({"std": 0}, "std 0 is of other units"),
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers, and the images 3 channels"),
        ({"device": "abacus"}, "abacus"),
        ({"image_size": 8}, "image_size is for files"),
        ({"batch_size": 0}, "batch_size 0 and eot 1 must be at least 1"),
    ],
)
def test_bad_input_is_refused_with_what_helps(coloured, change, message):
    images, labels = coloured
    images = change.pop("images", lambda x: x)(images)
    labels = change.pop("labels", lambda y: y)(labels)
    with pytest.raises(ValueError, match=message):
        quiet(Brightest(), (images, labels), **change)


def test_data_without_labels_or_of_several_sizes_is_refused(coloured, tmp_path):
    images, _ = coloured
    with pytest.raises(ValueError, match="are not known; one of"):
        quiet(Brightest(), images)
    with pytest.raises(ValueError, match="the data yield Tensor, not"):
        quiet(Brightest(), DataLoader(images))
    several = [(images[0], 0), (images[1, :, :8], 1)]
    with pytest.raises(ValueError, match=r"different sizes, \(3, 8, 16\) and \(3, 16, 16\)"):
        quiet(Brightest(), DataLoader(several, batch_size=1))
    with pytest.raises(ValueError, match="absent is not there"):
        quiet(Brightest(), tmp_path / "absent")


class Returns(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of, self.inner = of, Brightest()

    def forward(self, images):
        return self.of(self.inner(images))


@pytest.mark.parametrize(
    ("of", "hint"),
    [
        (lambda z: (z.mean(), z), r"returns tuple, .* lambda x: model\(x\)\[1\]"),
        (lambda z: {"loss": z.mean(), "logits": z}, r"returns dict, .* lambda x: model\(x\)\['l"),
        (lambda z: z[:, :1], r"returns \(8, 1\) for 8 images, .* of one logit z, give \[0, z\]"),
        (lambda z: z / 0 - z / 0, "NaN or infinite"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused_with_the_hint(coloured, of, hint):
    with pytest.raises(ValueError, match=hint):
        quiet(Returns(of), coloured)


def test_weights_on_two_devices_or_on_none_are_refused(coloured):
    with pytest.raises(ValueError, match="weights are on meta: move it to one device"):
        quiet(nn.Linear(3, 3, device="meta"), coloured)
    both = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="weights are on cpu and meta"):
        quiet(both, coloured)


def test_what_has_no_gradient_is_judged_but_not_attacked(coloured):
    def numb(images):
        return torch.from_numpy(np.asarray(images.detach()).mean(axis=(2, 3)))

    assert quiet(numb, coloured)["clean"].value == pytest.approx(10 / 12)
    with pytest.raises(
        ValueError, match="attacks need gradients, and the model's logits have none"
    ):
        quiet(numb, coloured, ["clean", "pgd"])
    with pytest.raises(ValueError, match="the model is NoneType"):
        quiet(None, coloured)


def test_normalisation_may_be_in_front_of_the_model_or_inside_it(coloured):
    """White images: after the mean of channel 0 is taken away, channel 1 is the brightest."""
    white = torch.ones(4, 3, 8, 8), torch.tensor([1, 1, 1, 0])
    outside = quiet(Brightest(), white, mean=(0.5, 0.0, 0.2), std=1)
    assert outside["clean"].value == 0.75

    def inside(images):
        return Brightest()(images - torch.tensor([0.5, 0.0, 0.2])[:, None, None])

    assert quiet(inside, white)["clean"].value == 0.75


class Old(nn.Module):
    """Flattens by view, as models of channels-first memory do; noisy and wrong in training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3 * 16 * 16, 3)
        self.drop = nn.Dropout(0.9)

    def forward(self, images):
        return self.head(self.drop(self.norm(images)).view(len(images), -1))


def test_training_mode_is_said_of_a_model_that_is_in_it_alone(coloured):
    said = "in training mode"
    assert said not in str(quiet(Brightest().eval(), coloured))
    assert said in str(quiet(Brightest(), coloured))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_in_training_mode_is_judged_in_eval_mode_and_comes_back(coloured, wrapped):
    torch.manual_seed(0)
    model = Old().train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject = model.forward if wrapped else model
    scores = [quiet(subject, coloured, ["clean", "pgd-5"], epsilon="1/255") for _ in range(2)]
    assert scores[0].ledger.equals(scores[1].ledger)
    assert "it was judged in eval mode" in str(scores[0])
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert (model.head.bias.requires_grad, model.head.weight.requires_grad) == (False, True)
    assert model.head.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_comes_back_from_an_evaluation_that_fails(coloured):
    def broken(module, inputs):
        if len(inputs[0]) == 12:
            raise RuntimeError("no more")

    model = Brightest().train()
    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="no more"):
        quiet(model, coloured)
    assert model.training


class Noisy(nn.Module):
    """The brightest channel under noise that turns many single answers round."""

    def forward(self, images):
        return 10 * images.mean(dim=(2, 3)) + 6 * torch.randn(len(images), 3)


def test_random_noise_is_said_and_eot_answers_by_the_mean_of_many_draws(coloured):
    torch.manual_seed(0)
    images, labels = coloured[0], torch.arange(12) % 3
    many = images.repeat(20, 1, 1, 1), labels.repeat(20)
    single = quiet(Noisy(), many)
    assert "verdicts are not repeatable; eot=20" in str(single)
    assert single["clean"].value < 0.9
    mean = quiet(Noisy(), many, eot=50)
    assert mean["clean"].value > 0.97
    assert "eot=50 averages 50 draws" in str(mean)


def test_a_model_in_half_precision_is_judged_and_a_softmax_is_said(coloured):
    half = quiet(Brightest().half(), coloured, ["clean", "pgd-5"], epsilon="1/255")
    assert half["clean"].value == pytest.approx(10 / 12)
    soft = quiet(lambda x: Brightest()(x).softmax(dim=1), coloured)
    assert "the model returns probabilities" in str(soft)


def test_what_is_stored_is_not_judged_again_and_another_model_or_label_is(coloured, tmp_path):
    shown = []

    def counted(module, inputs):
        shown.append(len(inputs[0]))

    def passes(model, data, **options):
        shown.clear()
        hook = model.register_forward_pre_hook(counted)
        scores = quiet(model, data, ["pgd-5"], store=tmp_path, **options)
        hook.remove()
        return scores, sum(shown)

    model, (images, labels) = Brightest(), coloured
    first, all_passes = passes(model, coloured)
    again, probes = passes(model, coloured)
    assert again.ledger.equals(first.ledger)
    # 5 steps and the iterate that is scored, and one image that tells the head's width
    assert all_passes - probes == 12 * 6 + 1
    with torch.no_grad():
        model.scale.mul_(2)
    others = [passes(model, coloured), passes(Brightest(), (images, labels.flip(0)))]
    others += [passes(Brightest(), coloured, epsilon="1/255"), passes(Brightest(), coloured, eot=2)]
    others += [passes(Brightest(), (images.flip(0), labels))]
    assert all(count >= all_passes for _, count in others)
    assert len([*tmp_path.glob("Brightest-*/pgd.parquet")]) == 5


def test_two_models_are_compared_on_the_same_images_and_questions_alone(coloured):
    """Of twelve images the second model loses the four of channel 2 that the first gets right."""
    images, labels = coloured

    def blind(images):
        return Brightest()(images) - torch.tensor([0.0, 0.0, 20.0])

    seeing = quiet(Brightest(), coloured, ["clean", "pgd-5"], epsilon="1/255", name="seeing")
    other = quiet(blind, coloured, ["clean", "pgd-5"], epsilon="2/255", name="blind")
    both = compare(seeing, other)
    assert both["clean"].difference == pytest.approx(4 / 12)
    assert both["clean"].p == pytest.approx(2 / 2**4)  # four of four: the exact test by hand
    assert str(both).splitlines()[2].split()[:4] == ["clean", "83.33", "50.00", "+33.33"]
    assert "pgd is not compared: epsilon is 1/255 of the first and 2/255 of" in str(both)
    assert "<td>+33.33</td>" in both._repr_html_()
    part = quiet(blind, (images[2:8], labels[2:8]))
    assert (compare(seeing, part)["clean"].n, compare(part, seeing)["clean"].n) == (6, 6)
    with pytest.raises(ValueError, match="they share no score of the same images"):
        compare(seeing, quiet(blind, (images * 0.9, labels)))
    with pytest.raises(ValueError, match="they share no score of"):
        compare(seeing, quiet(blind, coloured, "stylized"))
