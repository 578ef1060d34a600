from __future__ import annotations

import pytest
import torch

from trainables.train.exactness import image_numbers, philox, uniform

# Known answers of Philox4x32-10, published with the generator (Random123, kat_vectors).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_its_published_known_answers(counter, key, answer):
    words = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == answer


def test_an_images_numbers_are_the_same_in_any_batch():
    images = image_numbers([f"image-{i}" for i in range(40)])
    whole = uniform(images, (3, 5, 5), key=(1, "start"))
    order = torch.randperm(40)
    assert torch.equal(uniform(images[order], (3, 5, 5), key=(1, "start")), whole[order])
    alone = torch.cat([uniform(images[i : i + 1], (3, 5, 5), key=(1, "start")) for i in range(40)])
    assert torch.equal(alone, whole)


def test_large_draws_are_those_of_small_ones(monkeypatch):
    images = torch.arange(7)
    whole = uniform(images, (100,), key=(0,))
    monkeypatch.setattr("trainables.train.exactness.AT_ONCE", {"cpu": 250})
    assert torch.equal(uniform(images, (100,), key=(0,)), whole)


def test_numbers_differ_by_image_place_and_key():
    drawn = [
        uniform(torch.arange(64), (64,), key=key)
        for key in ((0, 1), (1, 0), (0, 1, "a"), (0, 1, "b"))
    ]
    values = torch.cat(drawn).flatten()
    # Of 16,384 draws out of 2^24 about eight pairs are alike by chance.
    assert len(values.unique()) > len(values) - 40


def test_numbers_are_uniform():
    drawn = uniform(torch.arange(1000), (3, 16, 16), key=(3,)).double()
    n = drawn.numel()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert float(drawn.mean()) == pytest.approx(1 / 2, abs=4 / (12 * n) ** 0.5)
    counts = torch.histc(drawn, 100, 0, 1)
    # Chi-square of 99 degrees of freedom: mean 99, standard deviation 14.
    assert float((counts - n / 100).square().sum() / (n / 100)) < 99 + 4 * 14
