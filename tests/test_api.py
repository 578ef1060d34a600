"""The Python API: any model on any images, and two models compared."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from evaluators import evaluate

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
