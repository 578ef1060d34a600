from __future__ import annotations

import pytest
import torch

from trainables.data.base import to_unit
from trainables.data.load import load_data
from trainables.scale import DIGITS, IMAGENET


def test_digits_are_split_once_and_for_all(digits):
    train, held_out = digits.train, digits.held_out
    assert (len(train), len(held_out)) == (1200, 597)
    assert not set(train.ids) & set(held_out.ids)
    assert train.images.shape == (1200, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert torch.bincount(held_out.labels).min() >= 55
    assert held_out.ids_hash() == "cf179190ac48"
    assert digits is load_data(DIGITS)


def test_subset_is_drawn_by_seed_and_keeps_images_labels_and_ids_together(digits):
    subset = digits.held_out.subset(50, seed=0)
    assert len(subset) == 50
    assert subset.ids == digits.held_out.subset(50, seed=0).ids
    assert subset.ids != digits.held_out.subset(50, seed=1).ids
    where = digits.held_out.ids.index(subset.ids[7])
    assert torch.equal(subset.images[7], digits.held_out.images[where])
    assert subset.labels[7] == digits.held_out.labels[where]
    assert digits.held_out.subset(10_000, seed=0) is digits.held_out


def test_pixels_become_unit_floats():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([0.0, 0.2, 1.0]).view(1, 3, 1, 1)
    assert torch.equal(to_unit(pixels), expected)


def test_a_scale_without_embedded_data_says_so():
    with pytest.raises(ValueError, match="'imagenet' has no embedded data"):
        load_data(IMAGENET)
